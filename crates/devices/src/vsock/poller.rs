//! epoll, with one namespace of tokens for the device and its owner.

use std::os::fd::{AsFd, BorrowedFd};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};

/// Tokens from here on are the owner's.
const EXTERNAL: u64 = 1 << 63;
/// The listening socket.
const LISTENER: u64 = EXTERNAL - 1;
/// Events taken from the kernel per call.
pub(super) const BATCH: usize = 64;

/// Who an event is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    /// A connection, by its identity in the muxer.
    Connection(u64),
    Listener,
    /// The owner's, by the number it chose.
    External(u32),
}

impl Token {
    fn encode(self) -> u64 {
        match self {
            Token::Connection(id) => id,
            Token::Listener => LISTENER,
            Token::External(n) => EXTERNAL | u64::from(n),
        }
    }

    fn decode(raw: u64) -> Token {
        match raw {
            LISTENER => Token::Listener,
            raw if raw & EXTERNAL == 0 => Token::Connection(raw),
            raw => Token::External(u32::try_from(raw & !EXTERNAL).unwrap_or(u32::MAX)),
        }
    }
}

/// An epoll instance. Everything is registered edge-triggered: a peer that has
/// hung up, or is not being read, wakes nobody twice.
#[derive(Debug)]
pub(super) struct Poller {
    epoll: Epoll,
}

impl Poller {
    pub(super) fn new() -> Result<Poller, Errno> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Poller { epoll })
    }

    /// Readable when [`Self::wait`] would return at once.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// Watches for input and hang-up, and for room to write if `output`.
    pub(super) fn add(&self, fd: impl AsFd, token: Token, output: bool) -> Result<(), Errno> {
        self.epoll.add(fd, event(token, output))
    }

    /// Watches one of the owner's descriptors for input.
    pub(super) fn add_external(&self, fd: impl AsFd, n: u32, edge: bool) -> Result<(), Errno> {
        let mut flags = EpollFlags::EPOLLIN;
        flags.set(EpollFlags::EPOLLET, edge);
        self.epoll
            .add(fd, EpollEvent::new(flags, Token::External(n).encode()))
    }

    /// Changes whether room to write is reported; reports what is true now again.
    pub(super) fn modify(&self, fd: impl AsFd, token: Token, output: bool) -> Result<(), Errno> {
        self.epoll.modify(fd, &mut event(token, output))
    }

    pub(super) fn remove(&self, fd: impl AsFd) -> Result<(), Errno> {
        self.epoll.delete(fd)
    }

    /// Waits, and appends what happened.
    pub(super) fn wait(
        &self,
        timeout: EpollTimeout,
        out: &mut Vec<(Token, EpollFlags)>,
    ) -> Result<(), Errno> {
        let mut events = [EpollEvent::empty(); BATCH];
        let n = match self.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => 0,
            other => other?,
        };
        out.extend(
            events
                .iter()
                .take(n)
                .map(|event| (Token::decode(event.data()), event.events())),
        );
        Ok(())
    }
}

fn event(token: Token, output: bool) -> EpollEvent {
    let mut flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
    flags.set(EpollFlags::EPOLLOUT, output);
    EpollEvent::new(flags, token.encode())
}
