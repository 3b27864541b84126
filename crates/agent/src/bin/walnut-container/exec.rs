//! Runs one more process in a running container.
//!
//! Done here and not with libcontainer's tenant builder, which gives the new
//! process no seccomp filter and clones twice: the namespaces are entered
//! through a pidfd in one call, then one fork.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use libcontainer::oci_spec::runtime::{LinuxSeccomp, Process};
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::{capabilities, syscall::Syscall};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::pty::openpty;
use nix::sys::statfs::{FsType, fstatfs};
use nix::unistd::{
    ForkResult, Gid, Uid, chdir, fchown, fork, pipe2, setgroups, setresgid, setresuid, setsid,
};
use protobuf::Message;
use walnut_agent::names::ContainerPaths;
use walnut_agent::wire::{Ends, Status};
use walnut_archive::Operation;
use walnut_protocol::agent::ExecProcessRequest;

use crate::archive;
use crate::failure::{Failure, chain};
use crate::link::Done;
use crate::program;
use crate::spec::{adapt_process, load_seccomp};
use crate::stdio::{self, Own};
use crate::user::{self, Names};

const DEVPTS_MAGIC: i64 = 0x1cd1;

/// All namespaces a container may have of its own, with their names in /proc.
/// The network is the machine's; time is entered with the rest if it differs.
const NAMESPACES: [(&str, libc::c_int); 7] = [
    ("user", libc::CLONE_NEWUSER),
    ("cgroup", libc::CLONE_NEWCGROUP),
    ("ipc", libc::CLONE_NEWIPC),
    ("uts", libc::CLONE_NEWUTS),
    ("pid", libc::CLONE_NEWPID),
    ("time", libc::CLONE_NEWTIME),
    ("mnt", libc::CLONE_NEWNS),
];

/// `first` is the container's first process.
pub(crate) fn exec(first: u32, payload: &[u8]) -> Result<Done, Failure> {
    let request = ExecProcessRequest::parse_from_bytes(payload)
        .map_err(|e| Failure::invalid(format!("exec request: {e}")))?;
    let paths =
        ContainerPaths::new(&request.container_id).map_err(|e| Failure::invalid(e.to_string()))?;
    let mut process: Process = serde_json::from_slice(&request.process)
        .map_err(|e| Failure::invalid(format!("process of exec {}: {e}", request.exec_id)))?;
    let operation = archive::wanted(&request.process)?;
    adapt_process(&mut process)?;
    let seccomp = load_seccomp(&paths.seccomp())?;
    // What is needed of the guest is opened before its mounts are gone.
    let cgroup = enter(first, &paths)?;
    user::resolve(&mut process, Names::here)?;
    if let Some(score) = process.oom_score_adj() {
        // The child inherits it.
        cgroup.set_oom_score(score)?;
    }
    let (uid, gid) = (process.user().uid(), process.user().gid());
    let mut ends = Ends::default();
    let mut own = Own::default();
    let mut slave = None;
    if process.terminal().unwrap_or_default() {
        let (master, side) = terminal(uid, gid)?;
        ends.stdin = Some(master);
        ends.terminal = true;
        slave = Some(side);
    } else {
        (ends, own) = stdio::pipes(&request.stdio, uid, gid)?;
    }
    let child = Child {
        process: &process,
        seccomp: seccomp.as_ref().filter(|_| operation.is_none()),
        operation: operation.as_ref(),
        cgroup: &cgroup,
        own: &own,
        slave: slave.as_ref(),
    };
    let pid = spawn(&child)?;
    Ok(Done { pid, ends })
}

/// What was opened in the guest before the container was entered.
struct Entered {
    procs: File,
    oom_score: File,
}

impl Entered {
    fn set_oom_score(&self, score: i32) -> Result<(), Failure> {
        write!(&self.oom_score, "{score}").map_err(|e| Failure::internal("set oom_score_adj", e))
    }
}

