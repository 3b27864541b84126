//! The memory file: RAM at its own offsets, holes where it is zero, and behind it
//! a page with the magic and the identity.
//!
//! All of RAM is looked at, and pages of zeroes are left out. `mincore` does not
//! say which were never touched: it calls anonymous pages that are swapped out
//! absent, and they would be lost.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};
use vm_memory::{Address, Bytes, GuestMemoryBackend, GuestMemoryRegion};
use walnut_devices::virtio::Memory;
use walnut_vmm_api::Backing;

use super::{Error, envelope::Identity};

const PAGE: usize = 4096;
const PAGE_LEN: u64 = 4096;
/// Compared with in one go, where a look at each byte would take ten times as long.
const ZEROES: [u8; PAGE] = [0; PAGE];
/// Bytes looked at, and written or read, at a time.
const CHUNK: usize = 64 << 10;
const MAGIC: [u8; 8] = *b"WALNUTSM";

/// Writes guest memory, none of which may change meanwhile, to an empty file; its
/// size.
pub(crate) fn write(memory: &Memory, identity: &Identity, file: &File) -> Result<u64, Error> {
    let failed = |e| Error::Io("write the memory file", e);
    let mut chunk = vec![0; CHUNK];
    let mut offset = 0;
    for region in memory.iter() {
        let start = region.start_addr();
        for at in (0..region.len()).step_by(CHUNK) {
            let address = start.unchecked_add(at);
            let len = usize::try_from(region.len() - at).map_or(CHUNK, |len| len.min(CHUNK));
            let chunk = chunk.get_mut(..len).unwrap_or_default();
            memory
                .read_slice(chunk, address)
                .map_err(|_| Error::Memory(address.raw_value()))?;
            for (from, bytes) in used(chunk) {
                file.write_all_at(bytes, offset + at + from)
                    .map_err(failed)?;
            }
        }
        offset += region.len();
    }
    file.set_len(offset + PAGE_LEN).map_err(failed)?;
    let mark = [&MAGIC[..], identity].concat();
    file.write_all_at(&mark, offset).map_err(failed)?;
    file.sync_data().map_err(failed)?;
    Ok(offset)
}

/// Runs of pages that are not all zero, with their offsets.
fn used(chunk: &[u8]) -> Vec<(u64, &[u8])> {
    let mut runs: Vec<(u64, &[u8])> = Vec::new();
    let (mut start, mut at) = (None, 0);
    for page in chunk.chunks(PAGE).chain([&[][..]]) {
        let zero = ZEROES.starts_with(page);
        match (start, zero) {
            (None, false) => start = Some(at),
            (Some(from), true) => {
                runs.push((from as u64, chunk.get(from..at).unwrap_or_default()));
                start = None;
            }
            _ => {}
        }
        at += page.len();
    }
    runs
}

/// Guest memory with what the file holds: the file itself, copy-on-write, where
/// memory is private and of ordinary pages, else a copy. The file has been checked.
pub(crate) fn map(file: &File, size: u64, backing: Backing) -> Result<Memory, crate::Error> {
    if backing == Backing::default() {
        return crate::memory::map_private(size, file);
    }
    let memory = crate::memory::create(size, backing)?;
    let mut offset = 0;
    for region in memory.iter() {
        let start = region.start_addr();
        let sent = match region.file_offset() {
            Some(to) if !backing.huge_pages => {
                send(file, offset..offset + region.len(), to.file(), to.start())?
            }
            _ => false,
        };
        if !sent {
            copy(file, offset, region.len(), |at, bytes| {
                let address = start.unchecked_add(at);
                memory
                    .write_slice(bytes, address)
                    .map_err(|_| Error::Memory(address.raw_value()))
            })?;
        }
        offset += region.len();
    }
    Ok(memory)
}

/// Has the kernel copy a piece of the file to a place in another one, which is empty there:
/// page by page, without a fault for each, as there is for memory that is mapped. False if
/// it cannot with these files.
fn send(file: &File, piece: Range<u64>, to: &File, place: u64) -> Result<bool, Error> {
    let failed = |e: io::Error| Error::Io("copy the memory file", e);
    let number = |n: u64| i64::try_from(n).map_err(|_| failed(io::ErrorKind::InvalidInput.into()));
    let mut at = piece.start;
    while let Some(data) = next_data(file, at..piece.end).map_err(failed)? {
        at = data.start;
        let into = number(place + (at - piece.start))?;
        lseek(to, into, Whence::SeekSet).map_err(|e| failed(e.into()))?;
        while at < data.end {
            let mut from = number(at)?;
            let len = usize::try_from(data.end - at).unwrap_or(usize::MAX);
            // SAFETY: takes descriptors that are open, and a number of ours.
            let sent =
                unsafe { libc::sendfile(to.as_raw_fd(), file.as_raw_fd(), &raw mut from, len) };
            match Errno::result(sent) {
                Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(sent) => at = at.saturating_add(u64::try_from(sent).unwrap_or(0)),
                Err(Errno::EINTR) => {}
                Err(Errno::EINVAL | Errno::ENOSYS) => return Ok(false),
                Err(e) => return Err(failed(e.into())),
            }
        }
    }
    Ok(true)
}

