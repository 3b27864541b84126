//! The end of the guest, and the promise that PID 1 says why.

use std::fmt::Display;
use std::io::Write;

use nix::sys::reboot::{RebootMode, reboot};
use thiserror::Error;

/// Something without which the guest is of no use.
#[derive(Debug, Error)]
#[error("{what}: {why}")]
pub(crate) struct Fatal {
    what: String,
    why: String,
}

impl Fatal {
    pub(crate) fn new(what: impl Into<String>, why: impl Display) -> Self {
        Self {
            what: what.into(),
            why: why.to_string(),
        }
    }
}

/// Says `reason` on the console and ends the guest.
pub(crate) fn fatal(reason: &str) -> ! {
    let line = format!("walnut-agent: fatal: {}\n", reason.replace('\n', "; "));
    let _ = std::io::stderr().write_all(line.as_bytes());
    // SAFETY: waits until the console has taken what was written.
    unsafe { libc::tcdrain(2) };
    off()
}

/// Ends the guest now. A restart, because a microVM without ACPI has no other
/// way to be off: the hypervisor is told not to start again (QEMU -no-reboot),
/// and the kernel with `reboot=t` how to ask.
pub(crate) fn off() -> ! {
    nix::unistd::sync();
    for mode in [
        RebootMode::RB_AUTOBOOT,
        RebootMode::RB_POWER_OFF,
        RebootMode::RB_HALT_SYSTEM,
    ] {
        let _ = reboot(mode);
    }
    loop {
        nix::unistd::pause();
    }
}

/// A panic of init would leave a guest that nobody can reach.
pub(crate) fn guard_against_panics() {
    std::panic::set_hook(Box::new(|info| {
        if std::process::id() == 1 {
            fatal(&info.to_string());
        }
        eprintln!("walnut-agent: {info}");
    }));
}
