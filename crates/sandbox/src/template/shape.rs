//! What a template is good for.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use walnut_machine::{Driver, MachineSpec};

use crate::{
    Error, Result,
    sizing::{Size, Span},
};

/// Of this module's files, and of what a template's guest has done when it is saved.
const FORMAT: u32 = 3;

/// Everything that a template depends on: a machine that differs in any of it is not
/// started from the template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    format: u32,
    /// Walnut's version.
    walnut: String,
    /// Machine driver: `vmm`, `qemu-kvm`, `qemu-tcg`.
    pub driver: String,
    /// Guest memory in bytes.
    pub memory: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// What memory can grow to.
    max_memory: u64,
    /// vCPUs that can be brought online.
    max_vcpus: u32,
    /// Disks that a clone may have.
    spare_disks: u32,
    /// Added to the kernel's command line.
    cmdline: Vec<String>,
    /// Kernel, initramfs, and the driver's programs.
    files: Vec<Stamp>,
    host: Host,
}

/// A file as it was. A change shows in it without the file being read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    pub(crate) path: String,
    device: u64,
    inode: u64,
    pub(crate) size: u64,
    /// Nanoseconds since the epoch.
    modified: i128,
}

impl Stamp {
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let meta = fs::metadata(path).map_err(Error::io("examine", path))?;
        let modified = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
        Ok(Self {
            path: path.to_string_lossy().into_owned(),
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            modified,
        })
    }

    /// The file is what it was, wherever it has been moved.
    pub(crate) fn same_content(&self, other: &Self) -> bool {
        self.inode == other.inode
            && self.device == other.device
            && self.size == other.size
            && self.modified == other.modified
    }
}

/// The host, as far as a guest has seen it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Host {
    /// `/etc/machine-id`.
    id: String,
    /// Release and version of its kernel.
    kernel: String,
    /// Digest of the first processor's model, features and microcode.
    processor: String,
}

impl Host {
    fn this() -> Self {
        let uname = nix::sys::utsname::uname();
        let (release, version) = uname
            .as_ref()
            .map(|u| (u.release(), u.version()))
            .unwrap_or_default();
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self {
            id: read("/etc/machine-id").trim().to_owned(),
            kernel: format!(
                "{} {}",
                release.to_string_lossy(),
                version.to_string_lossy()
            ),
            processor: processor(&read("/proc/cpuinfo")),
        }
    }
}

/// Of a processor's lines those that stay as they are while it runs.
fn processor(cpuinfo: &str) -> String {
    const LASTING: [&str; 7] = [
        "vendor_id",
        "cpu family",
        "model",
        "model name",
        "stepping",
        "microcode",
        "flags",
    ];
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    let lasting = first.lines().filter(|line| {
        line.split_once(':')
            .is_some_and(|(name, _)| LASTING.contains(&name.trim()))
    });
    hex(&lasting.collect::<Vec<_>>().join("\n"))
}

/// The start of a text's SHA-256: 32 hexadecimal digits.
fn hex(text: &str) -> String {
    let digest = Sha256::digest(text);
    digest.iter().take(16).map(|b| format!("{b:02x}")).collect()
}

impl Shape {
    /// Of a machine that `driver` would start from `spec` on this host now.
    pub(crate) fn of(driver: &dyn Driver, spec: &MachineSpec) -> Result<Option<Self>> {
        let Some(restore) = driver.as_restore() else {
            return Ok(None);
        };
        let programs = restore.programs();
        let files: Result<Vec<_>> = [&spec.kernel, &spec.initramfs]
            .into_iter()
            .chain(&programs)
            .map(|path| Stamp::of(path))
            .collect();
        Ok(Some(Self {
            format: FORMAT,
            walnut: env!("CARGO_PKG_VERSION").to_owned(),
            driver: driver.name().to_owned(),
            memory: spec.memory,
            vcpus: spec.vcpus,
            max_memory: spec.max_memory,
            max_vcpus: spec.max_vcpus,
            spare_disks: spec.spare_disks,
            cmdline: spec.cmdline.clone(),
            files: files?,
            host: Host::this(),
        }))
    }

    /// The same of a machine that has all its disks.
    pub(crate) fn of_whole(mut self) -> Self {
        self.spare_disks = 0;
        self
    }

    /// The same of a machine that has grown to `size`.
    pub(crate) fn of_size(mut self, size: Size) -> Self {
        (self.memory, self.vcpus) = (size.memory, size.vcpus);
        self
    }

    /// How large the machine is, and what it can grow to.
    pub(crate) fn span(&self) -> Span {
        let size = |memory, vcpus| Size { vcpus, memory };
        Span {
            boot: size(self.memory, self.vcpus),
            max: size(self.max_memory, self.max_vcpus),
        }
    }

    /// The template's name: a digest of the shape.
    pub(super) fn id(&self) -> String {
        hex(&serde_json::to_string(self).unwrap_or_default())
    }

    /// Why no machine of this host has this shape any more, if that is so.
    pub(crate) fn stale(&self) -> Option<String> {
        if self.format != FORMAT || self.walnut != env!("CARGO_PKG_VERSION") {
            return Some(format!("made by walnut {}", self.walnut));
        }
        if self.host != Host::this() {
            return Some("made on another host, or before its kernel changed".to_owned());
        }
        let changed = self
            .files
            .iter()
            .find(|then| Stamp::of(Path::new(&then.path)).map_or(true, |now| now != **then));
        changed.map(|file| format!("{} has changed", file.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_by_itself_is_no_part_of_a_processor() {
        let info = |mhz: &str, microcode: &str| {
            format!(
                "processor\t: 0\nmodel name\t: X\ncpu MHz\t\t: {mhz}\nmicrocode\t: {microcode}\n\nprocessor\t: 1\n"
            )
        };
        assert_eq!(
            processor(&info("800", "0x1")),
            processor(&info("900", "0x1"))
        );
        assert_ne!(
            processor(&info("800", "0x1")),
            processor(&info("800", "0x2"))
        );
    }

    #[test]
    fn a_rewritten_file_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        fs::write(&path, "one").unwrap();
        let before = Stamp::of(&path).unwrap();
        assert_eq!(Stamp::of(&path).unwrap(), before);
        fs::write(dir.path().join("new"), "two").unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        assert!(!Stamp::of(&path).unwrap().same_content(&before));
        assert!(Stamp::of(&dir.path().join("none")).is_err());
    }
}
