//! What the process gives up before the guest runs.
//!
//! Three walls, each of which would hold alone. *Namespaces*: an empty root (or
//! the directory of the vsock sockets, if there is one), no network, no IPC
//! objects; a PID namespace is the supervisor's to make, before this process is.
//! *Privileges*: a user without capabilities, no way to gain any, no files but
//! those that are open. *System calls*: each thread has a filter of its own,
//! installed before the guest runs, that holds what its loop needs.
//!
//! What the filters admit, and why:
//!
//! | thread | calls |
//! |---|---|
//! | vCPU | `ioctl` (run the guest; route a message, move a doorbell), `write` (eventfds, the console), `futex`, `rt_sigreturn` (after a call out of the guest), `brk` (a message table may grow) |
//! | device | `epoll_wait`, `read` and `write` (eventfds), `futex`, `brk`, and what [`walnut_devices`] says the device needs |
//! | nursery | what it takes to make and drop any device, and to start its thread, whose filter can only be narrower: see [`Filter::nursery`]. It touches nothing of the guest |
//! | control | `poll`, `recvmsg`, `sendmsg`, `close`, `read`, `write`, `futex`, `brk`, `tgkill` (call a vCPU out), `restart_syscall` (a `poll` that the kernel broke off), `exit_group` |

use std::{
    collections::BTreeMap,
    ffi::CString,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::ffi::OsStrExt,
    },
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags},
    sched::CloneFlags,
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{Gid, Uid},
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::Error;

/// Requests of `ioctl` that a vCPU makes (linux/kvm.h).
const KVM_RUN: u32 = 0xae80;
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
const KVM_IOEVENTFD: u32 = 0x4040_ae79;

/// Descriptors: the vsock device's connections above all.
const FILES: u64 = 2048;
/// Memory the process may lock: what io_uring and KVM may account here.
const MEMLOCK: u64 = 16 << 20;

fn fail(what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Host(what, errno)
}

/// Leaves the host's namespaces, root and user. `root` becomes the root and the
/// working directory; an empty file system does where there is none. Called while
/// the process has one thread.
pub(crate) fn leave_host(root: Option<BorrowedFd<'_>>, user: Option<u32>) -> Result<(), Error> {
    let spaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    if Uid::effective().is_root() {
        nix::sched::unshare(spaces).map_err(fail("leave the host's namespaces"))?;
    } else {
        nix::sched::unshare(spaces | CloneFlags::CLONE_NEWUSER).map_err(fail(
            "leave the host's namespaces (an unprivileged user needs user namespaces: \
             sysctl kernel.unprivileged_userns_clone)",
        ))?;
    }
    change_root(root)?;
    if let Some(id) = user {
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
        nix::unistd::setgroups(&[]).map_err(fail("drop the groups"))?;
        nix::unistd::setresgid(gid, gid, gid).map_err(fail("change the group"))?;
        nix::unistd::setresuid(uid, uid, uid).map_err(fail("change the user"))?;
    }
    nix::sys::prctl::set_no_new_privs().map_err(fail("renounce privileges"))?;
    nix::sys::prctl::set_dumpable(false).map_err(fail("hide the memory from debuggers"))?;
    drop_capabilities()?;
    // Nothing is opened any more but what the supervisor hands over.
    lower(Resource::RLIMIT_CORE, 0)?;
    lower(Resource::RLIMIT_NOFILE, FILES)?;
    lower(Resource::RLIMIT_MEMLOCK, MEMLOCK)?;
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .map_err(fail("die with the supervisor"))
}

/// Lowers a limit that is higher.
fn lower(resource: Resource, limit: u64) -> Result<(), Error> {
    let (soft, hard) = getrlimit(resource).map_err(fail("read a resource limit"))?;
    setrlimit(resource, soft.min(limit), hard.min(limit)).map_err(fail("lower a resource limit"))
}

