//! Where a process's standard streams lead on the host: the FIFOs that a client opened,
//! files, descriptors. [`crate::copy`] moves what goes through them.
//!
//! A client that reads slowly stops the guest's writer (that is what it wants);
//! a client that has gone does not: its share is dropped, the log goes on. (The other end
//! of a descriptor that was inherited cannot be opened again: the guest is told.) One
//! that comes back, as a daemon does that is restarted, is waited for instead
//! ([`StdioTargets::returns`]): both ends of its FIFOs stay open here.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{net::unix::pipe, sync::watch, time::sleep};
use tracing::debug;
use walnut_machine::takeover::{Fd, Giver, Taker};

use crate::{Error, Inherited, Result, copy::Pending, descriptor::Descriptor, takeover::taken};

/// Where a process's streams lead on the host; `None` where one goes nowhere.
#[derive(Debug, Clone, Default)]
pub struct StdioTargets {
    /// The process has a terminal; then `stdout` carries it and `stderr` is none.
    pub terminal: bool,
    /// Read by the process.
    pub stdin: Option<Input>,
    /// Written by the process.
    pub stdout: Option<Output>,
    /// Written by the process.
    pub stderr: Option<Output>,
    /// Who reads and writes the FIFOs may go and come back: input ends when
    /// [`crate::Sandbox::close_stdin`] says so, output waits for its reader.
    pub returns: bool,
}

/// Where input comes from.
#[derive(Debug, Clone)]
pub enum Input {
    /// A FIFO.
    Path(PathBuf),
    /// Whatever its owner had for it.
    Descriptor(Inherited),
}

/// Where output goes.
#[derive(Debug, Clone)]
pub enum Output {
    /// A FIFO, or a file that is appended to.
    Path(PathBuf),
    /// A pipe that somebody reads; gone from here once the process has it.
    Pipe(Inherited),
    /// Whatever its owner had for it.
    Descriptor(Inherited),
}

impl Output {
    /// The writing end of a pipe.
    pub fn pipe(writer: OwnedFd) -> Self {
        Self::Pipe(Inherited::new(writer))
    }
}

/// Where streams lead in a state ([`walnut_machine::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TargetsState {
    terminal: bool,
    stdin: Option<TargetState>,
    stdout: Option<TargetState>,
    stderr: Option<TargetState>,
    returns: bool,
}

/// A descriptor is there until the process has it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum TargetState {
    Path(PathBuf),
    Pipe(Option<Fd>),
    Descriptor(Option<Fd>),
}

impl StdioTargets {
    pub(crate) fn state(&self, giver: &mut Giver) -> TargetsState {
        let stdin = self.stdin.as_ref().map(|input| match input {
            Input::Path(path) => TargetState::Path(path.clone()),
            Input::Descriptor(fd) => TargetState::Descriptor(fd.state(giver)),
        });
        let mut output = |output: &Output| match output {
            Output::Path(path) => TargetState::Path(path.clone()),
            Output::Pipe(fd) => TargetState::Pipe(fd.state(giver)),
            Output::Descriptor(fd) => TargetState::Descriptor(fd.state(giver)),
        };
        TargetsState {
            terminal: self.terminal,
            stdin,
            stdout: self.stdout.as_ref().map(&mut output),
            stderr: self.stderr.as_ref().map(&mut output),
            returns: self.returns,
        }
    }

    pub(crate) fn take_over(state: TargetsState, taker: &mut Taker) -> Result<Self> {
        let stdin = state.stdin.map(|input| {
            Ok(match input {
                TargetState::Path(path) => Input::Path(path),
                TargetState::Pipe(fd) | TargetState::Descriptor(fd) => {
                    Input::Descriptor(Inherited::take_over(fd, taker)?)
                }
            })
        });
        let stdin = stdin.transpose().map_err(taken)?;
        let mut output = |output: Option<TargetState>| {
            let output = output.map(|output| {
                Ok(match output {
                    TargetState::Path(path) => Output::Path(path),
                    TargetState::Pipe(fd) => Output::Pipe(Inherited::take_over(fd, taker)?),
                    TargetState::Descriptor(fd) => {
                        Output::Descriptor(Inherited::take_over(fd, taker)?)
                    }
                })
            });
            output.transpose().map_err(taken)
        };
        Ok(Self {
            terminal: state.terminal,
            stdin,
            stdout: output(state.stdout)?,
            stderr: output(state.stderr)?,
            returns: state.returns,
        })
    }
}

/// Client ends of a process's streams, opened before the process exists, so
/// that a wrong path is an error of the request.
#[derive(Debug)]
pub(crate) struct ClientEnds {
    pub(crate) stdin: Option<Source>,
    pub(crate) stdout: Option<Sink>,
    pub(crate) stderr: Option<Sink>,
}

/// The client's end of an input.
#[derive(Debug)]
pub(crate) enum Source {
    Pipe(pipe::Receiver),
    Descriptor(Descriptor),
}

/// The client's end of an output.
#[derive(Debug)]
pub(crate) enum Sink {
    Pipe(pipe::Sender),
    File(File),
    Descriptor(Descriptor),
}

