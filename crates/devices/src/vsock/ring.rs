//! Descriptor chains as scatter lists. Every length and address in a chain is the
//! guest's word: nothing is used that guest memory does not contain.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, Permissions};

use super::{
    Memory,
    packet::{HEADER_LEN, Header},
    sys::IoVec,
};
use crate::virtio::pieces;
pub(super) use crate::virtio::pieces::Malformed;

/// Most pieces of one chain. Linux uses two; a 64 KiB packet of single pages
/// needs seventeen.
const MAX_PIECES: usize = 64;
/// Most chains reserved at once.
pub(super) const MAX_BATCH: usize = 16;
/// Most payload that one packet to the guest carries.
const MAX_PAYLOAD: usize = 64 << 10;

/// The rings themselves make no sense; the queue is dead until it is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken;

impl From<virtio_queue::Error> for Broken {
    fn from(_: virtio_queue::Error) -> Self {
        Broken
    }
}

type Chain<'m> = DescriptorChain<&'m Memory>;

/// The next available chain.
pub(super) fn next<'m>(queue: &mut Queue, mem: &'m Memory) -> Result<Option<Chain<'m>>, Broken> {
    let mut iter = queue.iter(mem)?;
    Ok(iter.next())
}

fn push_pieces(
    mem: &Memory,
    addr: GuestAddress,
    len: usize,
    access: Permissions,
    out: &mut Vec<IoVec>,
) -> Result<(), Malformed> {
    pieces::push(mem, addr, len, access, MAX_PIECES * MAX_BATCH, out)
}

/// Reads a packet that the guest sends. The payload's pieces go to `payload`,
/// which is valid as long as `mem` is. The list is cut to the header's length,
/// or left empty, with `false`, when the chain does not hold that much.
pub(super) fn read_packet(
    mem: &Memory,
    chain: Chain<'_>,
    payload: &mut Vec<IoVec>,
) -> Result<(Header, bool), Malformed> {
    payload.clear();
    let mut raw = [0; HEADER_LEN];
    let mut have = 0;
    let mut room = None;
    for (i, desc) in chain.enumerate() {
        if i == MAX_PIECES || desc.is_write_only() {
            return Err(Malformed);
        }
        let mut addr = desc.addr();
        let mut len = usize::try_from(desc.len()).map_err(|_| Malformed)?;
        if have < HEADER_LEN {
            let part = len.min(HEADER_LEN - have);
            mem.read_slice(&mut raw[have..have + part], addr)
                .map_err(|_| Malformed)?;
            have += part;
            addr = addr
                .checked_add(u64::try_from(part).map_err(|_| Malformed)?)
                .ok_or(Malformed)?;
            len -= part;
        }
        if have == HEADER_LEN {
            // The header is read once: what it says cannot change any more.
            let left = match &mut room {
                Some(left) => left,
                none => {
                    none.insert(usize::try_from(Header::parse(&raw).len).map_err(|_| Malformed)?)
                }
            };
            let part = len.min(*left);
            push_pieces(mem, addr, part, Permissions::Read, payload)?;
            *left -= part;
        }
    }
    let whole = match room {
        Some(left) => left == 0,
        None => return Err(Malformed),
    };
    if !whole {
        payload.clear();
    }
    Ok((Header::parse(&raw), whole))
}

/// A chain to be filled.
#[derive(Debug, Clone, Copy)]
struct Slot {
    head: u16,
    /// Its pieces in the reservation's list of headers.
    header: (usize, usize),
    /// Bytes of payload that it can take.
    room: usize,
}

/// The receive queue during one run: chains are reserved, filled and either
/// used or handed back.
#[derive(Debug)]
pub(super) struct RxRing<'a> {
    queue: &'a mut Queue,
    mem: &'a Memory,
    slots: Vec<Slot>,
    headers: Vec<IoVec>,
    data: Vec<IoVec>,
    /// Unusable chains met.
    pub(super) malformed: u32,
    /// Chains used.
    pub(super) used: u32,
}