fn change_root(root: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    let none = None::<&str>;
    // Where the directory is, by the name that it has now: mounts of another
    // namespace cannot be bound by a descriptor.
    let wanted = match root {
        Some(fd) => {
            let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
            let path = std::fs::read_link(link)
                .map_err(|e| Error::Host("find the socket directory", crate::vcpu::errno(&e)))?;
            Some((
                path,
                nix::sys::stat::fstat(fd).map_err(fail("look at the socket directory"))?,
            ))
        }
        None => None,
    };
    nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(fail("leave the host's mounts"))?;
    let path = match &wanted {
        Some((path, _)) => {
            nix::mount::mount(Some(path), path, none, MsFlags::MS_BIND, none)
                .map_err(fail("bind the socket directory"))?;
            CString::new(path.as_os_str().as_bytes()).unwrap_or_default()
        }
        None => {
            nix::mount::mount(
                Some("none"),
                "/tmp",
                Some("tmpfs"),
                MsFlags::MS_RDONLY,
                Some("size=4k,nr_inodes=1"),
            )
            .map_err(fail("mount an empty root"))?;
            c"/tmp".to_owned()
        }
    };
    nix::unistd::chdir(path.as_c_str()).map_err(fail("enter the new root"))?;
    if let Some((_, before)) = wanted {
        let now = nix::sys::stat::stat(c".").map_err(fail("look at the new root"))?;
        if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino) {
            return Err(Error::Config(
                "the socket directory was replaced while the machine started".to_owned(),
            ));
        }
    }
    nix::mount::mount(
        none,
        ".",
        none,
        MsFlags::MS_BIND
            | MsFlags::MS_REMOUNT
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NODEV
            | MsFlags::MS_NOEXEC,
        none,
    )
    .map_err(fail("harden the new root"))?;
    nix::unistd::pivot_root(c".", c".").map_err(fail("change the root"))?;
    nix::mount::umount2(c".", MntFlags::MNT_DETACH).map_err(fail("let go of the old root"))?;
    nix::unistd::chdir(c"/").map_err(fail("enter the new root"))
}

fn drop_capabilities() -> Result<(), Error> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    // _LINUX_CAPABILITY_VERSION_3, this thread.
    let header = Header {
        version: 0x2008_0522,
        pid: 0,
    };
    // Effective, permitted and inheritable, for capabilities 0-31 and 32-63.
    let none = [0u32; 6];
    // SAFETY: both pointers refer to live values of the layout that the version
    // asks for.
    let result = unsafe { libc::syscall(libc::SYS_capset, &header, none.as_ptr()) };
    Errno::result(result)
        .map(drop)
        .map_err(fail("drop the capabilities"))
}

/// A thread's filter, compiled.
#[derive(Debug, Clone)]
pub(crate) struct Filter(BpfProgram);

