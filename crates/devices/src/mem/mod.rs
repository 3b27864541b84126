//! The memory device (virtio 1.3 §5.15, virtio-mem): memory that comes and goes
//! while the guest runs, block by block, as far as the guest agrees.
//!
//! The device keeps the books; whoever owns guest memory does the work ([`Blocks`]):
//! what is not plugged must be out of reach, of the guest and of every other
//! device, before it is said to be unplugged.
//!
//! - [`request`]: from bytes to a request, and is it one for this region? No I/O.
//! - [`device`]: the queue, and the size that is asked for.
//! - [`saved`]: what a snapshot says of it, which is hostile. No I/O.
//!
//! System calls once the guest runs, beside those of [`crate::virtio::Worker`] and
//! of [`Blocks`]: none.

mod device;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzz;
mod request;
mod saved;

pub use device::{Mem, Target};
pub use saved::Saved;

use std::{fmt::Debug, ops::Range};

/// Most blocks of a region.
pub const MAX_BLOCKS: u64 = 1 << 20;
/// Smallest block, in bytes.
pub const MIN_BLOCK: u64 = 4096;

/// The owner of guest memory. Called on the device's thread; each call does all it
/// is asked for or nothing.
pub trait Blocks: Send + Debug {
    /// Backs a range of guest addresses with memory, zeroed, and lets guest and
    /// devices reach it.
    fn plug(&mut self, range: Range<u64>) -> Result<(), Busy>;

    /// Plugs ranges that do not touch each other, none of which is plugged. If one
    /// cannot be, some may stay.
    fn plug_all(&mut self, ranges: &[Range<u64>]) -> Result<(), Busy> {
        ranges.iter().try_for_each(|range| self.plug(range.clone()))
    }

    /// Takes a range away, from the guest and from
    /// [`crate::virtio::MemoryCell`] first, then gives its memory back to the host.
    fn unplug(&mut self, range: Range<u64>) -> Result<(), Busy>;
}

/// Not now; the guest may try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the memory cannot be plugged or unplugged now")]
pub struct Busy;

/// Where the device's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Its first guest address, a multiple of the block's size.
    pub addr: u64,
    /// Bytes, a multiple of the block's size; what can be plugged at most.
    pub size: u64,
    /// Bytes of a block: a power of two, [`MIN_BLOCK`] or more. Linux needs 2 MiB to
    /// use each block by itself.
    pub block: u64,
}

/// Why a memory device cannot be made, or its size not be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The region makes no sense.
    #[error(
        "cannot plug memory into {0:x?}: address and size must be multiples of the block's size, a power of two from 4096 on, with 1 to 1048576 blocks below 2^64"
    )]
    Region(Region),
    /// The size asked for.
    #[error("cannot ask the guest for {wanted} bytes of plugged memory: it must be a multiple of {} up to {}", region.block, region.size)]
    Size {
        /// Bytes asked for.
        wanted: u64,
        /// The device's region.
        region: Region,
    },
    /// An eventfd could not be made.
    #[error("cannot make an eventfd: {0}")]
    EventFd(nix::errno::Errno),
}