impl ClientEnds {
    pub(crate) fn open(targets: &StdioTargets) -> Result<Self> {
        let returns = targets.returns;
        let source = |input: &Input| Source::open(input, returns);
        let sink = |output: &Output| Sink::open(output, returns);
        Ok(Self {
            stdin: targets.stdin.as_ref().map(source).transpose()?,
            stdout: targets.stdout.as_ref().map(sink).transpose()?,
            stderr: targets.stderr.as_ref().map(sink).transpose()?,
        })
    }
}

impl Source {
    pub(crate) fn open(input: &Input, returns: bool) -> Result<Self> {
        match input {
            // With a writer of our own there is no end before the client has begun to
            // write, and none when it is restarted.
            Input::Path(path) => pipe::OpenOptions::new()
                .read_write(returns)
                .open_receiver(path)
                .map(Self::Pipe)
                .map_err(Error::io("open stdin FIFO", path)),
            Input::Descriptor(inherited) => inherited
                .take()
                .and_then(Descriptor::reader)
                .map(Self::Descriptor)
                .map_err(Error::io("use", "the descriptor for stdin")),
        }
    }

    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => loop {
                pipe.readable().await?;
                match pipe.try_read(buffer) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    read => return read,
                }
            },
            Self::Descriptor(descriptor) => descriptor.read(buffer).await,
        }
    }

    /// What lies there. Asks the pipe itself: the runtime may not have heard yet that
    /// there is something to read.
    pub(crate) fn read_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => Ok(rustix::io::read(pipe, buffer)?),
            Self::Descriptor(descriptor) => descriptor.read_now(buffer),
        }
    }
}

impl Sink {
    pub(crate) fn open(output: &Output, returns: bool) -> Result<Self> {
        let path = match output {
            Output::Path(path) => path,
            Output::Pipe(pipe) => {
                let sender = pipe.take().and_then(pipe::Sender::from_owned_fd);
                return Ok(Self::Pipe(sender.map_err(Error::io("use", "a pipe"))?));
            }
            Output::Descriptor(inherited) => {
                let writer = inherited.take().and_then(Descriptor::writer);
                let writer = writer.map_err(Error::io("use", "a descriptor for output"))?;
                return Ok(Self::Descriptor(writer));
            }
        };
        if fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo()) {
            return open_sender(path, returns).map(Self::Pipe);
        }
        // Never waits: it might be a device.
        let file = OpenOptions::new()
            .append(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path);
        file.map(Self::File)
            .map_err(Error::io("open output file", path))
    }

    /// A FIFO that somebody reads already.
    pub(crate) fn read_fifo(path: &Path) -> Result<Self> {
        let sender = pipe::OpenOptions::new().open_sender(path);
        sender
            .map(Self::Pipe)
            .map_err(Error::io("open output FIFO", path))
    }

    /// Writes some of what lies there, and takes that away, in one step; waits until some
    /// can be written.
    async fn write(&self, from: &Pending) -> io::Result<()> {
        let written = match self {
            Self::Pipe(pipe) => loop {
                pipe.writable().await?;
                match from.written(|bytes| pipe.try_write(bytes)) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    written => break written,
                }
            },
            Self::File(file) => {
                let mut file = file;
                from.written(|bytes| file.write(bytes))
            }
            Self::Descriptor(descriptor) => descriptor.write(from).await,
        };
        match written? {
            0 => Err(io::ErrorKind::WriteZero.into()),
            _ => Ok(()),
        }
    }

    /// Writes all that lies there, unless the process has `ended` and nobody takes it.
    pub(crate) async fn write_all(
        &self,
        from: &Pending,
        ended: &mut watch::Receiver<bool>,
        stall: Duration,
    ) -> io::Result<()> {
        while !from.is_empty() {
            let stalled = async {
                match ended.wait_for(|ended| *ended).await {
                    Ok(_) => {}
                    // The process is forgotten, which is an end as well.
                    Err(_) => debug!("copying for a process that is forgotten"),
                }
                sleep(stall).await;
            };
            tokio::select! {
                biased;
                written = self.write(from) => written?,
                () = stalled => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
        Ok(())
    }
}

pub(crate) fn open_sender(path: &Path, returns: bool) -> Result<pipe::Sender> {
    let both = || pipe::OpenOptions::new().read_write(true).open_sender(path);
    if returns {
        return both().map_err(Error::io("open output FIFO", path));
    }
    match pipe::OpenOptions::new().open_sender(path) {
        // No reader yet: hold both ends, so that output waits for one.
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => both(),
        other => other,
    }
    .map_err(Error::io("open output FIFO", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn output_that_nobody_takes_does_not_outlast_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "out");
        let sink = Sink::open(&Output::Path(path), true).unwrap();
        let much = Pending::from(vec![0; 1 << 20]);
        let (end, mut ended) = watch::channel(false);
        let mut write = Box::pin(sink.write_all(&much, &mut ended, Duration::ZERO));
        // For as long as the process runs, its output waits.
        let early = tokio::time::timeout(Duration::from_millis(20), &mut write).await;
        assert!(early.is_err());
        end.send_replace(true);
        let error = write.await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    fn fifo(dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    }
}
