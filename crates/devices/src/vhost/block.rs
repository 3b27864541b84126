//! A disk that another process serves (virtio 1.3 §5.2).

use std::os::fd::OwnedFd;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::{
    Error,
    frontend::{Backend, Frontend, Limits, Profile, RING_FEATURES},
};
use crate::Log;

const ID: u32 = 2;
const QUEUE_SIZE: u16 = 256;
/// `struct virtio_blk_config` up to the write-zeroes fields.
const CONFIG: usize = 60;
/// Where it says the number of queues.
const NUM_QUEUES: usize = 34;
/// The cache mode is the owner's choice, not the driver's: no `CONFIG_WCE`.
const FEATURES: u64 = RING_FEATURES
    | 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_GEOMETRY
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// A disk behind the vhost-user-blk back end on `sock`, with as many queues as it
/// serves, `queues` at most. Its size and the rest are the back end's word, and
/// stay as they are now.
pub fn connect(sock: OwnedFd, queues: u16, limits: Limits, log: Log) -> Result<Frontend, Error> {
    let mut backend = Backend::meet(sock, limits, true)?;
    let mut config = backend.config::<CONFIG>()?;
    let mut features = FEATURES & backend.features;
    let multiqueue = 1 << VIRTIO_BLK_F_MQ;
    let queues = match backend.queues()? {
        Some(most) if features & multiqueue != 0 => {
            queues.min(u16::try_from(most).unwrap_or(queues))
        }
        _ => 1,
    };
    if queues == 0 {
        return Err(Error::Unfit("serves no queue"));
    }
    if queues == 1 {
        features &= !multiqueue;
    }
    config[NUM_QUEUES..NUM_QUEUES + 2].copy_from_slice(&queues.to_le_bytes());
    let profile = Profile {
        id: ID,
        features,
        queues: queues.into(),
        queue_size: QUEUE_SIZE,
        config: config.to_vec(),
    };
    Frontend::new(backend, limits, profile, log)
}
