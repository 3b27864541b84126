//! `bind`: a part of the guest's tree, shown in another place. The source is
//! opened without following links: folders it leads through may be shared with
//! a container.

use std::path::Path;

use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount as sys_mount};
use walnut_protocol::agent::Storage;

use super::{Target, complain, fixed, open_plain, options};
use crate::failure::Failure;

pub(super) fn mount(storage: &Storage, target: &Target) -> Result<(), Failure> {
    let source = Path::new(&storage.source);
    if !source.is_absolute() {
        return Err(Failure::invalid(format!(
            "storage bind: source {:?} is not absolute",
            storage.source
        )));
    }
    let source = open_plain(None, source, OFlag::O_PATH).map_err(|e| complain(storage, e))?;
    let (flags, rest) = options(storage);
    let recursive = rest.split(',').any(|w| w == "rbind");
    let mut how = MsFlags::MS_BIND;
    if recursive {
        how |= MsFlags::MS_REC;
    }
    let none = None::<&str>;
    sys_mount(Some(&fixed(&source)), &target.fixed(), none, how, none)
        .map_err(|e| complain(storage, e))?;
    if flags.is_empty() {
        return Ok(());
    }
    // Flags take a second call, on the new mount, which is reached by name:
    // the held descriptor is what lies beneath it.
    let remount = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags;
    sys_mount(none, &target.path, none, remount, none).map_err(|e| {
        let _ = nix::mount::umount2(&target.path, nix::mount::MntFlags::MNT_DETACH);
        complain(storage, e)
    })
}