/// Enters the container's namespaces; the PID namespace counts for children.
fn enter(first: u32, paths: &ContainerPaths) -> Result<Entered, Failure> {
    let what = || format!("enter container {}", paths.id());
    let fail = |e: io::Error| Failure::internal(what(), e);
    // A helper that a container's process can trace or reopen would hand it
    // the guest's descriptors.
    // SAFETY: prctl with integers only.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } != 0 {
        return Err(fail(io::Error::last_os_error()));
    }
    // SAFETY: pidfd_open takes integers only.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, first, 0) };
    if pidfd < 0 {
        return Err(Failure::precondition(format!(
            "{}: its first process has ended",
            what()
        )));
    }
    let pidfd = i32::try_from(pidfd).map_err(|e| Failure::internal(what(), e))?;
    // SAFETY: the kernel just made this descriptor for us alone.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let cgroup = cgroup_of(first, paths)?;
    let open = |path: &Path| File::options().write(true).open(path);
    let procs = open(&cgroup.join("cgroup.procs")).map_err(fail)?;
    let oom_score = open(Path::new("/proc/self/oom_score_adj")).map_err(fail)?;
    let mut flags = 0;
    for (name, flag) in NAMESPACES {
        let own = fs::metadata(format!("/proc/self/ns/{name}"));
        let theirs = fs::metadata(format!("/proc/{first}/ns/{name}"));
        match (own, theirs) {
            (Ok(own), Ok(theirs)) if own.ino() == theirs.ino() => {}
            (Ok(_), Ok(_)) => flags |= flag,
            // A kind of namespace this kernel does not have.
            (Err(_), _) => {}
            (_, Err(e)) => return Err(fail(e)),
        }
    }
    // SAFETY: setns with a pidfd and flags; the process has one thread.
    if unsafe { libc::setns(pidfd.as_raw_fd(), flags) } != 0 {
        return Err(fail(io::Error::last_os_error()));
    }
    Ok(Entered { procs, oom_score })
}

/// The cgroup of the container's first process, which may have moved itself
/// below its own. It also tells that the pid is still the container's.
fn cgroup_of(first: u32, paths: &ContainerPaths) -> Result<std::path::PathBuf, Failure> {
    let gone = || {
        Failure::precondition(format!(
            "enter container {}: its first process has ended",
            paths.id()
        ))
    };
    let text = fs::read_to_string(format!("/proc/{first}/cgroup")).map_err(|_| gone())?;
    let path = text
        .lines()
        .find_map(|l| l.strip_prefix("0::"))
        .ok_or_else(gone)?;
    let relative = Path::new(path);
    if !relative.starts_with(paths.cgroup_in_hierarchy()) {
        return Err(gone());
    }
    let inside = relative.strip_prefix("/").map_err(|_| gone())?;
    Ok(Path::new(ContainerPaths::CGROUP_ROOT).join(inside))
}

/// A terminal of the container's own devpts; both ends are checked to be that,
/// since /dev is the container's to change.
fn terminal(uid: u32, gid: u32) -> Result<(OwnedFd, OwnedFd), Failure> {
    let what = "open a terminal in the container";
    let pty = openpty(None, None).map_err(|e| Failure::internal(what, e))?;
    for fd in [&pty.master, &pty.slave] {
        let kind = fstatfs(fd.as_fd()).map_err(|e| Failure::internal(what, e))?;
        if kind.filesystem_type() != FsType(DEVPTS_MAGIC) {
            return Err(Failure::internal(what, "its /dev/ptmx is no devpts"));
        }
        // SAFETY: sets a flag of a descriptor that is ours.
        unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    fchown(
        pty.slave.as_fd(),
        Some(Uid::from_raw(uid)),
        Some(Gid::from_raw(gid)),
    )
    .map_err(|e| Failure::internal(what, e))?;
    Ok((pty.master, pty.slave))
}

/// What the child turns into the process.
struct Child<'a> {
    process: &'a Process,
    seccomp: Option<&'a LinuxSeccomp>,
    /// It executes nothing, and does this.
    operation: Option<&'a Operation>,
    cgroup: &'a Entered,
    own: &'a Own,
    slave: Option<&'a OwnedFd>,
}

