//! Why a machine could not be made, or go on.

use nix::errno::Errno;
use walnut_devices::virtio::WorkerError;
use walnut_vmm_api::ChannelError;

/// Why a machine could not be made, or go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A call of KVM failed.
    #[error("{0} of KVM: {1}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// Guest memory could not be had.
    #[error("{0} guest memory: {1}")]
    Memory(&'static str, #[source] Errno),
    /// The kernel or what it needs could not be loaded.
    #[error("{0}")]
    Boot(String),
    /// A request that no machine can be made from.
    #[error("{0}")]
    Config(String),
    /// An operation of the host failed.
    #[error("{0}: {1}")]
    Host(&'static str, #[source] Errno),
    /// A device could not be made.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The vsock device could not be made.
    #[error(transparent)]
    Vsock(#[from] walnut_devices::vsock::Error),
    /// A snapshot could not be written or must not be used.
    #[error(transparent)]
    Snapshot(#[from] crate::snapshot::Error),
    /// The control socket failed.
    #[error(transparent)]
    Control(#[from] ChannelError),
}
