//! The vhost-user wire (QEMU docs/interop/vhost-user.rst), as a front end speaks
//! it: one request, at most one reply, never without a limit of time.
//!
//! The back end is another process, and may be hostile: no length of its is
//! believed, and descriptors that it sends are never taken in.

use std::{
    io::IoSlice,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        socket::{ControlMessage, MsgFlags, recv, sendmsg},
        time::TimeSpec,
    },
};

use super::Error;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER: usize = 12;
/// Longest reply: the configuration space is the only one that is not fixed.
const MAX_REPLY: usize = 4096;

/// The requests that we make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    GetConfig = 24,
}

/// The connection. After the first failure every call fails at once: what comes
/// next on the wire would be the answer to something else.
#[derive(Debug)]
pub(super) struct Channel {
    sock: OwnedFd,
    limit: Duration,
    deadline: Instant,
    dead: bool,
    /// `VHOST_USER_PROTOCOL_F_REPLY_ACK`: every request is answered.
    pub(super) acks: bool,
}

impl Channel {
    /// Requests are made between two calls of [`Self::begin`] in `limit` together.
    pub(super) fn new(sock: OwnedFd, limit: Duration) -> Self {
        Self {
            sock,
            limit,
            deadline: Instant::now() + limit,
            dead: false,
            acks: false,
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.sock.as_fd()
    }

    /// From the next [`Self::begin`] on.
    pub(super) fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// From here on the next requests have their time.
    pub(super) fn begin(&mut self) {
        self.deadline = Instant::now() + self.limit;
    }

    /// Whether the back end is there, and silent as it has to be.
    pub(super) fn alive(&mut self) -> bool {
        if !self.dead {
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            let result = recv(self.sock.as_raw_fd(), &mut [0], flags);
            self.dead = !matches!(result, Err(Errno::EAGAIN | Errno::EINTR));
        }
        !self.dead
    }

    /// A request without an answer of its own.
    pub(super) fn tell(
        &mut self,
        request: Request,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        let flags = if self.acks { NEED_REPLY } else { 0 };
        self.whole(|channel| {
            channel.send(request, flags, body, fds)?;
            if !channel.acks {
                return Ok(None);
            }
            let reply = channel.reply(request)?;
            let code = reply
                .try_into()
                .map_err(|_| Error::Protocol(request.name()))?;
            Ok(Some(u64::from_le_bytes(code)))
        })
        .and_then(|code| match code {
            None | Some(0) => Ok(()),
            Some(_) => Err(Error::Refused(request.name())),
        })
    }

    /// A request that is answered by `N` bytes.
    pub(super) fn ask<const N: usize>(
        &mut self,
        request: Request,
        body: &[u8],
    ) -> Result<[u8; N], Error> {
        let reply = self.ask_long(request, body)?;
        reply.try_into().map_err(|_| {
            self.dead = true;
            Error::Protocol(request.name())
        })
    }

    /// A request that is answered by some bytes.
    pub(super) fn ask_long(&mut self, request: Request, body: &[u8]) -> Result<Vec<u8>, Error> {
        self.whole(|channel| {
            channel.send(request, 0, body, &[])?;
            channel.reply(request)
        })
    }

    fn whole<T>(&mut self, act: impl FnOnce(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        if self.dead {
            return Err(Error::Closed);
        }
        let result = act(self);
        self.dead = result.is_err();
        result
    }

    fn send(
        &mut self,
        request: Request,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        let size = u32::try_from(body.len()).map_err(|_| Error::Protocol(request.name()))?;
        let mut message = Vec::with_capacity(HEADER + body.len());
        for word in [request as u32, VERSION | flags, size] {
            message.extend(word.to_le_bytes());
        }
        message.extend(body);
        let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let mut sent = 0;
        while sent < message.len() {
            // The descriptors go with the first byte.
            let rights = [ControlMessage::ScmRights(&raw)];
            let control: &[_] = if sent == 0 && !raw.is_empty() {
                &rights
            } else {
                &[]
            };
            let data = [IoSlice::new(message.get(sent..).unwrap_or_default())];
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(self.sock.as_raw_fd(), &data, control, flags, None) {
                Ok(n) => sent += n,
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, request)?,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(failed(request, e)),
            }
        }
        Ok(())
    }

    fn reply(&mut self, request: Request) -> Result<Vec<u8>, Error> {
        let mut header = [0; HEADER];
        self.receive(&mut header, request)?;
        let word = |at: usize| {
            let bytes = header.get(at..at + 4).and_then(|raw| raw.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        let size = usize::try_from(word(8)).unwrap_or(usize::MAX);
        let right = word(0) == request as u32
            && word(4) & (VERSION_MASK | REPLY) == VERSION | REPLY
            && size <= MAX_REPLY;
        if !right {
            return Err(Error::Protocol(request.name()));
        }
        let mut body = vec![0; size];
        self.receive(&mut body, request)?;
        Ok(body)
    }

    fn receive(&mut self, mut into: &mut [u8], request: Request) -> Result<(), Error> {
        while !into.is_empty() {
            // No room for control messages: what is passed is dropped by the kernel.
            match recv(self.sock.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Err(Error::Closed),
                Ok(n) => into = into.get_mut(n..).unwrap_or_default(),
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLIN, request)?,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(failed(request, e)),
            }
        }
        Ok(())
    }

    fn wait(&self, flags: PollFlags, request: Request) -> Result<(), Error> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::Late(request.name(), self.limit));
        }
        // Not poll, which a process that was stopped goes on with by a call of its own
        // (restart_syscall).
        let mut fds = [PollFd::new(self.sock.as_fd(), flags)];
        match ppoll(&mut fds, Some(TimeSpec::from_duration(left)), None) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(failed(request, e)),
        }
    }
}

fn failed(request: Request, errno: Errno) -> Error {
    match errno {
        Errno::EPIPE | Errno::ECONNRESET => Error::Closed,
        errno => Error::Socket(request.name(), errno.into()),
    }
}

impl Request {
    /// Its name in the protocol's documents.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::GetFeatures => "GET_FEATURES",
            Self::SetFeatures => "SET_FEATURES",
            Self::SetOwner => "SET_OWNER",
            Self::SetMemTable => "SET_MEM_TABLE",
            Self::SetVringNum => "SET_VRING_NUM",
            Self::SetVringAddr => "SET_VRING_ADDR",
            Self::SetVringBase => "SET_VRING_BASE",
            Self::GetVringBase => "GET_VRING_BASE",
            Self::SetVringKick => "SET_VRING_KICK",
            Self::SetVringCall => "SET_VRING_CALL",
            Self::GetProtocolFeatures => "GET_PROTOCOL_FEATURES",
            Self::SetProtocolFeatures => "SET_PROTOCOL_FEATURES",
            Self::GetQueueNum => "GET_QUEUE_NUM",
            Self::SetVringEnable => "SET_VRING_ENABLE",
            Self::GetConfig => "GET_CONFIG",
        }
    }
}