/// Reads a piece of the file, and gives `put` what is not zero with its place in the
/// piece.
pub(crate) fn copy(
    file: &File,
    offset: u64,
    len: u64,
    mut put: impl FnMut(u64, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let failed = |e| Error::Io("read the memory file", e);
    let mut chunk = vec![0; CHUNK];
    let mut at = offset;
    let end = offset.saturating_add(len);
    while let Some(data) = next_data(file, at..end).map_err(failed)? {
        at = data.start;
        while at < data.end {
            let part = usize::try_from(data.end - at).map_or(CHUNK, |len| len.min(CHUNK));
            let chunk = chunk.get_mut(..part).unwrap_or_default();
            file.read_exact_at(chunk, at).map_err(failed)?;
            for (from, bytes) in used(chunk) {
                put(at - offset + from, bytes)?;
            }
            at += chunk.len() as u64;
        }
    }
    Ok(())
}

/// The first part of a piece of the file that is no hole. A file system that knows of no
/// holes has none.
fn next_data(file: &File, piece: Range<u64>) -> io::Result<Option<Range<u64>>> {
    let seek = |at: u64, whence| {
        let at = i64::try_from(at).map_err(|_| Errno::EINVAL)?;
        lseek(file, at, whence).map(|at| u64::try_from(at).unwrap_or(u64::MAX))
    };
    if piece.is_empty() {
        return Ok(None);
    }
    let start = match seek(piece.start, Whence::SeekData) {
        // Nothing but a hole, or not even that: then the file is too short, and the read of
        // its last byte says so.
        Err(Errno::ENXIO) => {
            file.read_exact_at(&mut [0], piece.end - 1)?;
            return Ok(None);
        }
        start => start?,
    };
    let end = seek(start, Whence::SeekHole)?.min(piece.end);
    Ok((start < piece.end).then_some(start..end))
}

/// Whether a file has `size` bytes of memory of the snapshot `identity`.
///
/// What the pages hold is not digested: that would read all that a restore wants
/// to leave on the disk. They are a guest's, and trusted no more than it.
pub(crate) fn check(file: &File, identity: &Identity, size: u64) -> Result<(), Error> {
    let found = file
        .metadata()
        .map_err(|e| Error::Io("examine the memory file", e))?
        .len();
    // A size without a successor is none that a file has.
    let expected = size.saturating_add(PAGE_LEN);
    if found != expected {
        return Err(Error::Length {
            what: "memory",
            found,
            expected,
        });
    }
    let mut mark = [0; 24];
    file.read_exact_at(&mut mark, size)
        .map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => Error::Foreign("memory"),
            _ => Error::Io("read the memory file", e),
        })?;
    let (magic, its) = mark.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(Error::Foreign("memory"));
    }
    match its == identity {
        true => Ok(()),
        false => Err(Error::Mismatch),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::GuestAddress;

    use super::*;

    const SIZE: u64 = 64 << 20;

    #[test]
    fn memory_is_at_its_offsets_and_zeroes_are_holes() {
        let memory = crate::memory::create(SIZE, Backing::default()).unwrap();
        memory.write_slice(b"first", GuestAddress(1)).unwrap();
        let last = SIZE - 4;
        memory.write_slice(b"last", GuestAddress(last)).unwrap();
        let file = tempfile::tempfile().unwrap();
        assert_eq!(write(&memory, &[3; 16], &file).unwrap(), SIZE);
        check(&file, &[3; 16], SIZE).unwrap();
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, 1).unwrap();
        assert_eq!(&bytes, b"first");
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, last).unwrap();
        assert_eq!(&bytes, b"last");
        // Three pages; a file system may give more at once.
        assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn what_was_written_is_mapped_and_the_file_stays_as_it_is() {
        let memory = crate::memory::create(SIZE, Backing::default()).unwrap();
        let places = [0, 4096 * 15 + 4090, 4096 * 17, SIZE / 2 + 5, SIZE - 8];
        for place in places {
            memory
                .write_slice(b"present!", GuestAddress(place))
                .unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        write(&memory, &[3; 16], &file).unwrap();
        let shared = Backing {
            shared: true,
            huge_pages: false,
        };
        for backing in [Backing::default(), shared] {
            let clone = map(&file, SIZE, backing).unwrap();
            for place in places {
                let mut bytes = [0; 8];
                clone.read_slice(&mut bytes, GuestAddress(place)).unwrap();
                assert_eq!(&bytes, b"present!", "{place:#x} {backing:?}");
                clone.write_slice(b"changed!", GuestAddress(place)).unwrap();
            }
        }
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, SIZE - 8).unwrap();
        assert_eq!(&bytes, b"present!");
    }

    #[test]
    fn another_memory_is_refused() {
        let memory = crate::memory::create(SIZE, Backing::default()).unwrap();
        let file = tempfile::tempfile().unwrap();
        write(&memory, &[3; 16], &file).unwrap();
        let other = check(&file, &[4; 16], SIZE);
        assert!(matches!(other, Err(Error::Mismatch)));
        for size in [0, SIZE / 2, SIZE * 2, u64::MAX] {
            let other = check(&file, &[3; 16], size);
            assert!(matches!(other, Err(Error::Length { .. })), "{size}");
        }
        file.write_all_at(b"X", SIZE).unwrap();
        let foreign = check(&file, &[3; 16], SIZE);
        assert!(matches!(foreign, Err(Error::Foreign("memory"))));
        file.set_len(SIZE - 1).unwrap();
        let cut = check(&file, &[3; 16], SIZE);
        assert!(matches!(cut, Err(Error::Length { .. })));
    }
}
