//! What a fuzz target, and an exhaustive test, asks of the parser of requests.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a check fails by panicking"
)]

use super::{Region, request::Request};

/// Parses a request for a region, and checks that the blocks of it are the
/// region's, and those that were named (virtio 1.3 §5.15.6).
pub fn request(raw: &[u8; 24], region: &Region) {
    if region.check().is_err() {
        return;
    }
    let kind = u16::from_le_bytes([raw[0], raw[1]]);
    let addr = u128::from(u64::from_le_bytes(raw[8..16].try_into().unwrap()));
    let count = u128::from(u16::from_le_bytes([raw[16], raw[17]]));
    let (start, block) = (u128::from(region.addr), u128::from(region.block));
    let inside = addr >= start
        && (addr - start).is_multiple_of(block)
        && count > 0
        && addr + count * block <= start + u128::from(region.size);
    let parsed = Request::parse(raw, region);
    let right = match kind {
        0 | 1 | 3 => inside,
        kind => kind == 2,
    };
    assert_eq!(parsed.is_some(), right, "{raw:x?} of {region:x?}");
    if let Some(Request::Plug(blocks) | Request::Unplug(blocks) | Request::State(blocks)) = parsed {
        let range = region.addresses(&blocks);
        assert_eq!(u128::from(range.start), addr);
        assert_eq!(u128::from(range.end), addr + count * block);
        assert!(blocks.end <= region.count());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// virtio 1.3 §5.15.6: every kind, at every boundary of a small and of the
    /// highest region, with every count near the region's.
    #[test]
    fn every_request_at_every_boundary_is_what_the_specification_says() {
        let block = 4096;
        for addr in [0, block, 1 << 32, u64::MAX - 17 * block + 1] {
            let region = Region {
                addr,
                size: 16 * block,
                block,
            };
            region.check().unwrap();
            for kind in (0..6).chain([0x100, u16::MAX]) {
                let mut edges = vec![0, 1, u64::MAX, u64::MAX - block + 1];
                for n in 0..=18 {
                    let at = addr.wrapping_add(n * block).wrapping_sub(block);
                    edges.extend([at.wrapping_sub(1), at, at.wrapping_add(1), at ^ 2048]);
                }
                for at in edges {
                    for count in (0..=18).chain([255, 256, 0x8000, u16::MAX]) {
                        let mut raw = [0xee; 24];
                        raw[..2].copy_from_slice(&kind.to_le_bytes());
                        raw[8..16].copy_from_slice(&at.to_le_bytes());
                        raw[16..18].copy_from_slice(&count.to_le_bytes());
                        request(&raw, &region);
                    }
                }
            }
        }
    }
}
