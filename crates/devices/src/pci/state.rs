//! What a function is, for a snapshot. Hostile when it comes back.

use serde::{Deserialize, Serialize};

use super::{msix, transport::QueueRegisters};

/// A function at rest: its registers, and where its device stands in the queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    /// The device's virtio ID.
    pub(super) id: u32,
    /// The configuration space, of which only what a driver may write comes back.
    pub(super) config: Vec<u8>,
    pub(super) status: u8,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueRegisters>,
    pub(super) isr: u8,
    pub(super) needs_reset: bool,
    pub(super) config_vector: u16,
    pub(super) queue_vectors: Vec<u16>,
    pub(super) msix: msix::State,
    /// The next entry that the device takes, and the next that it gives back, of
    /// each queue, while the device is active.
    pub(super) positions: Option<Vec<(u16, u16)>>,
}

impl FunctionState {
    /// Queues that the device has.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }
}

/// Why a function's state cannot be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Of another device.
    #[error("it is of a device with virtio ID {found}, not {expected}")]
    Kind {
        /// In the state.
        found: u32,
        /// On the bus.
        expected: u32,
    },
    /// The device has other queues, vectors or registers now.
    #[error("it has {found} {what}, the device has {expected}")]
    Count {
        /// Of what.
        what: &'static str,
        /// In the state.
        found: usize,
        /// In the device.
        expected: usize,
    },
    /// No driver brings a device there.
    #[error("its status {0:#x} is none that a driver can set")]
    Status(u8),
    /// The driver uses what the device does not offer here.
    #[error("its driver uses features {wanted:#x}, the device offers {offered:#x}")]
    Features {
        /// In the state.
        wanted: u64,
        /// By the device.
        offered: u64,
    },
    /// A number that is none.
    #[error("its {0} is none that a driver can set")]
    Register(&'static str),
}
