//! A process the host knows: its end, its streams, its terminal.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_vsock::VsockStream;
use walnut_agent::wire::Ends;
use walnut_protocol::agent::TerminalSize;

use crate::cgroup::Cgroup;
use crate::pump::{self, End};
use crate::reaper::Reaper;
use crate::system::now_ns;

/// How a process ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exit {
    pub(crate) code: u32,
    pub(crate) at_ns: i64,
    pub(crate) oom: bool,
}

/// The host's streams of one process.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    pub(crate) stdin: Option<VsockStream>,
    pub(crate) stdout: Option<VsockStream>,
    pub(crate) stderr: Option<VsockStream>,
}

/// A container's first process, or an exec.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    exit: watch::Receiver<Option<Exit>>,
    terminal: Option<End>,
}

impl Process {
    /// Takes a new process on the books; from here on its end is noticed.
    pub(crate) fn adopt(reaper: &Reaper, pid: u32, cgroup: Cgroup) -> (Self, Ended) {
        let code = reaper.expect(pid);
        let (sender, exit) = watch::channel(None);
        let (over, ended) = watch::channel(false);
        tokio::spawn(async move {
            let code = code.await.unwrap_or(255);
            sender.send_replace(Some(Exit {
                code,
                at_ns: now_ns(),
                oom: cgroup.oom_kills() > 0,
            }));
            over.send_replace(true);
        });
        let process = Self {
            pid,
            exit,
            terminal: None,
        };
        (process, ended)
    }

    /// The end, if it has come.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for the end.
    pub(crate) async fn wait(&self) -> Option<Exit> {
        let mut exit = self.exit.clone();
        let found = exit.wait_for(Option::is_some).await;
        found.ok().and_then(|e| *e)
    }

    /// Connects the agent's ends with the host's streams.
    pub(crate) fn connect(
        &mut self,
        ends: Ends,
        streams: Streams,
        ended: &Ended,
    ) -> io::Result<()> {
        if ends.terminal {
            let Some(master) = ends.stdin else {
                return Ok(());
            };
            let master = pump::end(master)?;
            if let Some(stdin) = streams.stdin {
                tokio::spawn(pump::feed(stdin, Arc::clone(&master), ended.clone()));
            }
            tokio::spawn(pump::drain(Arc::clone(&master), streams.stdout));
            self.terminal = Some(master);
            return Ok(());
        }
        if let (Some(fd), Some(stream)) = (ends.stdin, streams.stdin) {
            tokio::spawn(pump::feed(stream, pump::end(fd)?, ended.clone()));
        }
        for (fd, stream) in [(ends.stdout, streams.stdout), (ends.stderr, streams.stderr)] {
            if let Some(fd) = fd {
                tokio::spawn(pump::drain(pump::end(fd)?, stream));
            }
        }
        Ok(())
    }

    /// Sets the terminal's size; `false` if the process has none.
    pub(crate) fn resize(&self, size: &TerminalSize) -> io::Result<bool> {
        let Some(terminal) = &self.terminal else {
            return Ok(false);
        };
        let cells = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let size = libc::winsize {
            ws_row: cells(size.rows),
            ws_col: cells(size.columns),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the ioctl reads one winsize.
        if unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(true)
    }
}

/// Turns true when the process has ended.
pub(crate) type Ended = watch::Receiver<bool>;
