//! `virtio-fs`: a folder of the host, by its tag.

use walnut_protocol::agent::Storage;

use super::{Target, mount_on};
use crate::failure::Failure;

pub(super) fn mount(storage: &Storage, target: &Target) -> Result<(), Failure> {
    if storage.source.is_empty() {
        return Err(Failure::invalid("storage virtio-fs: the tag is empty"));
    }
    mount_on(storage, target, &storage.source, "virtiofs")
}
