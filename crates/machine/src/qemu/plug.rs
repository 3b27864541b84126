//! Disks that come while a guest runs.
//!
//! A microvm has no hot-plug: its devices are there from the start. So a spare disk is a
//! disk without content, until it is taken out, given what it was to be, and put back
//! ([`super::sockets`] does so with the vsock device). The guest stands meanwhile: it must
//! never meet a device that is out, whose memory QEMU has freed. It is not told either;
//! its driver holds a device that has been reset, and must let go of it and take it again.
//! The agent makes it do so with every disk of no size when it looks for one that it does
//! not find.

use std::os::fd::OwnedFd;

use async_trait::async_trait;
use serde_json::{Value, json};

use super::{
    command,
    machine::{QemuMachine, Shared},
    qmp::Qmp,
};
use crate::{Disk, Error, SpareDisks, files, spec};

/// The device that the `n`th spare disk becomes.
pub(super) fn device(n: usize) -> String {
    format!("spare{n}")
}

/// The drive of a device without content.
pub(super) fn nothing(n: usize) -> String {
    format!("nothing{n}")
}

/// The number of the set that has the descriptor of the `n`th disk that came later;
/// those that were there from the start have lower ones.
fn set(n: usize) -> usize {
    100 + n
}

/// What QEMU is to make of a disk's descriptor, which `set` has.
pub(super) fn drive(node: &str, set: usize, read_only: bool) -> Value {
    // A read-only image is shared by many machines and written by none: no
    // locks. A writable one is locked against a second machine.
    let locking = if read_only { "off" } else { "on" };
    json!({
        "driver": "raw", "node-name": node, "read-only": read_only, "discard": "unmap",
        "file": {
            "driver": "file", "filename": format!("/dev/fdset/{set}"),
            "read-only": read_only, "locking": locking,
        },
    })
}

async fn set_property(qmp: &Qmp, n: usize, property: &str, value: Value) -> Result<(), Error> {
    let path = format!("/machine/peripheral/{}", device(n));
    let change = json!({ "path": path, "property": property, "value": value });
    qmp.execute_with("qom-set", change).await.map(drop)
}

/// Makes the `n`th spare disk the one that `fd` is. Where that fails the guest stands,
/// and must not run again.
async fn put_in(qmp: &Qmp, n: usize, disk: &Disk, fd: OwnedFd) -> Result<(), Error> {
    qmp.add_fd(set(n), fd).await?;
    let node = format!("later{n}");
    let drive = drive(&node, set(n), disk.read_only);
    qmp.execute_with("blockdev-add", drive).await?;
    let status = qmp.execute("query-status").await?;
    let runs = status.get("running").and_then(Value::as_bool) == Some(true);
    if runs {
        qmp.execute("stop").await?;
    }
    set_property(qmp, n, "realized", false.into()).await?;
    set_property(qmp, n, "drive", node.as_str().into()).await?;
    set_property(qmp, n, "serial", disk.serial.as_str().into()).await?;
    set_property(qmp, n, "realized", true.into()).await?;
    if runs {
        qmp.execute("cont").await?;
    }
    Ok(())
}

#[async_trait]
impl SpareDisks for QemuMachine {
    async fn attach_disk(&self, disk: &Disk) -> Result<(), Error> {
        const WHAT: &str = "attach a disk";
        if let Some(problem) = spec::disk_problem(disk) {
            return Err(Error::Other(format!("{WHAT}: {problem}")));
        }
        if !disk.read_only {
            return Err(Error::Other(format!(
                "{WHAT}: a spare disk of QEMU's is read-only, and {} is not",
                disk.serial
            )));
        }
        let fd = files::open_disk(disk)?;
        let shared: &Shared = &self.shared;
        // Nobody saves the machine meanwhile.
        let _whole = shared.registers.lock().await;
        let disks = shared.disks();
        if disks.iter().any(|other| other.serial == disk.serial) {
            let serial = &disk.serial;
            return Err(Error::Other(format!(
                "{WHAT}: the machine has a disk with the serial {serial}"
            )));
        }
        let n = disks.len() - shared.spec.disks.len();
        let spare = command::spare(&shared.spec);
        if n >= spare {
            return Err(Error::Other(format!(
                "{WHAT}: the machine has no spare disk left of {spare}; QEMU's have what they began with, walnut-vmm's (--driver vmm) get others"
            )));
        }
        let qmp = shared.monitor("qom-set")?;
        let attempt = shared.or_end(WHAT, put_in(qmp, n, disk, fd)).await;
        match attempt {
            Ok(()) => {
                shared.plugged(disk.clone());
                shared.runs_again();
            }
            // What it would meet is no device.
            Err(_) => shared.kill(),
        }
        attempt
    }
}
