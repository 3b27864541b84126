//! `tmpfs`: memory of the guest.

use walnut_protocol::agent::Storage;

use super::{Target, mount_on};
use crate::failure::Failure;

pub(super) fn mount(storage: &Storage, target: &Target) -> Result<(), Failure> {
    mount_on(storage, target, "tmpfs", "tmpfs")
}