impl<'a> RxRing<'a> {
    pub(super) fn new(queue: &'a mut Queue, mem: &'a Memory) -> RxRing<'a> {
        RxRing {
            queue,
            mem,
            slots: Vec::new(),
            headers: Vec::new(),
            data: Vec::new(),
            malformed: 0,
            used: 0,
        }
    }

    /// Reserves up to `want` chains; returns how many there are. Chains without
    /// room for a header and a byte are returned to the guest empty.
    pub(super) fn reserve(&mut self, want: usize) -> Result<usize, Broken> {
        self.slots.clear();
        self.headers.clear();
        self.data.clear();
        while self.slots.len() < want.min(MAX_BATCH) {
            let Some(chain) = next(self.queue, self.mem)? else {
                break;
            };
            let head = chain.head_index();
            match self.collect(chain) {
                Ok(slot) => self.slots.push(slot),
                // Chains are used in order: finish what came before it first.
                Err(Malformed) if !self.slots.is_empty() => {
                    self.queue.go_to_previous_position();
                    break;
                }
                Err(Malformed) => {
                    self.malformed += 1;
                    if self.malformed > u32::from(self.queue.size()) {
                        return Err(Broken);
                    }
                    self.queue.add_used(self.mem, head, 0)?;
                    self.used += 1;
                }
            }
        }
        Ok(self.slots.len())
    }

    fn collect(&mut self, chain: Chain<'_>) -> Result<Slot, Malformed> {
        let (header, data) = (self.headers.len(), self.data.len());
        let head = chain.head_index();
        let result = self.pieces(chain);
        let slot = Slot {
            head,
            header: (header, self.headers.len()),
            room: self.data[data..].iter().map(|piece| piece.iov_len).sum(),
        };
        if result.is_err() || slot.room == 0 {
            self.headers.truncate(header);
            self.data.truncate(data);
            return Err(Malformed);
        }
        Ok(slot)
    }

    fn pieces(&mut self, chain: Chain<'_>) -> Result<(), Malformed> {
        let mut header_left = HEADER_LEN;
        let mut data_left = MAX_PAYLOAD;
        for (i, desc) in chain.enumerate() {
            if i == MAX_PIECES || !desc.is_write_only() {
                return Err(Malformed);
            }
            let mut addr = desc.addr();
            let mut len = usize::try_from(desc.len()).map_err(|_| Malformed)?;
            let part = len.min(header_left);
            push_pieces(self.mem, addr, part, Permissions::Write, &mut self.headers)?;
            header_left -= part;
            len -= part;
            addr = addr
                .checked_add(u64::try_from(part).map_err(|_| Malformed)?)
                .ok_or(Malformed)?;
            let part = len.min(data_left);
            push_pieces(self.mem, addr, part, Permissions::Write, &mut self.data)?;
            data_left -= part;
        }
        if header_left == 0 {
            Ok(())
        } else {
            Err(Malformed)
        }
    }

    /// The reserved room for payload, cut to `limit` bytes: a list for one
    /// receive that fills all chains in turn.
    pub(super) fn room(&mut self, limit: usize) -> Vec<IoVec> {
        let mut left = limit;
        let mut list = Vec::with_capacity(self.data.len());
        for piece in &self.data {
            if left == 0 {
                break;
            }
            let len = piece.iov_len.min(left);
            list.push(IoVec {
                iov_base: piece.iov_base,
                iov_len: len,
            });
            left -= len;
        }
        list
    }

    /// Bytes of payload that the reserved chains can take together.
    pub(super) fn capacity(&self) -> usize {
        self.slots.iter().map(|slot| slot.room).sum()
    }

    /// Hands `len` bytes, already in place, to the guest under copies of
    /// `header`, and gives back the chains that were not needed. A packet
    /// without payload takes one chain.
    pub(super) fn commit(&mut self, mut header: Header, len: usize) -> Result<(), Broken> {
        let mut left = len;
        let mut filled = 0;
        while filled < self.slots.len() && (left > 0 || (filled == 0 && len == 0)) {
            let slot = self.slots[filled];
            let part = left.min(slot.room);
            header.len = u32::try_from(part).map_err(|_| Broken)?;
            self.write_header(slot, &header);
            let total = u32::try_from(HEADER_LEN + part).map_err(|_| Broken)?;
            self.queue.add_used(self.mem, slot.head, total)?;
            self.used += 1;
            left -= part;
            filled += 1;
        }
        self.release(filled);
        Ok(())
    }

    /// Gives the reserved chains back.
    pub(super) fn cancel(&mut self) {
        self.release(0);
    }

    fn release(&mut self, filled: usize) {
        for _ in filled..self.slots.len() {
            self.queue.go_to_previous_position();
        }
        self.slots.clear();
    }

    fn write_header(&self, slot: Slot, header: &Header) {
        let raw = header.encode();
        let mut at = 0;
        for piece in &self.headers[slot.header.0..slot.header.1] {
            let part = piece.iov_len.min(HEADER_LEN - at);
            // SAFETY: the piece was resolved in `mem`, which is borrowed for the
            // life of this ring, and holds iov_len bytes; `raw` holds part bytes
            // from `at`. The guest may race with the copy but only for its own
            // bytes, and no reference into its memory exists.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    raw.as_ptr().add(at),
                    piece.iov_base.cast::<u8>(),
                    part,
                );
            }
            at += part;
        }
    }
}
