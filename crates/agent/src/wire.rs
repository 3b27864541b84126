//! The socket between agent and helper: one request, one reply, one byte of
//! acknowledgement. Payloads are the protobuf messages of the host's request,
//! untouched: the agent does not look into OCI JSON at all.
//!
//! Request: verb (1), pid (4, LE), length (4, LE), payload.
//! Reply: status (1), pid (4, LE), which descriptors follow (1), text length
//! (2, LE), text; the descriptors travel with the first byte.

use std::os::fd::OwnedFd;

/// Largest request payload: ttrpc's own limit on a message.
pub const PAYLOAD_MAX: usize = 4 << 20;
/// Longest text of a reply, in bytes.
pub const TEXT_MAX: usize = 4096;
/// Length of a request's head.
pub const REQUEST_HEAD: usize = 9;
/// Length of a reply's head.
pub const REPLY_HEAD: usize = 8;
/// Most descriptors a reply carries.
pub const FDS_MAX: usize = 3;
/// What the agent writes once the new process is on its books. The helper
/// stays until then: while it lives the process is its child, and nobody reaps
/// it unnoticed.
pub const ACK: u8 = b'k';

/// What the helper is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Verb {
    /// `CreateContainerRequest`.
    Create = b'c',
    /// `ExecProcessRequest`; the head's pid is the container's first process.
    Exec = b'e',
    /// `UpdateContainerRequest`.
    Update = b'u',
}

impl Verb {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Create, Self::Exec, Self::Update]
            .into_iter()
            .find(|v| *v as u8 == byte)
    }
}

/// A request's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What is asked.
    pub verb: Verb,
    /// See [`Verb::Exec`]; otherwise 0.
    pub pid: u32,
    /// Bytes of payload that follow.
    pub len: u32,
}

impl Request {
    /// Bytes of the head.
    pub fn encode(&self) -> [u8; REQUEST_HEAD] {
        let mut head = [0; REQUEST_HEAD];
        head[0] = self.verb as u8;
        head[1..5].copy_from_slice(&self.pid.to_le_bytes());
        head[5..9].copy_from_slice(&self.len.to_le_bytes());
        head
    }

    /// The head in `bytes`; `None` if it is not one.
    pub fn decode(bytes: &[u8; REQUEST_HEAD]) -> Option<Self> {
        let [verb, p0, p1, p2, p3, l0, l1, l2, l3] = *bytes;
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        if usize::try_from(len).ok()? > PAYLOAD_MAX {
            return None;
        }
        Some(Self {
            verb: Verb::from_byte(verb)?,
            pid: u32::from_le_bytes([p0, p1, p2, p3]),
            len,
        })
    }
}

/// How a request ended; each failure is one ttrpc status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// A bad spec or request, or a program that cannot be executed.
    Invalid = 1,
    /// Wrong state.
    Precondition = 2,
    /// A device did not appear in time.
    Deadline = 3,
    /// Everything else.
    Internal = 4,
}

impl Status {
    fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Ok,
            Self::Invalid,
            Self::Precondition,
            Self::Deadline,
            Self::Internal,
        ]
        .into_iter()
        .find(|s| *s as u8 == byte)
    }
}

/// The agent's ends of a new process's streams.
#[derive(Debug, Default)]
pub struct Ends {
    /// Write end of the process's standard input, or the terminal's master.
    pub stdin: Option<OwnedFd>,
    /// Read end of its standard output.
    pub stdout: Option<OwnedFd>,
    /// Read end of its standard error.
    pub stderr: Option<OwnedFd>,
    /// `stdin` is a terminal's master and there is nothing else.
    pub terminal: bool,
}

const FD_STDIN: u8 = 1;
const FD_STDOUT: u8 = 2;
const FD_STDERR: u8 = 4;
const FD_TERMINAL: u8 = 8;

