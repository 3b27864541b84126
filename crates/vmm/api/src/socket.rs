//! The socket: packets of JSON with descriptors beside them.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
        sendmsg, socketpair,
    },
};
use serde::{Serialize, de::DeserializeOwned};

/// Longest message in bytes.
pub const MESSAGE_MAX: usize = 64 * 1024;
/// Most descriptors beside a message.
pub const FDS_MAX: usize = 64;

/// Why nothing could be said or heard.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The socket failed.
    #[error("{0} the control socket: {1}")]
    Socket(&'static str, #[source] Errno),
    /// A message that would not fit.
    #[error("a message of {0} bytes and {1} descriptors is too long")]
    TooLong(usize, usize),
    /// What came was cut, or is no message of this contract.
    #[error("what came over the control socket is no message: {0}")]
    Malformed(String),
}

/// A message, and the descriptors that came with it.
#[derive(Debug)]
pub struct Received<T> {
    /// The message.
    pub message: T,
    /// The descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// One end.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// Both ends, close-on-exec.
pub fn pair() -> Result<(Channel, Channel), ChannelError> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map(|(a, b)| (Channel(a), Channel(b)))
    .map_err(|e| ChannelError::Socket("make", e))
}

impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn encode(message: &impl Serialize) -> Result<Vec<u8>, ChannelError> {
    let bytes = serde_json::to_vec(message).map_err(|e| ChannelError::Malformed(e.to_string()))?;
    if bytes.len() > MESSAGE_MAX {
        return Err(ChannelError::TooLong(bytes.len(), 0));
    }
    Ok(bytes)
}

impl Channel {
    /// Sends a message with descriptors. `EAGAIN` comes as
    /// [`ChannelError::Socket`] if the socket was made non-blocking.
    pub fn send(
        &self,
        message: &impl Serialize,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = encode(message)?;
        if fds.len() > FDS_MAX {
            return Err(ChannelError::TooLong(bytes.len(), fds.len()));
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[_] = if raw.is_empty() { &[] } else { &rights };
        sendmsg::<()>(
            self.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map(drop)
        .map_err(|e| ChannelError::Socket("write to", e))
    }

    /// Sends a message without descriptors by a plain `write`, for a thread that may
    /// make few calls. SIGPIPE must be ignored, as it is in programs of Rust.
    pub fn tell(&self, message: &impl Serialize) -> Result<(), ChannelError> {
        let bytes = encode(message)?;
        nix::unistd::write(&self.0, &bytes)
            .map(drop)
            .map_err(|e| ChannelError::Socket("write to", e))
    }

    /// The next message; `None` when the peer is gone. Waits for it unless the
    /// socket was made non-blocking.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<Received<T>>, ChannelError> {
        let mut bytes = vec![0; MESSAGE_MAX];
        let mut control = cmsg_space!([RawFd; FDS_MAX]);
        let mut iov = [IoSliceMut::new(&mut bytes)];
        let got = loop {
            match recvmsg::<()>(
                self.as_raw_fd(),
                &mut iov,
                Some(&mut control),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Err(Errno::EINTR) => {}
                Err(e) => return Err(ChannelError::Socket("read from", e)),
                Ok(got) => break got,
            }
        };
        // First of all own what came, so that nothing leaks whatever follows.
        let mut fds = Vec::new();
        if let Ok(messages) = got.cmsgs() {
            for message in messages {
                if let ControlMessageOwned::ScmRights(numbers) = message {
                    // SAFETY: the kernel has just made these descriptors for us.
                    fds.extend(numbers.iter().map(|&n| unsafe { OwnedFd::from_raw_fd(n) }));
                }
            }
        }
        let (len, flags) = (got.bytes, got.flags);
        if len == 0 && fds.is_empty() {
            return Ok(None);
        }
        if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Err(ChannelError::Malformed("it is too long".to_owned()));
        }
        let message = serde_json::from_slice(bytes.get(..len).unwrap_or_default())
            .map_err(|e| ChannelError::Malformed(e.to_string()))?;
        Ok(Some(Received { message, fds }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Message, Reply, Request};

    #[test]
    fn messages_and_descriptors_arrive() {
        let (a, b) = pair().unwrap();
        a.send(&Request::Pause, &[a.as_fd(), b.as_fd()]).unwrap();
        let got: Received<Request> = b.receive().unwrap().unwrap();
        assert_eq!((got.message, got.fds.len()), (Request::Pause, 2));
        drop(got.fds);
        for reply in [Ok(Reply::Done), Err("no".to_owned())] {
            b.tell(&Message::Reply(reply.clone())).unwrap();
            let got: Received<Message> = a.receive().unwrap().unwrap();
            assert_eq!(got.message, Message::Reply(reply));
        }
        drop(a);
        assert!(b.receive::<Request>().unwrap().is_none());
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let (a, b) = pair().unwrap();
        for junk in [
            &b"{"[..],
            b"\"fly\"",
            b"[1]",
            &[0xff; 100],
            &[b'x'; MESSAGE_MAX + 1],
        ] {
            nix::sys::socket::send(a.as_raw_fd(), junk, MsgFlags::empty()).unwrap();
            let error = b.receive::<Request>().unwrap_err();
            assert!(matches!(error, ChannelError::Malformed(_)), "{error}");
        }
        let long = Message::Reply(Err("x".repeat(MESSAGE_MAX)));
        assert!(matches!(a.send(&long, &[]), Err(ChannelError::TooLong(..))));
    }
}
