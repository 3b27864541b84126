//! The socket device (virtio 1.3 §5.10): guest vsock streams become Unix sockets.
//!
//! The host's view is the convention that Firecracker and Cloud Hypervisor share.
//! *Host to guest*: connect to `<uds>`, write `CONNECT <port>\n`, read
//! `OK <host port>\n` once the guest has accepted; a refusal is a close without
//! an answer. *Guest to host*: a connection to CID 2, port P, arrives on the Unix
//! socket `<uds>_P`; if nobody listens there the guest's connect is reset.
//!
//! The parts: `packet` and `handshake` are pure parsers; `ring` turns descriptor
//! chains into scatter lists; `connection` is one stream with its credit;
//! `muxer` holds all of them, their timers and turns; [`Device`] joins the muxer
//! to the virtqueues; [`Virtio`] lets a worker drive it in process. Elsewhere
//! one thread drives it all:
//!
//! ```text
//! loop { device.wait(&mut external)?; …kicks, control…; signals = device.run(); }
//! ```

mod connection;
mod device;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzz;
mod handshake;
mod host;
mod muxer;
mod packet;
mod poller;
mod ring;
mod sys;
mod virtio;

pub use device::{Device, EVENT_QUEUE, FEATURES, QUEUE_SIZE, QUEUES, RX_QUEUE, Signals, TX_QUEUE};
pub use host::SocketDir;
pub use virtio::Virtio;

pub use crate::{log::Log, virtio::Memory};

use std::time::Duration;

/// The host's context identifier (virtio 1.3 §5.10.4).
pub const HOST_CID: u64 = 2;

/// What a device is made of.
#[derive(Debug, Clone)]
pub struct Config {
    /// The guest's context identifier, 3 or more.
    pub cid: u64,
    /// File name, inside the socket directory, of the socket the host connects to.
    pub name: String,
    /// Most connections at once, in every state together. Each needs a file
    /// descriptor.
    pub max_connections: usize,
    /// How long anybody is waited for.
    pub timeouts: Timeouts,
}

/// How long anybody is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// A host program, from its connect to the end of its `CONNECT` line.
    pub handshake: Duration,
    /// The guest's answer to a request.
    pub request: Duration,
    /// Room in the backlog of a host listener.
    pub connect: Duration,
    /// The guest's answer to the end of a connection.
    pub close: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            handshake: Duration::from_secs(5),
            // Generous: an emulated guest on a busy host answers late, a guest
            // that is gone is noticed by other means.
            request: Duration::from_secs(10),
            connect: Duration::from_secs(2),
            // Linux's own VSOCK_CLOSE_TIMEOUT.
            close: Duration::from_secs(8),
        }
    }
}

/// Why the device cannot work. Nothing the guest does ends here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file name of the socket is unusable.
    #[error(
        "cannot use {0:?} as the socket's file name: it must be 1-96 bytes without a slash; choose a shorter one"
    )]
    Name(String),
    /// The directory of the sockets cannot be opened.
    #[error("cannot open the socket directory {0:?}: {1}; create it before the device starts")]
    Directory(std::path::PathBuf, #[source] std::io::Error),
    /// The socket that the host connects to cannot be created.
    #[error(
        "cannot listen on the socket {0:?}: {1}; remove a stale socket or check the directory's permissions"
    )]
    Listen(String, #[source] std::io::Error),
    /// The guest's CID is reserved.
    #[error("cannot give the guest the CID {0}: 0-2 and 4294967295 upwards are reserved; use 3")]
    Cid(u64),
    /// epoll failed.
    #[error("cannot wait for events: {0}")]
    Poll(#[source] std::io::Error),
    /// A virtqueue could not be created.
    #[error("cannot create a virtqueue of {QUEUE_SIZE} entries")]
    Queue,
}
