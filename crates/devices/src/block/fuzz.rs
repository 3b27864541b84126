//! What a fuzz target, and an exhaustive test, asks of the parser of requests: that
//! it says what a model says that takes the specification word by word.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a check fails by panicking"
)]

use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};

use super::{
    MAX_PIECES, SECTOR,
    request::{Kind, parse},
    task::{Piece, Pieces},
};
use crate::virtio::Memory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A piece of host memory: address and length.
type Part = (usize, usize);

/// Where a range of guest addresses lies, region by region; `None` if not all of it
/// is memory.
fn parts(memory: &Memory, mut at: u64, mut len: u64) -> Option<Vec<Part>> {
    let mut out = Vec::new();
    at.checked_add(len)?;
    while len > 0 {
        let region = memory
            .iter()
            .find(|region| at >= region.start_addr().0 && at <= region.last_addr().0)?;
        let offset = at - region.start_addr().0;
        let part = len.min(region.len() - offset);
        let host = region.get_host_address(MemoryRegionAddress(offset)).ok()?;
        out.push((host.addr(), usize::try_from(part).unwrap()));
        (at, len) = (at.wrapping_add(part), len - part);
    }
    Some(out)
}

/// Parses a chain of descriptors (address, length, writable), the last of which
/// says that another follows if `endless`, and checks what comes of it.
pub fn request(memory: &Memory, chain: &[(u64, u32, bool)], endless: bool) {
    let last = chain.len().saturating_sub(1);
    let descriptors = chain.iter().enumerate().map(|(n, (addr, len, write))| {
        let next = if n < last || endless { NEXT } else { 0 };
        let flags = next | if *write { WRITE } else { 0 };
        Descriptor::new(*addr, *len, flags, 0)
    });
    let mut list = vec![Piece::EMPTY; MAX_PIECES];
    let parsed = parse(memory, descriptors, Pieces::new(&mut list));
    let found: Vec<_> = list.iter().take(parsed.pieces).map(Piece::parts).collect();
    if endless || chain.is_empty() {
        assert!(parsed.status.is_none() && parsed.request.is_none());
        return;
    }
    // Here the model begins (virtio 1.3 §5.2.6, §2.7.4).
    let full = || chain.iter().filter(|(_, len, _)| *len > 0);
    let readable: Vec<_> = full().filter(|part| !part.2).collect();
    let mut writable: Vec<_> = full().filter(|part| part.2).copied().collect();
    let ordered = full().is_sorted_by_key(|part| part.2);
    let status = writable.last_mut().and_then(|(at, len, _)| {
        *len -= 1;
        let at = at.checked_add(u64::from(*len))?;
        memory.find_region(GuestAddress(at)).map(|_| at)
    });
    assert_eq!(parsed.status.map(|at| at.raw_value()), status);
    let mut header = Vec::new();
    let mut expected = Some(Vec::new());
    let mut bytes = [0, 0];
    for &(at, len, write) in readable.into_iter().chain(&writable) {
        let (mut at, mut len) = (at, u64::from(len));
        if !write && header.len() < 16 {
            let part = len.min(16 - header.len() as u64);
            let mut raw = vec![0; usize::try_from(part).unwrap()];
            if parts(memory, at, part).is_none() {
                expected = None;
            } else {
                memory.read_slice(&mut raw, GuestAddress(at)).unwrap();
            }
            header.extend(raw);
            (at, len) = (at.wrapping_add(part), len - part);
        }
        bytes[usize::from(write)] += len;
        match (parts(memory, at, len), &mut expected) {
            (Some(more), Some(list)) => list.extend(more),
            _ if len > 0 => expected = None,
            _ => {}
        }
    }
    let expected = expected.filter(|list| list.len() <= MAX_PIECES);
    let whole = ordered && header.len() == 16 && status.is_some() && expected.is_some();
    let word = |at: usize| {
        let raw = header.get(at..at + 8).and_then(|raw| raw.try_into().ok());
        raw.map_or(0, u64::from_le_bytes)
    };
    let start = word(8).checked_mul(SECTOR).filter(|_| whole);
    match (parsed.request, start) {
        (None, None) => {}
        (Some(request), Some(start)) => {
            let kind = u32::try_from(word(0) & u64::from(u32::MAX)).unwrap();
            assert_eq!(request.kind, Kind::from(kind));
            assert_eq!((request.at, request.readable), (start, bytes[0]));
            assert_eq!(request.writable, bytes[1]);
            assert_eq!(found, expected.unwrap());
        }
        (found, start) => panic!("{found:?} where {start:?} was expected, of {chain:x?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEAM: u64 = 0x1000;
    const HOLE: u64 = 0x2000;
    const HOLE_END: u64 = 0x3000;
    const END: u64 = 0x4000;

    /// Two regions that touch, a hole, another; headers of several kinds in it.
    fn memory() -> Memory {
        let memory = Memory::from_ranges(&[
            (GuestAddress(0), 0x1000),
            (GuestAddress(SEAM), 0x1000),
            (GuestAddress(HOLE_END), 0x1000),
        ])
        .unwrap();
        for at in [SEAM - 8, HOLE_END, 0x100] {
            let header = [u64::from(at == 0x100), at];
            memory.write_obj(header[0], GuestAddress(at)).unwrap();
            memory.write_obj(header[1], GuestAddress(at + 8)).unwrap();
        }
        // A sector beyond all numbers.
        memory.write_obj(u64::MAX, GuestAddress(0x208)).unwrap();
        memory
    }

    fn every(memory: &Memory, options: &[(u64, u32, bool)], len: usize) -> u64 {
        let mut chain = vec![0; len];
        let mut count = 0;
        loop {
            let descriptors: Vec<_> = chain.iter().map(|n| options[*n]).collect();
            request(memory, &descriptors, false);
            count += 1;
            let Some(at) = chain.iter().position(|n| n + 1 < options.len()) else {
                return count;
            };
            chain[at] += 1;
            chain[..at].fill(0);
        }
    }

    fn options(addresses: &[u64], lengths: &[u32]) -> Vec<(u64, u32, bool)> {
        let mut out = Vec::new();
        for at in addresses {
            for len in lengths {
                out.extend([(*at, *len, false), (*at, *len, true)]);
            }
        }
        out
    }

    /// virtio 1.3 §5.2.6 and §2.7.4: every chain of one or two descriptors with an
    /// address and a length at every boundary there is.
    #[test]
    fn every_short_chain_at_every_boundary_is_what_the_specification_says() {
        let addresses = [
            0,
            0x100,
            0x200,
            SEAM - 8,
            SEAM,
            HOLE - 16,
            HOLE - 1,
            HOLE,
            HOLE_END - 1,
            HOLE_END,
            END - 1,
            END,
            u64::MAX - 16,
            u64::MAX - 15,
            u64::MAX,
        ];
        let lengths = [0, 1, 15, 16, 17, 511, 512, 0x1000, u32::MAX];
        let options = options(&addresses, &lengths);
        let memory = memory();
        let count = every(&memory, &options, 1) + every(&memory, &options, 2);
        assert_eq!(count, 270 + 270 * 270);
        request(&memory, &[], false);
        for option in options {
            request(&memory, &[option], true);
        }
    }

    /// The same for three and four descriptors, with every order of readable,
    /// writable and empty ones.
    #[test]
    fn every_longer_chain_of_every_order_is_what_the_specification_says() {
        let memory = memory();
        let three = options(&[0x100, SEAM - 8, HOLE - 8, u64::MAX], &[0, 1, 8, 16, 512]);
        let four = options(&[0x100, SEAM - 8, HOLE - 8], &[0, 1, 8, 16]);
        let count = every(&memory, &three, 3) + every(&memory, &four, 4);
        assert_eq!(count, 40 * 40 * 40 + 24 * 24 * 24 * 24);
    }

    /// A chain of as many descriptors as a ring has, each across a seam: more pieces
    /// than there is room for is an error, and no more.
    #[test]
    fn pieces_beyond_their_room_are_an_error() {
        let memory = memory();
        for data in 0..=255 {
            let mut chain = vec![(0x100, 16, false)];
            chain.extend((0..data).map(|_| (SEAM - 8, 16, true)));
            chain.push((0, 1, true));
            chain.truncate(256);
            request(&memory, &chain, false);
        }
    }
}
