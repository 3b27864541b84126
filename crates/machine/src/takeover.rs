//! What a program leaves to the one that takes its place in the same process (execve(2)):
//! descriptors keep their numbers, children their parent, and everything else goes as
//! state, which the types of this crate's `*State` describe.
//!
//! A number means nothing by itself. [`Giver`] notes which descriptors the state names, and
//! lets exactly those survive; [`Taker`] makes each of them somebody's, once.

use std::{
    collections::HashSet,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use serde::{Deserialize, Serialize};

/// A descriptor by its number, in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fd(RawFd);

/// Why there is no state to be had.
#[derive(Debug, thiserror::Error)]
pub enum NoState {
    /// Something is under way that will be done in a moment.
    #[error("{0}")]
    Busy(String),
    /// It will not be had by waiting.
    #[error("{0}")]
    Never(String),
}

impl NoState {
    /// Something is under way.
    pub fn busy(what: impl Into<String>) -> Self {
        Self::Busy(what.into())
    }

    /// There is a reason that stays.
    pub fn never(why: impl Into<String>) -> Self {
        Self::Never(why.into())
    }
}

/// Collects the descriptors that a state names.
#[derive(Debug, Default)]
pub struct Giver(Vec<RawFd>);

impl Giver {
    /// Notes a descriptor, which must stay open until the program is replaced.
    pub fn give(&mut self, fd: impl AsFd) -> Fd {
        let number = fd.as_fd().as_raw_fd();
        self.0.push(number);
        Fd(number)
    }

    /// Lets the descriptors survive an execve(2). Nothing may be executed meanwhile that
    /// is not to have them. On failure none does.
    pub fn expose(self) -> io::Result<Exposed> {
        let mut seen = HashSet::new();
        if let Some(twice) = self.0.iter().find(|number| !seen.insert(**number)) {
            // The other program would refuse it.
            let twice = format!("descriptor {twice} is two things");
            return Err(io::Error::other(twice));
        }
        let mut exposed = Exposed(Vec::with_capacity(self.0.len()));
        for number in self.0 {
            // SAFETY: who gave it keeps it open, and nothing else runs meanwhile.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            fcntl_setfd(fd, FdFlags::empty())?;
            exposed.0.push(number);
        }
        Ok(exposed)
    }
}

/// Descriptors that survive an execve(2) while this lives.
#[derive(Debug)]
pub struct Exposed(Vec<RawFd>);

impl Drop for Exposed {
    fn drop(&mut self) {
        for &number in &self.0 {
            // SAFETY: as in `expose`.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            let _ = fcntl_setfd(fd, FdFlags::CLOEXEC);
        }
    }
}

/// Hands out the descriptors that a state names.
#[derive(Debug, Default)]
pub struct Taker(HashSet<Fd>);

impl Taker {
    /// Makes a descriptor the caller's. An error if it is not open, is one of the standard
    /// streams', or has been taken before.
    pub fn take(&mut self, fd: Fd) -> io::Result<OwnedFd> {
        let number = fd.0;
        let refuse = |why: &str| io::Error::other(format!("descriptor {number}: {why}"));
        if number <= 2 {
            return Err(refuse("not one that is handed over"));
        }
        if !self.0.insert(fd) {
            return Err(refuse("handed over twice"));
        }
        // SAFETY: fcntl on any number is sound; it fails on what is not open.
        let probe = unsafe { BorrowedFd::borrow_raw(number) };
        fcntl_getfd(probe).map_err(|e| refuse(&e.to_string()))?;
        fcntl_setfd(probe, FdFlags::CLOEXEC)?;
        // SAFETY: it is open, the predecessor left it to this program, and it was not taken
        // before.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }
}

/// Bytes in a state, as hexadecimal digits.
pub mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// For `#[serde(with)]`.
    pub fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(bytes.len() * 2);
        for byte in bytes {
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from_digit(digit.into(), 16).unwrap_or('0'));
            }
        }
        to.serialize_str(&text)
    }

    /// For `#[serde(with)]`.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        let byte = |[high, low]: &[u8; 2]| Some(digit(*high)? << 4 | digit(*low)?);
        let bytes: Option<Vec<u8>> = pairs.iter().map(byte).collect();
        let bytes = bytes.filter(|_| rest.is_empty());
        bytes.ok_or_else(|| D::Error::custom("no pairs of hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Bytes(#[serde(with = "hex")] Vec<u8>);

    #[test]
    fn bytes_come_back_and_nothing_else_does() {
        let all = Bytes((0..=255).collect());
        let text = serde_json::to_string(&all).unwrap();
        assert_eq!(serde_json::from_str::<Bytes>(&text).unwrap(), all);
        for bad in [r#""0""#, r#""0g""#, r#""AB""#, "[1]", r#"" 0""#] {
            assert!(serde_json::from_str::<Bytes>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn descriptors_survive_while_they_are_exposed_and_are_taken_once() {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let closes = |fd: &OwnedFd| fcntl_getfd(fd).unwrap() == FdFlags::CLOEXEC;
        let mut giver = Giver::default();
        let number = giver.give(&read);
        let exposed = giver.expose().unwrap();
        assert!(!closes(&read) && closes(&write));
        drop(exposed);
        assert!(closes(&read));
        let mut giver = Giver::default();
        giver.give(&read);
        giver.give(&read);
        assert!(
            giver
                .expose()
                .unwrap_err()
                .to_string()
                .contains("two things")
        );
        // As the next program would, to which it is just a number.
        std::mem::forget(read);
        let mut taker = Taker::default();
        let read = taker.take(number).unwrap();
        assert!(closes(&read));
        assert!(
            taker
                .take(number)
                .unwrap_err()
                .to_string()
                .contains("twice")
        );
        assert!(taker.take(Fd(1)).is_err());
        let closed = taker.take(Fd(987_654)).unwrap_err().to_string();
        assert!(closed.contains("descriptor 987654"), "{closed}");
    }
}
