//! The one place that waits for children. Init inherits every orphan, so a
//! second waiter would steal statuses, and a status collected before its pid
//! is expected would be lost: see [`walnut_agent::wire::ACK`].

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Exit code of an ended process: its own, or 128 + signal.
pub(crate) type Code = u32;

/// Processes whose end somebody waits for.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    expected: Mutex<HashMap<i32, oneshot::Sender<Code>>>,
}

/// Starts to reap.
pub(crate) fn start() -> io::Result<Arc<Reaper>> {
    let reaper = Arc::new(Reaper::default());
    let mut children = signal(SignalKind::child())?;
    let collector = Arc::clone(&reaper);
    tokio::spawn(async move {
        while children.recv().await.is_some() {
            collector.collect();
        }
    });
    Ok(reaper)
}

impl Reaper {
    fn expected(&self) -> std::sync::MutexGuard<'_, HashMap<i32, oneshot::Sender<Code>>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The end of `pid`, a child that has not been reaped yet.
    pub(crate) fn expect(&self, pid: u32) -> oneshot::Receiver<Code> {
        let (sender, receiver) = oneshot::channel();
        if let Ok(pid) = i32::try_from(pid) {
            self.expected().insert(pid, sender);
        }
        receiver
    }

    /// Signals an expected process. Reaping happens on this thread, so the pid
    /// cannot become another's in between.
    pub(crate) fn signal(&self, pid: u32, signal: libc::c_int) -> Result<(), Errno> {
        let pid = i32::try_from(pid).map_err(|_| Errno::ESRCH)?;
        if !self.expected().contains_key(&pid) {
            return Err(Errno::ESRCH);
        }
        // SAFETY: kill takes integers.
        Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
    }

    fn collect(&self) {
        loop {
            let mut status = 0;
            // Not nix's: it has no name for realtime signals, which also kill.
            // SAFETY: writes one status.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) };
            if pid <= 0 {
                return;
            }
            if let Some(sender) = self.expected().remove(&pid) {
                let _ = sender.send(code(status));
            }
        }
    }
}

fn code(status: libc::c_int) -> Code {
    let code = if libc::WIFSIGNALED(status) {
        128 + libc::WTERMSIG(status)
    } else {
        libc::WEXITSTATUS(status)
    };
    u32::try_from(code).unwrap_or(255)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_a_shells() {
        assert_eq!(code(3 << 8), 3);
        assert_eq!(code(9), 137);
        assert_eq!(code(34), 162, "SIGRTMIN");
    }
}
