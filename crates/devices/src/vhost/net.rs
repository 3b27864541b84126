//! A network interface that another process serves (virtio 1.3 §5.1).

use std::os::fd::OwnedFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};

use super::{
    Error,
    frontend::{Backend, Frontend, Limits, Profile, RING_FEATURES},
};
use crate::Log;

const ID: u32 = 1;
const QUEUE_SIZE: u16 = 256;
/// A receive queue and a transmit queue. More would need a control queue, which is
/// the front end's to serve.
const QUEUES: usize = 2;
/// What the back end must offer for the driver to have it.
const FEATURES: u64 = RING_FEATURES
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_MRG_RXBUF;
/// What the front end offers by itself.
const OWN: u64 = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS;

/// What the protocol does not tell.
#[derive(Debug, Clone, Copy)]
pub struct NetConfig {
    /// The guest's address.
    pub mac: [u8; 6],
    /// The link's MTU in bytes, if the driver is to know it.
    pub mtu: Option<u16>,
}

/// An interface behind the vhost-user-net back end on `sock`, one queue pair. The
/// link is always up.
pub fn connect(
    sock: OwnedFd,
    config: NetConfig,
    limits: Limits,
    log: Log,
) -> Result<Frontend, Error> {
    let mut backend = Backend::meet(sock, limits, false)?;
    if backend.queues()?.is_some_and(|most| most < 1) {
        return Err(Error::Unfit("serves no queue"));
    }
    let mut features = FEATURES & backend.features | OWN;
    let mut bytes = config.mac.to_vec();
    let up = u16::try_from(VIRTIO_NET_S_LINK_UP).unwrap_or(1);
    // Status, number of pairs, MTU.
    for word in [up, 1, config.mtu.unwrap_or(0)] {
        bytes.extend(word.to_le_bytes());
    }
    if config.mtu.is_some() {
        features |= 1 << VIRTIO_NET_F_MTU;
    }
    let profile = Profile {
        id: ID,
        features,
        queues: QUEUES,
        queue_size: QUEUE_SIZE,
        config: bytes,
    };
    Frontend::new(backend, limits, profile, log)
}
