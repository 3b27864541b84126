//! A client for QEMU's monitor (QMP): one command at a time over one
//! connection, events kept aside.
//!
//! QEMU is only semi-trusted: a guest that broke out of it speaks here. Lines
//! are bounded, waiting is bounded, and nothing it says is taken for more than
//! a reply or a reason.

use std::{
    io::{self, IoSlice},
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{mpsc, oneshot},
};

use crate::{
    Error, process,
    takeover::{Fd, Giver, NoState, Taker},
};

/// Longest line that is accepted, in bytes. QEMU's longest answer to what is
/// asked here is below 1 KiB.
const LINE_MAX: usize = 64 * 1024;
/// How long a command may take. The first one waits for QEMU's own start, which on a
/// host with many others at it takes seconds.
pub(super) const COMMAND_DEADLINE: Duration = Duration::from_secs(30);

type Reply = oneshot::Sender<Result<Value, String>>;

/// A command, a descriptor that goes with it, and whoever waits.
type Request = (Value, Option<OwnedFd>, Reply);

/// What QEMU said unasked, and whether it is saying something.
#[derive(Debug, Default)]
struct Heard {
    version: Option<String>,
    shutdown: Option<String>,
    /// A command waits for its reply.
    asked: bool,
    /// A line has come in part.
    begun: bool,
    /// The connection has ended.
    over: bool,
}

/// The client in a state ([`crate::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QmpState {
    stream: Fd,
    version: Option<String>,
}

/// The error for a command that did not do what it should.
pub(super) fn failed(command: &str, reason: impl ToString) -> Error {
    Error::Monitor {
        command: command.to_owned(),
        reason: reason.to_string(),
    }
}

/// The client; its connection is served by a task that ends with it or with
/// QEMU.
#[derive(Debug)]
pub(super) struct Qmp {
    commands: mpsc::Sender<Request>,
    heard: Arc<Mutex<Heard>>,
    stream: Arc<UnixStream>,
}

impl Qmp {
    /// Serves `stream`, and returns when QEMU's main loop has answered.
    pub(super) async fn negotiate(stream: UnixStream) -> Result<Self, Error> {
        let qmp = Self::begin(stream, Heard::default());
        qmp.execute("qmp_capabilities").await?;
        Ok(qmp)
    }

    fn begin(stream: UnixStream, heard: Heard) -> Self {
        let (commands, requests) = mpsc::channel(8);
        let (stream, heard) = (Arc::new(stream), Arc::new(Mutex::new(heard)));
        tokio::spawn(serve(Arc::clone(&stream), requests, Arc::clone(&heard)));
        Self {
            commands,
            heard,
            stream,
        }
    }

    /// For the next program.
    pub(super) fn state(&self, giver: &mut Giver) -> Result<QmpState, NoState> {
        let heard = lock(&self.heard);
        if heard.over || heard.shutdown.is_some() {
            return Err(NoState::never("QEMU is ending"));
        }
        // Requests that nobody has taken yet are in the channel.
        if heard.asked || heard.begun || self.commands.capacity() < self.commands.max_capacity() {
            return Err(NoState::busy("QEMU is doing something it was asked to"));
        }
        Ok(QmpState {
            stream: giver.give(&*self.stream),
            version: heard.version.clone(),
        })
    }

    /// That of the program before.
    pub(super) fn take_over(state: QmpState, taker: &mut Taker) -> io::Result<Self> {
        let stream = std::os::unix::net::UnixStream::from(taker.take(state.stream)?);
        let heard = Heard {
            version: state.version,
            ..Heard::default()
        };
        Ok(Self::begin(UnixStream::from_std(stream)?, heard))
    }

    /// Executes a command that takes no arguments.
    pub(super) async fn execute(&self, command: &str) -> Result<Value, Error> {
        self.exchange(command, json!({ "execute": command }), None)
            .await
    }

    /// Executes a command with arguments.
    pub(super) async fn execute_with(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<Value, Error> {
        let line = json!({ "execute": command, "arguments": arguments });
        self.exchange(command, line, None).await
    }

    /// Gives QEMU a descriptor, which it knows by `name` until it has been used.
    pub(super) async fn give(&self, name: &str, fd: OwnedFd) -> Result<(), Error> {
        const COMMAND: &str = "getfd";
        let line = json!({ "execute": COMMAND, "arguments": { "fdname": name } });
        self.exchange(COMMAND, line, Some(fd)).await.map(drop)
    }

    /// Adds a descriptor to the set of that number, which files can be opened from.
    pub(super) async fn add_fd(&self, set: usize, fd: OwnedFd) -> Result<(), Error> {
        const COMMAND: &str = "add-fd";
        let line = json!({ "execute": COMMAND, "arguments": { "fdset-id": set } });
        self.exchange(COMMAND, line, Some(fd)).await.map(drop)
    }

    async fn exchange(
        &self,
        command: &str,
        line: Value,
        fd: Option<OwnedFd>,
    ) -> Result<Value, Error> {
        let gone = || failed(command, "QEMU is gone");
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            let request = (line, fd, reply);
            self.commands.send(request).await.map_err(|_| gone())?;
            let answer = answer.await.map_err(|_| gone())?;
            answer.map_err(|reason| failed(command, reason))
        };
        tokio::time::timeout(COMMAND_DEADLINE, exchange)
            .await
            .unwrap_or_else(|_| {
                let late = format!("no answer within {COMMAND_DEADLINE:?}");
                Err(failed(command, late))
            })
    }

