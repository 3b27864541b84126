//! Disks that are mounted here, when they go.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use tracing::{debug, warn};

/// How long those who have it open may take to let go of it. Somebody who has nothing to do
/// with it may have a copy of the mount in a namespace of theirs.
const GOES_WITHIN: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// The block device of a mount.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    device: PathBuf,
    /// What is attached to it, if it is a loop device.
    backing: Option<Vec<u8>>,
}

impl Disk {
    /// That of what is mounted on `target`, if it is a whole file system on one.
    pub(crate) fn at(target: &Path) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let device = device(&mounts, target)?;
        let backing = backing(&device);
        Some(Self { device, backing })
    }

    /// Has everything written to it.
    pub(crate) fn sync(&self, target: &Path) {
        let synced = File::open(target).and_then(|root| Ok(nix::unistd::syncfs(root)?));
        if let Err(e) = synced {
            warn!("write {} to its disk: {e}", target.display());
        }
    }

    /// Returns when nobody has it mounted any more.
    pub(crate) fn until_free(&self) {
        let began = Instant::now();
        while self.is_used() {
            if began.elapsed() > GOES_WITHIN {
                return debug!("{} is still mounted somewhere", self.device.display());
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    fn is_used(&self) -> bool {
        match &self.backing {
            // It is another's, or nobody's, once it has been let go of.
            Some(file) => backing(&self.device).as_ref() == Some(file),
            // Nobody else may open a disk so while it is mounted.
            None => {
                let mut options = OpenOptions::new();
                let open = options.read(true).custom_flags(libc::O_EXCL);
                let opened = open.open(&self.device);
                opened.is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
            }
        }
    }
}

fn backing(device: &Path) -> Option<Vec<u8>> {
    let name = device.file_name()?;
    fs::read(Path::new("/sys/block").join(name).join("loop/backing_file")).ok()
}

/// The device whose file system's root is mounted on `target`, by the lines of `mounts`
/// (proc_pid_mountinfo(5)).
fn device(mounts: &str, target: &Path) -> Option<PathBuf> {
    let line = mounts.lines().rev().find(|line| {
        let mut words = line.split(' ');
        words.nth(3) == Some("/") && words.next().map(Path::new) == Some(target)
    })?;
    let (_, rest) = line.split_once(" - ")?;
    let source = Path::new(rest.split(' ').nth(1)?);
    source.starts_with("/dev").then(|| source.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_that_of_a_whole_file_system() {
        const MOUNTS: &str = "\
            22 1 7:3 / /b/rootfs rw,relatime shared:1 - ext4 /dev/loop3 rw\n\
            23 1 0:5 / /o/rootfs rw - overlay overlay rw,lowerdir=/x\n\
            24 1 8:1 /var/x /c/rootfs rw - ext4 /dev/sda1 rw\n";
        let of = |target: &str| device(MOUNTS, Path::new(target));
        assert_eq!(of("/b/rootfs"), Some("/dev/loop3".into()));
        for none in ["/o/rootfs", "/c/rootfs", "/b"] {
            assert_eq!(of(none), None);
        }
    }
}
