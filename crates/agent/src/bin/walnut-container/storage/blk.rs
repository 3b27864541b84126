//! `blk`: a virtio block device, found by its serial.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use walnut_agent::wire::Status;
use walnut_protocol::agent::Storage;

use super::{Target, mount_on};
use crate::failure::Failure;

/// How long a device that was announced may take to appear.
const APPEARANCE: Duration = Duration::from_secs(10);
/// virtio 1.3 §5.2.6.1: a serial is at most 20 bytes.
const SERIAL_MAX: usize = 20;

pub(super) fn mount(storage: &Storage, target: &Target) -> Result<(), Failure> {
    if storage.fstype.is_empty() {
        return Err(Failure::invalid(
            "storage blk: fstype is empty; formats are never detected",
        ));
    }
    let device = wait_for(&storage.source)?;
    mount_on(storage, target, &device, &storage.fstype)
}

/// The path of the device with this serial, as soon as there is one.
fn wait_for(serial: &str) -> Result<String, Failure> {
    if serial.is_empty() || serial.len() > SERIAL_MAX {
        return Err(Failure::invalid(format!(
            "storage blk: serial {serial:?}: want 1-{SERIAL_MAX} bytes"
        )));
    }
    let fail = |e: io::Error| Failure::internal(format!("find block device {serial:?}"), e);
    if let Some(device) = find(serial).map_err(fail)? {
        return Ok(device);
    }
    let deadline = Instant::now() + APPEARANCE;
    look_again();
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
        .map_err(|e| fail(e.into()))?;
    // sysfs reports no changes, but devtmpfs does, and comes after it.
    watch
        .add_watch("/dev", AddWatchFlags::IN_CREATE)
        .map_err(|e| fail(e.into()))?;
    loop {
        // Looked at after the watch was set: nothing is missed in between.
        if let Some(device) = find(serial).map_err(fail)? {
            return Ok(device);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Failure {
                status: Status::Deadline,
                text: format!(
                    "find block device {serial:?}: none with this serial within {} s",
                    APPEARANCE.as_secs()
                ),
            });
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).map_err(|e| fail(e.into()))?;
        let _ = watch.read_events();
    }
}

/// Lets the driver take the disks of no size again: a machine without hot-plug has spare
/// ones, and nothing says so when one of them has become a disk (see `SpareDisks` of the
/// machine drivers).
fn look_again() {
    const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_blk";
    for disk in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let disk = disk.path();
        // Only a virtio disk's device is one of that driver's.
        let device = fs::canonicalize(disk.join("device"));
        let Some(name) = device.as_deref().ok().and_then(Path::file_name) else {
            continue;
        };
        if is_empty(&disk) && fs::exists(Path::new(DRIVER).join(name)).unwrap_or(false) {
            for step in ["unbind", "bind"] {
                let _ = fs::write(Path::new(DRIVER).join(step), name.as_bytes());
            }
        }
    }
}

/// Whether a disk has no size.
fn is_empty(disk: &Path) -> bool {
    fs::read_to_string(disk.join("size")).is_ok_and(|size| size.trim() == "0")
}

fn find(serial: &str) -> io::Result<Option<String>> {
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        // One of no size may be a spare one, whose driver waits for ever for a serial.
        if is_empty(&entry.path()) {
            continue;
        }
        let Ok(found) = fs::read_to_string(entry.path().join("serial")) else {
            continue;
        };
        if found.trim_end_matches(['\n', '\0']) == serial {
            let device = format!("/dev/{}", entry.file_name().to_string_lossy());
            return Ok(fs::exists(&device)?.then_some(device));
        }
    }
    Ok(None)
}
