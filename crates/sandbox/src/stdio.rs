//! A process's standard streams on the host: from the guest's connections to
//! the FIFOs a client opened and to the container's log, and back.
//!
//! A client that reads slowly stops the guest's writer (that is what it wants);
//! a client that has gone does not: its share is dropped, the log goes on. One
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
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{UnixStream, unix::pipe},
    sync::{Mutex, Notify, watch},
    task::JoinHandle,
    time::sleep,
};
use tracing::{debug, warn};

use crate::{
    Error, Inherited, Result,
    descriptor::Descriptor,
    log::{LogWriter, Stream},
};

/// Bytes moved at a time.
const CHUNK: usize = 32 << 10;

/// Longest a client may leave the output of a process that has ended where it is.
const STALL: Duration = Duration::from_secs(10);

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

/// A log shared by both streams of a container.
pub(crate) type SharedLog = Arc<Mutex<LogWriter>>;

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
    fn open(input: &Input, returns: bool) -> Result<Self> {
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

    async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.read(buffer).await,
            Self::Descriptor(descriptor) => descriptor.read(buffer).await,
        }
    }

    /// What lies there. Asks the pipe itself: the runtime may not have heard yet that
    /// there is something to read.
    fn read_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => Ok(rustix::io::read(pipe, buffer)?),
            Self::Descriptor(descriptor) => descriptor.read_now(buffer),
        }
    }
}

impl Sink {
    fn open(output: &Output, returns: bool) -> Result<Self> {
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

    async fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.write(bytes).await,
            Self::File(file) => file.write(bytes),
            Self::Descriptor(descriptor) => descriptor.write(bytes).await,
        }
    }

    /// Writes everything, unless the process has `ended` and nobody takes it.
    async fn write_all(
        &mut self,
        mut bytes: &[u8],
        ended: &mut watch::Receiver<bool>,
        stall: Duration,
    ) -> io::Result<()> {
        if let Self::File(file) = self {
            return file.write_all(bytes);
        }
        while !bytes.is_empty() {
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
                written = self.write(bytes) => bytes = &bytes[written?..],
                () = stalled => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
        Ok(())
    }
}

fn open_sender(path: &Path, returns: bool) -> Result<pipe::Sender> {
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

/// Copies a guest stream to a client and a log until the guest closes it.
pub(crate) fn spawn_output(
    guest: UnixStream,
    client: Option<Sink>,
    log: Option<SharedLog>,
    stream: Stream,
    ended: watch::Receiver<bool>,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let copied = copy_output(guest, client, log.as_ref(), stream, ended);
        if let Err(e) = copied.await {
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
    mut client: Option<Sink>,
    log: Option<&SharedLog>,
    stream: Stream,
    mut ended: watch::Receiver<bool>,
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
            && let Err(e) = sender.write_all(bytes, &mut ended, STALL).await
        {
            debug!("{stream:?} has no reader any more: {e}");
            client = None;
        }
    }
}

/// Copies a client's input to the guest until the client closes it, the guest
/// stops reading, or `close` is notified; what the client had written by then
/// is still copied. Then closes the guest's stream for writing.
pub(crate) fn spawn_input(guest: UnixStream, client: Source, close: Arc<Notify>) -> JoinHandle<()> {
    tokio::spawn(async move {
        if let Err(e) = copy_input(guest, client, &close).await
            && e.kind() != io::ErrorKind::BrokenPipe
            && e.kind() != io::ErrorKind::ConnectionReset
        {
            warn!("copy stdin: {e}");
        }
    })
}

async fn copy_input(mut guest: UnixStream, mut client: Source, close: &Notify) -> io::Result<()> {
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

/// Moves what lies in the pipe and does not wait for more.
async fn drain(client: &mut Source, guest: &mut UnixStream, buffer: &mut [u8]) -> io::Result<()> {
    loop {
        match client.read_now(buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => guest.write_all(&buffer[..read]).await?,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    fn running() -> watch::Receiver<bool> {
        // Whether its sender is there makes no difference to what is written in time.
        watch::Sender::new(false).subscribe()
    }

    #[tokio::test]
    async fn output_that_nobody_takes_does_not_outlast_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "out");
        let mut sink = Sink::open(&Output::Path(path), true).unwrap();
        let much = vec![0; 1 << 20];
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
        let copy = spawn_input(ours, Source::Pipe(client), Arc::new(Notify::new()));
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
        let copy = spawn_input(ours, Source::Pipe(client), close);
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
        let copy = spawn_input(ours, Source::Pipe(client), Arc::new(Notify::new()));
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
        let client = Sink::Pipe(open_sender(&path, false).unwrap());
        drop(reader);
        let log = dir.path().join("log");
        let writer = Arc::new(Mutex::new(LogWriter::open(&log).unwrap()));
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let copy = spawn_output(ours, Some(client), Some(writer), Stream::Stdout, running());
        guest.write_all(b"one\n").await.unwrap();
        guest.write_all(b"two").await.unwrap();
        drop(guest);
        copy.await.unwrap();
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(text.contains("one\\n") && text.contains("two"), "{text}");
    }

    #[tokio::test]
    async fn input_of_a_client_that_returns_ends_when_it_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "in");
        let targets = StdioTargets {
            stdin: Some(Input::Path(path.clone())),
            returns: true,
            ..StdioTargets::default()
        };
        // Nobody has opened it for writing yet.
        let client = ClientEnds::open(&targets).unwrap().stdin.unwrap();
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let close = Arc::new(Notify::new());
        let copy = spawn_input(ours, client, close.clone());
        let write = |text: &str| {
            let writer = OpenOptions::new().write(true).open(&path).unwrap();
            Write::write_all(&mut &writer, text.as_bytes()).unwrap();
        };
        let mut got = [0; 3];
        for text in ["one", "two"] {
            write(text);
            guest.read_exact(&mut got).await.unwrap();
            assert_eq!(got, text.as_bytes());
        }
        close.notify_one();
        assert_eq!(guest.read(&mut got).await.unwrap(), 0);
        copy.await.unwrap();
    }

    #[tokio::test]
    async fn output_waits_for_a_client_that_returns() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path(), "out");
        let client = Sink::open(&Output::Path(path.clone()), true).unwrap();
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let copy = spawn_output(ours, Some(client), None, Stream::Stdout, running());
        let reader = || {
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&path)
                .unwrap()
        };
        drop(reader());
        guest.write_all(b"kept").await.unwrap();
        let again = pipe::Receiver::from_file(reader()).unwrap();
        drop(guest);
        let mut text = String::new();
        let mut again = again;
        again.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "kept");
        copy.await.unwrap();
    }

    #[tokio::test]
    async fn output_is_appended_to_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "old ").unwrap();
        let client = Sink::open(&Output::Path(path.clone()), true).unwrap();
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let copy = spawn_output(ours, Some(client), None, Stream::Stdout, running());
        guest.write_all(b"new").await.unwrap();
        drop(guest);
        copy.await.unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "old new");
    }
}
