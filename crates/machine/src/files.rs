//! What a hypervisor may touch, opened by the supervisor and handed over, and the
//! user it becomes.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{MetadataExt, OpenOptionsExt},
            net::UnixStream,
        },
    },
    path::Path,
};

use crate::{Disk, Error, MachineSpec, Nic, Share, agent::host, process::Identity, qemu::Accel};

/// First of 4 million user IDs that no distribution and no container range
/// uses (systemd.io/UIDS-GIDS: 1879048192–2147483647 is free).
const UID_BASE: u32 = 1_900_000_000;

/// Everything a machine that boots opens, in the order of its specification.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) kernel: OwnedFd,
    pub(crate) initramfs: OwnedFd,
    pub(crate) devices: Devices,
}

/// What a machine's devices need.
#[derive(Debug)]
pub(crate) struct Devices {
    pub(crate) disks: Vec<OwnedFd>,
    /// Connections to the back ends of the shares.
    pub(crate) shares: Vec<OwnedFd>,
    /// The queues of each network interface.
    pub(crate) nics: Vec<Vec<OwnedFd>>,
}

impl Devices {
    pub(crate) fn open(spec: &MachineSpec) -> Result<Self, Error> {
        let disks: Result<_, _> = spec.disks.iter().map(open_disk).collect();
        let shares: Result<_, _> = spec.shares.iter().map(connect_share).collect();
        let nics: Result<_, _> = spec.nics.iter().map(share_taps).collect();
        Ok(Self {
            disks: disks?,
            shares: shares?,
            nics: nics.map_err(host("hand over a tap"))?,
        })
    }
}

fn share_taps(nic: &Nic) -> io::Result<Vec<OwnedFd>> {
    nic.taps.iter().map(|tap| tap.try_clone()).collect()
}

impl Files {
    pub(crate) fn open(spec: &MachineSpec, private: bool) -> Result<Self, Error> {
        Ok(Self {
            devices: Devices::open(spec)?,
            kernel: open_boot("open kernel", &spec.kernel, private)?,
            initramfs: open_boot("open initramfs", &spec.initramfs, private)?,
        })
    }
}

/// Opens a file that QEMU opens again through `/proc/self/fd`: as another user
/// (`private`) it needs the file's permission, though not its directory's.
fn open_boot(what: &'static str, path: &Path, private: bool) -> Result<OwnedFd, Error> {
    let error = |source| Error::File {
        what,
        path: path.to_owned(),
        source,
    };
    let file = open(path, false).map_err(error)?;
    let mode = file.metadata().map_err(error)?.mode();
    if private && mode & 0o004 == 0 {
        return Err(error(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "QEMU runs as another user and must be able to read it; chmod o+r",
        )));
    }
    Ok(file.into())
}

pub(crate) fn open_disk(disk: &Disk) -> Result<OwnedFd, Error> {
    let what = if disk.read_only {
        "open disk for reading"
    } else {
        "open disk for writing"
    };
    open(&disk.path, !disk.read_only)
        .map(OwnedFd::from)
        .map_err(|source| Error::File {
            what,
            path: disk.path.clone(),
            source,
        })
}

/// Opens a regular file or block device; a FIFO in its place must not hang us.
fn open(path: &Path, write: bool) -> io::Result<File> {
    use std::os::unix::fs::FileTypeExt;
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() {
        // Whoever reads it wants to wait for it.
        rustix::io::ioctl_fionbio(&file, false)?;
        return Ok(file);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "it is neither a file nor a block device",
    ))
}

pub(crate) fn connect_share(share: &Share) -> Result<OwnedFd, Error> {
    UnixStream::connect(&share.socket)
        .map(OwnedFd::from)
        .map_err(|source| Error::File {
            what: "connect to the virtio-fs back end at",
            path: share.socket.clone(),
            source,
        })
}

/// A user of a machine's own, if this process may give it one. `unique` as below.
pub(crate) fn own_identity(unique: u32) -> Option<Identity> {
    if !rustix::process::geteuid().is_root() || !ids_exist() {
        return None;
    }
    let id = UID_BASE.checked_add(unique)?;
    Some(Identity {
        uid: id,
        gid: id,
        extra_group: None,
    })
}

/// The user a QEMU of this process runs as: none other where this process is
/// not root or has no such IDs (a user namespace). `unique` is the PID of a
/// process that lives as long, so no two machines of a host share a user.
pub(crate) fn identity(accel: Accel, unique: u32) -> Option<Identity> {
    if !drops_privileges(accel) {
        return None;
    }
    let extra_group = match accel {
        Accel::Kvm => std::fs::metadata("/dev/kvm").ok().map(|m| m.gid()),
        Accel::Tcg => None,
    };
    own_identity(unique).map(|identity| Identity {
        extra_group,
        ..identity
    })
}

/// Whether QEMU runs as another user than this process.
pub(crate) fn drops_privileges(accel: Accel) -> bool {
    if !rustix::process::geteuid().is_root() || !ids_exist() {
        return false;
    }
    match accel {
        Accel::Tcg => true,
        // QEMU opens /dev/kvm itself: another user needs the group's permission
        // and must not have to become group root for it.
        Accel::Kvm => std::fs::metadata("/dev/kvm").is_ok_and(|m| {
            m.mode() & 0o006 == 0o006 || (m.mode() & 0o060 == 0o060 && m.gid() != 0)
        }),
    }
}

/// Whether the IDs above are mapped in this user namespace.
fn ids_exist() -> bool {
    let covers = |map: &str| {
        map.lines().any(|line| {
            let mut fields = line
                .split_whitespace()
                .map(|f| f.parse::<u64>().unwrap_or(0));
            let (first, _, count) = (fields.next(), fields.next(), fields.next());
            matches!((first, count), (Some(first), Some(count))
                if first <= u64::from(UID_BASE)
                    && u64::from(UID_BASE) + (1 << 22) <= first + count)
        })
    };
    ["/proc/self/uid_map", "/proc/self/gid_map"]
        .iter()
        .all(|file| std::fs::read_to_string(file).is_ok_and(|map| covers(&map)))
}
