//! The block device (virtio 1.3 §5.2): a raw disk behind an inherited descriptor.
//!
//! Raw means raw: no format is ever looked for in the bytes, and no path is ever
//! opened. Data moves between the file and guest memory without a copy of ours:
//! the kernel gets the guest's own pieces.
//!
//! - [`request`]: from a descriptor chain to a request, without any I/O.
//! - [`task`]: from a request to the calls that do it, one after the other.
//! - [`disk`]: the descriptor, its size, the plain engine's calls.
//! - [`uring`]: the asynchronous engine.
//! - [`device`]: queues, limits, completions.
//!
//! System calls once the guest runs, beside those of [`crate::virtio::Worker`]
//! (epoll_wait, read of a kick, write of an interrupt, futex for the desk):
//!
//! - `io_uring` engine: io_uring_enter, one for all requests found in a turn.
//!   Completions arrive by an eventfd that is watched and never read.
//! - plain engine: preadv, pwritev, fdatasync, fallocate.
//!
//! Nothing is allocated: what requests in flight need was reserved before, and
//! becomes resident as far as the guest ever had requests in flight.

mod device;
mod disk;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzz;
mod request;
mod size;
mod slots;
mod task;
mod uring;

pub use device::Block;
pub use disk::Error;
pub use size::Resizer;

use crate::limit::LimitConfig;

/// A sector of the device, in bytes (§5.2.4).
pub const SECTOR: u64 = SECTOR_LEN as u64;
const SECTOR_LEN: u32 = 512;
/// Most entries of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// Most queues.
pub const MAX_QUEUES: u16 = 32;
/// Bytes of a serial number (`VIRTIO_BLK_ID_BYTES`).
pub const SERIAL_LEN: usize = 20;

/// Most data descriptors of a request: with header and status, as many as a chain
/// may have, indirect or not (§2.7.5.3.1).
const SEG_MAX: u32 = 254;
/// Most bytes that the driver is to put into one descriptor.
const SIZE_MAX: u32 = 256 << 10;
/// Most segments of a discard or of a write of zeroes.
const MAX_SEGMENTS: u32 = 8;
/// Most sectors in such a segment: 1 GiB.
const MAX_SEGMENT_SECTORS: u32 = 1 << 21;
/// Most requests in flight.
const MAX_TASKS: usize = 128;
/// Most pieces of host memory in a request: its descriptors, and some more where
/// they cross from one region of guest memory into the next.
const MAX_PIECES: usize = SEG_MAX as usize + 10;

/// What does the I/O.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Engine {
    /// `io_uring` where the host lets us have one, else plain.
    #[default]
    Auto,
    /// Asynchronous: the device's thread never waits for the disk.
    IoUring,
    /// One request after the other, on the device's thread.
    Plain,
}

/// What a flush means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cache {
    /// What has been flushed survives the host. A driver that cannot flush has
    /// every write flushed for it (§5.2.6.2).
    #[default]
    Writeback,
    /// For a disk that does not outlive its guest: flushes succeed, and do nothing.
    Volatile,
}

/// What a [`Block`] device is made of, beside its descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Refuse writes, even if the descriptor would take them.
    pub read_only: bool,
    /// What `VIRTIO_BLK_T_GET_ID` answers: ASCII, padded with zeroes.
    pub serial: [u8; SERIAL_LEN],
    /// Number of queues, 1 to [`MAX_QUEUES`]; as many as vCPUs is best.
    pub queues: u16,
    /// What a flush means.
    pub cache: Cache,
    /// What does the I/O.
    pub engine: Engine,
    /// How much the guest may do.
    pub limit: LimitConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            read_only: false,
            serial: [0; SERIAL_LEN],
            queues: 1,
            cache: Cache::default(),
            engine: Engine::default(),
            limit: LimitConfig::default(),
        }
    }
}
