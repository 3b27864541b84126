//! Requests of the kernel's network stack (rtnetlink(7)), as few as the agent has. A
//! library for all of them would make every guest larger.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const ASKS: u16 = 0x1 | 0x4;
/// `NLM_F_CREATE | NLM_F_REPLACE`: what is there already becomes what is asked for.
pub(crate) const REPLACES: u16 = 0x400 | 0x100;
/// `NLM_F_CREATE | NLM_F_EXCL`: it is refused if it is there already.
pub(crate) const IS_NEW: u16 = 0x400 | 0x200;
/// `NLMSG_ERROR`, which an acknowledgement is as well.
const ERROR: u16 = 2;

/// A request under construction.
#[derive(Debug)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    /// A request of type `RTM_*` with the structure that this type begins with.
    pub(crate) fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend([0; 4]);
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((ASKS | flags).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(body);
        Self(bytes)
    }

    /// With an attribute, unless that is empty.
    pub(crate) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        if !value.is_empty() {
            self.0.extend(attribute(kind, value));
        }
        self
    }
}

/// An attribute, with what aligns the next.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(8 + value.len());
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A connection to the kernel.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    asked: u32,
}

impl Netlink {
    pub(crate) fn new() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        Ok(Self { socket, asked: 0 })
    }

    /// Has the kernel do what the message says; it has when this returns.
    pub(crate) fn ask(&mut self, message: Message) -> io::Result<()> {
        self.asked = self.asked.wrapping_add(1);
        let mut bytes = message.0;
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        for (at, field) in [(0, length), (8, self.asked)] {
            if let Some(place) = bytes.get_mut(at..at + 4) {
                place.copy_from_slice(&field.to_ne_bytes());
            }
        }
        let fd = self.socket.as_raw_fd();
        send(fd, &bytes, MsgFlags::empty())?;
        let mut answer = [0; 1024];
        loop {
            let length = recv(fd, &mut answer, MsgFlags::empty())?;
            let answer = answer.get(..length).unwrap_or_default();
            if let Some(code) = verdict(answer, self.asked)? {
                return match code {
                    0 => Ok(()),
                    code => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
                };
            }
        }
    }
}

/// The code in an answer, if it is one to this request.
fn verdict(answer: &[u8], asked: u32) -> io::Result<Option<i32>> {
    let short = || {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "the kernel's answer is cut short",
        )
    };
    let field = |at: usize| -> io::Result<[u8; 4]> {
        let bytes = answer.get(at..at + 4).ok_or_else(short)?;
        bytes.try_into().map_err(|_| short())
    };
    let [low, high, ..] = field(4)?;
    if u16::from_ne_bytes([low, high]) != ERROR || u32::from_ne_bytes(field(8)?) != asked {
        return Ok(None);
    }
    Ok(Some(i32::from_ne_bytes(field(HEADER)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_aligned_and_say_their_length() {
        assert_eq!(attribute(3, b"eth0\0"), *b"\x09\0\x03\0eth0\0\0\0\0");
        let message = Message::new(16, 0, &[7; 16])
            .with(1, b"")
            .with(4, &[1, 2, 3, 4]);
        assert_eq!(message.0.len(), HEADER + 16 + 8);
    }

    #[test]
    fn only_the_answer_to_the_last_request_counts() {
        let answer = |kind: u16, asked: u32, code: i32| {
            let mut bytes = vec![0; HEADER];
            bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
            bytes[8..12].copy_from_slice(&asked.to_ne_bytes());
            bytes.extend(code.to_ne_bytes());
            bytes
        };
        assert_eq!(verdict(&answer(ERROR, 7, -17), 7).unwrap(), Some(-17));
        assert_eq!(verdict(&answer(ERROR, 6, -17), 7).unwrap(), None);
        assert_eq!(verdict(&answer(16, 7, 0), 7).unwrap(), None);
        assert!(verdict(&answer(ERROR, 7, 0)[..18], 7).is_err());
    }

    #[test]
    fn the_kernel_answers() {
        // Loopback's own MTU, which needs no privilege only if it is refused: an index
        // that no link has.
        let body = [0, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0, 0, 0, 0, 0];
        let mut kernel = Netlink::new().unwrap();
        let error = kernel.ask(Message::new(16, 0, &body)).unwrap_err();
        let code = error.raw_os_error();
        assert!(matches!(code, Some(libc::ENODEV | libc::EPERM)), "{error}");
    }
}
