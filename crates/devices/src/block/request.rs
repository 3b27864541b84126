//! From a descriptor chain to a request (virtio 1.3 §5.2.6). Every length, flag and
//! address is the guest's word; nothing is used that guest memory does not hold.
//!
//! How a request is cut into descriptors says nothing (§2.7.4): its first 16
//! readable bytes are the header, its last writable byte is the status.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};

use super::{QUEUE_SIZE, SECTOR, task::Pieces};
use crate::virtio::Memory;

const HEADER_LEN: usize = 16;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `VIRTIO_BLK_T_IN`
    Read,
    /// `VIRTIO_BLK_T_OUT`
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    /// What we do not know.
    Other(u32),
}

impl From<u32> for Kind {
    fn from(value: u32) -> Self {
        match value {
            0 => Self::Read,
            1 => Self::Write,
            4 => Self::Flush,
            8 => Self::GetId,
            11 => Self::Discard,
            13 => Self::WriteZeroes,
            other => Self::Other(other),
        }
    }
}

/// A request with a meaning. Its data are in the [`Pieces`] that it was read into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) kind: Kind,
    /// Where, in bytes: at most 2^64 - 512, else [`Bad`].
    pub(super) at: u64,
    /// Bytes that the device reads, beyond the header.
    pub(super) readable: u64,
    /// Bytes that it may write, but for the status.
    pub(super) writable: u64,
}

/// What came of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parsed {
    /// Where the status goes; `None` if there is no such byte in guest memory, then
    /// the chain is returned unused.
    pub(super) status: Option<GuestAddress>,
    /// `None` if it has no meaning: an error, if there is a status byte.
    pub(super) request: Option<Request>,
    /// How many pieces its data are in.
    pub(super) pieces: usize,
}

#[derive(Debug)]
struct Parser<'a> {
    memory: &'a Memory,
    pieces: Pieces<'a>,
    header: [u8; HEADER_LEN],
    have: usize,
    readable: u64,
    writable: u64,
    /// The last writable bytes so far: the status is the last of them.
    tail: Option<(GuestAddress, u32)>,
    /// Something in it is wrong.
    bad: bool,
}

/// Reads a chain's descriptors. Those after the first that is too many are not
/// even looked at, so a chain costs no more than [`QUEUE_SIZE`] of them.
pub(super) fn parse(
    memory: &Memory,
    chain: impl Iterator<Item = Descriptor>,
    pieces: Pieces<'_>,
) -> Parsed {
    let mut parser = Parser {
        memory,
        pieces,
        header: [0; HEADER_LEN],
        have: 0,
        readable: 0,
        writable: 0,
        tail: None,
        bad: false,
    };
    let mut more = true;
    let mut left = QUEUE_SIZE;
    for descriptor in chain {
        if left == 0 {
            more = true;
            break;
        }
        left -= 1;
        more = descriptor.has_next();
        if descriptor.is_write_only() {
            parser.write_only(&descriptor);
        } else {
            parser.read_only(&descriptor);
        }
    }
    // A chain that breaks off (a loop, an index or a table out of bounds, too long)
    // has no last byte, so no status.
    if more {
        return Parsed {
            status: None,
            request: None,
            pieces: 0,
        };
    }
    parser.finish()
}

impl Parser<'_> {
    fn read_only(&mut self, descriptor: &Descriptor) {
        let (mut at, mut len) = (descriptor.addr(), descriptor.len());
        if len == 0 {
            return;
        }
        // What the device reads comes first (§2.7.4.2).
        if self.tail.is_some() {
            self.bad = true;
            return;
        }
        if self.have < HEADER_LEN {
            let room = HEADER_LEN - self.have;
            let part = usize::try_from(len).map_or(room, |len| len.min(room));
            let Some(to) = self.header.get_mut(self.have..self.have + part) else {
                return;
            };
            let taken = u32::try_from(part).unwrap_or(u32::MAX);
            if at.checked_add(u64::from(taken)).is_none() || self.memory.read_slice(to, at).is_err()
            {
                self.bad = true;
                return;
            }
            self.have += part;
            at = at.unchecked_add(u64::from(taken));
            len -= taken;
        }
        self.readable += u64::from(len);
        self.push(at, len, Permissions::Read);
    }

    fn write_only(&mut self, descriptor: &Descriptor) {
        let (at, len) = (descriptor.addr(), descriptor.len());
        if len == 0 {
            return;
        }
        if let Some((at, len)) = self.tail.replace((at, len)) {
            self.writable += u64::from(len);
            self.push(at, len, Permissions::Write);
        }
    }

    /// Adds a piece of guest memory to the data, split where regions meet.
    fn push(&mut self, at: GuestAddress, len: u32, access: Permissions) {
        if len == 0 || self.bad {
            return;
        }
        let (Some(_), Ok(len)) = (at.checked_add(u64::from(len)), usize::try_from(len)) else {
            // Addresses must not wrap: the pieces would go on at zero.
            self.bad = true;
            return;
        };
        let Ok(slices) = self.memory.get_slices(at, len, access) else {
            self.bad = true;
            return;
        };
        for slice in slices {
            match slice {
                Ok(slice) if self.pieces.push(&slice) => {}
                _ => {
                    self.bad = true;
                    return;
                }
            }
        }
    }

    fn finish(mut self) -> Parsed {
        let mut status = None;
        if let Some((at, len)) = self.tail {
            let data = len - 1;
            self.writable += u64::from(data);
            self.push(at, data, Permissions::Write);
            status = at
                .checked_add(u64::from(data))
                .filter(|at| self.memory.check_range(*at, 1, Permissions::Write));
        }
        let word = |at: usize| -> [u8; 4] {
            std::array::from_fn(|n| self.header.get(at + n).copied().unwrap_or(0))
        };
        let (low, high) = (u32::from_le_bytes(word(8)), u32::from_le_bytes(word(12)));
        let sector = u64::from(high) << 32 | u64::from(low);
        let request = sector.checked_mul(SECTOR).map(|at| Request {
            kind: Kind::from(u32::from_le_bytes(word(0))),
            at,
            readable: self.readable,
            writable: self.writable,
        });
        let whole = self.have == HEADER_LEN && !self.bad && status.is_some();
        Parsed {
            status,
            request: request.filter(|_| whole),
            pieces: self.pieces.len(),
        }
    }
}
