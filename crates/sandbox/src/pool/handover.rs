//! How a container is handed to a member of a pool, or to the supervisor whose machine it is
//! to join: one message over a socket, with the descriptors that a new supervisor would
//! have inherited, and one answer.
//!
//! The message is one line of JSON. A member answers with the line `ok`, and has the
//! container from then on; with anything else, or nothing, it does not, and whoever asked
//! kills a member that is silent: two must never have one container. A supervisor that is
//! silent has containers of its own, and is left alone: one that it takes later has a lease
//! that is broken by then, and goes.

use std::{
    fs,
    io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream as StdStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::{
    signal::{Signal, kill},
    socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg,
        sockopt::PeerCredentials,
    },
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{UnixListener, UnixStream},
    time::timeout,
};

use crate::{Error, Result};

/// Longest message.
const MESSAGE_MAX: usize = 16 << 10;
/// Longest answer that is read.
const ANSWER_MAX: u64 = 4 << 10;
/// Descriptors of a container: socket, lock, lease, log, and its image's lease.
const FDS: usize = 5;
/// Those of one that joins: lock, lease, and its image's lease.
const JOIN_FDS: usize = 3;
const OK: &str = "ok";
/// Longest a member may take to answer, and a visitor to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// A container, as its supervisor is told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Handover {
    /// Its name.
    pub id: String,
    /// Its record and bundle.
    pub container_dir: PathBuf,
    /// Directory for the sandbox's sockets.
    pub run_dir: PathBuf,
}

/// What a member is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Message {
    Handover(Handover),
    Join(Handover),
    Retire,
}

/// A container that a member has been given.
#[derive(Debug)]
pub struct Given {
    /// The container.
    pub handover: Handover,
    /// Listening socket of its Task API.
    pub socket: OwnedFd,
    /// Its lock, held.
    pub lock: OwnedFd,
    /// A pipe, see the supervisor's options.
    pub lease: OwnedFd,
    /// The supervisor's log.
    pub log: OwnedFd,
    /// Keeps its image from being removed, while it is open.
    pub image: OwnedFd,
}

/// A container that is to join a machine.
#[derive(Debug)]
pub struct Joining {
    /// The container.
    pub handover: Handover,
    /// Its lock, held.
    pub lock: OwnedFd,
    /// A pipe, see the supervisor's options.
    pub lease: OwnedFd,
    /// Keeps its image from being removed, while it is open.
    pub image: OwnedFd,
}

/// What somebody wants of a member, or of a supervisor.
#[derive(Debug)]
pub enum Visit {
    /// A member: to have this container.
    Given(Box<Given>),
    /// A supervisor: to have this one as well.
    Joins(Box<Joining>),
    /// To go.
    Retire,
}

/// Who waits for an answer.
#[derive(Debug)]
pub struct Visitor(UnixStream);

impl Visitor {
    /// Says that it is done. False: nobody is there to hear it, so it is not.
    pub async fn accept(mut self) -> bool {
        let line = format!("{OK}\n");
        self.0.write_all(line.as_bytes()).await.is_ok()
    }

    /// Says why it is not.
    pub async fn refuse(mut self, why: &str) {
        let line = format!("{}\n", why.replace('\n', " "));
        let _ = self.0.write_all(line.as_bytes()).await;
    }
}

/// A member's socket.
pub(super) fn socket(dir: &Path) -> PathBuf {
    dir.join("sock")
}

/// A member's socket, as the member has it. Dropping it takes the socket away.
#[derive(Debug)]
pub struct Post {
    listener: UnixListener,
    path: PathBuf,
}

impl Post {
    /// From here on the member can be had.
    pub fn open(dir: &Path) -> Result<Self> {
        let new = dir.join("sock.new");
        let path = socket(dir);
        let listener = UnixListener::bind(&new).map_err(Error::io("create socket", &new))?;
        fs::rename(&new, &path).map_err(Error::io("put in place", &new))?;
        Ok(Self { listener, path })
    }

    /// Who comes next with something that is understood, and what they want.
    pub async fn visit(&self) -> Result<(Visit, Visitor)> {
        loop {
            let (stream, _) = self
                .listener
                .accept()
                .await
                .map_err(Error::io("accept at", &self.path))?;
            match timeout(PATIENCE, read(stream)).await {
                Ok(Ok(visit)) => return Ok(visit),
                // A caller that has gone, or of another version.
                Ok(Err(e)) => tracing::debug!("a visitor is not understood: {e}"),
                Err(_) => tracing::debug!("a visitor said nothing"),
            }
        }
    }
}

