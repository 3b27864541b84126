//! How every helper process of a sandbox is spawned: hypervisor, vsock device,
//! virtiofsd.
//!
//! A [`Spawn`] starts with nothing of its parent: an empty environment,
//! `/` as its directory, `/dev/null` as input, only the descriptors it was
//! given, a session of its own, no way to gain privileges, no core file. What
//! it writes is kept in bounded [`Tail`]s. It is killed when its parent dies.
//!
//! The kernel binds that last promise (`PR_SET_PDEATHSIG`) to the *thread* that
//! spawned: spawn from a thread that lives as long as the process should. The
//! supervisor's single-threaded runtime on the main thread is such a thread; a
//! worker of a thread pool that retires idle threads is not.

mod cgroup;
mod child;
mod tail;

use std::{
    ffi::{OsStr, OsString},
    fmt,
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

pub use cgroup::{Cgroup, Limits};
pub(crate) use child::quotable;
pub use child::{Child, ChildState, Status, reap};
pub(crate) use tail::pipe;
pub use tail::{Tail, TailState};

/// What processes enter before anything else, see [`confine`].
static DOORS: Mutex<Option<Arc<[File]>>> = Mutex::new(None);

/// Every process that this one starts from here on is born into `cgroup`, until it is said
/// again of another: a supervisor has one sandbox at a time, and a second one where the first,
/// which stood by, did not do.
pub fn confine(cgroup: &Cgroup) -> io::Result<()> {
    *doors() = Some(cgroup.doors()?.into());
    Ok(())
}

fn doors() -> MutexGuard<'static, Option<Arc<[File]>>> {
    // It is whole whoever panicked.
    DOORS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How much of a process's standard error is kept, in bytes.
const STDERR_MAX: usize = 4096;

/// Why a process could not be started.
#[derive(Debug, thiserror::Error)]
#[error("start {name} ({}): {source}", program.display())]
pub struct SpawnError {
    /// The process's role.
    pub name: &'static str,
    /// The program.
    pub program: PathBuf,
    /// The operating system's reason.
    pub source: io::Error,
}

/// Runs in the child between fork and exec.
type BeforeExec = Box<dyn FnMut() -> io::Result<()> + Send + Sync>;

/// A user and groups to become before the program is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
    /// The only supplementary group, if any.
    pub extra_group: Option<u32>,
}

/// A process to be started.
pub struct Spawn {
    name: &'static str,
    program: PathBuf,
    args: Vec<OsString>,
    fds: Vec<OwnedFd>,
    stdout: usize,
    identity: Option<Identity>,
    new_network: bool,
    new_pids: bool,
    before_exec: Option<BeforeExec>,
}

impl fmt::Debug for Spawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spawn")
            .field("name", &self.name)
            .field("program", &self.program)
            .field("args", &self.args)
            .finish_non_exhaustive()
    }
}

impl Spawn {
    /// `name` is the role that messages use.
    pub fn new(name: &'static str, program: &Path) -> Self {
        Self {
            name,
            program: program.to_owned(),
            args: Vec::new(),
            fds: Vec::new(),
            stdout: 0,
            identity: None,
            new_network: false,
            new_pids: false,
            before_exec: None,
        }
    }

