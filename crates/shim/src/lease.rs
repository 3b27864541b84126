//! A pipe by which a supervisor knows that somebody has use for it.

use std::{io, os::fd::OwnedFd, sync::Mutex};

use tokio::net::unix::pipe;
use walnut_sandbox::machine::takeover::{Fd, Giver, Taker};

/// The end of whoever was started.
#[derive(Debug)]
pub(crate) struct Lease(Mutex<Option<std::sync::Arc<pipe::Receiver>>>);

impl Lease {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let pipe = pipe::Receiver::from_owned_fd(fd)?;
        Ok(Self(Mutex::new(Some(pipe.into()))))
    }

    fn pipe(&self) -> Option<std::sync::Arc<pipe::Receiver>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// True: it ended without a byte, so its holder is gone. False: the holder has let the
    /// sandbox go its own way. Returns once.
    pub(crate) async fn broken(&self) -> bool {
        let Some(pipe) = self.pipe() else {
            return std::future::pending().await;
        };
        let broken = loop {
            if pipe.readable().await.is_err() {
                break true;
            }
            match pipe.try_read(&mut [0]) {
                Ok(1) => break false,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                _ => break true,
            }
        };
        self.0.lock().unwrap_or_else(|e| e.into_inner()).take();
        broken
    }

    /// For the next program, if it holds still.
    pub(crate) fn state(&self, giver: &mut Giver) -> Option<Fd> {
        self.pipe().map(|pipe| giver.give(&*pipe))
    }

    /// That of the program before.
    pub(crate) fn take_over(state: Option<Fd>, taker: &mut Taker) -> io::Result<Self> {
        match state {
            Some(fd) => Self::new(taker.take(fd)?),
            None => Ok(Self(Mutex::default())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn a_holder_that_lets_go_and_one_that_goes() {
        let (ours, mut theirs) = io::pipe().unwrap();
        let lease = Lease::new(ours.into()).unwrap();
        assert!(lease.state(&mut Giver::default()).is_some());
        theirs.write_all(b"d").unwrap();
        assert!(!lease.broken().await);
        assert!(lease.state(&mut Giver::default()).is_none());
        let (ours, theirs) = io::pipe().unwrap();
        let lease = Lease::new(ours.into()).unwrap();
        drop(theirs);
        assert!(lease.broken().await);
    }
}
