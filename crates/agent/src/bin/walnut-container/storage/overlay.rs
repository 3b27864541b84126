//! `overlay`: layers of folders. Missing upper and work folders are made.

use std::path::Path;

use walnut_agent::names::below_guest_root;
use walnut_protocol::agent::Storage;

use super::{Target, make_dirs, mount_on};
use crate::failure::Failure;

pub(super) fn mount(storage: &Storage, target: &Target) -> Result<(), Failure> {
    for option in storage.options.iter().flat_map(|o| o.split(',')) {
        if let Some(path) = option
            .strip_prefix("upperdir=")
            .or_else(|| option.strip_prefix("workdir="))
        {
            let below = below_guest_root(path)
                .map_err(|e| Failure::invalid(format!("storage overlay: {option}: {e}")))?;
            make_dirs(&below)?;
        } else if let Some(layers) = option.strip_prefix("lowerdir=") {
            let plain = |l: &str| Path::new(l).is_absolute();
            if !layers.split(':').all(plain) {
                return Err(Failure::invalid(format!(
                    "storage overlay: {option}: want absolute paths"
                )));
            }
        }
    }
    mount_on(storage, target, "overlay", "overlay")
}
