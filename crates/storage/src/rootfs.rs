//! A container's root file system: an image as a read-only block device, and a
//! writable layer of the guest's own over it.

use std::{fs, io, os::unix::fs::FileTypeExt, path::Path};

use walnut_machine::Disk;
use walnut_protocol::{GUEST_ROOT, agent::Storage};

use crate::Error;

/// What the machine attaches and the agent mounts for one root file system.
#[derive(Debug, Clone)]
pub struct Rootfs {
    /// The image, read-only.
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
        let serial = format!("rootfs-{index}");
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
            storage("blk", &serial, "erofs", &["ro"], &lower),
            storage("tmpfs", "tmpfs", "tmpfs", &["mode=0755"], &rw),
            storage("overlay", "overlay", "overlay", &layers, &guest_path),
        ];
        Ok(Self {
            disk: Disk {
                serial,
                path: file.to_path_buf(),
                read_only: true,
            },
            storages,
            guest_path,
        })
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
    fn a_missing_image_is_named() {
        let error = Rootfs::erofs(Path::new("/nowhere.erofs"), "c1", 0).unwrap_err();
        assert!(error.to_string().contains("/nowhere.erofs"), "{error}");
        assert!(Rootfs::erofs(Path::new("/"), "c1", 0).is_err());
    }
}
