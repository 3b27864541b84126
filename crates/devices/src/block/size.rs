//! What the driver is told about the disk, and when its size changes.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use nix::sys::eventfd::EventFd;

use super::{
    Config, Error, MAX_SEGMENT_SECTORS, MAX_SEGMENTS, SECTOR_LEN, SEG_MAX, SIZE_MAX, disk::Disk,
};
use crate::virtio::ConfigSpace;

/// Tells the device that its disk has another size. Any thread may.
#[derive(Debug, Clone)]
pub struct Resizer {
    pub(super) disk: Arc<Disk>,
    pub(super) space: Arc<ConfigSpace>,
    pub(super) bell: Arc<EventFd>,
    pub(super) count: Arc<AtomicU64>,
}

impl Resizer {
    /// Measures the disk, tells the driver, and says how many sectors there are.
    /// What the driver asks for beyond them fails, even if it has not noticed yet.
    pub fn resize(&self) -> Result<u64, Error> {
        let sectors = self.disk.measure()?;
        self.space.set(0, &sectors.to_le_bytes());
        self.count.fetch_add(1, Ordering::AcqRel);
        // Fails only when the counter is full: then it has been rung.
        let _ = self.bell.write(1);
        Ok(sectors)
    }
}

/// `struct virtio_blk_config` (§5.2.4).
pub(super) fn space(config: &Config, sectors: u64) -> ConfigSpace {
    let mut bytes = [0; 60];
    let mut put = |at: usize, data: &[u8]| {
        for (to, byte) in bytes.iter_mut().skip(at).zip(data) {
            *to = *byte;
        }
    };
    put(0, &sectors.to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &SECTOR_LEN.to_le_bytes());
    // A physical block is 2^3 sectors, and the least that is worth moving.
    put(24, &[3]);
    put(26, &8u16.to_le_bytes());
    put(34, &config.queues.to_le_bytes());
    if !config.read_only {
        put(36, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(40, &MAX_SEGMENTS.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(52, &MAX_SEGMENTS.to_le_bytes());
        put(56, &[1]);
    }
    ConfigSpace::new(bytes, 0..0)
}
