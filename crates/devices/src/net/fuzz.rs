//! What a fuzz target asks of the check of a frame's front.

#![allow(clippy::panic, reason = "a check fails by panicking")]

use super::header::{FRONT, Rules};

/// Bytes of a front.
pub const LEN: usize = FRONT;

/// Checks a front, and that what passes asks for nothing that was not agreed on
/// (virtio 1.3 §5.1.6.2).
pub fn front(raw: &[u8; LEN], features: u64, source: Option<[u8; 6]>) {
    let mut front = *raw;
    let passes = Rules { features, source }.check(&mut front).is_ok();
    if !passes {
        return;
    }
    assert!(front[0] <= 1 && (front[0] == 0 || features & 1 != 0));
    let feature = match front[1] & 0x7f {
        0 => None,
        1 => Some(11),
        4 => Some(12),
        5 => Some(56),
        other => panic!("segments of kind {other}"),
    };
    if let Some(feature) = feature {
        assert!(features & 1 << feature != 0 && front[0] == 1);
    }
    assert_eq!(front[10..12], [0, 0]);
    assert!(source.is_none_or(|source| front[18..24] == source));
    // Nothing else has changed.
    assert_eq!((&front[1..10], &front[12..]), (&raw[1..10], &raw[12..]));
}
