//! Starts helper processes and talks to them; see [`walnut_agent::wire`].
//!
//! Building a container takes a process with one thread, and starting that
//! takes longer than anything else here: one is kept ready for the first
//! container, started while the host still thinks.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdStream;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::timeout;
use walnut_agent::HELPER;
use walnut_agent::wire::{
    ACK, Ends, FDS_MAX, PAYLOAD_MAX, REPLY_HEAD, Reply, Request, Status, Verb,
};

use crate::emulated;
use crate::reaper::{Code, Reaper};

/// How long a helper may take: longer than a device may take to appear.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// Why a helper did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub(crate) struct Refusal {
    pub(crate) status: Status,
    pub(crate) text: String,
    /// The helper itself says so: it has undone what it did.
    pub(crate) undone: bool,
}

fn internal(what: &str, why: impl std::fmt::Display) -> Refusal {
    Refusal {
        status: Status::Internal,
        text: format!("{what}: {why}"),
        undone: false,
    }
}

/// What a helper answered. Until it is dropped the helper lives and its new
/// process is its child, not ours.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) pid: u32,
    pub(crate) ends: Ends,
    socket: UnixStream,
}

impl Answer {
    /// Lets the helper go; call when the process is on the reaper's books.
    pub(crate) fn acknowledge(self) -> Ends {
        // One byte into an empty socket: there is room.
        let _ = self.socket.try_write(&[ACK]);
        self.ends
    }
}

#[derive(Debug)]
struct Helper {
    pid: u32,
    socket: UnixStream,
    ended: oneshot::Receiver<Code>,
}

/// Starts helpers.
#[derive(Debug, Clone)]
pub(crate) struct Helpers {
    reaper: Arc<Reaper>,
    ready: Arc<Mutex<Option<Helper>>>,
}

impl Helpers {
    pub(crate) fn new(reaper: Arc<Reaper>) -> Self {
        Self {
            reaper,
            ready: Arc::default(),
        }
    }

    fn ready(&self) -> std::sync::MutexGuard<'_, Option<Helper>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a helper for the next request, unless there is one.
    pub(crate) fn prepare(&self) {
        if self.ready().is_some() {
            return;
        }
        if let Ok(helper) = self.spawn() {
            *self.ready() = Some(helper);
        }
    }

    fn spawn(&self) -> io::Result<Helper> {
        let (ours, theirs) = StdStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut command = Command::new(HELPER);
        command
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)));
        let child = emulated::at_fixed_addresses(|| command.spawn())?;
        // Its status goes to the reaper, like everybody's.
        let pid = child.id();
        Ok(Helper {
            pid,
            ended: self.reaper.expect(pid),
            socket: UnixStream::from_std(ours)?,
        })
    }

    /// Asks a helper. `pid` and `payload` are as the verb wants them.
    pub(crate) async fn ask(
        &self,
        verb: Verb,
        pid: u32,
        payload: &[u8],
    ) -> Result<Answer, Refusal> {
        let what = "run the container helper";
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if payload.len() > PAYLOAD_MAX {
            return Err(Refusal {
                status: Status::Invalid,
                text: format!("the request is larger than {PAYLOAD_MAX} bytes"),
                undone: true,
            });
        }
        let waiting = self.ready().take();
        let Helper {
            pid: helper,
            mut socket,
            ended,
        } = match waiting {
            Some(helper) => helper,
            None => self.spawn().map_err(|e| internal(what, e))?,
        };
        let talk = async {
            socket
                .write_all(&Request { verb, pid, len }.encode())
                .await?;
            socket.write_all(payload).await?;
            receive(&mut socket).await
        };
        let answer = tokio::select! {
            biased;
            answer = timeout(ANSWER_WITHIN, talk) => answer,
            code = ended => {
                let code = code.unwrap_or(255);
                return Err(internal(what, format!("it ended without an answer, with code {code}")));
            }
        };
        match answer {
            Ok(Ok((reply, ends, text))) if reply.status == Status::Ok => {
                drop(text);
                Ok(Answer {
                    pid: reply.pid,
                    ends,
                    socket,
                })
            }
            Ok(Ok((reply, _, text))) => Err(Refusal {
                status: reply.status,
                text,
                undone: true,
            }),
            Ok(Err(e)) => {
                let _ = self.reaper.signal(helper, libc::SIGKILL);
                Err(internal(what, e))
            }
            Err(_late) => {
                let _ = self.reaper.signal(helper, libc::SIGKILL);
                Err(Refusal {
                    status: Status::Deadline,
                    text: format!("{what}: no answer within {} s", ANSWER_WITHIN.as_secs()),
                    undone: false,
                })
            }
        }
    }
}

async fn receive(socket: &mut UnixStream) -> io::Result<(Reply, Ends, String)> {
    let mut head = [0; REPLY_HEAD];
    let (got, fds) = socket
        .async_io(Interest::READABLE, || receive_head(socket, &mut head))
        .await?;
    if let Some(rest) = head.get_mut(got..).filter(|r| !r.is_empty()) {
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        socket.read_exact(rest).await?;
    }
    let bad = || io::Error::other("its answer is not of this protocol");
    let reply = Reply::decode(&head).ok_or_else(bad)?;
    let ends = Ends::from_parts(reply.mask, fds).ok_or_else(bad)?;
    let mut text = vec![0; usize::from(reply.text_len)];
    socket.read_exact(&mut text).await?;
    Ok((reply, ends, String::from_utf8_lossy(&text).into_owned()))
}

/// The first bytes of a reply, and the descriptors that come with them.
fn receive_head(socket: &UnixStream, head: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut iov = [IoSliceMut::new(head)];
    let mut space = nix::cmsg_space!([RawFd; FDS_MAX]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel just made these descriptors for us alone.
            fds.extend(
                received
                    .iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }),
            );
        }
    }
    Ok((message.bytes, fds))
}
