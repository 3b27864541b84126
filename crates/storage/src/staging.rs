//! The tree virtiofsd serves: a tmpfs with one bind mount per volume, which
//! exists only in virtiofsd's mount namespace.
//!
//! The mounts are made detached, from descriptors, so that neither a path nor a
//! mount table can be raced or littered: a volume's source is opened once, its
//! mounts are cloned from that descriptor and made read-only before anybody can
//! reach them. [`Staging::attach`] then only puts them in place, in the child.
//! If any of its processes is killed, the kernel takes the mounts down.
//!
//! The tmpfs is mounted twice there: as it is, which the supervisor keeps a descriptor of
//! and makes the names of later volumes in, and read-only over that, which is served.

use std::{
    ffi::{CStr, CString},
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use rustix::{
    fs::{Mode, OFlags},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change,
        move_mount, open_tree,
    },
};

use crate::{Error, Volume};

/// Most volumes of a sandbox at a time.
pub(crate) const VOLUMES_MAX: usize = 4096;

/// A tree that is not mounted anywhere yet.
#[derive(Debug)]
pub(crate) struct Staging {
    root: OwnedFd,
    volumes: Vec<(CString, OwnedFd)>,
    mount_point: CString,
}

impl Staging {
    /// The tmpfs itself, to be written through this descriptor only.
    pub(crate) fn root(&self) -> io::Result<OwnedFd> {
        self.root.try_clone()
    }

    /// `mount_point` is an empty directory that the tree will cover.
    pub(crate) fn new(volumes: &[Volume], mount_point: &Path) -> Result<Self, Error> {
        use std::os::unix::ffi::OsStrExt;
        // Sources first: a wrong path is the commonest mistake.
        let sources: Result<Vec<_>, _> = volumes.iter().map(Detached::open).collect();
        let sources = sources?;
        let root = tmpfs().map_err(denied)?;
        let mut mounts = Vec::with_capacity(volumes.len());
        for (n, source) in sources.into_iter().enumerate() {
            let name = source.name(&root, n).map_err(denied)?;
            mounts.push((name, source.tree));
        }
        let mount_point = CString::new(mount_point.as_os_str().as_bytes())
            .map_err(|_| Error::VirtioFs("the run directory's name holds a NUL".to_owned()))?;
        Ok(Self {
            root,
            volumes: mounts,
            mount_point,
        })
    }

    /// Gives the calling process a mount namespace in which the tree is
    /// mounted. For a child between fork and exec: makes system calls only.
    pub(crate) fn attach(&self) -> io::Result<()> {
        // SAFETY: takes a flag; the child has one thread.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // Nothing of ours reaches the host; what the host unmounts goes here
        // too, so that no volume it wants to eject is kept busy.
        mount_change(
            c"/",
            MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        )?;
        attach_at(&self.root, rustix::fs::CWD, &self.mount_point)?;
        // The guest must find the volumes, and nothing to write beside them.
        let served = detached(&self.root)?;
        set_attributes(&served, libc::MOUNT_ATTR_RDONLY, 0, false)?;
        attach_at(&served, rustix::fs::CWD, &self.mount_point)?;
        for (name, tree) in &self.volumes {
            attach_at(tree, served.as_fd(), name)?;
        }
        Ok(())
    }
}

/// A volume's mounts, not yet in any place.
pub(crate) struct Detached {
    pub(crate) tree: OwnedFd,
    is_dir: bool,
}

impl Detached {
    /// Opens a volume's source and clones what is mounted there.
    pub(crate) fn open(volume: &Volume) -> Result<Self, Error> {
        let source = open_source(volume)?;
        let tree = clone_tree(&source.fd, volume).map_err(|source| {
            if source.kind() == io::ErrorKind::PermissionDenied {
                return Error::NotPermitted(source);
            }
            Error::Source {
                what: "bind",
                path: volume.source.clone(),
                source,
            }
        })?;
        Ok(Self {
            tree,
            is_dir: source.is_dir,
        })
    }

    /// Makes the name that volume number `n` has in the served tree.
    pub(crate) fn name(&self, root: &OwnedFd, n: usize) -> io::Result<CString> {
        let name = n.to_string();
        if self.is_dir {
            rustix::fs::mkdirat(root, &name, Mode::from_raw_mode(0o755))?;
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(root, &name, flags, Mode::from_raw_mode(0o644))?;
        }
        Ok(CString::new(name)?)
    }

    /// Puts it below the calling thread's root.
    pub(crate) fn attach(&self, name: &CStr) -> io::Result<()> {
        attach_at(&self.tree, rustix::fs::CWD, name)
    }
}

fn attach_at(tree: &OwnedFd, at: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    move_mount(tree, c"", at, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

pub(crate) fn denied(source: io::Error) -> Error {
    if source.kind() == io::ErrorKind::PermissionDenied {
        return Error::NotPermitted(source);
    }
    Error::VirtioFs(format!("prepare the volumes' mounts: {source}"))
}

struct Source {
    fd: OwnedFd,
    is_dir: bool,
}

fn open_source(volume: &Volume) -> Result<Source, Error> {
    let path = &volume.source;
    let fail = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => Error::NoSource(path.clone()),
        _ => Error::Source {
            what: "open bind source",
            path: path.clone(),
            source,
        },
    };
    let refuse = |why: &str| fail(io::Error::new(io::ErrorKind::InvalidInput, why));
    if !path.is_absolute() {
        return Err(refuse("it is not an absolute path"));
    }
    // O_PATH reads nothing and cannot hang on a FIFO.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
        .open(path)
        .map_err(fail)?;
    let kind = file.metadata().map_err(fail)?.file_type();
    if !kind.is_dir() && !kind.is_file() {
        return Err(refuse("it is neither a directory nor a file"));
    }
    Ok(Source {
        is_dir: kind.is_dir(),
        fd: file.into(),
    })
}

fn tmpfs() -> io::Result<OwnedFd> {
    let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "mode", "0755")?;
    fsconfig_set_string(&fs, "size", "64k")?;
    fsconfig_set_string(&fs, "nr_inodes", (VOLUMES_MAX + 8).to_string())?;
    fsconfig_create(&fs)?;
    Ok(fsmount(
        &fs,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?)
}

/// The mounts at and below `source`, detached. What the host enforces for a
/// read-only volume, it enforces for every mount below it too.
fn clone_tree(source: &OwnedFd, volume: &Volume) -> io::Result<OwnedFd> {
    let tree = detached(source)?;
    let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    if volume.read_only {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    let propagation = match volume.follows_host {
        true => libc::MS_SLAVE,
        false => libc::MS_PRIVATE,
    };
    set_attributes(&tree, attributes, propagation, true)?;
    Ok(tree)
}

fn detached(source: &OwnedFd) -> io::Result<OwnedFd> {
    Ok(open_tree(
        source,
        c"",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE,
    )?)
}

/// `mount_setattr(2)` (Linux 5.12) on the mount behind `fd`.
fn set_attributes(fd: &OwnedFd, set: u64, propagation: u64, recursive: bool) -> io::Result<()> {
    /// `struct mount_attr` of linux/mount.h, version 0.
    #[repr(C)]
    struct MountAttr {
        attr_set: u64,
        attr_clr: u64,
        propagation: u64,
        userns_fd: u64,
    }
    let attributes = MountAttr {
        attr_set: set,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path and the structure outlive the call, whose last argument
    // is the structure's size.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
