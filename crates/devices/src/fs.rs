//! A file system that a virtiofsd serves (virtio 1.3 §5.11).
//!
//! The guest's driver speaks FUSE with virtiofsd; what is here is only the way to
//! it ([`crate::vhost`]).

use std::os::fd::OwnedFd;

use crate::{
    Log,
    vhost::{Backend, Error, Frontend, Limits, Profile, RING_FEATURES},
};

const ID: u32 = 26;
/// As long as virtiofsd's own.
const QUEUE_SIZE: u16 = 1024;
/// Most bytes of a tag.
const TAG: usize = 36;

/// The file system behind the virtiofsd on `sock`, which the guest mounts by `tag`
/// (1 to 36 bytes). `queues`: request queues that it gets at most; older servers
/// have one.
///
/// Features that neither the driver nor virtiofsd may have: notifications, DAX.
pub fn connect(
    sock: OwnedFd,
    tag: &str,
    queues: u16,
    limits: Limits,
    log: Log,
) -> Result<Frontend, Error> {
    if tag.is_empty() || tag.len() > TAG || tag.contains('\0') {
        return Err(Error::Request("a tag has 1 to 36 bytes, none of them zero"));
    }
    let mut backend = Backend::meet(sock, limits, false)?;
    // One of them is the queue for high priority.
    let queues = match backend.queues()? {
        Some(most) => queues.min(u16::try_from(most.saturating_sub(1)).unwrap_or(queues)),
        None => 1,
    };
    let queues = queues.max(1);
    let mut config = tag.as_bytes().to_vec();
    config.resize(TAG, 0);
    config.extend(u32::from(queues).to_le_bytes());
    let features = RING_FEATURES & backend.features;
    let profile = Profile {
        id: ID,
        features,
        queues: usize::from(queues) + 1,
        queue_size: QUEUE_SIZE,
        config,
    };
    Frontend::new(backend, limits, profile, log)
}
