//! A process's standard streams on the host: from the guest's connections to
//! the FIFOs a client opened and to the container's log, and back.
//!
//! A client that reads slowly stops the guest's writer (that is what it wants);
//! a client that has gone does not: its share is dropped, the log goes on.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{UnixStream, unix::pipe},
    sync::{Mutex, Notify},
    task::JoinHandle,
};
use tracing::warn;

use crate::{
    Error, Result,
    log::{LogWriter, Stream},
};

/// Bytes moved at a time.
const CHUNK: usize = 32 << 10;

/// FIFOs on the host, as containerd names them; `None` where a stream goes
/// nowhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioTargets {
    /// The process has a terminal; then `stdout` carries it and `stderr` is none.
    pub terminal: bool,
    /// Read by the process.
    pub stdin: Option<PathBuf>,
    /// Written by the process.
    pub stdout: Option<PathBuf>,
    /// Written by the process.
    pub stderr: Option<PathBuf>,
}

/// A log shared by both streams of a container.
pub(crate) type SharedLog = Arc<Mutex<LogWriter>>;

/// Client ends of a process's streams, opened before the process exists, so
/// that a wrong path is an error of the request.
#[derive(Debug)]
pub(crate) struct ClientEnds {
    pub(crate) stdin: Option<pipe::Receiver>,
    pub(crate) stdout: Option<pipe::Sender>,
    pub(crate) stderr: Option<pipe::Sender>,
}

impl ClientEnds {
    pub(crate) fn open(targets: &StdioTargets) -> Result<Self> {
        Ok(Self {
            stdin: targets
                .stdin
                .as_deref()
                .map(|path| {
                    pipe::OpenOptions::new()
                        .open_receiver(path)
                        .map_err(Error::io("open stdin FIFO", path))
                })
                .transpose()?,
            stdout: targets.stdout.as_deref().map(open_sender).transpose()?,
            stderr: targets.stderr.as_deref().map(open_sender).transpose()?,
        })
    }
}

fn open_sender(path: &Path) -> Result<pipe::Sender> {
    match pipe::OpenOptions::new().open_sender(path) {
        // No reader yet: hold both ends, so that output waits for one.
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => {
            pipe::OpenOptions::new().read_write(true).open_sender(path)
        }
        other => other,
    }
    .map_err(Error::io("open output FIFO", path))
}

/// Copies a guest stream to a client and a log until the guest closes it.
pub(crate) fn spawn_output(
    guest: UnixStream,
    client: Option<pipe::Sender>,
    log: Option<SharedLog>,
    stream: Stream,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        if let Err(e) = copy_output(guest, client, log.as_ref(), stream).await {
            warn!("copy {stream:?}: {e}");
        }
        if let Some(log) = log
            && let Err(e) = log.lock().await.flush(stream)
        {
            warn!("write the log of {stream:?}: {e}");
        }
    })
}

async fn copy_output(
    mut guest: UnixStream,
    mut client: Option<pipe::Sender>,
    log: Option<&SharedLog>,
    stream: Stream,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = match guest.read(&mut buffer).await {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(e) => return Err(e),
        };
        let bytes = &buffer[..read];
        if let Some(log) = log {
            log.lock().await.write(stream, bytes)?;
        }
        if let Some(sender) = &mut client
            && sender.write_all(bytes).await.is_err()
        {
            client = None;
        }
    }
}

/// Copies a client's input to the guest until the client closes it, the guest
/// stops reading, or `close` is notified; what the client had written by then
/// is still copied. Then closes the guest's stream for writing.
pub(crate) fn spawn_input(
    guest: UnixStream,
    client: pipe::Receiver,
    close: Arc<Notify>,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        if let Err(e) = copy_input(guest, client, &close).await
            && e.kind() != io::ErrorKind::BrokenPipe
            && e.kind() != io::ErrorKind::ConnectionReset
        {
            warn!("copy stdin: {e}");
        }
    })
}

async fn copy_input(
    mut guest: UnixStream,
    mut client: pipe::Receiver,
    close: &Notify,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = tokio::select! {
            biased;
            read = client.read(&mut buffer) => read?,
            () = close.notified() => {
                drain(&mut client, &mut guest, &mut buffer).await?;
                0
            }
            // Nothing comes from this side: readable means that it is closed.
            _ = guest.ready(Interest::READABLE) => match guest.try_read(&mut [0]) {
                Ok(0) => return Ok(()),
                Ok(_) => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                Err(e) => return Err(e),
            },
        };
        if read == 0 {
            return guest.shutdown().await;
        }
        guest.write_all(&buffer[..read]).await?;
    }
}

/// Moves what lies in the pipe and does not wait for more. Asks the pipe itself:
/// the runtime may not have heard yet that there is something to read.
async fn drain(
    client: &mut pipe::Receiver,
    guest: &mut UnixStream,
    buffer: &mut [u8],
) -> io::Result<()> {
    loop {
        match rustix::io::read(&*client, &mut *buffer) {
            Ok(0) | Err(rustix::io::Errno::WOULDBLOCK) => return Ok(()),
            Ok(read) => guest.write_all(&buffer[..read]).await?,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    fn fifo(dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path
    }

    #[tokio::test]
    async fn stdin_reaches_the_guest_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "in");
        let writer = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let client = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let copy = spawn_input(ours, client, Arc::new(Notify::new()));
        io::Write::write_all(&mut &writer, b"hello").unwrap();
        drop(writer);
        let mut got = String::new();
        guest.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "hello");
        copy.await.unwrap();
    }

    #[tokio::test]
    async fn close_io_delivers_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "in");
        let writer = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let client = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let close = Arc::new(Notify::new());
        io::Write::write_all(&mut &writer, b"all of it").unwrap();
        close.notify_one();
        let copy = spawn_input(ours, client, close);
        let mut got = String::new();
        guest.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "all of it");
        copy.await.unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_closed_ends_the_copy() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "in");
        let _writer = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let client = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let (ours, guest) = UnixStream::pair().unwrap();
        let copy = spawn_input(ours, client, Arc::new(Notify::new()));
        drop(guest);
        copy.await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_went_does_not_stop_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "out");
        let reader = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        let client = open_sender(&path).unwrap();
        drop(reader);
        let log = dir.path().join("log");
        let writer = Arc::new(Mutex::new(LogWriter::open(&log).unwrap()));
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let copy = spawn_output(ours, Some(client), Some(writer), Stream::Stdout);
        guest.write_all(b"one\n").await.unwrap();
        guest.write_all(b"two").await.unwrap();
        drop(guest);
        copy.await.unwrap();
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(text.contains("one\\n") && text.contains("two"), "{text}");
    }
}
