//! A guest's memory: a file without a name, mapped by QEMU and by every vhost-user
//! back end, and held by the supervisor too, which saves it and fills it.
//!
//! A clone copies what was saved. To share it copy-on-write would cost nothing, but
//! what one process writes into such a mapping the others do not see, and the vsock
//! device is another process: that is the price of vhost-user.

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::OwnedFd, unix::fs::FileExt},
};

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom, fcntl_add_seals, memfd_create, seek, sendfile};

use crate::takeover::{Fd, Giver, Taker};

/// A page of the guest.
const PAGE: usize = 4096;
/// Read at once while memory is saved, in bytes.
const CHUNK: usize = 256 * PAGE;

/// Guest memory. Dropping it frees it once nobody maps it.
#[derive(Debug)]
pub(super) struct Memory(File);

impl Memory {
    /// So many bytes of zero, which nobody can make fewer or more.
    pub(super) fn new(bytes: u64) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("walnut-guest", flags)?);
        file.set_len(bytes)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Self(file))
    }

    /// For the next program.
    pub(super) fn give(&self, giver: &mut Giver) -> Fd {
        giver.give(&self.0)
    }

    /// That of the program before.
    pub(super) fn take_over(fd: Fd, taker: &mut Taker) -> io::Result<Self> {
        Ok(Self(taker.take(fd)?.into()))
    }

    /// A descriptor for a process to map.
    pub(super) fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }

    /// Writes it to an empty file, with holes where it is zero. The guest stands.
    pub(super) fn save(&self, to: &File) -> io::Result<()> {
        let length = self.0.metadata()?.len();
        to.set_len(length)?;
        let mut buffer = vec![0; CHUNK];
        extents(&self.0, |mut at, end| {
            while at < end {
                let count = CHUNK.min(usize::try_from(end - at).unwrap_or(CHUNK));
                let chunk = buffer.get_mut(..count).unwrap_or_default();
                self.0.read_exact_at(chunk, at)?;
                for (offset, run) in runs(chunk) {
                    to.write_all_at(run, at + u64::try_from(offset).unwrap_or(0))?;
                }
                at += u64::try_from(count).unwrap_or(0);
            }
            Ok(())
        })
    }

    /// Copies what a file of the same length holds into memory that is all zero.
    pub(super) fn fill(&self, from: &File) -> io::Result<()> {
        extents(from, |mut at, end| {
            seek(&self.0, SeekFrom::Start(at))?;
            while at < end {
                let count = usize::try_from(end - at).unwrap_or(usize::MAX);
                if sendfile(&self.0, from, Some(&mut at), count)? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Ok(())
        })
    }
}

/// The parts of a file that are no holes, as offsets.
fn extents(file: &File, mut each: impl FnMut(u64, u64) -> io::Result<()>) -> io::Result<()> {
    let mut end = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(end)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        end = seek(file, SeekFrom::Hole(start))?;
        each(start, end)?;
    }
}

/// The parts of a chunk that are not zero, in whole pages, with their offsets.
fn runs(chunk: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let zero = |at: usize| {
        let page = chunk.get(at..chunk.len().min(at + PAGE));
        page.is_none_or(|page| page == &[0; PAGE][..page.len()])
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < chunk.len() && zero(at) {
            at += PAGE;
        }
        let start = at;
        while at < chunk.len() && !zero(at) {
            at += PAGE;
        }
        let run = chunk.get(start..at.min(chunk.len()))?;
        (!run.is_empty()).then_some((start, run))
    })
}

/// Writes a whole file.
pub(super) fn write(mut file: &File, parts: &[&[u8]]) -> io::Result<()> {
    parts.iter().try_for_each(|part| file.write_all(part))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_was_saved_comes_back_and_zero_takes_no_room() {
        let memory = Memory::new(8 << 20).unwrap();
        let pages = [0u64, 1, 3, 1023, 1024, 2047];
        for page in pages {
            memory.0.write_all_at(b"x", page * 4096 + 17).unwrap();
        }
        // Touched, and zero again.
        memory.0.write_all_at(&[0; 8192], 5 << 20).unwrap();
        let file = tempfile::tempfile().unwrap();
        memory.save(&file).unwrap();
        let saved = file.metadata().unwrap();
        assert_eq!(saved.len(), 8 << 20);
        assert!(saved.blocks() <= 6 * 8 + 8, "{} blocks", saved.blocks());
        let clone = Memory::new(8 << 20).unwrap();
        clone.fill(&file).unwrap();
        let bytes = |memory: &Memory| {
            let mut bytes = vec![0; 8 << 20];
            memory.0.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let bytes = (bytes(&memory), bytes(&clone));
        assert!(bytes.0 == bytes.1);
        assert_eq!(bytes.1.iter().filter(|&&byte| byte == b'x').count(), 6);
    }

    #[test]
    fn it_keeps_its_size() {
        let memory = Memory::new(1 << 20).unwrap();
        assert!(memory.0.set_len(0).is_err() && memory.0.set_len(2 << 20).is_err());
        // A file that is longer does not fit.
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 << 20).unwrap();
        file.write_all_at(b"x", (1 << 20) + 1).unwrap();
        assert!(memory.fill(&file).is_err());
    }
}
