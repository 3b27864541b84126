//! The Task API's connections, of which it is known at any moment what has been asked on
//! them and not yet been answered.
//!
//! So a program that takes this one's place can serve them on: it is given the connections,
//! and once more the requests that wait for something to happen ([`REPLAYED`]); its answers
//! go to where those came from. Whoever is at the other end (containerd) notices nothing.
//!
//! ttrpc (containerd/ttrpc, PROTOCOL.md) has frames of ten bytes and what they announce. They
//! are followed here as they pass, and never held up in the middle.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::AsRawFd,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, Waker, ready},
};

use containerd_shim_protos::protobuf::Message;
use futures::{Stream, StreamExt, stream};
use nix::sys::socket::{Shutdown, shutdown};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
};
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, Request};
use walnut_sandbox::machine::takeover::{Fd, Giver, NoState, Taker, hex};

/// What may be asked a second time, since it only waits. No other method has one of these
/// names.
const REPLAYED: [&str; 3] = ["Wait", "WaitSandbox", "Upgrade"];
/// Longest request that is kept to be asked again; those that wait are short.
const KEPT_MAX: usize = 64 << 10;

/// All connections, and where they come from.
#[derive(Debug)]
pub(crate) struct Connections {
    listener: UnixListener,
    all: Mutex<Vec<Weak<Connection>>>,
    held: Mutex<bool>,
}

/// A connection.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    traffic: Mutex<Traffic>,
}

/// What passes through a connection.
#[derive(Debug, Default)]
struct Traffic {
    inward: Frames,
    outward: Frames,
    /// Requests without an answer, by their streams' numbers.
    open: BTreeMap<u32, Open>,
    /// Bytes that come before those of the socket.
    again: VecDeque<u8>,
    /// No new frame comes in.
    held: bool,
    /// Who waits for one.
    waiting: Option<Waker>,
    /// The other end has gone.
    over: bool,
}

/// A request without an answer.
#[derive(Debug, PartialEq)]
struct Open {
    method: String,
    /// The whole frame, if it can be asked again.
    frame: Option<Vec<u8>>,
}

/// Follows frames.
#[derive(Debug, Default)]
struct Frames {
    header: Vec<u8>,
    /// Bytes that are still to come of the frame.
    rest: usize,
    /// Those that have, if it is worth it.
    kept: Option<Vec<u8>>,
}

/// A frame that has passed.
#[derive(Debug, PartialEq)]
struct Frame {
    kind: u8,
    stream: u32,
    /// Header and all, if it was kept.
    bytes: Option<Vec<u8>>,
}

impl Frames {
    /// No frame has begun and not ended.
    fn between(&self) -> bool {
        self.header.is_empty()
    }

    /// How many bytes may pass that are of one frame.
    fn room(&self) -> usize {
        match MESSAGE_HEADER_LENGTH - self.header.len() {
            0 => self.rest,
            header => header,
        }
    }

    /// Sees bytes, of which some are of the next frame, pass; the frames that end with
    /// them. Requests of no more than [`KEPT_MAX`] are kept if `keep`.
    fn pass(&mut self, mut bytes: &[u8], keep: bool, mut each: impl FnMut(Frame)) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(self.room().min(bytes.len()));
            bytes = later;
            if self.header.len() < MESSAGE_HEADER_LENGTH {
                self.header.extend_from_slice(now);
                let Some([a, b, c, d, _, _, _, _, kind, _]) = self.whole() else {
                    continue;
                };
                let length = u32::from_be_bytes([a, b, c, d]);
                self.rest = usize::try_from(length).unwrap_or(usize::MAX);
                let kept = keep && kind == MESSAGE_TYPE_REQUEST && self.rest <= KEPT_MAX;
                self.kept = kept.then(|| self.header.clone());
            } else {
                self.rest -= now.len();
                if let Some(kept) = &mut self.kept {
                    kept.extend_from_slice(now);
                }
            }
            if self.rest == 0
                && let Some([_, _, _, _, a, b, c, d, kind, _]) = self.whole()
            {
                self.header.clear();
                each(Frame {
                    kind,
                    stream: u32::from_be_bytes([a, b, c, d]),
                    bytes: self.kept.take(),
                });
            }
        }
    }

    fn whole(&self) -> Option<[u8; MESSAGE_HEADER_LENGTH]> {
        self.header.as_slice().try_into().ok()
    }
}

