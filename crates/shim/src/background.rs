//! Processes that go their own way while a sandbox runs.

use std::{
    ffi::OsString,
    process::Stdio,
    sync::{Mutex, PoisonError},
};

use tokio::process::Command;
use tracing::{debug, warn};

/// Those that may not have ended, or not have been reaped.
static STARTED: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// PIDs of processes that were started here, and are this one's children still.
pub(crate) fn running() -> Vec<u32> {
    let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    started.retain(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // proc(5): pid (comm) state ppid …
        let mut after = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace();
        after.nth(1) == Some(&*std::process::id().to_string())
    });
    started.clone()
}

/// linux/close_range.h.
const CLOSE_RANGE_CLOEXEC: u32 = 4;

/// Starts this program again with `args`, in a session of its own: this sandbox may end
/// before it.
///
/// What is `kind` gives way to others, and so does everything that it starts.
pub(crate) fn spawn(
    what: &'static str,
    kind: bool,
    args: Vec<OsString>,
    env: Option<(&str, String)>,
) {
    let mut command = Command::new("/proc/self/exe");
    command
        .args(args)
        .envs(env)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: between fork and exec only async-signal-safe calls are made.
    unsafe {
        command.pre_exec(move || {
            libc::setsid();
            if kind {
                // Others are waiting for their containers; nobody waits for this.
                libc::nice(10);
            }
            // What this sandbox holds (locks, its image) it shall not hold as well.
            match libc::syscall(libc::SYS_close_range, 3, u32::MAX, CLOSE_RANGE_CLOEXEC) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    match command.spawn() {
        // The runtime reaps it; after this process, init does.
        Ok(child) => {
            let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
            started.extend(child.id());
            debug!(pid = child.id(), "started to {what}");
        }
        Err(e) => warn!("start a process to {what}: {e}"),
    }
}
