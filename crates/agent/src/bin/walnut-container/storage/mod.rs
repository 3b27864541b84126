//! Storages: what the agent mounts for a container.
//!
//! A registry of handlers by driver name; a new kind of storage is a new file
//! and a line in [`HANDLERS`]. Mount points are resolved component by
//! component without following links and mounted on through the descriptor, so
//! that nothing a container left in a shared folder leads elsewhere.

mod bind;
mod blk;
mod overlay;
mod tmpfs;
mod virtio_fs;

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, mkdirat};
use walnut_agent::names::below_guest_root;
use walnut_protocol::GUEST_ROOT;
use walnut_protocol::agent::Storage;

use crate::failure::Failure;

/// Most storages of one container.
const STORAGES_MAX: usize = 256;

/// Mounted by the kernel when it is first looked at; the agent unmounts it.
const SHARE: &str = "share";
/// Mounted with the first container that names it, and kept for the next.
const SANDBOX_WIDE: &str = "virtio-fs";

/// Mounts one storage on `target`, a path that cannot be moved away.
type Handler = fn(&Storage, &Target) -> Result<(), Failure>;

const HANDLERS: [(&str, Handler); 5] = [
    ("blk", blk::mount),
    ("virtio-fs", virtio_fs::mount),
    ("tmpfs", tmpfs::mount),
    ("overlay", overlay::mount),
    ("bind", bind::mount),
];

/// A mount point, held open.
#[derive(Debug)]
pub(crate) struct Target {
    fd: OwnedFd,
    path: PathBuf,
}

impl Target {
    /// A path to the held mount point, whatever happens to its name.
    fn fixed(&self) -> PathBuf {
        fixed(&self.fd)
    }
}

/// The mounts made so far; unmounts them again unless kept.
#[derive(Debug, Default)]
pub(crate) struct Mounted(Vec<PathBuf>);

impl Mounted {
    /// Leaves the mounts to the agent.
    pub(crate) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
    }
}

/// Mounts in order; if one fails, those before it are unmounted.
pub(crate) fn mount_all(storages: &[Storage]) -> Result<Mounted, Failure> {
    if storages.len() > STORAGES_MAX {
        return Err(Failure::invalid(format!(
            "{} storages; at most {STORAGES_MAX}",
            storages.len()
        )));
    }
    let mut mounted = Mounted::default();
    for storage in storages {
        if storage.driver == SHARE {
            below_guest_root(&storage.mount_point).map_err(|e| Failure::invalid(e.to_string()))?;
            continue;
        }
        if storage.driver == SANDBOX_WIDE && virtio_fs::is_mounted(storage) {
            continue;
        }
        let (_, handler) = HANDLERS
            .iter()
            .find(|(driver, _)| *driver == storage.driver)
            .ok_or_else(|| {
                Failure::invalid(format!("storage driver {:?} is not known", storage.driver))
            })?;
        let target = target(storage)?;
        handler(storage, &target)?;
        if storage.driver != SANDBOX_WIDE {
            mounted.0.push(target.path);
        }
    }
    Ok(mounted)
}

/// Makes and opens the mount point.
fn target(storage: &Storage) -> Result<Target, Failure> {
    let below =
        below_guest_root(&storage.mount_point).map_err(|e| Failure::invalid(e.to_string()))?;
    let path = Path::new(GUEST_ROOT).join(&below);
    // A file is bound on a file.
    let file = storage.driver == "bind" && fs::metadata(&storage.source).is_ok_and(|m| m.is_file());
    let fd = if file {
        let parent = below.parent().unwrap_or(Path::new(""));
        make_dirs(parent)?;
        make_file(&below)?
    } else {
        make_dirs(&below)?
    };
    Ok(Target { fd, path })
}

/// Options as mount(2) takes them: flags, and the rest as text.
fn options(storage: &Storage) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    let words = storage.options.iter().flat_map(|o| {
        // An overlay's paths may hold no comma, other options are split at it.
        o.split(',').filter(|w| !w.is_empty())
    });
    for word in words {
        match word {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => flags |= MsFlags::MS_DIRSYNC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "rw" | "defaults" | "suid" | "dev" | "exec" | "async" => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

/// mount(2), with a message that says what was mounted where.
fn mount_on(storage: &Storage, target: &Target, source: &str, fstype: &str) -> Result<(), Failure> {
    try_mount(storage, target, source, fstype).map_err(|e| complain(storage, e))
}

fn try_mount(storage: &Storage, target: &Target, source: &str, fstype: &str) -> Result<(), Errno> {
    let (flags, data) = options(storage);
    mount(
        Some(source),
        &target.fixed(),
        Some(fstype),
        flags,
        Some(data.as_str()),
    )
}

fn complain(storage: &Storage, errno: Errno) -> Failure {
    Failure::internal(
        format!(
            "mount {} {:?} on {}",
            storage.driver, storage.source, storage.mount_point
        ),
        errno,
    )
}

fn fixed(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Opens `path` (relative to `at`) without following any link.
fn open_plain(at: Option<&OwnedFd>, path: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    match at {
        Some(at) => openat2(at, path, how),
        None => openat2(nix::fcntl::AT_FDCWD, path, how),
    }
}

/// Makes the folders of `below` under the agent's root and opens the last.
fn make_dirs(below: &Path) -> Result<OwnedFd, Failure> {
    let fail = |e: Errno| {
        let path = Path::new(GUEST_ROOT).join(below);
        Failure::internal(format!("make mount point {}", path.display()), e)
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let mut at = open_plain(None, Path::new(GUEST_ROOT), flags).map_err(fail)?;
    for name in below.components() {
        let name: &Path = name.as_ref();
        match mkdirat(&at, name, Mode::from_bits_truncate(0o755)) {
            // A folder on a read-only mount may be there already.
            Ok(()) | Err(Errno::EEXIST | Errno::EROFS) => {}
            Err(e) => return Err(fail(e)),
        }
        at = open_plain(Some(&at), name, flags).map_err(fail)?;
    }
    Ok(at)
}

fn make_file(below: &Path) -> Result<OwnedFd, Failure> {
    let path = Path::new(GUEST_ROOT).join(below);
    let fail = |e: Errno| Failure::internal(format!("make mount point {}", path.display()), e);
    let how = OpenHow::new()
        .flags(OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_CLOEXEC)
        .mode(Mode::from_bits_truncate(0o644))
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(nix::fcntl::AT_FDCWD, &path, how).map_err(fail)?;
    open_plain(None, &path, OFlag::O_PATH).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(options: &[&str]) -> Storage {
        Storage {
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            ..Storage::default()
        }
    }

    #[test]
    fn options_are_flags_or_data() {
        let (flags, data) = options(&storage(&["ro,nodev", "size=1m", "mode=755", "rw"]));
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NODEV);
        assert_eq!(data, "size=1m,mode=755");
    }

    #[test]
    fn unknown_drivers_and_bad_places_are_invalid() {
        use walnut_agent::wire::Status;
        let mut s = storage(&[]);
        s.driver = "9p".into();
        s.mount_point = "/run/walnut/a".into();
        assert_eq!(mount_all(&[s.clone()]).unwrap_err().status, Status::Invalid);
        s.driver = "tmpfs".into();
        s.mount_point = "/run/walnut/../../etc".into();
        assert_eq!(mount_all(&[s.clone()]).unwrap_err().status, Status::Invalid);
        assert!(mount_all(&vec![s; STORAGES_MAX + 1]).is_err());
    }
}