impl Drop for Post {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

async fn read(mut stream: UnixStream) -> io::Result<(Visit, Visitor)> {
    let own = nix::unistd::geteuid().as_raw();
    if getsockopt(&stream, PeerCredentials)?.uid() != own {
        return Err(io::Error::other("it is another user"));
    }
    let mut line = vec![0; MESSAGE_MAX];
    let (got, fds) = stream
        .async_io(Interest::READABLE, || receive(stream.as_fd(), &mut line))
        .await?;
    line.truncate(got);
    while !line.ends_with(b"\n") {
        let mut more = [0; 1024];
        let got = stream.read(&mut more).await?;
        line.extend_from_slice(more.get(..got).unwrap_or_default());
        if got == 0 || line.len() > MESSAGE_MAX {
            return Err(io::Error::other("the message is no line"));
        }
    }
    let visit = match serde_json::from_slice(&line)? {
        Message::Retire => Visit::Retire,
        Message::Join(handover) => {
            let fds: [OwnedFd; JOIN_FDS] = fds
                .try_into()
                .map_err(|_| io::Error::other("it came with other descriptors"))?;
            let [lock, lease, image] = fds;
            Visit::Joins(Box::new(Joining {
                handover,
                lock,
                lease,
                image,
            }))
        }
        Message::Handover(handover) => {
            let fds: [OwnedFd; FDS] = fds
                .try_into()
                .map_err(|_| io::Error::other("it came with other descriptors"))?;
            let [socket, lock, lease, log, image] = fds;
            Visit::Given(Box::new(Given {
                handover,
                socket,
                lock,
                lease,
                log,
                image,
            }))
        }
    };
    Ok((visit, Visitor(stream)))
}

/// The first bytes of a message, and the descriptors that come with them.
fn receive(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut iov = [IoSliceMut::new(bytes)];
    let mut space = nix::cmsg_space!([RawFd; FDS]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel just made these descriptors for us alone.
            let owned = received
                .iter()
                .map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
            fds.extend(owned);
        }
    }
    Ok((message.bytes, fds))
}

/// What becomes of one that does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Silent {
    IsKilled,
    IsLeft,
}

/// Sends a message and reads the answer. Returns the PID of who gave it.
fn ask(dir: &Path, message: &Message, fds: &[BorrowedFd<'_>], silent: Silent) -> io::Result<u32> {
    let mut stream = StdStream::connect(socket(dir))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let member = getsockopt(&stream, PeerCredentials)?.pid();
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights };
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&line)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    stream.write_all(line.get(sent..).unwrap_or_default())?;
    let mut answer = String::new();
    let read = BufReader::new((&stream).take(ANSWER_MAX)).read_line(&mut answer);
    match (read, answer.trim_end()) {
        (Ok(_), OK) => Ok(u32::try_from(member).unwrap_or(0)),
        (Ok(0), _) => Err(io::Error::other("it has gone")),
        (Ok(_), why) => Err(io::Error::other(why.to_owned())),
        (Err(e), _) => {
            // One that hung up has been given another container, or is gone. One that is
            // silent might still take what it was given.
            let late = matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
            );
            if late && silent == Silent::IsKilled {
                let _ = kill(nix::unistd::Pid::from_raw(member), Signal::SIGKILL);
            }
            Err(e)
        }
    }
}

/// Gives a container to the member of `dir`.
pub(super) fn give(dir: &Path, handover: &Handover, fds: &[BorrowedFd<'_>]) -> io::Result<u32> {
    let message = Message::Handover(handover.clone());
    ask(dir, &message, fds, Silent::IsKilled)
}

/// Has a container join the machine whose supervisor's run directory this is. The
/// descriptors are the ones of [`Joining`], in its order.
pub fn join(run_dir: &Path, handover: &Handover, fds: &[BorrowedFd<'_>]) -> Result<()> {
    let joined = ask(
        run_dir,
        &Message::Join(handover.clone()),
        fds,
        Silent::IsLeft,
    );
    joined
        .map(drop)
        .map_err(|e| Error::WrongState(format!("join the machine: {e}")))
}

/// Tells the member of `dir` to go.
pub(super) fn retire(dir: &Path) -> io::Result<()> {
    ask(dir, &Message::Retire, &[], Silent::IsKilled).map(drop)
}