/// Forks; returns when the program runs, or says why it does not.
fn spawn(child: &Child<'_>) -> Result<u32, Failure> {
    let what = "start the process";
    let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| Failure::internal(what, e))?;
    // SAFETY: the helper has one thread, so the child may do anything.
    match unsafe { fork() }.map_err(|e| Failure::internal(what, e))? {
        ForkResult::Child => {
            drop(read);
            let failure = match (child.operation, confine(child)) {
                (_, Err(failure)) => failure,
                (None, Ok(())) => execute(child),
                (Some(operation), Ok(())) => {
                    // That it runs is what there is to say.
                    drop(write);
                    // SAFETY: ends this process, which has done what it was for.
                    unsafe { libc::_exit(archive::run(operation)) }
                }
            };
            // The first byte is the status.
            let mut message = vec![failure.status as u8];
            message.extend_from_slice(failure.text.as_bytes());
            let _ = File::from(write).write_all(&message);
            // SAFETY: ends this process at once, as a failed exec does.
            unsafe { libc::_exit(127) }
        }
        ForkResult::Parent { child } => {
            drop(write);
            let mut message = Vec::new();
            let _ = File::from(read).take(8192).read_to_end(&mut message);
            let Some((status, text)) = message.split_first() else {
                return u32::try_from(child.as_raw()).map_err(|e| Failure::internal(what, e));
            };
            let _ = nix::sys::wait::waitpid(child, None);
            Err(Failure {
                status: if *status == Status::Invalid as u8 {
                    Status::Invalid
                } else {
                    Status::Internal
                },
                text: String::from_utf8_lossy(text).into_owned(),
            })
        }
    }
}

/// Runs in the child; returns only on failure.
fn execute(child: &Child<'_>) -> Failure {
    let args = child.process.args().as_deref().unwrap_or_default();
    let path = program::path_of(child.process.env().as_ref());
    let errno = program::run(args, path);
    let name = args.first().map_or("", String::as_str);
    Failure::invalid(program::complaint(name, errno))
}

