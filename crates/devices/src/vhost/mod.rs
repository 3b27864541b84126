//! Devices that another process serves, over vhost-user: a [`Frontend`] takes the
//! back end's place towards the driver.
//!
//! The queues' work does not pass through here: the guest's kicks go to the back
//! end by eventfds, and it reads and writes guest memory by itself. It may
//! therefore do to the guest whatever it likes, but nothing to us: it is never
//! waited for beyond a limit, none of its words is used unchecked, and its death
//! breaks the device, not the machine.
//!
//! The protocol is spoken here rather than by the `vhost` crate's front end: that
//! one repeats a receive that timed out for ever, so a silent back end would hold
//! its caller. A dozen requests are all it takes.
//!
//! Guest memory must consist of shared files (memfd), of [`MAX_REGIONS`] regions at most.
//! The back end gets it when the device becomes active: after the set of regions has
//! changed, [`Port::remap`](crate::virtio::Port::remap), before a region is taken away for
//! good.

mod block;
mod frontend;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzz;
mod net;
mod wire;

pub use block::connect as block;
pub(crate) use frontend::{Backend, Profile, RING_FEATURES};
pub use frontend::{Frontend, Limits, MAX_REGIONS};
pub use net::{NetConfig, connect as net};

use std::time::Duration;

/// Why a back end cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket failed.
    #[error("cannot make the vhost-user request {0}: {1}")]
    Socket(&'static str, #[source] std::io::Error),
    /// The back end has hung up, or failed before.
    #[error("the vhost-user back end is gone; look at its own messages")]
    Closed,
    /// The back end does not answer.
    #[error("the vhost-user back end did not answer {0} within {1:?}")]
    Late(&'static str, Duration),
    /// The back end's answer makes no sense.
    #[error("the vhost-user back end broke the protocol in its answer to {0}")]
    Protocol(&'static str),
    /// The back end said no.
    #[error("the vhost-user back end refused {0}")]
    Refused(&'static str),
    /// The back end lacks something.
    #[error("cannot use the vhost-user back end: it {0}")]
    Unfit(&'static str),
    /// What the owner asks for is impossible.
    #[error("cannot make a vhost-user device: {0}")]
    Request(&'static str),
    /// Guest memory cannot be shared.
    #[error("cannot share guest memory with a vhost-user back end: {0}")]
    Memory(&'static str),
    /// An eventfd could not be made.
    #[error("cannot make an eventfd: {0}")]
    EventFd(#[source] std::io::Error),
}
