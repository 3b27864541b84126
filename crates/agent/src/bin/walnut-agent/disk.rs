//! Disks that a container writes to, when it goes: the host's file has all of it before
//! the host is told that the container is gone.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::statfs::{EXT4_SUPER_MAGIC, statfs};

/// How long the kernel may take to unmount a file system that nobody uses any more.
const GOES_WITHIN: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// The disk below a file system that is mounted for writing.
#[derive(Debug)]
pub(crate) struct Disk(PathBuf);

impl Disk {
    /// That of what is mounted on `mount_point`, whose data is on the disk now; `None` if
    /// no disk is written to there.
    pub(crate) fn at(mount_point: &Path) -> Option<Self> {
        let of = statfs(mount_point).ok()?;
        if of.filesystem_type() != EXT4_SUPER_MAGIC {
            return None;
        }
        let root = File::open(mount_point).ok()?;
        let device = root.metadata().ok()?.dev();
        if let Err(e) = nix::unistd::syncfs(&root) {
            eprintln!(
                "walnut-agent: write {} to its disk: {e}",
                mount_point.display()
            );
        }
        let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
        let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
        Some(Self(Path::new("/dev").join(link.file_name()?)))
    }

    /// Returns when the file system is not mounted any more, which is a moment after the
    /// last of its users has gone.
    pub(crate) async fn until_free(&self) {
        let began = Instant::now();
        // Nobody else may open a disk so while it is mounted.
        let mut open = OpenOptions::new();
        open.read(true).custom_flags(libc::O_EXCL);
        while let Err(e) = open.open(&self.0) {
            if e.raw_os_error() != Some(Errno::EBUSY as i32) {
                return;
            }
            if began.elapsed() > GOES_WITHIN {
                eprintln!(
                    "walnut-agent: {} is still mounted somewhere",
                    self.0.display()
                );
                return;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}
