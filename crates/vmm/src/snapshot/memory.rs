//! The memory file: RAM at its own offsets, holes where it is zero, and behind it
//! a page with the magic and the identity.
//!
//! All of RAM is looked at, and pages of zeroes are left out. `mincore` does not
//! say which were never touched: it calls anonymous pages that are swapped out
//! absent, and they would be lost.

use std::{fs::File, io, os::unix::fs::FileExt};

use vm_memory::{Address, Bytes, GuestMemoryBackend, GuestMemoryRegion};
use walnut_devices::virtio::Memory;

use super::{Error, envelope::Identity};

const PAGE: usize = 4096;
const PAGE_LEN: u64 = 4096;
const MAGIC: [u8; 8] = *b"WALNUTSM";

/// Writes guest memory, none of which may change meanwhile, to an empty file.
pub(crate) fn write(memory: &Memory, identity: &Identity, file: &File) -> Result<(), Error> {
    let failed = |e| Error::Io("write the memory file", e);
    let mut page = [0; PAGE];
    let mut offset = 0;
    for region in memory.iter() {
        let start = region.start_addr();
        for at in (0..region.len()).step_by(PAGE) {
            let address = start.unchecked_add(at);
            memory
                .read_slice(&mut page, address)
                .map_err(|_| Error::Memory(address.raw_value()))?;
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(&page, offset + at).map_err(failed)?;
            }
        }
        offset += region.len();
    }
    file.set_len(offset + PAGE_LEN).map_err(failed)?;
    file.write_all_at(&MAGIC, offset).map_err(failed)?;
    file.write_all_at(identity, offset + 8).map_err(failed)?;
    file.sync_data().map_err(failed)
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
    use walnut_vmm_api::Backing;

    use super::*;

    const SIZE: u64 = 64 << 20;

    #[test]
    fn memory_is_at_its_offsets_and_zeroes_are_holes() {
        let memory = crate::memory::create(SIZE, Backing::default()).unwrap();
        memory.write_slice(b"first", GuestAddress(1)).unwrap();
        let last = SIZE - 4;
        memory.write_slice(b"last", GuestAddress(last)).unwrap();
        let file = tempfile::tempfile().unwrap();
        write(&memory, &[3; 16], &file).unwrap();
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
