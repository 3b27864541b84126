//! What every virtio device shares (virtio 1.3 §2): the [`Device`] trait, its
//! configuration space, and the thread that drives it.
//!
//! Three parties, and what passes between them:
//!
//! ```text
//! vCPU thread ── transport ──[Port]──► worker thread ── Device ──[Interrupt]──► guest
//!                    kicks (eventfds) ────────┘
//! ```
//!
//! A transport (virtio-pci) runs on the vCPU's thread: it holds the registers,
//! and must never wait. A device runs on a thread of its own that exists before
//! the guest sees the device, so that no thread has to be made, and no slow disk is
//! waited for, on a guest's word. Between them stands [`Port`]: requests one way,
//! acknowledgements the other.

mod config;
pub(crate) mod pieces;
pub(crate) mod turn;
mod worker;

pub use config::ConfigSpace;
pub use worker::{Port, Quiesced, Worker, WorkerError};

use std::{fmt::Debug, os::fd::BorrowedFd, sync::Arc, time::Instant};

use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Guest memory at one moment.
pub type Memory = GuestMemoryMmap<()>;

/// Guest memory, whose regions may change while the guest runs (virtio-mem). Take
/// a snapshot of it (`memory()`) for each run, and keep none between runs.
pub type MemoryCell = GuestMemoryAtomic<Memory>;

/// The driver wrote something that leaves a queue or a device without a meaning.
/// The device rests until the driver resets it (`DEVICE_NEEDS_RESET`, §2.1.2).
/// Never for a single bad request, which gets an error of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the driver broke the device")]
pub struct Broken;

impl From<virtio_queue::Error> for Broken {
    fn from(_: virtio_queue::Error) -> Self {
        Self
    }
}

/// How a device reaches its driver. Called from the device's thread; a call costs
/// at most a write to an eventfd.
pub trait Interrupt: Send + Sync + Debug {
    /// Used buffers are in queue `index`, and its driver wants to know: ask
    /// `Queue::needs_notification` first.
    fn queue(&self, index: usize);
    /// The configuration space has changed.
    fn config(&self);
    /// The device is broken: sets `DEVICE_NEEDS_RESET`, and interrupts.
    fn needs_reset(&self);
}

/// What a device gets when its driver is ready (`DRIVER_OK`).
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: MemoryCell,
    /// The features agreed on, a subset of [`Device::features`].
    pub features: u64,
    /// As many as [`Device::queue_sizes`]. A queue that the driver left out is not
    /// `ready()`; one that is has been checked (`is_valid`) against memory, and knows
    /// whether `VIRTIO_RING_F_EVENT_IDX` was agreed on.
    pub queues: Vec<Queue>,
    /// The way back.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Why a device is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The driver kicked queue `index`, or may have.
    Queue(usize),
    /// A descriptor of [`Device::watched`] is ready: its token.
    Watched(u32),
    /// [`Device::deadline`] has passed.
    Deadline,
    /// The driver wrote to the configuration space.
    Config,
}

/// A device, without its transport. All methods are called by one thread, its
/// own, and none may wait for anything slower than memory; what is slow is begun
/// here and reported by a watched descriptor.
pub trait Device: Send + Debug {
    /// The device's virtio ID (§5): 1 network, 2 block, …
    fn id(&self) -> u32;

    /// Features offered, with `VIRTIO_F_VERSION_1`.
    fn features(&self) -> u64;

    /// The most entries of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// The configuration space, which the transport reads without asking the
    /// device.
    fn config(&self) -> &Arc<ConfigSpace>;

    /// Descriptors to wait for, beside the kicks, while the device is active, with
    /// a token each. Edge-triggered: on an event, read until nothing is left, and
    /// look once on [`Self::activate`]. Asked for once, when the worker is made.
    fn watched(&self) -> Vec<(BorrowedFd<'_>, u32)> {
        Vec::new()
    }

    /// The eventfds that stand for kicks, one for each queue, when somebody else
    /// reads them (a vhost-user back end): the worker makes and watches none then,
    /// and calls [`Self::event`] with [`Event::Queue`] only after an activation.
    /// Asked for once, when the worker is made.
    fn external_kicks(&self) -> Option<Vec<BorrowedFd<'_>>> {
        None
    }

    /// Whether whoever serves the device has guest memory mapped as it was when it was
    /// activated, so that the device must be taken out of service and into it again
    /// ([`Port::remap`]) whenever the regions of memory change. Asked for once, when the
    /// worker is made.
    fn maps_memory(&self) -> bool {
        false
    }

    /// Takes the queues into service. The worker calls [`Self::event`] for each
    /// queue afterwards, so buffers already there are found.
    fn activate(&mut self, activation: Activation) -> Result<(), Broken>;

    /// Does what the event asks for, with a bound on the work: what is left is done
    /// when [`Self::deadline`] says "now", after others had a turn.
    fn event(&mut self, event: Event) -> Result<(), Broken>;

    /// When to be called with [`Event::Deadline`], if ever; in the past for "at
    /// once".
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Whether requests are in flight that touch guest memory (asynchronous I/O).
    /// A reset or a pause is acknowledged only when there are none; the device
    /// takes no new ones meanwhile, its watched descriptors are still served.
    fn in_flight(&self) -> bool {
        false
    }

    /// Take no new requests until [`Self::deactivate`]: the driver resets the device,
    /// or it is to rest, while something is in flight. May be called again.
    fn quiesce(&mut self) {}

    /// Gives the queues back, with their indices. Nothing is in flight.
    /// Afterwards the device is as new, or as [`Self::save`] found it.
    fn deactivate(&mut self) -> Vec<Queue>;

    /// The driver has reset the device: forget what concerned that driver. Called
    /// after [`Self::deactivate`].
    fn reset(&mut self) {}

    /// What a restored device must know beyond its queues, features and
    /// configuration: opaque, versioned by the device, small.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Undoes [`Self::save`] on a device just made. The bytes are hostile.
    fn restore(&mut self, state: &[u8]) -> Result<(), Broken> {
        if state.is_empty() {
            Ok(())
        } else {
            Err(Broken)
        }
    }
}
