//! What a memory device was, as a snapshot has it.

use std::ops::Range;

use super::Region;

/// Version of what is saved.
const VERSION: u8 = 1;
/// Bytes of the region and the size asked for.
const WORDS: usize = 32;

/// A device's state: version, region, size asked for, a bit for each block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// Where its memory is.
    pub region: Region,
    /// Bytes that the guest was asked to have.
    pub requested: u64,
    /// Which blocks were plugged, of all that there are.
    pub plugged: Vec<bool>,
}

impl Saved {
    /// Reads a state, which is hostile: the region makes sense, there are as many
    /// blocks as it has, and what is asked for fits it.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (&version, rest) = bytes.split_first()?;
        let (words, bits) = rest.split_at_checked(WORDS)?;
        let (words, _) = words.as_chunks::<8>();
        let &[addr, size, block, requested] = words else {
            return None;
        };
        let region = Region {
            addr: u64::from_le_bytes(addr),
            size: u64::from_le_bytes(size),
            block: u64::from_le_bytes(block),
        };
        let requested = u64::from_le_bytes(requested);
        region.check().ok()?;
        let right = version == VERSION
            && bits.len() == region.count().div_ceil(8)
            && requested <= region.size
            && requested.is_multiple_of(region.block);
        if !right {
            return None;
        }
        let mut plugged: Vec<bool> = bits
            .iter()
            .flat_map(|byte| (0..8).map(move |n| byte & 1 << n != 0))
            .collect();
        let beyond = plugged.split_off(region.count());
        (!beyond.contains(&true)).then_some(Self {
            region,
            requested,
            plugged,
        })
    }

    /// Undoes [`Self::parse`].
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        let Region { addr, size, block } = self.region;
        for word in [addr, size, block, self.requested] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(self.plugged.chunks(8).map(|eight| {
            let bits = eight.iter().enumerate();
            bits.fold(0, |byte, (n, plugged)| byte | u8::from(*plugged) << n)
        }));
        bytes
    }

    /// The plugged blocks, as ranges in order.
    pub fn runs(&self) -> Vec<Range<usize>> {
        runs(&self.plugged)
    }

    /// Bytes of the plugged blocks.
    pub fn bytes_plugged(&self) -> u64 {
        let blocks = self.plugged.iter().filter(|plugged| **plugged);
        blocks.map(|_| self.region.block).sum()
    }
}

/// The plugged blocks, as ranges in order.
pub(super) fn runs(plugged: &[bool]) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    for (at, _) in plugged.iter().enumerate().filter(|(_, plugged)| **plugged) {
        match out.last_mut() {
            Some(last) if last.end == at => last.end += 1,
            _ => out.push(at..at + 1),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn saved(blocks: usize) -> Saved {
        Saved {
            region: Region {
                addr: 1 << 32,
                size: 4096 * blocks as u64,
                block: 4096,
            },
            requested: 8192,
            plugged: (0..blocks).map(|n| n % 3 != 1).collect(),
        }
    }

    #[test]
    fn what_was_saved_is_read_and_nothing_near_it() {
        for blocks in 2..20 {
            let saved = saved(blocks);
            let bytes = saved.bytes();
            assert_eq!(Saved::parse(&bytes), Some(saved.clone()));
            for len in 0..bytes.len() {
                assert_eq!(Saved::parse(&bytes[..len]), None, "{len} of {blocks}");
            }
            // A bit of a block that is not there.
            if blocks % 8 != 0 {
                let mut more = bytes.clone();
                *more.last_mut().unwrap() |= 0x80;
                assert_eq!(Saved::parse(&more), None);
            }
            assert_eq!(Saved::parse(&[&bytes[..], &[0]].concat()), None);
            for (at, value) in [(0, 2), (1, 1), (17, 1), (25, 1), (31, 0xff)] {
                let mut other = bytes.clone();
                other[at] = value;
                assert_eq!(Saved::parse(&other), None, "byte {at}");
            }
            let sum: usize = saved.runs().iter().map(Range::len).sum();
            assert_eq!(saved.bytes_plugged(), sum as u64 * 4096);
        }
    }
}
