//! KVM's own counters of a machine, from debugfs.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail, ensure};

const DEBUGFS: &str = "/sys/kernel/debug";

/// What is printed; `exits` is all of them.
pub(crate) const COUNTERS: [&str; 7] = [
    "exits",
    "io_exits",
    "mmio_exits",
    "irq_exits",
    "halt_exits",
    "irq_injections",
    "pf_taken",
];

/// Mounts debugfs where it is not.
pub(crate) fn prepare() -> Result<()> {
    mount("debugfs", DEBUGFS, &format!("{DEBUGFS}/kvm"))
}

/// Mounts a kernel's file system at `at`, unless `shows` is there already.
pub(crate) fn mount(fstype: &str, at: &str, shows: &str) -> Result<()> {
    if Path::new(shows).exists() {
        return Ok(());
    }
    let status = std::process::Command::new("mount")
        .args(["-t", fstype, fstype, at])
        .status()
        .context("run mount")?;
    ensure!(status.success(), "mount {fstype}: {status}");
    Ok(())
}

/// The counters of the one machine that there is. It has the name of the process that
/// asked for it, which need not be the one that has it.
pub(crate) fn of_the_machine() -> Result<Vec<u64>> {
    let machines: Vec<_> = fs::read_dir(format!("{DEBUGFS}/kvm"))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    let [machine] = &machines[..] else {
        bail!("KVM shows {} machines, not one", machines.len());
    };
    COUNTERS
        .iter()
        .map(|name| sum(machine, name))
        .collect::<Result<_>>()
}

/// A counter is the machine's or, of each vCPU, in a folder of its own.
fn sum(machine: &Path, name: &str) -> Result<u64> {
    let read = |file: &Path| -> Option<u64> { fs::read_to_string(file).ok()?.trim().parse().ok() };
    read(&machine.join(name)).with_context(|| format!("KVM has no counter {name}"))
}
