//! What other threads hold of the device.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

use super::{Error, tx::Count};
use crate::virtio::ConfigSpace;

/// Where the configuration space has the link's status.
const STATUS: usize = 6;

/// Frames and bytes so far. Any thread may look.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames that the guest received.
    pub received: AtomicU64,
    /// Their bytes.
    pub received_bytes: AtomicU64,
    /// Frames that the guest could not receive.
    pub receive_dropped: AtomicU64,
    /// Frames that the guest sent.
    pub sent: AtomicU64,
    /// Their bytes.
    pub sent_bytes: AtomicU64,
    /// Frames that the guest sent in vain.
    pub send_dropped: AtomicU64,
}

impl Counters {
    pub(super) fn receive(&self, count: &Count) {
        self.received.fetch_add(count.frames, Ordering::Relaxed);
        self.received_bytes
            .fetch_add(count.bytes, Ordering::Relaxed);
        self.receive_dropped
            .fetch_add(count.dropped, Ordering::Relaxed);
    }

    pub(super) fn send(&self, count: &Count) {
        self.sent.fetch_add(count.frames, Ordering::Relaxed);
        self.sent_bytes.fetch_add(count.bytes, Ordering::Relaxed);
        self.send_dropped
            .fetch_add(count.dropped, Ordering::Relaxed);
    }
}

/// The cable. Any thread may pull it.
#[derive(Debug, Clone)]
pub struct Link {
    up: Arc<AtomicBool>,
    config: Arc<ConfigSpace>,
    bell: Arc<EventFd>,
    /// Set before the bell rings.
    news: Arc<AtomicBool>,
}

impl Link {
    /// A link that is up.
    pub(super) fn new(config: Arc<ConfigSpace>) -> Result<Self, Error> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell = EventFd::from_flags(flags).map_err(|e| Error::EventFd(e.into()))?;
        Ok(Self {
            up: Arc::new(AtomicBool::new(true)),
            config,
            bell: Arc::new(bell),
            news: Arc::default(),
        })
    }

    /// Written to when the link has changed, and never read.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Whether the link has changed since the last call.
    pub(super) fn changed(&self) -> bool {
        self.news.swap(false, Ordering::AcqRel)
    }

    /// Takes the link up or down, and tells the driver. While it is down, nothing
    /// is received, and what the guest sends is lost.
    pub fn set(&self, up: bool) {
        self.up.store(up, Ordering::Release);
        let status = if up { VIRTIO_NET_S_LINK_UP } else { 0 };
        self.config.set(STATUS, &status.to_le_bytes()[..2]);
        self.news.store(true, Ordering::Release);
        // Fails only when the counter is full: then it has been rung.
        let _ = self.bell.write(1);
    }

    /// Whether it is up.
    pub fn up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }
}
