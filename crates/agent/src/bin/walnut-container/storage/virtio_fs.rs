//! `virtio-fs`: a folder of the host, by its tag.

use nix::sys::statfs::{FUSE_SUPER_MAGIC, statfs};
use walnut_protocol::agent::Storage;

use super::{Target, mount_on};
use crate::failure::Failure;

pub(super) fn mount(storage: &Storage, target: &Target) -> Result<(), Failure> {
    if storage.source.is_empty() {
        return Err(Failure::invalid("storage virtio-fs: the tag is empty"));
    }
    mount_on(storage, target, &storage.source, "virtiofs")
}

/// Whether an earlier container has mounted it.
pub(super) fn is_mounted(storage: &Storage) -> bool {
    statfs(storage.mount_point.as_str()).is_ok_and(|fs| fs.filesystem_type() == FUSE_SUPER_MAGIC)
}
