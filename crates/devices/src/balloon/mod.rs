//! The memory balloon (virtio 1.3 §5.5): gives back to the host what the guest has
//! no use for.
//!
//! - *Free page reporting* (§5.5.6.7): the guest tells of free pages by itself. This
//!   is what keeps an idle guest small; nobody has to ask.
//! - *Inflating* takes pages from the guest, as many as [`Control::set_target`] says.
//!   Deflating needs nothing: a page comes back when it is touched.
//! - *Statistics* of the guest's memory, on request.
//!
//! Whatever the guest names is checked against guest memory, and whole pages of it
//! alone are handed to [`Release`]. Contents of what is released are lost, and need
//! not become zero: page poisoning is not offered.
//!
//! The queues of features that were not agreed on are left out of the numbering, as
//! Linux does it: inflate 0, deflate 1, then statistics, then reporting.
//!
//! System calls once the guest runs, beside those of [`crate::virtio::Worker`]: what
//! [`Release`] does; [`Advise`] does madvise.

mod device;
mod release;

pub use device::{Balloon, Control, Stats};
pub use release::{Advise, Release};

/// Entries of each queue. Linux reports 32 ranges at once.
pub const QUEUE_SIZE: u16 = 128;
/// Bytes of a page of the balloon's, whatever pages the host has.
pub const PAGE: u64 = 4096;

/// What a [`Balloon`] is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Pages of [`PAGE`] bytes to be taken from the guest at first.
    pub target: u32,
    /// The guest takes pages back rather than run out of memory.
    pub deflate_on_oom: bool,
    /// The guest tells of its free pages.
    pub reporting: bool,
    /// The guest tells of its memory's use when asked.
    pub statistics: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            target: 0,
            deflate_on_oom: true,
            reporting: true,
            statistics: true,
        }
    }
}
