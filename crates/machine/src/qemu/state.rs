//! The state file of a snapshot: what a clone must agree with, then what QEMU wrote.
//!
//! ```text
//! magic (8) | SHA-256 of the rest (32) | length of the header (4, little endian)
//! header (JSON) | QEMU's migration stream
//! ```
//!
//! The digest finds damage; it keeps nobody from writing what they like. So nothing
//! here is trusted: lengths are bounded before they are used, the header can only say
//! what a specification could, and the stream is read by QEMU alone, inside its filter.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{memory, sockets::Sockets};
use crate::{Error, MachineSpec};

const MAGIC: [u8; 8] = *b"walnutQ1";
const DIGEST: usize = 32;
const HEADER_MAX: usize = 64 * 1024;
/// Longest stream of QEMU's. Without guest memory it is 150 kB.
pub(super) const STREAM_MAX: usize = 32 << 20;

/// What a clone's QEMU must be told as the saved one's was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    /// The driver's name.
    pub(super) driver: String,
    /// QEMU's version, as its monitor says it.
    pub(super) qemu: String,
    pub(super) memory: u64,
    pub(super) vcpus: u32,
    pub(super) disks: Vec<Disk>,
    pub(super) spare_disks: u32,
    pub(super) sockets: Sockets,
}

/// A disk that the saved machine had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Disk {
    serial: String,
    read_only: bool,
}

/// The error for a file that cannot be restored from.
pub(super) fn refused(path: &Path, problem: impl Into<String>) -> Error {
    Error::Snapshot {
        path: path.to_owned(),
        problem: problem.into(),
    }
}

impl Header {
    pub(super) fn new(driver: &str, qemu: String, spec: &MachineSpec, sockets: Sockets) -> Self {
        let disks = spec.disks.iter().map(|disk| Disk {
            serial: disk.serial.clone(),
            read_only: disk.read_only,
        });
        Self {
            driver: driver.to_owned(),
            qemu,
            memory: spec.memory,
            vcpus: spec.vcpus,
            disks: disks.collect(),
            spare_disks: spec.spare_disks,
            sockets,
        }
    }

    /// The machine that `spec` wants of this snapshot: its devices are the spec's, its
    /// sizes the snapshot's. Or what is wrong with it, as a sentence.
    pub(super) fn clone_of(&self, driver: &str, spec: MachineSpec) -> Result<MachineSpec, String> {
        if self.driver != driver {
            let saved = &self.driver;
            return Err(format!(
                "it is of the driver {saved:?}; {driver} cannot restore it"
            ));
        }
        if !spec.shares.is_empty() {
            return Err("a clone cannot have shares: virtio-fs keeps no state".to_owned());
        }
        let (had, has) = (self.disks.len(), spec.disks.len());
        let same = self.disks.iter().zip(&spec.disks);
        let mut same = same.filter(|(a, b)| a.serial == b.serial && a.read_only == b.read_only);
        if has < had || same.by_ref().count() < had {
            let serials: Vec<_> = self.disks.iter().map(|disk| &disk.serial).collect();
            return Err(format!(
                "its first disks must be the saved machine's, {serials:?}, read-only where they were"
            ));
        }
        if let Some(disk) = spec.disks[had..].iter().find(|disk| !disk.read_only) {
            return Err(format!(
                "its spare disks are read-only, and {:?} is not",
                disk.serial
            ));
        }
        let more = u32::try_from(has - had).unwrap_or(u32::MAX);
        let Some(spare_disks) = self.spare_disks.checked_sub(more) else {
            return Err(format!(
                "{more} disks more than the saved machine's were asked for; it has room for {}",
                self.spare_disks
            ));
        };
        Ok(MachineSpec {
            memory: self.memory,
            max_memory: self.memory,
            vcpus: self.vcpus,
            max_vcpus: self.vcpus,
            cmdline: Vec::new(),
            spare_disks,
            ..spec
        })
    }

    /// Writes the file.
    pub(super) fn write(&self, to: &File, stream: &[u8]) -> io::Result<()> {
        let header = serde_json::to_vec(self)?;
        let length = u32::try_from(header.len()).map_err(io::Error::other)?;
        let length = length.to_le_bytes();
        let mut digest = Sha256::new();
        for part in [&length, &*header, stream] {
            digest.update(part);
        }
        memory::write(to, &[&MAGIC, &digest.finalize(), &length, &header, stream])
    }

