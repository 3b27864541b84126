//! What the process gives up before the guest runs.
//!
//! Three walls, each of which would hold alone. *Namespaces*: an empty root (or
//! the directory of the vsock sockets, if there is one), no network, no IPC
//! objects, and a user namespace in which there is one user; a PID namespace and a
//! cgroup are the supervisor's to make, before this process is. *Privileges*: a user
//! without capabilities, no way to gain any, no files but those that are open.
//! *System calls*: each thread has a filter of its own, installed before the guest
//! runs, that holds what its loop needs ([`calls`]).

pub(crate) mod calls;
mod filter;
mod heap;
mod program;

pub(crate) use filter::Filter;
pub(crate) use heap::{reserve as reserve_heap, tame as tame_heap};

use std::{
    ffi::{CStr, CString},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use crate::Error;
use nix::{
    errno::Errno,
    fcntl::OFlag,
    mount::{MntFlags, MsFlags},
    sched::CloneFlags,
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        stat::Mode,
    },
    unistd::{Gid, Uid},
};

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
///
/// Who is root makes the namespaces first, so that they belong to the host's root and
/// not to the process's own user namespace, which it enters last and empty-handed:
/// whatever it gained there, it would be over nothing. Nobody else can make namespaces
/// but in a user namespace, and enters that first.
pub(crate) fn leave_host(root: Option<BorrowedFd<'_>>, user: Option<u32>) -> Result<(), Error> {
    // Where this process finds its maps when there is no /proc any more.
    let process = directory(c"/proc/self").map_err(fail("open /proc/self"))?;
    let spaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    let unshared = nix::sched::unshare(spaces);
    if unshared != Err(Errno::EPERM) {
        unshared.map_err(fail("leave the host's namespaces"))?;
        change_root(root)?;
        become_user(user)?;
        let ids = (Uid::effective(), Gid::effective());
        // A host may have none to give: the other walls stand.
        match nix::sched::unshare(CloneFlags::CLONE_NEWUSER) {
            Err(Errno::EINVAL | Errno::ENOSPC | Errno::EUSERS | Errno::EPERM) => {}
            result => {
                result.map_err(fail("make a user namespace"))?;
                // What is mapped is what it is outside.
                map_itself(&process, ids)?;
            }
        }
    } else {
        let ids = (Uid::effective(), Gid::effective());
        nix::sched::unshare(spaces | CloneFlags::CLONE_NEWUSER).map_err(fail(
            "leave the host's namespaces (an unprivileged user needs user namespaces: \
             sysctl kernel.unprivileged_userns_clone)",
        ))?;
        map_itself(&process, ids)?;
        change_root(root)?;
    }
    drop(process);
    nix::sys::prctl::set_no_new_privs().map_err(fail("renounce privileges"))?;
    nix::sys::prctl::set_dumpable(false).map_err(fail("hide the memory from debuggers"))?;
    set_capabilities(0).map_err(fail("drop the capabilities"))?;
    // Nothing is opened any more but what the supervisor hands over.
    lower(Resource::RLIMIT_CORE, 0)?;
    lower(Resource::RLIMIT_NOFILE, FILES)?;
    lower(Resource::RLIMIT_MEMLOCK, MEMLOCK)?;
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .map_err(fail("die with the supervisor"))
}

fn directory(path: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, Mode::empty())
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

/// Becomes `user`, who is nobody to the host, and keeps for the moment what it takes
/// to make a user namespace.
fn become_user(user: Option<u32>) -> Result<(), Error> {
    let Some(id) = user else { return Ok(()) };
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    nix::unistd::setgroups(&[]).map_err(fail("drop the groups"))?;
    nix::unistd::setresgid(gid, gid, gid).map_err(fail("change the group"))?;
    nix::sys::prctl::set_keepcaps(true).map_err(fail("keep a capability"))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(fail("change the user"))?;
    nix::sys::prctl::set_keepcaps(false).map_err(fail("keep a capability"))?;
    const SYS_ADMIN: u64 = 1 << 21;
    set_capabilities(SYS_ADMIN).map_err(fail("keep a capability"))?;
    // Or its own maps were root's to write.
    nix::sys::prctl::set_dumpable(true).map_err(fail("own its directory in /proc"))
}

/// The user namespace just entered gets one user and one group, the process's own,
/// under the numbers that they have outside.
fn map_itself(process: &OwnedFd, (uid, gid): (Uid, Gid)) -> Result<(), Error> {
    let write = |name: &CStr, text: &str| {
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let file = nix::fcntl::openat(process, name, flags, Mode::empty())?;
        nix::unistd::write(&file, text.as_bytes()).map(drop)
    };
    // Without it no group can be mapped by who is not privileged outside.
    write(c"setgroups", "deny")
        .and_then(|()| write(c"uid_map", &format!("{uid} {uid} 1")))
        .and_then(|()| write(c"gid_map", &format!("{gid} {gid} 1")))
        .map_err(fail("map the user into its namespace"))
}

/// Sets the effective and the permitted capabilities, and empties the inheritable.
fn set_capabilities(set: u64) -> Result<(), Errno> {
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
    let [a, b, c, d, e, f, g, h] = set.to_le_bytes();
    let (low, high) = (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    );
    // Effective, permitted and inheritable, for capabilities 0-31 and 32-63.
    let sets = [low, low, 0, high, high, 0];
    // SAFETY: both pointers refer to live values of the layout that the version
    // asks for.
    let result = unsafe { libc::syscall(libc::SYS_capset, &header, sets.as_ptr()) };
    Errno::result(result).map(drop)
}