fn confine(child: &Child<'_>) -> Result<(), Failure> {
    let process = child.process;
    let what = |what: &'static str| move |e: Errno| Failure::internal(what, e);
    let syscall = create_syscall();
    let syscall: &dyn Syscall = syscall.as_ref();
    write!(&child.cgroup.procs, "0")
        .map_err(|e| Failure::internal("join the container's cgroup", e))?;
    setsid().map_err(what("setsid"))?;
    connect(child)?;
    for limit in process.rlimits().iter().flatten() {
        syscall
            .set_rlimit(limit)
            .map_err(|e| Failure::invalid(format!("process.rlimits: {}", chain(&e))))?;
    }
    if process.no_new_privileges() == Some(true) {
        // SAFETY: prctl with integers only.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    }
    if let Some(mask) = process.user().umask() {
        // SAFETY: umask takes any value and cannot fail.
        unsafe { libc::umask(mask & 0o777) };
    }
    // As root first, as the user below if that was not allowed: either may be
    // the one who can go there.
    let cwd = process.cwd();
    let stayed = chdir(cwd) == Err(Errno::EACCES);
    // Without no_new_privs a filter takes privilege to load; with it, the
    // filter need not allow what comes in between.
    let early = process.no_new_privileges().is_none();
    load_filter(child, early)?;
    let user = process.user();
    let groups: Vec<Gid> = user
        .additional_gids()
        .iter()
        .flatten()
        .map(|g| Gid::from_raw(*g))
        .collect();
    setgroups(&groups).map_err(what("setgroups"))?;
    set_ids(user.uid(), user.gid())?;
    capabilities::reset_effective(syscall)
        .map_err(|e| Failure::internal("set capabilities", chain(&e)))?;
    if let Some(wanted) = process.capabilities() {
        capabilities::drop_privileges(wanted, syscall)
            .map_err(|e| Failure::internal("drop capabilities", chain(&e)))?;
    }
    if stayed || nix::unistd::getcwd().is_ok_and(|at| at != *cwd) {
        chdir(cwd).map_err(|e| Failure::invalid(format!("process.cwd {}: {e}", cwd.display())))?;
    }
    // A folder outside the container's root has no name in it.
    nix::unistd::getcwd()
        .map_err(|e| Failure::invalid(format!("process.cwd {}: {e}", cwd.display())))?;
    load_filter(child, !early)?;
    let mut env = process.env().clone().unwrap_or_default();
    if !env.iter().any(|e| e.starts_with("HOME=")) {
        env.push(format!("HOME={}", home(user.uid())));
    }
    program::set_environment(&env);
    // SAFETY: marks every descriptor above the standard ones; none is used by
    // number after this.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    Ok(())
}

/// Takes the user's ids and keeps the permitted capabilities for now.
fn set_ids(uid: u32, gid: u32) -> Result<(), Failure> {
    let fail = |e: Errno| Failure::internal(format!("set uid {uid} and gid {gid}"), e);
    let keep = |on: libc::c_ulong| {
        // SAFETY: prctl with integers only.
        Errno::result(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, on, 0, 0, 0) })
    };
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    keep(1).map_err(fail)?;
    setresgid(gid, gid, gid).map_err(fail)?;
    setresuid(uid, uid, uid).map_err(fail)?;
    keep(0).map(drop).map_err(fail)
}

fn load_filter(child: &Child<'_>, now: bool) -> Result<(), Failure> {
    match child.seccomp {
        Some(filter) if now => initialize_seccomp(filter)
            .map(drop)
            .map_err(|e| Failure::internal("load the seccomp filter", chain(&e))),
        _ => Ok(()),
    }
}

/// Puts the terminal or the pipes on 0 to 2, where /dev/null is now.
fn connect(child: &Child<'_>) -> Result<(), Failure> {
    let put = |fd: &OwnedFd, number: libc::c_int| {
        // SAFETY: dup2 on a live descriptor; 0 to 2 belong to no Rust owner.
        match unsafe { libc::dup2(fd.as_raw_fd(), number) } {
            -1 => Err(Failure::internal(
                "connect stdio",
                io::Error::last_os_error(),
            )),
            _ => Ok(()),
        }
    };
    if let Some(slave) = child.slave {
        // SAFETY: makes a terminal of ours the session's; takes no pointer.
        if unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) } < 0 {
            let e = io::Error::last_os_error();
            return Err(Failure::internal("take the terminal", e));
        }
        return (0..=2).try_for_each(|number| put(slave, number));
    }
    // The container's own /dev/null, in place of the guest's.
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let null = OwnedFd::from(null);
        (0..=2).try_for_each(|number| put(&null, number))?;
    }
    let own = [&child.own.stdin, &child.own.stdout, &child.own.stderr];
    for (number, fd) in (0..).zip(own) {
        if let Some(fd) = fd {
            put(fd, number)?;
        }
    }
    Ok(())
}

/// The home folder /etc/passwd of the container gives `uid`, or "/".
fn home(uid: u32) -> String {
    let found = || {
        let mut text = String::new();
        let file = File::open("/etc/passwd").ok()?;
        file.take(1 << 20).read_to_string(&mut text).ok()?;
        text.lines().find_map(|line| {
            let mut fields = line.split(':');
            let id = fields.nth(2)?;
            (id.parse() == Ok(uid)).then(|| fields.nth(2).unwrap_or("/").to_owned())
        })
    };
    found().unwrap_or_else(|| "/".to_owned())
}
