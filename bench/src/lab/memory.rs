//! What a monitor costs the host beyond its guest.

use std::{fs, path::Path};

use anyhow::{Context, Result};

/// A mapping of so many kB or more is guest memory.
const GUEST_KB: u64 = 64 << 10;

/// Of a monitor, while its guest runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    /// PSS in kB beyond the guest's memory.
    pub(crate) own: u64,
    /// Of it, what is no file's.
    pub(crate) anonymous: u64,
    /// PSS in kB of the guest's memory.
    pub(crate) guest: u64,
    pub(crate) threads: u64,
}

impl Memory {
    pub(crate) fn of(process: &Path) -> Result<Self> {
        let smaps = fs::read_to_string(process.join("smaps")).context("read smaps")?;
        let (mut own, mut anonymous, mut guest, mut size) = (0, 0, 0, 0);
        let mut heap = false;
        for line in smaps.lines() {
            // A mapping's first line. The heap's reserve is large, and not the guest's.
            if line.contains(" [heap]") {
                heap = true;
            } else if line.starts_with("VmFlags:") {
                heap = false;
            }
            let mut words = line.split_whitespace();
            let (name, value) = (words.next(), words.next().and_then(|v| v.parse().ok()));
            match (name, value) {
                (Some("Size:"), Some(kb)) => size = if heap { 0 } else { kb },
                (Some("Pss:"), Some(kb)) if size >= GUEST_KB => guest += kb,
                (Some("Pss:"), Some(kb)) => own += kb,
                (Some("Anonymous:"), Some(kb)) if size < GUEST_KB => anonymous += kb,
                _ => {}
            }
        }
        let threads = fs::read_dir(process.join("task"))?.count();
        Ok(Self {
            own,
            anonymous,
            guest,
            threads: u64::try_from(threads)?,
        })
    }
}