/// What a thread needs: calls with any arguments, and requests of `ioctl`.
fn filter(calls: &[libc::c_long], ioctls: &[u32]) -> Result<Filter, Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        calls.iter().map(|&call| (call, Vec::new())).collect();
    let request = |number: &u32| {
        let dword = SeccompCmpArgLen::Dword;
        SeccompCondition::new(1, dword, SeccompCmpOp::Eq, u64::from(*number))
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    let failed = |e: seccompiler::BackendError| Error::Config(format!("make a filter: {e}"));
    if !ioctls.is_empty() {
        let ioctls: Result<Vec<_>, _> = ioctls.iter().map(request).collect();
        rules.insert(libc::SYS_ioctl, ioctls.map_err(failed)?);
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(failed)?;
    // Killed, and logged by the kernel's audit.
    let action = SeccompAction::KillProcess;
    SeccompFilter::new(rules, action, SeccompAction::Allow, arch)
        .and_then(TryInto::try_into)
        .map(Filter)
        .map_err(failed)
}

impl Filter {
    /// For a vCPU's thread.
    pub(crate) fn vcpu() -> Result<Self, Error> {
        filter(
            &[
                libc::SYS_write,
                libc::SYS_futex,
                libc::SYS_rt_sigreturn,
                libc::SYS_brk,
            ],
            &[KVM_RUN, KVM_SET_GSI_ROUTING, KVM_IOEVENTFD],
        )
    }

    /// For a device's thread, whose device makes `calls` as well.
    pub(crate) fn device(calls: &[libc::c_long]) -> Result<Self, Error> {
        let own = [
            libc::SYS_epoll_wait,
            libc::SYS_read,
            libc::SYS_write,
            libc::SYS_futex,
            libc::SYS_brk,
            // Where the host's clock is not one that the vDSO can read.
            libc::SYS_clock_gettime,
        ];
        filter(&[&own, calls].concat(), &[])
    }

    /// For the thread that makes and drops devices while the guest runs, and starts
    /// their threads. No file, no socket and no program can be opened by it.
    pub(crate) fn nursery() -> Result<Self, Error> {
        let own = [
            // Descriptors and mappings of devices; what a tap, a disk or KVM is asked.
            libc::SYS_epoll_create1,
            libc::SYS_epoll_ctl,
            libc::SYS_eventfd2,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_register,
            libc::SYS_fcntl,
            libc::SYS_fstat,
            libc::SYS_newfstatat,
            libc::SYS_statx,
            libc::SYS_lseek,
            libc::SYS_ioctl,
            libc::SYS_mmap,
            libc::SYS_munmap,
            libc::SYS_mprotect,
            libc::SYS_close,
            libc::SYS_getsockopt,
            libc::SYS_setsockopt,
            // A thread, up to its own filter.
            libc::SYS_clone3,
            libc::SYS_clone,
            libc::SYS_set_robust_list,
            libc::SYS_rseq,
            libc::SYS_rt_sigprocmask,
            libc::SYS_sigaltstack,
            libc::SYS_sched_getaffinity,
            libc::SYS_gettid,
            libc::SYS_prctl,
            libc::SYS_seccomp,
        ];
        let devices = [
            libc::SYS_epoll_wait,
            libc::SYS_read,
            libc::SYS_write,
            libc::SYS_futex,
            libc::SYS_restart_syscall,
            libc::SYS_brk,
            libc::SYS_clock_gettime,
            libc::SYS_io_uring_enter,
            libc::SYS_preadv,
            libc::SYS_pwritev,
            libc::SYS_fdatasync,
            libc::SYS_fallocate,
            libc::SYS_readv,
            libc::SYS_writev,
            libc::SYS_poll,
            libc::SYS_sendmsg,
            libc::SYS_recvmsg,
            libc::SYS_recvfrom,
            libc::SYS_getrandom,
            libc::SYS_madvise,
        ];
        filter(&[&own[..], &devices].concat(), &[])
    }

    /// For the thread that serves the control socket.
    pub(crate) fn control() -> Result<Self, Error> {
        filter(
            &[
                libc::SYS_poll,
                libc::SYS_recvmsg,
                libc::SYS_sendmsg,
                libc::SYS_close,
                libc::SYS_read,
                libc::SYS_write,
                libc::SYS_futex,
                libc::SYS_brk,
                libc::SYS_tgkill,
                libc::SYS_clock_gettime,
                libc::SYS_sigaltstack,
                libc::SYS_munmap,
                // `poll`, after the kernel has called the thread out of it: a ring
                // that it made is closed by another.
                libc::SYS_restart_syscall,
                libc::SYS_exit_group,
            ],
            &[],
        )
    }

    /// Installs it on the calling thread, for good.
    pub(crate) fn install(&self) -> Result<(), String> {
        seccompiler::apply_filter(&self.0).map_err(|e| format!("install a filter: {e}"))
    }
}

/// Lets the heap grow in one place and rarely, so that no thread needs more than
/// `brk` for it.
pub(crate) fn tame_heap() {
    const TOP_PAD: libc::c_int = 64 * 1024;
    const NEVER: libc::c_int = 1 << 30;
    // SAFETY: sets numbers of the allocator. It refuses what it does not like.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TOP_PAD, TOP_PAD);
        libc::mallopt(libc::M_MMAP_THRESHOLD, NEVER);
        libc::mallopt(libc::M_TRIM_THRESHOLD, NEVER);
    }
}
