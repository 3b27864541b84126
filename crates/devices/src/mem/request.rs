//! What the driver asks for (virtio 1.3 §5.15.6).

use std::ops::Range;

use super::{Error, MAX_BLOCKS, MIN_BLOCK, Region};

/// Bytes of a request and of an answer.
pub(super) const REQUEST: usize = 24;
pub(super) const ANSWER: usize = 10;

/// `VIRTIO_MEM_REQ_*`, checked: the blocks lie in the region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Range<usize>),
    Unplug(Range<usize>),
    UnplugAll,
    State(Range<usize>),
}

/// `VIRTIO_MEM_RESP_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Ack,
    State(State),
    Nack,
    Busy,
    Error,
}

/// `VIRTIO_MEM_STATE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Plugged,
    Unplugged,
    Mixed,
}

impl Answer {
    pub(super) fn bytes(self) -> [u8; ANSWER] {
        let (kind, state) = match self {
            Self::Ack | Self::State(State::Plugged) => (0, 0),
            Self::State(State::Unplugged) => (0, 1),
            Self::State(State::Mixed) => (0, 2),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

impl Request {
    /// `None` is answered with an error.
    pub(super) fn parse(raw: &[u8; REQUEST], region: &Region) -> Option<Self> {
        let [k0, k1, _, _, _, _, _, _, a @ .., n0, n1, _, _, _, _, _, _] = raw;
        let addr = u64::from_le_bytes(*a);
        let blocks = || region.blocks(addr, u16::from_le_bytes([*n0, *n1]));
        match u16::from_le_bytes([*k0, *k1]) {
            0 => Some(Self::Plug(blocks()?)),
            1 => Some(Self::Unplug(blocks()?)),
            2 => Some(Self::UnplugAll),
            3 => Some(Self::State(blocks()?)),
            _ => None,
        }
    }
}

impl Region {
    pub(super) fn check(&self) -> Result<(), Error> {
        let multiple = |n: u64| n.is_multiple_of(self.block);
        let right = self.block.is_power_of_two()
            && self.block >= MIN_BLOCK
            && multiple(self.addr)
            && multiple(self.size)
            && (1..=MAX_BLOCKS).contains(&(self.size / self.block))
            && self.addr.checked_add(self.size).is_some();
        if right {
            Ok(())
        } else {
            Err(Error::Region(*self))
        }
    }

    /// How many blocks there are.
    pub(super) fn count(&self) -> usize {
        usize::try_from(self.size / self.block).unwrap_or(0)
    }

    /// The blocks from `addr` on, if they are blocks of this region.
    fn blocks(&self, addr: u64, count: u16) -> Option<Range<usize>> {
        let offset = addr.checked_sub(self.addr)?;
        if count == 0 || !offset.is_multiple_of(self.block) {
            return None;
        }
        let first = offset / self.block;
        let end = first.checked_add(u64::from(count))?;
        (end <= self.size / self.block)
            .then_some(usize::try_from(first).ok()?..usize::try_from(end).ok()?)
    }

    /// The guest addresses of blocks.
    pub(super) fn addresses(&self, blocks: &Range<usize>) -> Range<u64> {
        let at = |n: usize| self.addr + u64::try_from(n).unwrap_or(0) * self.block;
        at(blocks.start)..at(blocks.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION: Region = Region {
        addr: 0x1_0000_0000,
        size: 0x80_0000,
        block: 0x20_0000,
    };

    fn raw(kind: u16, addr: u64, count: u16) -> [u8; REQUEST] {
        let mut raw = [0xee; REQUEST];
        raw[..2].copy_from_slice(&kind.to_le_bytes());
        raw[8..16].copy_from_slice(&addr.to_le_bytes());
        raw[16..18].copy_from_slice(&count.to_le_bytes());
        raw
    }

    #[test]
    fn only_blocks_of_the_region_are_taken() {
        let edges = [0, REGION.addr, REGION.addr + REGION.size, u64::MAX, 1 << 63];
        for edge in edges {
            for step in -5i64..=5 {
                for off in [-1, 0, 1, 0x1000] {
                    let addr = edge.wrapping_add_signed(step * 0x20_0000 + off);
                    for count in [0, 1, 2, 3, 4, 5, 0x7fff, 0xffff] {
                        let end = u128::from(addr) + u128::from(count) * 0x20_0000;
                        let right = count > 0
                            && addr >= REGION.addr
                            && addr % 0x20_0000 == 0
                            && end <= u128::from(REGION.addr + REGION.size);
                        for kind in [0, 1, 3] {
                            let parsed = Request::parse(&raw(kind, addr, count), &REGION);
                            assert_eq!(parsed.is_some(), right, "{addr:x} {count}");
                        }
                    }
                }
            }
        }
        let some = Request::parse(&raw(0, REGION.addr + 0x20_0000, 3), &REGION);
        assert_eq!(some, Some(Request::Plug(1..4)));
        assert_eq!(
            Request::parse(&raw(2, 7, 0), &REGION),
            Some(Request::UnplugAll)
        );
        for kind in 4..=u16::MAX {
            assert_eq!(Request::parse(&raw(kind, REGION.addr, 1), &REGION), None);
        }
    }

    #[test]
    fn regions_without_a_meaning_are_refused() {
        assert!(REGION.check().is_ok());
        let bad = |change: fn(&mut Region)| {
            let mut region = REGION;
            change(&mut region);
            assert_eq!(region.check(), Err(Error::Region(region)));
        };
        bad(|region| region.block = 0);
        bad(|region| region.block = 2048);
        bad(|region| region.block = 0x30_0000);
        bad(|region| region.addr += 4096);
        bad(|region| region.size -= 1);
        bad(|region| region.size = 0);
        bad(|region| region.size = (MAX_BLOCKS + 1) * 0x20_0000);
        bad(|region| region.addr = u64::MAX - 0x1f_ffff);
    }
}