    /// The reason QEMU gave for shutting down: `guest-reset`, `guest-panic`, ….
    pub(super) fn shutdown_reason(&self) -> Option<String> {
        lock(&self.heard).shutdown.clone()
    }

    /// QEMU's version, as it greets.
    pub(super) fn version(&self) -> String {
        lock(&self.heard).version.clone().unwrap_or_default()
    }
}

fn lock(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve(
    stream: Arc<UnixStream>,
    requests: mpsc::Receiver<Request>,
    heard: Arc<Mutex<Heard>>,
) {
    exchange(&stream, requests, &heard).await;
    lock(&heard).over = true;
}

async fn exchange(
    stream: &UnixStream,
    mut requests: mpsc::Receiver<Request>,
    heard: &Mutex<Heard>,
) {
    let mut lines = Lines::default();
    // A command whose caller gave up still gets its reply read: replies come
    // in order, and the next command's must not be taken for it.
    let mut waiting: Option<Reply> = None;
    loop {
        tokio::select! {
            line = lines.next(stream, heard) => {
                let Ok(line) = line else { return };
                match message(&line) {
                    Message::Reply(result) => {
                        if let Some(reply) = waiting.take() {
                            lock(heard).asked = false;
                            let _ = reply.send(result);
                        }
                    }
                    Message::Shutdown(reason) => lock(heard).shutdown = Some(reason),
                    Message::Greeting(version) => lock(heard).version = Some(version),
                    Message::Other => {}
                    Message::Broken => return,
                }
            }
            request = requests.recv(), if waiting.is_none() => {
                let Some((command, fd, reply)) = request else { return };
                lock(heard).asked = true;
                waiting = Some(reply);
                let line = format!("{command}\n");
                let sent = match fd {
                    Some(fd) => send_with(stream, line.as_bytes(), fd).await,
                    None => write_all(stream, line.as_bytes()).await,
                };
                if sent.is_err() {
                    return;
                }
            }
        }
    }
}

async fn write_all(stream: &UnixStream, mut line: &[u8]) -> io::Result<()> {
    while !line.is_empty() {
        stream.writable().await?;
        match stream.try_write(line) {
            Ok(written) => line = line.get(written..).unwrap_or_default(),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Sends a line, and a descriptor with it. One command waits at a time, so there is
/// room for the line.
async fn send_with(stream: &UnixStream, line: &[u8], fd: OwnedFd) -> io::Result<()> {
    let fds = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let send = || {
        let flags = MsgFlags::MSG_NOSIGNAL;
        let socket = stream.as_raw_fd();
        Ok(sendmsg::<()>(
            socket,
            &[IoSlice::new(line)],
            &rights,
            flags,
            None,
        )?)
    };
    match stream.async_io(Interest::WRITABLE, send).await? == line.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}

#[derive(Debug, PartialEq)]
enum Message {
    Reply(Result<Value, String>),
    Shutdown(String),
    /// The first, with the version.
    Greeting(String),
    /// An event nobody here needs.
    Other,
    Broken,
}

/// Parses one line of QMP (docs/interop/qmp-spec).
fn message(line: &[u8]) -> Message {
    let Ok(mut value) = serde_json::from_slice::<Value>(line) else {
        return Message::Broken;
    };
    if let Some(result) = value.get_mut("return") {
        return Message::Reply(Ok(result.take()));
    }
    if let Some(error) = value.get("error") {
        let words = error.get("desc").and_then(Value::as_str);
        return Message::Reply(Err(process::quotable(
            words.unwrap_or("an error without words"),
        )));
    }
    if value.get("event").and_then(Value::as_str) == Some("SHUTDOWN") {
        let reason = value.pointer("/data/reason").and_then(Value::as_str);
        return Message::Shutdown(process::quotable(reason.unwrap_or("unknown")));
    }
    if let Some(version) = value.pointer("/QMP/version") {
        let number = |name| version.pointer(name).and_then(Value::as_u64).unwrap_or(0);
        let (major, minor) = (number("/qemu/major"), number("/qemu/minor"));
        let micro = number("/qemu/micro");
        let package = version.get("package").and_then(Value::as_str);
        let words = format!("{major}.{minor}.{micro} {}", package.unwrap_or_default());
        return Message::Greeting(process::quotable(&words));
    }
    Message::Other
}

/// Bounded lines of a stream. `next` may be dropped while it waits.
#[derive(Debug, Default)]
struct Lines {
    buffer: Vec<u8>,
}

impl Lines {
    async fn next(&mut self, stream: &UnixStream, heard: &Mutex<Heard>) -> io::Result<Vec<u8>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&b| b == b'\n') {
                let rest = self.buffer.split_off(end + 1);
                lock(heard).begun = !rest.is_empty();
                return Ok(std::mem::replace(&mut self.buffer, rest));
            }
            if self.buffer.len() >= LINE_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            stream.readable().await?;
            let mut chunk = [0; 2048];
            match stream.try_read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    self.buffer.extend_from_slice(&chunk[..n]);
                    lock(heard).begun = true;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    /// A peer that answers each line with the next of `replies`.
    async fn with_peer(replies: &[&str]) -> Result<Qmp, Error> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let replies: Vec<String> = replies.iter().map(|r| r.to_string()).collect();
        tokio::spawn(async move {
            let mut peer = BufReader::new(theirs);
            let mut line = String::new();
            for reply in replies {
                peer.read_line(&mut line).await.unwrap();
                if peer.write_all(reply.as_bytes()).await.is_err() {
                    return;
                }
            }
        });
        Qmp::negotiate(ours).await
    }

    #[tokio::test]
    async fn greeting_events_and_errors() {
        let qmp = with_peer(&[
            "{\"QMP\": {\"version\": {\"qemu\": {\"major\": 7, \"minor\": 2, \"micro\": 9},\
             \"package\": \"Debian\"}}}\r\n{\"return\": {}}\r\n",
            "{\"event\":\"SHUTDOWN\",\"data\":{\"guest\":true,\"reason\":\"guest-reset\"}}\n{\"return\":{\"status\":\"running\"}}\n",
            "{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\\u001b way\"}}\n",
        ])
        .await
        .unwrap();
        assert_eq!(qmp.version(), "7.2.9 Debian");
        let status = qmp.execute("query-status").await.unwrap();
        assert_eq!(status["status"], "running");
        assert_eq!(qmp.shutdown_reason().as_deref(), Some("guest-reset"));
        let error = qmp.execute("stop").await.unwrap_err().to_string();
        assert_eq!(error, "QEMU monitor, stop: no way");
        let error = qmp.execute("stop").await.unwrap_err().to_string();
        assert_eq!(error, "QEMU monitor, stop: QEMU is gone");
    }

    #[tokio::test]
    async fn descriptors_go_along() {
        use nix::sys::socket::{ControlMessageOwned, recvmsg};
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let peer = std::thread::spawn(move || {
            use std::io::{BufRead, Write};
            let mut lines = std::io::BufReader::new(theirs.try_clone().unwrap());
            lines.read_line(&mut String::new()).unwrap();
            (&theirs).write_all(b"{\"return\": {}}\n").unwrap();
            let mut bytes = [0; 256];
            let mut buffer = [io::IoSliceMut::new(&mut bytes)];
            let mut room = nix::cmsg_space!([std::os::fd::RawFd; 1]);
            let flags = MsgFlags::empty();
            let got = recvmsg::<()>(theirs.as_raw_fd(), &mut buffer, Some(&mut room), flags);
            let fds = got.unwrap().cmsgs().unwrap().next();
            (&theirs).write_all(b"{\"return\": {}}\n").unwrap();
            assert!(matches!(fds, Some(ControlMessageOwned::ScmRights(fds)) if fds.len() == 1));
            String::from_utf8_lossy(&bytes).into_owned()
        });
        ours.set_nonblocking(true).unwrap();
        let qmp = Qmp::negotiate(UnixStream::from_std(ours).unwrap()).await;
        let fd = std::fs::File::open("/dev/null").unwrap();
        qmp.unwrap().give("state", fd.into()).await.unwrap();
        assert!(peer.join().unwrap().contains("\"fdname\":\"state\""));
    }

    #[tokio::test]
    async fn hostile_peers_are_refused() {
        let endless = "x".repeat(2 * LINE_MAX);
        for reply in ["not json\n", "{\"return\": \n", endless.as_str(), "\n", ""] {
            let error = with_peer(&[reply]).await.unwrap_err();
            assert!(error.to_string().contains("gone"), "{error}");
        }
    }

    #[test]
    fn odd_messages() {
        assert_eq!(message(b"[]"), Message::Other);
        assert_eq!(message(b"{\"event\":7}"), Message::Other);
        assert_eq!(
            message(b"{\"error\":null}"),
            Message::Reply(Err("an error without words".into()))
        );
    }
}
