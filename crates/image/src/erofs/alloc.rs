//! Places inodes, with what follows them inline, into metadata blocks.

use super::format::{BLOCK, SLOT};

/// Slots of a block.
const SLOTS: u64 = BLOCK / SLOT;

/// Best fit over the blocks begun so far, in order of arrival: inodes of one
/// directory stay near each other, and tails of files fill up blocks.
#[derive(Debug)]
pub(crate) struct Allocator {
    /// Blocks by their count of free slots at their end.
    open: Vec<Vec<u64>>,
    blocks: u64,
}

impl Allocator {
    /// The first 64 bytes stay free, as an inode number of 0 means "none" to
    /// many programs.
    pub(crate) fn new() -> Self {
        let slots = usize::try_from(SLOTS).unwrap_or(0);
        let mut open = vec![Vec::new(); slots + 1];
        open[slots - 2].push(0);
        Self { open, blocks: 1 }
    }

    /// The number (nid) of an inode of `bytes` bytes, inline parts included.
    /// Up to a block, it does not cross a block's end.
    pub(crate) fn place(&mut self, bytes: u64) -> u64 {
        let need = bytes.div_ceil(SLOT);
        let fit = (need..=SLOTS)
            .filter_map(|free| usize::try_from(free).ok())
            .find(|free| !self.open[*free].is_empty());
        if need <= SLOTS
            && let Some(free) = fit
            && let Some(block) = self.open[free].pop()
        {
            let free = free as u64;
            self.reopen(block, free - need);
            return block * SLOTS + (SLOTS - free);
        }
        let block = self.blocks;
        let take = need.div_ceil(SLOTS);
        self.blocks += take;
        self.reopen(block + take - 1, take * SLOTS - need);
        block * SLOTS
    }

    fn reopen(&mut self, block: u64, free: u64) {
        // Less than an inode and a byte is of no use.
        if free > 2
            && let Some(list) = usize::try_from(free)
                .ok()
                .and_then(|free| self.open.get_mut(free))
        {
            list.push(block);
        }
    }

    /// Blocks taken.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn places_never_overlap_nor_cross(sizes in prop::collection::vec(64u64..9000, 1..300)) {
            let mut alloc = Allocator::new();
            let mut taken: Vec<(u64, u64)> = sizes
                .iter()
                .map(|size| (alloc.place(*size) * SLOT, *size))
                .collect();
            for (at, size) in &taken {
                prop_assert!(*at >= 64);
                prop_assert!(at + size <= alloc.blocks() * BLOCK);
                if *size <= BLOCK {
                    prop_assert_eq!(at / BLOCK, (at + size - 1) / BLOCK);
                }
            }
            taken.sort_unstable();
            for pair in taken.windows(2) {
                prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0);
            }
        }
    }
}