/// The request that a kept frame is.
fn request(frame: &[u8]) -> Option<Request> {
    Request::parse_from_bytes(frame.get(MESSAGE_HEADER_LENGTH..)?).ok()
}

impl Open {
    fn of(frame: Option<Vec<u8>>) -> Self {
        let method = frame.as_deref().and_then(request).map(|r| r.method);
        match method {
            Some(method) if REPLAYED.contains(&&*method) => Self { method, frame },
            method => Self {
                method: method.unwrap_or_else(|| "a long request".into()),
                frame: None,
            },
        }
    }
}

impl Traffic {
    fn came(&mut self, bytes: &[u8]) {
        let Self { inward, open, .. } = self;
        inward.pass(bytes, true, |frame| {
            if frame.kind == MESSAGE_TYPE_REQUEST {
                open.insert(frame.stream, Open::of(frame.bytes));
            }
        });
    }

    fn went(&mut self, bytes: &[u8]) {
        let Self { outward, open, .. } = self;
        outward.pass(bytes, false, |frame| {
            if frame.kind == MESSAGE_TYPE_RESPONSE {
                open.remove(&frame.stream);
            }
        });
    }

    /// The frames that are to be asked again, if nothing else is under way.
    fn state(&self) -> Result<Vec<Vec<u8>>, NoState> {
        if !self.inward.between() || !self.again.is_empty() {
            return Err(NoState::busy("a request is coming in"));
        }
        let open = self.open.values().map(|open| match &open.frame {
            Some(frame) => Ok(frame.clone()),
            None => Err(NoState::busy(format!("{} is being answered", open.method))),
        });
        let open: Result<_, _> = open.collect();
        if !self.outward.between() {
            return Err(NoState::busy("an answer is going out"));
        }
        open
    }
}

impl Connection {
    fn new(stream: UnixStream, traffic: Traffic) -> Self {
        Self {
            stream,
            traffic: Mutex::new(traffic),
        }
    }

    fn traffic(&self) -> MutexGuard<'_, Traffic> {
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ConnectionState {
    stream: Fd,
    open: Vec<OpenState>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
struct OpenState(#[serde(with = "hex")] Vec<u8>);

impl ConnectionState {
    /// What it cannot be.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        let whole = |open: &OpenState| {
            let mut count = 0;
            let mut frames = Frames::default();
            frames.pass(&open.0, true, |frame| {
                let open = frame.bytes.map(|bytes| Open::of(Some(bytes)));
                count += usize::from(open.is_some_and(|open| open.frame.is_some()));
            });
            count == 1 && frames.between()
        };
        let all = self.open.iter().all(whole);
        (!all).then_some("a request that is to be asked again is none")
    }

    fn take_over(self, taker: &mut Taker) -> io::Result<Connection> {
        let stream = std::os::unix::net::UnixStream::from(taker.take(self.stream)?);
        stream.set_nonblocking(true)?;
        let mut traffic = Traffic::default();
        for OpenState(frame) in self.open {
            // Counted as it comes.
            traffic.again.extend(frame);
        }
        Ok(Connection::new(UnixStream::from_std(stream)?, traffic))
    }
}

/// The listener and its connections in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ConnectionsState {
    listener: Fd,
    pub(crate) all: Vec<ConnectionState>,
}

/// The listener, and connections that it has made already.
pub(crate) type Taken = (Arc<Connections>, Vec<Watched>);

impl Connections {
    /// Those that come to a socket that listens.
    pub(crate) fn new(listener: std::os::unix::net::UnixListener) -> io::Result<Arc<Self>> {
        listener.set_nonblocking(true)?;
        Ok(Arc::new(Self {
            listener: UnixListener::from_std(listener)?,
            all: Mutex::default(),
            held: Mutex::default(),
        }))
    }