    /// One more argument.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// More arguments.
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&mut self, args: I) -> &mut Self {
        self.args
            .extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// The child inherits `fd` under the number that is returned; this process
    /// closes its copy when the child has been started.
    pub fn inherit(&mut self, fd: impl Into<OwnedFd>) -> RawFd {
        let fd = fd.into();
        let number = fd.as_raw_fd();
        self.fds.push(fd);
        number
    }

    /// Keeps the last `limit` bytes of standard output instead of dropping it.
    pub fn keep_stdout(&mut self, limit: usize) -> &mut Self {
        self.stdout = limit;
        self
    }

    /// Becomes `identity` before the program is executed.
    pub fn identity(&mut self, identity: Identity) -> &mut Self {
        self.identity = Some(identity);
        self
    }

    /// Gives the process a network namespace of its own, with nothing in it.
    pub fn new_network(&mut self) -> &mut Self {
        self.new_network = true;
        self
    }

    /// Makes the process the first of a PID namespace of its own, where this process
    /// may: it then sees no other process. Its own PID is seen by us as usual. One
    /// whose parent dies while it is being started learns it only by a socket.
    pub fn new_pids(&mut self) -> &mut Self {
        self.new_pids = true;
        self
    }

    /// Runs `setup` in the child before its privileges are dropped.
    ///
    /// # Safety
    /// It runs after fork: `setup` must only make async-signal-safe calls and
    /// must not allocate.
    pub unsafe fn before_exec(
        &mut self,
        setup: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
    ) -> &mut Self {
        self.before_exec = Some(Box::new(setup));
        self
    }

    /// Starts the process. Needs a tokio runtime, and the caller's thread to
    /// live on (see the module).
    pub fn spawn(self) -> Result<Child, SpawnError> {
        let (name, program) = (self.name, self.program.clone());
        self.start().map_err(|source| SpawnError {
            name,
            program,
            source,
        })
    }

    fn start(self) -> io::Result<Child> {
        // The child changes its directory before it executes the program.
        let mut command = Command::new(std::path::absolute(&self.program)?);
        command
            .args(&self.args)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null());
        let (stderr, to_stderr) = tail::pipe(STDERR_MAX)?;
        command.stderr(to_stderr);
        let stdout = if self.stdout > 0 {
            let (tail, to_tail) = tail::pipe(self.stdout)?;
            command.stdout(to_tail);
            tail
        } else {
            command.stdout(Stdio::null());
            Arc::new(Tail::closed())
        };
        let doors = doors().clone();
        let inherited: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut before_exec = self.before_exec;
        let (identity, new_network) = (self.identity, self.new_network);
        let parent = rustix::process::getpid();
        let setup = move || {
            let setup = before_exec.as_mut();
            enter(doors.as_deref().unwrap_or_default())?;
            in_child(parent, &inherited, identity, new_network, setup)
        };
        // SAFETY: in_child and the caller's setup (see before_exec) make system
        // calls only.
        unsafe { command.pre_exec(setup) };
        let pids = match self.new_pids {
            true => PidSpace::enter(),
            false => None,
        };
        let child = command.spawn();
        drop(pids);
        let child = child?;
        Child::adopt(self.name, child.id(), stdout, stderr)
    }
}

/// While it lives, processes made by this thread are born into a new PID
/// namespace.
#[derive(Debug)]
struct PidSpace {
    before: std::fs::File,
}

impl PidSpace {
    /// `None` where this process may not.
    fn enter() -> Option<Self> {
        let before = std::fs::File::open("/proc/thread-self/ns/pid_for_children").ok()?;
        // SAFETY: concerns the children of this thread only, and is undone below.
        let rc = unsafe { libc::unshare(libc::CLONE_NEWPID) };
        (rc == 0).then_some(Self { before })
    }
}

impl Drop for PidSpace {
    fn drop(&mut self) {
        // It was ours a moment ago: this fails for no reason that is known. (Were it
        // to, the next process would not start, as the namespace's first has ended.)
        // SAFETY: takes a descriptor and a flag.
        unsafe { libc::setns(self.before.as_raw_fd(), libc::CLONE_NEWPID) };
    }
}

/// Enters cgroups: "0" is the process that writes.
fn enter(doors: &[File]) -> io::Result<()> {
    for mut door in doors {
        door.write_all(b"0")?;
    }
    Ok(())
}

/// The child's side, between fork and exec: system calls only.
fn in_child(
    parent: rustix::process::Pid,
    inherited: &[RawFd],
    identity: Option<Identity>,
    new_network: bool,
    setup: Option<&mut BeforeExec>,
) -> io::Result<()> {
    rustix::process::setsid()?;
    no_core_file()?;
    // SAFETY: takes two numbers and a flag; touches no memory.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    check(rc)?;
    for &fd in inherited {
        // SAFETY: fcntl on a descriptor that the parent holds open.
        check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }.into())?;
    }
    if new_network {
        // SAFETY: takes a flag; the child has one thread.
        check(unsafe { libc::unshare(libc::CLONE_NEWNET) }.into())?;
    }
    if let Some(setup) = setup {
        setup()?;
    }
    if let Some(identity) = identity {
        become_identity(identity)?;
    }
    rustix::thread::set_no_new_privs(true)?;
    // After the change of identity, which clears it.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    // From a PID namespace of its own it sees no parent, dead or alive: there the
    // end of a socket must tell.
    if rustix::process::getppid().is_some_and(|now| now != parent) {
        // The parent died before the line above took effect.
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    Ok(())
}

