//! The helper's end of the socket to the agent.

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use walnut_agent::wire::{Ends, PAYLOAD_MAX, REQUEST_HEAD, Reply, Request, Status, TEXT_MAX};

use crate::failure::Failure;

/// What a request brought about.
#[derive(Debug, Default)]
pub(crate) struct Done {
    /// The new process; 0 if none.
    pub(crate) pid: u32,
    /// The agent's ends of its streams.
    pub(crate) ends: Ends,
}

/// The socket.
#[derive(Debug)]
pub(crate) struct Link(UnixStream);

impl Link {
    /// Takes the socket off standard input and puts /dev/null on 0 to 2, so
    /// that a container that is given no streams inherits just that.
    pub(crate) fn from_stdin() -> io::Result<Self> {
        // SAFETY: F_DUPFD_CLOEXEC only makes a new descriptor.
        let fd = unsafe { libc::fcntl(0, libc::F_DUPFD_CLOEXEC, 3) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made and nobody else has it.
        let socket = unsafe { UnixStream::from_raw_fd(fd) };
        let null = File::options().read(true).write(true).open("/dev/null")?;
        for target in 0..=2 {
            // SAFETY: dup2 on a live descriptor; 0 to 2 belong to no Rust owner.
            if unsafe { libc::dup2(null.as_raw_fd(), target) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self(socket))
    }

    /// The request, or `None` when the agent closed without one.
    pub(crate) fn request(&mut self) -> io::Result<Option<(Request, Vec<u8>)>> {
        let mut head = [0; REQUEST_HEAD];
        match self.0.read_exact(&mut head) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(e) => return Err(e),
        }
        let request = Request::decode(&head)
            .ok_or_else(|| io::Error::other("the agent sent no request of this protocol"))?;
        let len = usize::try_from(request.len).unwrap_or(PAYLOAD_MAX);
        let mut payload = vec![0; len];
        self.0.read_exact(&mut payload)?;
        Ok(Some((request, payload)))
    }

    /// Answers, and waits for the agent's acknowledgement.
    pub(crate) fn reply(&mut self, result: Result<Done, Failure>) -> io::Result<()> {
        let (status, done, mut text) = match result {
            Ok(done) => (Status::Ok, done, String::new()),
            Err(failure) => (failure.status, Done::default(), failure.text),
        };
        let mut end = text.len().min(TEXT_MAX);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        let head = Reply {
            status,
            pid: done.pid,
            mask: done.ends.mask(),
            text_len: u16::try_from(text.len()).unwrap_or_default(),
        }
        .encode();
        let fds: Vec<RawFd> = done.ends.fds().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let iov = [IoSlice::new(&head), IoSlice::new(text.as_bytes())];
        // Some 4 KiB into an empty socket buffer: one call takes all of it.
        let sent = sendmsg::<()>(
            self.0.as_raw_fd(),
            &iov,
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        if sent != head.len() + text.len() {
            return Err(io::Error::other("the reply was cut"));
        }
        let mut ack = [0];
        match self.0.read_exact(&mut ack) {
            Err(e) if e.kind() != io::ErrorKind::UnexpectedEof => Err(e),
            _ => Ok(()),
        }
    }
}
