//! Bytes on their way between a guest and whoever has its streams on the host.
//!
//! What has been read at one end and not yet written at the other lies in a [`Pending`],
//! and nowhere else while anything is waited for: so a program that takes this one's place
//! goes on with the next byte ([`OutputState`], [`InputState`]).

use std::{
    io,
    os::unix::net::UnixStream as StdStream,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustix::net::{Shutdown, shutdown};
use serde::{Deserialize, Serialize};
use tokio::{
    io::Interest,
    net::{UnixStream, unix::pipe},
    sync::{Notify, watch},
    task::JoinHandle,
};
use tracing::{debug, warn};
use walnut_machine::takeover::{Fd, Giver, Taker, hex};

use crate::{
    descriptor::{Descriptor, DescriptorState},
    log::{LogWriter, Stream},
    stdio::{Sink, Source},
};

/// Bytes moved at a time.
pub(crate) const CHUNK: usize = 32 << 10;
/// Pieces copied before all else that has come has its turn.
const TURNS: u64 = 8;
/// Most clients that one output has beside its first.
const CLIENTS_MAX: usize = 16;
/// Longest a client may leave the output of a process that has ended where it is.
const STALL: Duration = Duration::from_secs(10);

/// Bytes that have been read and not written.
#[derive(Debug, Default)]
pub(crate) struct Pending(Mutex<Vec<u8>>);

impl<T: Into<Vec<u8>>> From<T> for Pending {
    fn from(bytes: T) -> Self {
        Self(Mutex::new(bytes.into()))
    }
}

impl Pending {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes().is_empty()
    }

    pub(crate) fn add(&self, bytes: &[u8]) {
        self.bytes().extend_from_slice(bytes);
    }

    pub(crate) fn clear(&self) {
        self.bytes().clear();
    }

    /// A copy of them.
    pub(crate) fn all(&self) -> Vec<u8> {
        self.bytes().clone()
    }

    /// Has `write` write some of them, which are gone from here then.
    pub(crate) fn written(
        &self,
        write: impl FnOnce(&[u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut bytes = self.bytes();
        let count = write(&bytes)?;
        let gone = count.min(bytes.len());
        bytes.drain(..gone);
        Ok(count)
    }
}

/// A log shared by both streams of a container.
pub(crate) type SharedLog = Arc<Mutex<LogWriter>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether input shall end.
#[derive(Debug, Default)]
pub(crate) struct Closing {
    asked: AtomicBool,
    notify: Notify,
}

impl Closing {
    pub(crate) fn ask(&self) {
        self.asked.store(true, Ordering::Relaxed);
        self.notify.notify_one();
    }

    pub(crate) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}

/// A copy, and the task that does it, which has all that belongs to it.
#[derive(Debug)]
pub(crate) struct Copying<T> {
    pub(crate) copy: Weak<T>,
    /// Taken by who waits for its end.
    pub(crate) task: Option<JoinHandle<()>>,
}

/// One of a guest's streams, copied to a client and a log until the guest closes it.
#[derive(Debug)]
pub(crate) struct OutputCopy {
    guest: UnixStream,
    /// As long as it takes something.
    client: Mutex<Option<Arc<Sink>>>,
    /// Those who have come later. The next program does not know them: they come again.
    others: Mutex<Vec<Arc<Sink>>>,
    pending: Pending,
    log: Option<SharedLog>,
    stream: Stream,
}

/// Copies a guest's stream. `ended` says when its process has ended.
pub(crate) fn output(
    guest: UnixStream,
    client: Option<Sink>,
    log: Option<SharedLog>,
    stream: Stream,
    ended: watch::Receiver<bool>,
) -> Copying<OutputCopy> {
    let copy = OutputCopy {
        guest,
        client: Mutex::new(client.map(Arc::new)),
        others: Mutex::default(),
        pending: Pending::default(),
        log,
        stream,
    };
    copy.begin(ended)
}

impl OutputCopy {
    fn begin(self, ended: watch::Receiver<bool>) -> Copying<Self> {
        let all = Arc::new(self);
        let copy = Arc::downgrade(&all);
        let task = Some(tokio::spawn(async move { all.run(ended).await }));
        Copying { copy, task }
    }

    async fn run(&self, ended: watch::Receiver<bool>) {
        let stream = self.stream;
        if let Err(e) = self.copied(ended).await {
            warn!("copy {stream:?}: {e}");
        }
        if let Some(log) = &self.log
            && let Err(e) = lock(log).flush(stream)
        {
            warn!("write the log of {stream:?}: {e}");
        }
    }

    async fn copied(&self, mut ended: watch::Receiver<bool>) -> io::Result<()> {
        for turn in 1u64.. {
            let others = lock(&self.others).clone();
            let bytes = match others.is_empty() {
                true => Vec::new(),
                false => self.pending.all(),
            };
            let client = lock(&self.client).clone();
            if let Some(client) = client
                && let Err(e) = client.write_all(&self.pending, &mut ended, STALL).await
            {
                debug!("{:?} has no reader any more: {e}", self.stream);
                lock(&self.client).take();
                if self.is_over(&client, &e) {
                    return Ok(());
                }
            }
            self.pending.clear();
            for other in others {
                let bytes = Pending::from(bytes.as_slice());
                if let Err(e) = other.write_all(&bytes, &mut ended, STALL).await {
                    debug!("{:?} has one reader less: {e}", self.stream);
                    lock(&self.others).retain(|sink| !Arc::ptr_eq(sink, &other));
                }
            }
            if !self.filled().await? {
                return Ok(());
            }
            // Who prints without end is not to keep everybody else waiting: without this,
            // thousands of such turns pass before the runtime looks for what else there is.
            if turn.is_multiple_of(TURNS) {
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// Whether nobody can ever read it again: the other end of a descriptor that was
    /// inherited has gone, and there is no log. Then the guest's stream is closed, so that
    /// the process sees it as it would on the host.
    fn is_over(&self, client: &Sink, e: &io::Error) -> bool {
        matches!(client, Sink::Descriptor(_))
            && e.kind() == io::ErrorKind::BrokenPipe
            && self.log.is_none()
            && lock(&self.others).is_empty()
    }

    /// Has it lead to one more client; false, if there are as many as there may be.
    pub(crate) fn add(&self, client: Sink) -> bool {
        let mut others = lock(&self.others);
        let room = others.len() < CLIENTS_MAX;
        if room {
            others.push(Arc::new(client));
        }
        room
    }

    /// Which of the process's.
    pub(crate) fn stream(&self) -> Stream {
        self.stream
    }

    /// False at the stream's end.
    async fn filled(&self) -> io::Result<bool> {
        loop {
            self.guest.readable().await?;
            let mut bytes = self.pending.bytes();
            bytes.reserve(CHUNK);
            match self.guest.try_read_buf(&mut *bytes) {
                Ok(0) => return Ok(false),
                Ok(_) => {
                    if let Some(log) = &self.log {
                        lock(log).write(self.stream, &bytes)?;
                    }
                    return Ok(true);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(e) => return Err(e),
            }
        }
    }

    /// For the next program.
    pub(crate) fn state(&self, giver: &mut Giver) -> OutputState {
        let client = lock(&self.client);
        OutputState {
            stream: self.stream,
            guest: giver.give(&self.guest),
            client: client.as_ref().map(|client| client.state(giver)),
            pending: self.pending.all(),
        }
    }
}

/// An output in a state ([`walnut_machine::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OutputState {
    stream: Stream,
    guest: Fd,
    client: Option<SinkState>,
    #[serde(with = "hex")]
    pending: Vec<u8>,
}

impl OutputState {
    /// Goes on with the output of the program before.
    pub(crate) fn take_over(
        self,
        log: Option<SharedLog>,
        ended: watch::Receiver<bool>,
        taker: &mut Taker,
    ) -> io::Result<Copying<OutputCopy>> {
        let client = self.client.map(|sink| sink.take_over(taker)).transpose()?;
        let copy = OutputCopy {
            guest: stream(self.guest, taker)?,
            client: Mutex::new(client.map(Arc::new)),
            others: Mutex::default(),
            pending: self.pending.into(),
            log,
            stream: self.stream,
        };
        Ok(copy.begin(ended))
    }
}

pub(crate) fn stream(fd: Fd, taker: &mut Taker) -> io::Result<UnixStream> {
    let stream = StdStream::from(taker.take(fd)?);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// A client's input, copied to the guest until the client closes it, the guest stops
/// reading, or it shall end; what the client had written by then is still copied. Then
/// the guest's stream is closed for writing.
#[derive(Debug)]
pub(crate) struct InputCopy {
    guest: UnixStream,
    client: Mutex<Arc<Source>>,
    /// There is another client.
    replaced: Notify,
    pending: Pending,
    close: Arc<Closing>,
    /// The client has nothing more.
    ended: AtomicBool,
}

/// Copies a client's input.
pub(crate) fn input(guest: UnixStream, client: Source, close: Arc<Closing>) -> Copying<InputCopy> {
    let copy = InputCopy {
        guest,
        client: Mutex::new(Arc::new(client)),
        replaced: Notify::new(),
        pending: Pending::default(),
        close,
        ended: AtomicBool::new(false),
    };
    copy.begin()
}

impl InputCopy {
    fn begin(self) -> Copying<Self> {
        let all = Arc::new(self);
        let copy = Arc::downgrade(&all);
        let task = Some(tokio::spawn(async move { all.run().await }));
        Copying { copy, task }
    }

    async fn run(&self) {
        if let Err(e) = self.copied().await
            && e.kind() != io::ErrorKind::BrokenPipe
            && e.kind() != io::ErrorKind::ConnectionReset
        {
            warn!("copy stdin: {e}");
        }
    }

    async fn copied(&self) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        loop {
            self.delivered().await?;
            if self.ended.load(Ordering::Relaxed) {
                shutdown(&self.guest, Shutdown::Write)?;
                return Ok(());
            }
            let client = lock(&self.client).clone();
            let read = if self.close.is_asked() {
                // What lies there, and no more.
                match client.read_now(&mut buffer) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    read => read?,
                }
            } else {
                tokio::select! {
                    biased;
                    () = self.replaced.notified() => continue,
                    read = client.read(&mut buffer) => read?,
                    () = self.close.notify.notified() => continue,
                    // Nothing comes from this side: readable means that it is closed.
                    ready = self.guest.ready(Interest::READABLE) => {
                        ready?;
                        match self.guest.try_read(&mut [0]) {
                            Ok(0) => return Ok(()),
                            Ok(_) => continue,
                            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                            Err(e) => return Err(e),
                        }
                    }
                }
            };
            match read {
                0 => self.ended.store(true, Ordering::Relaxed),
                read => self.pending.add(buffer.get(..read).unwrap_or_default()),
            }
        }
    }

    /// Has it come from another client; false, if it has come to its end.
    pub(crate) fn replace(&self, client: Source) -> bool {
        let open = !self.ended.load(Ordering::Relaxed);
        if open {
            *lock(&self.client) = Arc::new(client);
            self.replaced.notify_one();
        }
        open
    }

    /// Returns when the guest has all that was read.
    async fn delivered(&self) -> io::Result<()> {
        while !self.pending.is_empty() {
            self.guest.writable().await?;
            match self.pending.written(|bytes| self.guest.try_write(bytes)) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                written => drop(written?),
            }
        }
        Ok(())
    }

    /// For the next program.
    pub(crate) fn state(&self, giver: &mut Giver) -> InputState {
        InputState {
            guest: giver.give(&self.guest),
            client: lock(&self.client).state(giver),
            pending: self.pending.all(),
            ended: self.ended.load(Ordering::Relaxed),
        }
    }
}

/// An input in a state ([`walnut_machine::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct InputState {
    guest: Fd,
    client: SourceState,
    #[serde(with = "hex")]
    pending: Vec<u8>,
    ended: bool,
}

impl InputState {
    /// Goes on with the input of the program before.
    pub(crate) fn take_over(
        self,
        close: Arc<Closing>,
        taker: &mut Taker,
    ) -> io::Result<Copying<InputCopy>> {
        let copy = InputCopy {
            guest: stream(self.guest, taker)?,
            client: Mutex::new(Arc::new(self.client.take_over(taker)?)),
            replaced: Notify::new(),
            pending: self.pending.into(),
            close,
            ended: AtomicBool::new(self.ended),
        };
        Ok(copy.begin())
    }
}

/// A client's end of an output in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum SinkState {
    Pipe(Fd),
    File(Fd),
    Descriptor(DescriptorState),
}

impl Sink {
    fn state(&self, giver: &mut Giver) -> SinkState {
        match self {
            Self::Pipe(pipe) => SinkState::Pipe(giver.give(pipe)),
            Self::File(file) => SinkState::File(giver.give(file)),
            Self::Descriptor(descriptor) => SinkState::Descriptor(descriptor.state(giver)),
        }
    }
}

impl SinkState {
    fn take_over(self, taker: &mut Taker) -> io::Result<Sink> {
        Ok(match self {
            Self::Pipe(fd) => Sink::Pipe(pipe::Sender::from_owned_fd(taker.take(fd)?)?),
            Self::File(fd) => Sink::File(taker.take(fd)?.into()),
            Self::Descriptor(state) => {
                Sink::Descriptor(Descriptor::take_over(state, Interest::WRITABLE, taker)?)
            }
        })
    }
}

/// A client's end of an input in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum SourceState {
    Pipe(Fd),
    Descriptor(DescriptorState),
}

impl Source {
    fn state(&self, giver: &mut Giver) -> SourceState {
        match self {
            Self::Pipe(pipe) => SourceState::Pipe(giver.give(pipe)),
            Self::Descriptor(descriptor) => SourceState::Descriptor(descriptor.state(giver)),
        }
    }
}

impl SourceState {
    fn take_over(self, taker: &mut Taker) -> io::Result<Source> {
        Ok(match self {
            Self::Pipe(fd) => Source::Pipe(pipe::Receiver::from_owned_fd(taker.take(fd)?)?),
            Self::Descriptor(state) => {
                Source::Descriptor(Descriptor::take_over(state, Interest::READABLE, taker)?)
            }
        })
    }
}

#[cfg(test)]
mod tests;