/// A core file would hold the guest's memory.
fn no_core_file() -> io::Result<()> {
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `none` outlives the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) }.into())
}

fn become_identity(identity: Identity) -> io::Result<()> {
    let groups = [identity.extra_group.unwrap_or(0)];
    let count = usize::from(identity.extra_group.is_some());
    // Raw system calls: libc's wrappers signal other threads, which a child of
    // fork does not have.
    // SAFETY: `groups` outlives the call and holds `count` entries.
    check(unsafe { libc::syscall(libc::SYS_setgroups, count, groups.as_ptr()) })?;
    let (uid, gid) = (identity.uid, identity.gid);
    // SAFETY: takes numbers only.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: takes numbers only.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })
}

fn check(rc: libc::c_long) -> io::Result<()> {
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Spawn {
        let mut spawn = Spawn::new("test", Path::new("/bin/sh"));
        spawn.args(["-c", script]).keep_stdout(1024);
        spawn
    }

    #[tokio::test]
    async fn exit_codes_and_signals_are_told() {
        let child = sh("echo early >&2; echo last words >&2; exit 3")
            .spawn()
            .unwrap();
        assert_eq!(child.wait().await, Status::Exited(3));
        assert_eq!(child.wait().await.to_string(), "exited with code 3");
        assert_eq!(child.stderr().await.as_deref(), Some("last words"));
        let child = sh("kill -9 $$").spawn().unwrap();
        assert_eq!(
            child.wait().await.to_string(),
            "was killed by signal 9 (SIGKILL)"
        );
    }

    #[tokio::test]
    async fn child_has_nothing_of_its_parent() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut spawn = sh(
            "ls -l /proc/self/fd | grep -c socket; env | grep -v -e ^PWD= -e ^SHLVL= -e ^_= -e ^OLDPWD= ; pwd; grep NoNewPrivs /proc/self/status; ulimit -c",
        );
        spawn.inherit(theirs);
        let child = spawn.spawn().unwrap();
        assert_eq!(child.wait().await, Status::Exited(0));
        child.stdout().settle().await;
        assert_eq!(child.stdout().text(), "1\n/\nNoNewPrivs:\t1\n0\n");
        drop(ours);
    }

    #[tokio::test]
    async fn endless_output_is_bounded() {
        let child = sh("yes | head -c 3000000; echo end").spawn().unwrap();
        child.wait().await;
        child.stdout().settle().await;
        assert_eq!(child.stdout().text().len(), 1024);
        assert!(child.stdout().text().ends_with("y\nend\n"));
    }

    #[tokio::test]
    async fn drop_kills_and_reaps() {
        let child = sh("exec sleep 1000").spawn().unwrap();
        let proc = PathBuf::from(format!("/proc/{}", child.pid()));
        assert!(proc.exists());
        drop(child);
        assert!(!proc.exists());
    }

    #[tokio::test]
    async fn several_tasks_wait_for_one_child() {
        let child = Arc::new(sh("exec sleep 1000").spawn().unwrap());
        let waiters: Vec<_> = (0..3)
            .map(|_| {
                let child = Arc::clone(&child);
                tokio::spawn(async move { child.wait().await })
            })
            .collect();
        tokio::task::yield_now().await;
        child.kill();
        for waiter in waiters {
            assert_eq!(waiter.await.unwrap(), Status::Signaled(9));
        }
    }

    #[tokio::test]
    async fn missing_program_is_named() {
        let spawn = Spawn::new("qemu", Path::new("/nowhere/qemu"));
        let error = spawn.spawn().unwrap_err().to_string();
        assert!(
            error.starts_with("start qemu (/nowhere/qemu): No such file"),
            "{error}"
        );
    }
}
