//! What the process gives up before it touches anything of the guest's.
//!
//! After [`enter`] it can use the descriptors that it holds, connect to Unix
//! sockets in its directory and remove its own socket there, map memory that is
//! not executable, and end.

use std::{collections::BTreeMap, os::fd::BorrowedFd};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};
use nix::{errno::Errno, sched::CloneFlags};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// A wall that could not be built. The process does not serve without it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JailError {
    #[error("cannot give up privileges ({0}): {1}")]
    Privileges(&'static str, #[source] Errno),
    #[error("cannot restrict file access: {0}")]
    Landlock(#[source] RulesetError),
    #[error("cannot build the system call filter: {0}")]
    Filter(#[source] seccompiler::BackendError),
    #[error("cannot install the system call filter: {0}")]
    Install(#[source] seccompiler::Error),
    #[error("the parent process is gone; start it again")]
    Orphan,
}

/// Arranges that the kernel kills this process when the thread that started it
/// ends. `parent` is the process that must have started it, if that is known.
pub(crate) fn die_with_parent(parent: Option<i32>) -> Result<(), JailError> {
    let before = nix::unistd::getppid();
    arm_parent_death()?;
    // It may have died before the call: then somebody else has adopted us.
    let now = nix::unistd::getppid();
    if now != before || parent.is_some_and(|pid| pid != now.as_raw()) {
        return Err(JailError::Orphan);
    }
    Ok(())
}

fn arm_parent_death() -> Result<(), JailError> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .map_err(|e| JailError::Privileges("parent death signal", e))
}

/// Locks the process into `dir`, which is its working directory.
pub(crate) fn enter(dir: BorrowedFd<'_>, die_with_parent: bool) -> Result<(), JailError> {
    nix::sys::prctl::set_no_new_privs()
        .map_err(|e| JailError::Privileges("no new privileges", e))?;
    change_root();
    drop_capabilities()?;
    if die_with_parent {
        // A change of credentials may have disarmed it.
        arm_parent_death()?;
    }
    restrict_files(dir).map_err(JailError::Landlock)?;
    let program = filter().map_err(JailError::Filter)?;
    seccompiler::apply_filter(&program).map_err(JailError::Install)
}

/// Makes the directory the root where that is possible: as root, or in a user
/// namespace where the host allows one. Landlock and the filter hold regardless.
/// Other namespaces would add nothing: the filter admits no call that reaches
/// mounts, IPC objects, host names, or any socket but Unix ones.
fn change_root() {
    if nix::unistd::chroot(".").is_err() && nix::sched::unshare(CloneFlags::CLONE_NEWUSER).is_ok() {
        let _ = nix::unistd::chroot(".");
    }
}

fn drop_capabilities() -> Result<(), JailError> {
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
    for capability in 0..64 {
        // SAFETY: the call takes no pointers. Dropping one from the bounding set
        // fails without CAP_SETPCAP, or past the last one; nothing can be
        // executed any more anyhow.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    }
    // SAFETY: both pointers refer to live values of the layout that the version
    // asks for.
    let result = unsafe { libc::syscall(libc::SYS_capset, &header, none.as_ptr()) };
    Errno::result(result)
        .map(|_| ())
        .map_err(|e| JailError::Privileges("capabilities", e))
}

/// Forbids every file but the removal of and connection to sockets in `dir`, TCP,
/// abstract sockets and signals, as far as the host's kernel knows how.
fn restrict_files(dir: BorrowedFd<'_>) -> Result<(), RulesetError> {
    let allowed = AccessFs::RemoveFile | AccessFs::ResolveUnix;
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V9))?
        .handle_access(AccessNet::from_all(ABI::V9))?
        .scope(Scope::from_all(ABI::V9))?
        .create()?
        .add_rule(PathBeneath::new(dir, allowed))?
        .restrict_self()?;
    Ok(())
}

/// System calls that need no look at their arguments.
const ALLOWED: &[libc::c_long] = &[
    // The loop; eventfds and messages are written. Without a vDSO clock, time is
    // a call.
    libc::SYS_epoll_wait,
    libc::SYS_epoll_ctl,
    libc::SYS_write,
    libc::SYS_clock_gettime,
    libc::SYS_restart_syscall,
    // Sockets that exist, or come by accept.
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_close,
    // Guest memory when the machine takes it away, and our own.
    libc::SYS_munmap,
    libc::SYS_brk,
    libc::SYS_mremap,
    // The end.
    libc::SYS_unlink,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigreturn,
    libc::SYS_exit_group,
];

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|&call| (call, Vec::new())).collect();
    let only = |argument, operator, value: i32| {
        let value = u64::try_from(value).unwrap_or(0);
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    rules.insert(
        libc::SYS_socket,
        vec![only(0, SeccompCmpOp::Eq, libc::AF_UNIX)?],
    );
    let executable = u64::try_from(libc::PROT_EXEC).unwrap_or(4);
    rules.insert(
        libc::SYS_mmap,
        vec![only(2, SeccompCmpOp::MaskedEq(executable), 0)?],
    );
    SeccompFilter::new(
        rules,
        // Killed, and logged by the kernel's audit.
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::try_from(std::env::consts::ARCH)?,
    )?
    .try_into()
}
