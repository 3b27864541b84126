//! `virtio-fs`: a folder of the host, by its tag.

use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::statfs::{FUSE_SUPER_MAGIC, statfs};
use walnut_agent::transports;
use walnut_protocol::agent::Storage;

use super::{Target, complain, try_mount};
use crate::failure::Failure;

/// How long a device that was announced may take to appear, and between two attempts:
/// nothing tells of it.
const APPEARANCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(2);

pub(super) fn mount(storage: &Storage, target: &Target) -> Result<(), Failure> {
    if storage.source.is_empty() {
        return Err(Failure::invalid("storage virtio-fs: the tag is empty"));
    }
    let since = Instant::now();
    let mut looked = false;
    loop {
        match try_mount(storage, target, &storage.source, "virtiofs") {
            // There is no device of this tag.
            Err(Errno::EINVAL) if !looked => {
                transports::look_again();
                looked = true;
            }
            Err(Errno::EINVAL) if since.elapsed() < APPEARANCE => sleep(PAUSE),
            done => return done.map_err(|e| complain(storage, e)),
        }
    }
}

/// Whether an earlier container has mounted it.
pub(super) fn is_mounted(storage: &Storage) -> bool {
    statfs(storage.mount_point.as_str()).is_ok_and(|fs| fs.filesystem_type() == FUSE_SUPER_MAGIC)
}