    fn all(&self) -> MutexGuard<'_, Vec<Weak<Connection>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, connection: Connection) -> Watched {
        let held = *self.held.lock().unwrap_or_else(PoisonError::into_inner);
        connection.traffic().held = held;
        let connection = Arc::new(connection);
        let mut all = self.all();
        all.retain(|connection| connection.strong_count() > 0);
        all.push(Arc::downgrade(&connection));
        Watched(connection)
    }

    /// Those that there are, then those that come.
    pub(crate) fn stream(
        self: Arc<Self>,
        first: Vec<Watched>,
    ) -> impl Stream<Item = io::Result<Watched>> + Send + 'static {
        let first = stream::iter(first.into_iter().map(Ok));
        let later = stream::unfold(self, |all| async move {
            let next = all.listener.accept().await;
            let next = next.map(|(stream, _)| all.add(Connection::new(stream, Traffic::default())));
            Some((next, all))
        });
        first.chain(later)
    }

    /// From now on no request begins to come in, or, again, they do.
    pub(crate) fn hold(&self, held: bool) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
        for connection in self.all().iter().filter_map(Weak::upgrade) {
            let mut traffic = connection.traffic();
            traffic.held = held;
            if let Some(waiting) = traffic.waiting.take() {
                waiting.wake();
            }
        }
    }

    /// What the next program makes them its own from ([`Self::take_over`]).
    pub(crate) fn state(&self, giver: &mut Giver) -> Result<ConnectionsState, NoState> {
        let mut all = Vec::new();
        for connection in self.all().iter().filter_map(Weak::upgrade) {
            let traffic = connection.traffic();
            if traffic.over {
                continue;
            }
            all.push(ConnectionState {
                open: traffic.state()?.into_iter().map(OpenState).collect(),
                stream: giver.give(&connection.stream),
            });
        }
        Ok(ConnectionsState {
            listener: giver.give(&self.listener),
            all,
        })
    }

    /// Those of the program before.
    pub(crate) fn take_over(state: ConnectionsState, taker: &mut Taker) -> io::Result<Taken> {
        let connections = Self::new(taker.take(state.listener)?.into())?;
        let mut all = Vec::with_capacity(state.all.len());
        for state in state.all {
            all.push(connections.add(state.take_over(taker)?));
        }
        Ok((connections, all))
    }
}

/// A connection for ttrpc's server.
#[derive(Debug)]
pub(crate) struct Watched(Arc<Connection>);

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.traffic().over = true;
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let connection = &*self.0;
        loop {
            let mut traffic = connection.traffic();
            let room = traffic.inward.room().min(buffer.remaining());
            if !traffic.again.is_empty() {
                let count = room.min(traffic.again.len());
                let bytes: Vec<u8> = traffic.again.drain(..count).collect();
                traffic.came(&bytes);
                buffer.put_slice(&bytes);
                return Poll::Ready(Ok(()));
            }
            if traffic.held && traffic.inward.between() {
                traffic.waiting = Some(cx.waker().clone());
                return Poll::Pending;
            }
            drop(traffic);
            ready!(connection.stream.poll_read_ready(cx))?;
            let into = buffer.initialize_unfilled_to(room);
            match connection.stream.try_read(into) {
                Ok(count) => {
                    let mut traffic = connection.traffic();
                    traffic.over = count == 0 && room > 0;
                    traffic.came(into.get(..count).unwrap_or_default());
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let connection = &*self.0;
        loop {
            ready!(connection.stream.poll_write_ready(cx))?;
            match connection.stream.try_write(bytes) {
                Ok(count) => {
                    let sent = bytes.get(..count).unwrap_or_default();
                    connection.traffic().went(sent);
                    return Poll::Ready(Ok(count));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (stream, how) = (self.0.stream.as_raw_fd(), Shutdown::Write);
        Poll::Ready(shutdown(stream, how).map_err(io::Error::from))
    }
}

#[cfg(test)]
mod tests;
