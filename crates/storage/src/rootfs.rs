//! A container's root file system on a block device: an image that is read-only, with a
//! writable layer of the guest's own over it, or a disk that the container writes to.

use std::{fs, io, os::unix::fs::FileTypeExt, path::Path};

use walnut_machine::Disk;
use walnut_protocol::{GUEST_ROOT, agent::Storage};

use crate::Error;

/// What the machine attaches and the agent mounts for one root file system.
#[derive(Debug, Clone)]
pub struct Rootfs {
    /// The image or disk.
    pub disk: Disk,
    /// Mounted by the agent in this order.
    pub storages: Vec<Storage>,
    /// Where the root file system then is, in the guest.
    pub guest_path: String,
}

impl Rootfs {
    /// The EROFS image `file` (raw, file or block device) as root of
    /// `container`; `index` tells it from the machine's other disks.
    ///
    /// Writes go to a tmpfs of the guest, so they end with the machine and count
    /// as its memory. A root that the container may not write has one too: the
    /// mount points that the image lacks are made there before it is closed.
    pub fn erofs(file: &Path, container: &str, index: u32) -> Result<Self, Error> {
        let disk = disk(file, index, true)?;
        Ok(Self::layered(disk, "erofs", &["ro"], container))
    }

    /// The ext2, ext3 or ext4 file system in `file` (raw, file or block device) as root of
    /// `container`; `index` tells it from the machine's other disks.
    ///
    /// The container writes to it. One that is `read_only` has a layer above it, as an
    /// image has.
    pub fn ext4(file: &Path, read_only: bool, container: &str, index: u32) -> Result<Self, Error> {
        // Linux has one driver for the three of them.
        const KIND: &str = "ext4";
        let disk = disk(file, index, read_only)?;
        if read_only {
            // A journal that is not empty could not be replayed.
            return Ok(Self::layered(disk, KIND, &["ro", "noload"], container));
        }
        let guest_path = format!("{GUEST_ROOT}/{container}/rootfs");
        Ok(Self {
            storages: vec![storage("blk", &disk.serial, KIND, &["rw"], &guest_path)],
            disk,
            guest_path,
        })
    }

    /// A writable layer of the guest's memory above a disk.
    fn layered(disk: Disk, kind: &str, options: &[&str], container: &str) -> Self {
        let base = format!("{GUEST_ROOT}/{container}");
        let guest_path = format!("{base}/rootfs");
        let lower = format!("{base}/lower");
        let rw = format!("{base}/rw");
        let layers = [
            format!("lowerdir={lower}"),
            format!("upperdir={rw}/upper"),
            format!("workdir={rw}/work"),
        ];
        let layers: Vec<&str> = layers.iter().map(String::as_str).collect();
        let storages = vec![
            storage("blk", &disk.serial, kind, options, &lower),
            storage("tmpfs", "tmpfs", "tmpfs", &["mode=0755"], &rw),
            storage("overlay", "overlay", "overlay", &layers, &guest_path),
        ];
        Self {
            disk,
            storages,
            guest_path,
        }
    }

    /// Lets the guest write at most `bytes`; half of its memory by default.
    pub fn with_write_limit(mut self, bytes: u64) -> Self {
        for storage in &mut self.storages {
            if storage.driver == "tmpfs" {
                storage.options.push(format!("size={bytes}"));
            }
        }
        self
    }
}

/// A disk of a machine.
fn disk(file: &Path, index: u32, read_only: bool) -> Result<Disk, Error> {
    let fail = |source| Error::Source {
        what: "open image",
        path: file.to_path_buf(),
        source,
    };
    let kind = fs::metadata(file).map_err(fail)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(fail(io::Error::new(
            io::ErrorKind::InvalidInput,
            "neither a file nor a block device",
        )));
    }
    Ok(Disk {
        serial: format!("rootfs-{index}"),
        path: file.to_path_buf(),
        read_only,
    })
}

fn storage(driver: &str, source: &str, fstype: &str, options: &[&str], at: &str) -> Storage {
    Storage {
        driver: driver.into(),
        source: source.into(),
        fstype: fstype.into(),
        options: options.iter().map(|&o| o.to_owned()).collect(),
        mount_point: at.into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_is_an_overlay() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let root = Rootfs::erofs(image.path(), "c1", 0).unwrap();
        let drivers: Vec<_> = root.storages.iter().map(|s| s.driver.as_str()).collect();
        assert_eq!(drivers, ["blk", "tmpfs", "overlay"]);
        assert_eq!(root.storages[2].mount_point, root.guest_path);
        assert!(root.disk.read_only);
        let root = root.with_write_limit(1 << 20);
        assert_eq!(root.storages[1].options, ["mode=0755", "size=1048576"]);
        assert!(
            root.storages[0]
                .options
                .iter()
                .all(|o| !o.starts_with("size"))
        );
    }

    #[test]
    fn a_disk_is_written_to_and_a_read_only_one_is_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let root = Rootfs::ext4(file.path(), false, "c1", 3).unwrap();
        assert!(!root.disk.read_only && root.disk.serial == "rootfs-3");
        assert_eq!(root.storages.len(), 1);
        assert_eq!(root.storages[0].mount_point, root.guest_path);
        let root = Rootfs::ext4(file.path(), true, "c1", 3).unwrap();
        assert!(root.disk.read_only);
        assert_eq!(root.storages[0].options, ["ro", "noload"]);
        assert_eq!(root.storages[2].mount_point, root.guest_path);
    }

    #[test]
    fn a_missing_image_is_named() {
        let error = Rootfs::erofs(Path::new("/nowhere.erofs"), "c1", 0).unwrap_err();
        assert!(error.to_string().contains("/nowhere.erofs"), "{error}");
        assert!(Rootfs::erofs(Path::new("/"), "c1", 0).is_err());
    }
}