    /// Reads the file, and leaves it where QEMU's part begins.
    pub(super) fn read(file: &File, path: &Path) -> Result<Self, Error> {
        let error = |source| Error::File {
            what: "read the snapshot's state",
            path: path.to_owned(),
            source,
        };
        let most = STREAM_MAX + HEADER_MAX + 64;
        let mut bytes = Vec::new();
        let mut bounded = file.take(u64::try_from(most).unwrap_or(0) + 1);
        bounded.read_to_end(&mut bytes).map_err(error)?;
        if bytes.len() > most {
            return Err(refused(path, "it is too long"));
        }
        let (header, rest) = parse(&bytes)
            .ok_or_else(|| refused(path, "it is damaged, or no state of a machine"))?;
        let start = bytes.len() - rest;
        let start = rustix::fs::SeekFrom::Start(u64::try_from(start).unwrap_or(0));
        rustix::fs::seek(file, start).map_err(|e| error(e.into()))?;
        Ok(header)
    }
}

/// The header, and the length of what follows it.
fn parse(bytes: &[u8]) -> Option<(Header, usize)> {
    let (digest, rest) = bytes.strip_prefix(&MAGIC)?.split_at_checked(DIGEST)?;
    if Sha256::digest(rest).as_slice() != digest {
        return None;
    }
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    let (header, stream) = rest.split_at_checked(length)?;
    if header.len() > HEADER_MAX {
        return None;
    }
    Some((serde_json::from_slice(header).ok()?, stream.len()))
}

#[cfg(test)]
mod tests {
    use std::{io::Seek, path::PathBuf};

    use super::*;

    fn spec(disks: &[(&str, bool)]) -> MachineSpec {
        MachineSpec {
            id: "m".into(),
            run_dir: PathBuf::new(),
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            cmdline: vec!["word".into()],
            vcpus: 2,
            max_vcpus: 2,
            memory: 64 << 20,
            max_memory: 64 << 20,
            disks: disks
                .iter()
                .map(|(serial, read_only)| crate::Disk {
                    serial: (*serial).to_owned(),
                    path: PathBuf::new(),
                    read_only: *read_only,
                })
                .collect(),
            spare_disks: 2,
            shares: vec![],
            nics: Vec::new(),
        }
    }

    fn header() -> Header {
        let spec = spec(&[("a", true)]);
        Header::new("qemu-tcg", "7.2".into(), &spec, Sockets::default())
    }

    #[test]
    fn files_come_back_and_damage_is_found() {
        let path = Path::new("/x/state");
        let file = tempfile::tempfile().unwrap();
        header().write(&file, b"stream").unwrap();
        (&file).rewind().unwrap();
        assert_eq!(Header::read(&file, path).unwrap(), header());
        let mut rest = String::new();
        (&file).read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "stream");

        let mut bytes = Vec::new();
        (&file).rewind().unwrap();
        (&file).read_to_end(&mut bytes).unwrap();
        for length in 0..bytes.len() {
            assert!(parse(&bytes[..length]).is_none(), "{length} bytes");
        }
        for at in 0..bytes.len() {
            bytes[at] ^= 1;
            assert!(parse(&bytes).is_none(), "byte {at}");
            bytes[at] ^= 1;
        }
        file.set_len(u64::try_from(2 * STREAM_MAX).unwrap())
            .unwrap();
        (&file).rewind().unwrap();
        let said = Header::read(&file, path).unwrap_err().to_string();
        assert_eq!(said, "snapshot /x/state: it is too long");
    }

    #[test]
    fn a_header_that_promises_more_than_there_is_is_refused() {
        let mut rest = u32::MAX.to_le_bytes().to_vec();
        rest.extend(b"{}");
        let mut bytes = MAGIC.to_vec();
        bytes.extend(Sha256::digest(&rest));
        bytes.extend(&rest);
        assert!(parse(&bytes).is_none());
    }

    #[test]
    fn clones_name_the_same_disks_and_then_others() {
        let of = |disks: &[(&str, bool)]| header().clone_of("qemu-tcg", spec(disks));
        let spare = |disks| of(disks).unwrap().spare_disks;
        assert_eq!(spare(&[("a", true)]), 2);
        assert_eq!(spare(&[("a", true), ("b", true)]), 1);
        assert_eq!(spare(&[("a", true), ("b", true), ("c", true)]), 0);
        let writable = of(&[("a", true), ("b", false)]).unwrap_err();
        assert!(writable.contains("read-only, and \"b\" is not"));
        for wrong in [&[][..], &[("b", true)], &[("a", false)]] {
            assert!(of(wrong).unwrap_err().contains("must be the saved"));
        }
        let many = [("a", true), ("b", true), ("c", true), ("d", true)];
        assert!(of(&many).unwrap_err().contains("room for 2"));
        let other = header().clone_of("qemu-kvm", spec(&[("a", true)]));
        assert!(other.unwrap_err().contains("of the driver"));
        let mut bigger = spec(&[("a", true)]);
        (bigger.memory, bigger.vcpus) = (1 << 40, 32);
        let clone = header().clone_of("qemu-tcg", bigger).unwrap();
        assert_eq!((clone.memory, clone.vcpus), (64 << 20, 2));
    }
}
