//! What a clone had plugged when it was saved.
//!
//! Private memory is the snapshot's file, copy-on-write, as RAM is. A block that the
//! guest gives up and takes again must come back empty, and giving its pages back shows
//! the file again: so such a block is cleaned when it comes. To put other pages there
//! would take a system call (mmap) that the running device can do without.

use std::{ops::Range, os::fd::AsRawFd};

use nix::errno::Errno;

use super::Growth;
use crate::{
    Error,
    snapshot::{self, Plugged},
};

/// What a block is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Page {
    /// Pages of its own, which are empty when they come.
    Own,
    /// The snapshot's file; what is in it is the guest's.
    Saved,
    /// The snapshot's file; what is in it is given up.
    Worn,
}

impl Growth {
    /// Puts what was plugged where it was, out of reach until it is plugged again.
    pub(super) fn fill(&mut self, plugged: &Plugged) -> Result<(), Error> {
        let mut offset = plugged.offset;
        for blocks in plugged.saved.runs() {
            let address = |block: usize| {
                let blocks = u64::try_from(block).unwrap_or(u64::MAX);
                (self.region.start).saturating_add(super::BLOCK.saturating_mul(blocks))
            };
            let range = address(blocks.start)..address(blocks.end);
            if range.end > self.region.end {
                return Err(Error::Memory("place what was plugged into", Errno::EINVAL));
            }
            match self.file {
                Some(_) => self.copy(&range, plugged, offset)?,
                None => {
                    self.map(&range, plugged, offset)
                        .map_err(|e| Error::Memory("map what was plugged into", e))?;
                    self.set(&range, |_| Page::Saved);
                }
            }
            offset += range.end - range.start;
        }
        Ok(())
    }

