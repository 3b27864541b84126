//! A process the host knows: its end, its streams, its terminal.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Weak};

use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio_vsock::VsockStream;
use walnut_agent::wire::Ends;
use walnut_protocol::agent::TerminalSize;

use crate::cgroup::Cgroup;
use crate::gate::{self, Gate, Line};
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
    ended: Ended,
    gate: Arc<Gate>,
    terminal: Option<End>,
    stdin: Option<Arc<Line<VsockStream>>>,
    /// Standard output and error.
    outputs: [Option<Output>; 2],
}

/// Where a process's output comes from, and the pump that carries it.
#[derive(Debug)]
struct Output {
    from: Weak<AsyncFd<OwnedFd>>,
    line: Arc<Line<VsockStream>>,
}

impl Process {
    /// Takes a new process on the books; from here on its end is noticed.
    pub(crate) fn adopt(reaper: &Reaper, pid: u32, cgroup: Cgroup, gate: Arc<Gate>) -> Self {
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
        Self {
            pid,
            exit,
            ended,
            gate,
            terminal: None,
            stdin: None,
            outputs: [None, None],
        }
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
    pub(crate) fn connect(&mut self, ends: Ends, streams: Streams) -> io::Result<()> {
        if ends.terminal {
            let Some(master) = ends.stdin else {
                return Ok(());
            };
            let master = pump::end(master)?;
            if let Some(stdin) = streams.stdin {
                self.stdin = Some(self.feed(stdin, Arc::clone(&master)));
            }
            self.outputs[0] = Some(drain(&self.gate, &master, streams.stdout));
            self.terminal = Some(master);
            return Ok(());
        }
        if let (Some(fd), Some(stream)) = (ends.stdin, streams.stdin) {
            self.stdin = Some(self.feed(stream, pump::end(fd)?));
        }
        let both = [(ends.stdout, streams.stdout), (ends.stderr, streams.stderr)];
        for (n, (fd, stream)) in both.into_iter().enumerate() {
            if let (Some(fd), Some(output)) = (fd, self.outputs.get_mut(n)) {
                *output = Some(drain(&self.gate, &pump::end(fd)?, stream));
            }
        }
        Ok(())
    }

    fn feed(&self, stream: VsockStream, to: End) -> Arc<Line<VsockStream>> {
        let line = Line::new(Arc::clone(&self.gate));
        tokio::spawn(pump::feed(
            stream,
            to,
            self.ended.clone(),
            Arc::clone(&line),
        ));
        line
    }

    /// Whether it can be given input by [`Self::reconnect`]: it has a terminal, or had
    /// a stream before.
    pub(crate) fn takes_input(&self) -> bool {
        self.terminal.is_some() || self.stdin.is_some()
    }

    /// In a clone, while the gate is shut: gives it these streams instead of those that it
    /// had, and none where there is none. Those that it has closed by now are closed.
    pub(crate) fn reconnect(&self, streams: Streams) {
        let given = match &self.stdin {
            Some(line) => line.give(streams.stdin),
            None => Err(streams.stdin),
        };
        if let (Err(Some(stdin)), Some(terminal)) = (given, &self.terminal) {
            self.feed(stdin, Arc::clone(terminal));
        }
        for (output, stream) in self.outputs.iter().zip([streams.stdout, streams.stderr]) {
            if let Some(output) = output {
                // Dropped, that is closed, if the process has closed its end.
                let _ = output.line.give(stream);
            }
        }
    }

    /// Whether it has written something that no pump has taken yet.
    pub(crate) fn has_unread(&self) -> bool {
        self.outputs.iter().flatten().any(|output| {
            let from = output.from.upgrade();
            from.is_some_and(|from| gate::unread(&*from).is_ok_and(|n| n > 0))
        })
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

fn drain(gate: &Arc<Gate>, from: &End, stream: Option<VsockStream>) -> Output {
    let line = Line::new(Arc::clone(gate));
    tokio::spawn(pump::drain(Arc::clone(from), stream, Arc::clone(&line)));
    Output {
        from: Arc::downgrade(from),
        line,
    }
}

/// Turns true when the process has ended.
pub(crate) type Ended = watch::Receiver<bool>;
