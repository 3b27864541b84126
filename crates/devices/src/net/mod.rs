//! The network device (virtio 1.3 §5.1): a tap behind inherited descriptors.
//!
//! The tap's owner has made it (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and
//! `IFF_MULTI_QUEUE` for more than one queue pair), and passes one descriptor per
//! pair. Frames move between guest memory and the tap without a copy of ours, but
//! for the first 26 bytes of those that the guest sends: what is checked must not
//! change any more.
//!
//! - [`header`]: from those bytes to a frame that may be sent, without any I/O.
//! - [`ring`]: descriptor chains as scatter lists; used buffers, many at once.
//! - [`rx`], [`tx`], [`control`]: one kind of queue each.
//! - [`tap`]: the descriptor and its calls.
//! - [`device`]: whose turn it is; [`handles`]: what other threads hold of it.
//!
//! System calls once the guest runs, beside those of [`crate::virtio::Worker`]:
//! one readv or writev per frame, and one readv that finds nothing. A driver that declines an offload costs one ioctl (`TUNSETOFFLOAD`) when it becomes ready, since the
//! tap must stop sending such frames; Linux declines none.

mod control;
mod device;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzz;
mod handles;
mod header;
mod ring;
mod rx;
mod tap;
mod tx;

pub use device::Net;
pub use handles::{Counters, Link};

use crate::limit::LimitConfig;

/// Most entries of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// Most queue pairs.
pub const MAX_PAIRS: u16 = 16;
/// The virtio header of every frame (§5.1.6): twelve bytes since virtio 1.0.
const HEADER: usize = 12;
/// An Ethernet header without VLAN tag.
const ETHERNET: usize = 14;
/// Longest frame with its header: a segment of 64 KiB, and room for two VLAN tags.
const MAX_FRAME: usize = HEADER + ETHERNET + 8 + (64 << 10);

/// What a [`Net`] device is made of, beside its descriptors.
#[derive(Debug, Clone, Copy, Default)]
pub struct Config {
    /// The guest's address.
    pub mac: [u8; 6],
    /// The link's MTU in bytes, 68 or more, if the driver is to know it.
    pub mtu: Option<u16>,
    /// Drop frames of the guest's that do not come from `mac`.
    pub only_own_mac: bool,
    /// Offer checksum and segmentation offloads, as far as the tap has them.
    pub offloads: bool,
    /// What the guest may receive, all queues together.
    pub receive: LimitConfig,
    /// What the guest may send, all queues together.
    pub send: LimitConfig,
}

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A number of descriptors.
    #[error("cannot make a network device of {0} tap descriptors: it needs 1 to {MAX_PAIRS}")]
    Pairs(usize),
    /// A call on a descriptor failed.
    #[error("cannot {0} of the tap: {1}; pass a descriptor of /dev/net/tun after TUNSETIFF")]
    Tap(&'static str, #[source] std::io::Error),
    /// The tap was made in another way.
    #[error(
        "cannot use the tap: its flags are {0:#x}; make it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    )]
    Flags(u16),
    /// The MTU.
    #[error("cannot announce an MTU of {0}: it must be 68 or more")]
    Mtu(u16),
    /// An eventfd could not be made.
    #[error("cannot make an eventfd: {0}")]
    EventFd(#[source] std::io::Error),
}