    fn map(&self, range: &Range<u64>, plugged: &Plugged, offset: u64) -> Result<(), Errno> {
        let len = usize::try_from(range.end - range.start).map_err(|_| Errno::EINVAL)?;
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EINVAL)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let (at, file) = (self.at(range.start) as *mut libc::c_void, &plugged.file);
        // SAFETY: over a part of this region's own reservation, of which nobody has
        // seen anything.
        let mapped =
            unsafe { libc::mmap(at, len, libc::PROT_NONE, flags, file.as_raw_fd(), offset) };
        match mapped {
            libc::MAP_FAILED => Err(Errno::last()),
            _ => Ok(()),
        }
    }

    fn copy(&self, range: &Range<u64>, plugged: &Plugged, offset: u64) -> Result<(), Error> {
        (self.back(range, true)).map_err(|e| Error::Memory("back what was plugged in", e))?;
        let start = self.at(range.start) as *mut u8;
        snapshot::memory::copy(
            &plugged.file,
            offset,
            range.end - range.start,
            |at, bytes| {
                let at = usize::try_from(at).map_err(|_| snapshot::Error::Memory(range.start))?;
                // SAFETY: the piece lies in the range, which can be written to since it is
                // backed, and which nobody else knows.
                unsafe {
                    start
                        .add(at)
                        .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
                };
                Ok(())
            },
        )?;
        Ok(())
    }

    /// Empties what was given up of a range that is backed and that nobody can reach.
    pub(super) fn clean(&self, range: &Range<u64>) {
        let size = usize::try_from(super::BLOCK).unwrap_or(0);
        let blocks = self.blocks(range);
        let start = self.at(range.start);
        let pages = self.pages.get(blocks).unwrap_or_default();
        for (n, _) in pages
            .iter()
            .enumerate()
            .filter(|(_, it)| **it == Page::Worn)
        {
            let at = (start + n * size) as *mut u8;
            // SAFETY: the block lies in the range.
            unsafe { at.write_bytes(0, size) };
        }
    }

    /// What is in a range is given up.
    pub(super) fn wear(&mut self, range: &Range<u64>) {
        self.set(range, |page| match page {
            Page::Own => Page::Own,
            Page::Saved | Page::Worn => Page::Worn,
        });
    }

    fn set(&mut self, range: &Range<u64>, to: impl Fn(Page) -> Page) {
        let blocks = self.blocks(range);
        for page in self.pages.get_mut(blocks).unwrap_or_default() {
            *page = to(*page);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::{
        fs::File,
        os::unix::fs::{FileExt, MetadataExt},
    };

    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
    use walnut_devices::mem::{Blocks, Saved};

    use super::{
        super::{
            BLOCK,
            tests::{Rig, SIZE, START, blocks, rig},
        },
        *,
    };

    /// Where the plugged blocks lie in the file.
    const OFFSET: u64 = 4 << 20;

    /// Blocks 1, 2 and 5 of a snapshot, each with its number and the byte `x` at its
    /// end.
    fn plugged() -> Plugged {
        let file = tempfile::tempfile().unwrap();
        file.set_len(OFFSET + 3 * BLOCK).unwrap();
        let mut plugged = vec![false; usize::try_from(SIZE / BLOCK).unwrap()];
        for (n, block) in [1u8, 2, 5].into_iter().enumerate() {
            plugged[usize::from(block)] = true;
            let at = OFFSET + n as u64 * BLOCK;
            file.write_all_at(&[block], at).unwrap();
            file.write_all_at(b"x", at + BLOCK - 1).unwrap();
        }
        let saved = Saved {
            region: super::super::region(&(START..START + SIZE)),
            requested: 3 * BLOCK,
            plugged,
        };
        Plugged {
            saved,
            file,
            offset: OFFSET,
        }
    }

    fn clone(shared: bool, plugged: &Plugged) -> Rig {
        let mut rig = rig(shared);
        rig.growth.fill(plugged).unwrap();
        rig.growth.plug_all(&[blocks(1..3), blocks(5..6)]).unwrap();
        rig
    }

    fn ends(rig: &Rig, block: u64) -> (u8, u8) {
        let memory = rig.cell.memory();
        let read = |at: u64| memory.read_obj::<u8>(GuestAddress(START + at)).unwrap();
        (read(block * BLOCK), read((block + 1) * BLOCK - 1))
    }

    fn bytes(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(OFFSET + 3 * BLOCK).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn a_clone_has_what_was_plugged_and_the_file_stays_as_it_is() {
        for shared in [false, true] {
            let plugged = plugged();
            let before = bytes(&plugged.file);
            let (one, two) = (clone(shared, &plugged), clone(shared, &plugged));
            for block in 0..8 {
                let there = [1, 2, 5].contains(&block);
                assert_eq!(one.reachable(block), there, "block {block}, {shared}");
            }
            for block in [1u8, 2, 5] {
                assert_eq!(ends(&one, block.into()), (block, b'x'));
                let at = GuestAddress(START + u64::from(block) * BLOCK);
                one.cell.memory().write_obj(77u8, at).unwrap();
                assert_eq!(ends(&two, block.into()), (block, b'x'));
            }
            assert!(bytes(&plugged.file) == before, "{shared}");
        }
    }

    #[test]
    fn what_a_clone_gave_up_comes_back_empty_every_time() {
        for shared in [false, true] {
            let mut rig = clone(shared, &plugged());
            for round in 0..3 {
                rig.growth.unplug(blocks(2..3)).unwrap();
                assert!(rig.reachable(1) && !rig.reachable(2));
                // With neighbours that never were there, and that stay.
                rig.growth.plug(blocks(2..5)).unwrap();
                for block in 2..5 {
                    assert_eq!(ends(&rig, block), (0, 0), "round {round}, {shared}");
                }
                let at = GuestAddress(START + 2 * BLOCK);
                rig.cell.memory().write_obj(9u8, at).unwrap();
                rig.growth.unplug(blocks(3..5)).unwrap();
            }
            assert_eq!(ends(&rig, 1), (1, b'x'));
            assert_eq!(ends(&rig, 5), (5, b'x'));
        }
    }

    #[test]
    fn a_copy_has_holes_where_the_snapshot_has_zeroes() {
        let rig = clone(true, &plugged());
        let file = rig.growth.file.as_ref().unwrap();
        // Two pages for each block.
        assert!(file.metadata().unwrap().blocks() * 512 <= 6 * 4096);
    }

    #[test]
    fn a_file_that_ends_early_is_refused_when_it_is_copied() {
        let plugged = plugged();
        plugged.file.set_len(OFFSET + BLOCK).unwrap();
        assert!(rig(true).growth.fill(&plugged).is_err());
    }
}