impl Ends {
    /// The mask that says which descriptors are there.
    pub fn mask(&self) -> u8 {
        let bit = |there: bool, bit: u8| if there { bit } else { 0 };
        bit(self.stdin.is_some(), FD_STDIN)
            | bit(self.stdout.is_some(), FD_STDOUT)
            | bit(self.stderr.is_some(), FD_STDERR)
            | bit(self.terminal, FD_TERMINAL)
    }

    /// The descriptors in the mask's order.
    pub fn fds(&self) -> impl Iterator<Item = &OwnedFd> {
        [&self.stdin, &self.stdout, &self.stderr]
            .into_iter()
            .flatten()
    }

    /// Puts descriptors back in their places; `None` if they are not as many
    /// as the mask says.
    pub fn from_parts(mask: u8, fds: Vec<OwnedFd>) -> Option<Self> {
        let mut fds = fds.into_iter();
        let mut take = |bit: u8| -> Option<Option<OwnedFd>> {
            if mask & bit == 0 {
                return Some(None);
            }
            fds.next().map(Some)
        };
        let (stdin, stdout, stderr) = (take(FD_STDIN)?, take(FD_STDOUT)?, take(FD_STDERR)?);
        if fds.next().is_some() {
            return None;
        }
        Some(Self {
            stdin,
            stdout,
            stderr,
            terminal: mask & FD_TERMINAL != 0,
        })
    }
}

/// A reply's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// How it ended.
    pub status: Status,
    /// The new process, in the guest's root PID namespace; 0 if none.
    pub pid: u32,
    /// See [`Ends::mask`].
    pub mask: u8,
    /// Bytes of text that follow.
    pub text_len: u16,
}

impl Reply {
    /// Bytes of the head.
    pub fn encode(&self) -> [u8; REPLY_HEAD] {
        let mut head = [0; REPLY_HEAD];
        head[0] = self.status as u8;
        head[1..5].copy_from_slice(&self.pid.to_le_bytes());
        head[5] = self.mask;
        head[6..8].copy_from_slice(&self.text_len.to_le_bytes());
        head
    }

    /// The head in `bytes`; `None` if it is not one.
    pub fn decode(bytes: &[u8; REPLY_HEAD]) -> Option<Self> {
        let [status, p0, p1, p2, p3, mask, t0, t1] = *bytes;
        let text_len = u16::from_le_bytes([t0, t1]);
        if usize::from(text_len) > TEXT_MAX {
            return None;
        }
        Some(Self {
            status: Status::from_byte(status)?,
            pid: u32::from_le_bytes([p0, p1, p2, p3]),
            mask,
            text_len,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn heads_round_trip() {
        let request = Request {
            verb: Verb::Exec,
            pid: 77,
            len: 12345,
        };
        assert_eq!(Request::decode(&request.encode()), Some(request));
        let reply = Reply {
            status: Status::Deadline,
            pid: 4_000_000_000,
            mask: 9,
            text_len: 4096,
        };
        assert_eq!(Reply::decode(&reply.encode()), Some(reply));
    }

    #[test]
    fn bad_heads_are_refused() {
        assert_eq!(Request::decode(&[b'x', 0, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(Request::decode(&[b'c', 0, 0, 0, 0, 1, 0, 0x40, 0]), None);
        assert_eq!(Reply::decode(&[99, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(Reply::decode(&[0, 0, 0, 0, 0, 0, 1, 0x10]), None);
    }

    #[test]
    fn descriptors_find_their_places() {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let ends = Ends {
            stdout: Some(null()),
            stderr: Some(null()),
            ..Ends::default()
        };
        let back = Ends::from_parts(ends.mask(), vec![null(), null()]).unwrap();
        assert!(back.stdin.is_none() && back.stdout.is_some() && back.stderr.is_some());
        assert!(Ends::from_parts(ends.mask(), vec![null()]).is_none());
        assert!(Ends::from_parts(0, vec![null()]).is_none());
    }
}
