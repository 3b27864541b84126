//! A running process, held by its pidfd.

use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open,
    pidfd_send_signal, waitid,
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

use super::{Tail, tail::TailState};
use crate::takeover::{Giver, NoState, Taker};

/// Longest line of standard error that is quoted, in bytes.
const QUOTE_MAX: usize = 400;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It exited with this code.
    Exited(i32),
    /// This signal ended it.
    Signaled(i32),
    /// Somebody else collected its status.
    Unknown,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exited with code {code}"),
            Self::Signaled(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => write!(f, "was killed by signal {number} ({signal})"),
                Err(_) => write!(f, "was killed by signal {number}"),
            },
            Self::Unknown => f.write_str("ended"),
        }
    }
}

/// A process started by [`super::Spawn`]. Dropping it kills it, with its
/// process group, and reaps it.
#[derive(Debug)]
pub struct Child {
    name: &'static str,
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
    /// Locked while the kernel is asked, so that of two callers none takes the
    /// other's status for lost.
    status: Mutex<Option<Status>>,
    stdout: Arc<Tail>,
    stderr: Arc<Tail>,
}

/// A running process in a state ([`crate::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChildState {
    pid: u32,
    stdout: TailState,
    stderr: TailState,
}

impl Child {
    /// For the next program, whose child it then is.
    pub fn state(&self, giver: &mut Giver) -> Result<ChildState, NoState> {
        match self.try_wait() {
            Some(status) => Err(NoState::never(format!("{} {status}", self.name))),
            None => Ok(ChildState {
                pid: self.pid(),
                stdout: self.stdout.state(giver),
                stderr: self.stderr.state(giver),
            }),
        }
    }

    /// That of the program before, which has not reaped it: nobody else has its PID.
    pub fn take_over(name: &'static str, state: ChildState, taker: &mut Taker) -> io::Result<Self> {
        let stdout = Tail::take_over(state.stdout, taker)?;
        let stderr = Tail::take_over(state.stderr, taker)?;
        if !is_child(state.pid) {
            return Err(io::Error::other(format!(
                "process {} ({name}) is no child of this one",
                state.pid
            )));
        }
        Self::adopt(name, state.pid, stdout, stderr)
    }

    /// Takes over the child process `pid`, which nobody else may reap.
    pub(super) fn adopt(
        name: &'static str,
        pid: u32,
        stdout: Arc<Tail>,
        stderr: Arc<Tail>,
    ) -> io::Result<Self> {
        let pid = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(io::ErrorKind::InvalidData)?;
        let opened = pidfd_open(pid, PidfdFlags::empty())
            .map_err(io::Error::from)
            .and_then(|fd| {
                // SAFETY: the pidfd is owned by the AsyncFd and is neither
                // closed nor replaced before it.
                unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }
                    .map_err(io::Error::from)
            });
        let pidfd = match opened {
            Ok(pidfd) => pidfd,
            Err(e) => {
                // Out of descriptors: an unwatched child must not live.
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
                return Err(e);
            }
        };
        Ok(Self {
            name,
            pid,
            pidfd,
            status: Mutex::new(None),
            stdout,
            stderr,
        })
    }

    /// The role it was spawned under.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its PID; reused by the kernel once it has been reaped.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Its standard output, empty unless [`super::Spawn::keep_stdout`].
    pub fn stdout(&self) -> &Tail {
        &self.stdout
    }

    /// The last line that is not blank of its standard error, cut to 400
    /// bytes, control characters removed. Waits for the pipe of a dead process.
    pub async fn stderr(&self) -> Option<String> {
        if self.status().is_some() {
            self.stderr.settle().await;
        }
        last_line(&self.stderr.text())
    }

    /// Returns when the process has ended; for any number of callers.
    pub async fn wait(&self) -> Status {
        loop {
            if let Some(status) = self.try_wait() {
                return status;
            }
            match self.pidfd.readable().await {
                Ok(mut guard) => {
                    if let Some(status) = self.try_wait() {
                        return status;
                    }
                    guard.clear_ready();
                }
                // The runtime shuts down: nobody polls again.
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// How it ended, if it has.
    pub fn try_wait(&self) -> Option<Status> {
        self.reap(WaitIdOptions::NOHANG)
    }

    fn reap(&self, how: WaitIdOptions) -> Option<Status> {
        let mut known = self.status();
        while known.is_none() {
            let pidfd = WaitId::PidFd(self.pidfd.get_ref().as_fd());
            *known = match waitid(pidfd, WaitIdOptions::EXITED | how) {
                Ok(None) => return None,
                Ok(Some(ended)) => Some(match (ended.exit_status(), ended.terminating_signal()) {
                    (Some(code), _) => Status::Exited(code),
                    (_, Some(signal)) => Status::Signaled(signal),
                    _ => Status::Unknown,
                }),
                Err(rustix::io::Errno::INTR) => None,
                Err(_) => Some(Status::Unknown),
            };
        }
        *known
    }

    fn status(&self) -> MutexGuard<'_, Option<Status>> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills the process and the group it leads. Does nothing once it has been
    /// reaped.
    pub fn kill(&self) {
        if self.status().is_none() {
            // The group exists and is this child's while the child is unreaped.
            let _ = kill_process_group(self.pid, Signal::KILL);
            let _ = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
        }
    }
}

impl Child {
    /// Waits on the caller's thread for a process that has been killed; for
    /// `Drop`, which cannot await. SIGKILL is certain, though a process stuck
    /// in the kernel delays it.
    pub fn reap_blocking(&self) {
        self.reap(WaitIdOptions::empty());
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        self.reap_blocking();
    }
}

/// Whether a process is a child of this one that has not been reaped: what is killed and
/// waited for must be.
fn is_child(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return false;
    };
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    waitid(WaitId::Pid(pid), look).is_ok()
}

/// Reaps a child of this process that the program before started, when it ends.
pub async fn reap(pid: u32) {
    if !is_child(pid) {
        return;
    }
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return;
    };
    let watched = pidfd_open(pid, PidfdFlags::empty())
        .map_err(io::Error::from)
        .and_then(|fd| {
            // SAFETY: the pidfd is owned by the AsyncFd and is neither closed nor replaced
            // before it.
            unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }
                .map_err(io::Error::from)
        });
    if let Ok(watched) = watched
        && watched.readable().await.is_ok()
    {
        let _ = waitid(
            WaitId::Pid(pid),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        );
    }
}

fn last_line(text: &str) -> Option<String> {
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(quotable(line))
}

/// `line` without control characters and cut to a bounded length: it comes
/// from a guest or a process that may be hostile to a terminal.
pub(crate) fn quotable(line: &str) -> String {
    let mut quoted = String::new();
    for c in line.trim().chars().filter(|c| !c.is_control()) {
        if quoted.len() + c.len_utf8() > QUOTE_MAX {
            break;
        }
        quoted.push(c);
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_are_harmless() {
        assert_eq!(last_line("a\n\x1b[31mred\r\n\n"), Some("[31mred".into()));
        assert_eq!(last_line(" \n"), None);
        assert!(quotable(&"é".repeat(4096)).len() <= QUOTE_MAX);
    }
}
