//! Programs in the host's memory. The lab's root is its machine's, over a wire whose
//! waits have nothing to do with instructions; the overlay on it is memory. A change
//! of a file's mode, to what it was, moves the file there.

use std::{collections::BTreeSet, path::PathBuf, process::Command};

use anyhow::{Context, Result};

/// What else the programs open.
const BESIDE: [&str; 6] = [
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/usr/share/qemu/pvh.bin",
    "/usr/share/qemu/qboot.rom",
    "/usr/share/seabios/qboot.rom",
    "/usr/bin/qemu-system-x86_64",
];

const OWN: [&str; 2] = ["out/lib/walnut/walnut-vmm", "out/lib/walnut/walnut-vsock"];

/// Moves all that the monitors load.
pub(crate) fn bring() -> Result<()> {
    let programs = || BESIDE.into_iter().chain(OWN);
    let mut files: BTreeSet<PathBuf> = programs().map(PathBuf::from).collect();
    for program in programs() {
        let out = Command::new("ldd")
            .arg(program)
            .output()
            .context("run ldd")?;
        let text = String::from_utf8_lossy(&out.stdout);
        let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
        files.extend(paths.map(PathBuf::from));
    }
    for file in files.into_iter().filter(|file| file.is_file()) {
        std::fs::metadata(&file)
            .and_then(|metadata| std::fs::set_permissions(&file, metadata.permissions()))
            .with_context(|| format!("move {} into memory", file.display()))?;
    }
    Ok(())
}

/// Gives the processor something to do while all wait: an idle one lets the lab's
/// clock leap to the next timer, however long the wait really takes.
pub(crate) fn never_idle() -> Result<()> {
    let (said, hears) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let priority = libc::sched_param { sched_priority: 0 };
        // SAFETY: reads a sched_param; 0 is this thread.
        let result = match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &priority) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        };
        let refused = result.is_err();
        // Whoever waits for it does so below.
        let _ = said.send(result);
        if refused {
            return;
        }
        loop {
            std::hint::spin_loop();
        }
    });
    hears.recv()?.context("start a thread for when all wait")
}
