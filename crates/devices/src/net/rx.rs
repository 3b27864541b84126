//! A receive queue: frames to the guest.
//!
//! A frame's length is known only once it has been read. So it is read into the
//! buffers that there are and, behind them, into a room of our own. What has not
//! fitted into the buffers waits there until the driver leaves more.

use std::{collections::VecDeque, time::Instant};

use nix::errno::Errno;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::Permissions;

use super::{
    HEADER, MAX_FRAME, QUEUE_SIZE,
    ring::{Pieces, Vring},
    tap::{IoVec, Tap},
    tx::{Outcome, Way},
};
use crate::virtio::{
    Broken, Memory,
    pieces::{self, Malformed},
};

/// Frames received before others have their turn.
const BUDGET: usize = 128;
/// Most pieces of one chain.
const MAX_PIECES: usize = 64;
/// Most pieces that the kernel takes in one call, one of them ours.
const ALL_PIECES: usize = 1024 - 1;
/// Room that holds every frame of a link with the usual MTU.
const USUAL_FRAME: usize = 2048;
/// Where a frame's header has its flags and the number of its buffers.
const FLAGS: usize = 0;
const BUFFERS: usize = 10;

/// A chain to be filled.
#[derive(Debug, Clone, Copy)]
struct Slot {
    head: u16,
    pieces: usize,
    room: usize,
}

/// How frames are laid out for the driver.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Layout {
    /// A frame may take many chains (`VIRTIO_NET_F_MRG_RXBUF`).
    pub(super) mergeable: bool,
    /// Frames may be larger than the link's MTU.
    pub(super) large: bool,
    /// The driver takes flags (`VIRTIO_NET_F_GUEST_CSUM`).
    pub(super) flags: bool,
}

/// A receive queue.
#[derive(Debug)]
pub(super) struct Rx {
    pub(super) ring: Vring,
    layout: Layout,
    /// Chains taken from the queue and not yet used, in order. Empty between runs,
    /// as are their pieces.
    slots: VecDeque<Slot>,
    pieces: Pieces,
    room: usize,
    /// No more chains can be taken, however many the driver leaves.
    full: bool,
    /// Zeroed and never touched, so not resident, until a frame overflows.
    bounce: Box<[u8]>,
    /// Bytes of the frame that waits in `bounce`.
    waiting: Option<usize>,
    /// Bytes received that the limit has not been told of.
    owed: Option<u64>,
    /// Why the last frame was dropped, for the log.
    pub(super) complaint: Option<&'static str>,
}

impl Rx {
    pub(super) fn new() -> Self {
        Self {
            ring: Vring::default(),
            layout: Layout::default(),
            slots: VecDeque::with_capacity(QUEUE_SIZE.into()),
            pieces: Pieces(Vec::with_capacity(ALL_PIECES + 1)),
            room: 0,
            full: false,
            bounce: vec![0; MAX_FRAME].into(),
            waiting: None,
            owed: None,
            complaint: None,
        }
    }

    pub(super) fn start(&mut self, queue: Queue, event_idx: bool, layout: Layout) {
        self.ring = Vring::new(queue, event_idx);
        self.layout = layout;
    }

    /// Gives the queue back. A frame that waits is lost, as on any network.
    pub(super) fn stop(&mut self) -> Queue {
        self.waiting = None;
        std::mem::take(&mut self.ring).queue
    }

    /// Gives the guest what is in `taps`, one frame of each in turn.
    pub(super) fn run(
        &mut self,
        taps: &mut Taps<'_>,
        way: &mut Way<'_>,
    ) -> Result<Outcome, Broken> {
        if !self.ring.queue.ready() {
            return Ok(Outcome::Rest);
        }
        let result = self.pump(taps, way);
        for _ in 0..self.slots.len() {
            self.ring.queue.go_to_previous_position();
        }
        self.slots.clear();
        self.pieces.0.clear();
        self.room = 0;
        result
    }

    fn pump(&mut self, taps: &mut Taps<'_>, way: &mut Way<'_>) -> Result<Outcome, Broken> {
        let mem = way.mem;
        self.ring.queue.disable_notification(mem)?;
        for _ in 0..BUDGET {
            if let Err(at) = self.pay(way) {
                return Ok(Outcome::Limited(at));
            }
            if !way.up || (self.waiting.is_none() && !taps.readable()) {
                return Ok(Outcome::Rest);
            }
            self.reserve(way)?;
            let enough = self.full || self.waiting.is_none_or(|len| len <= self.room);
            if self.slots.is_empty() || !enough {
                // Asks for a kick behind the chains that are reserved.
                if self.ring.queue.enable_notification(mem)? {
                    continue;
                }
                return Ok(Outcome::Rest);
            }
            let len = match self.waiting.take() {
                Some(len) => {
                    self.copy(len.min(self.room), Direction::ToGuest);
                    Some(len)
                }
                None => self.read(taps),
            };
            match len {
                None => {}
                Some(len) if len <= self.room => self.deliver(len, way)?,
                Some(len) if self.full => {
                    way.count.dropped += 1;
                    self.complaint = Some("it is larger than the guest has room for");
                    self.owe(len);
                }
                Some(len) => {
                    self.copy(self.room, Direction::FromGuest);
                    self.waiting = Some(len);
                }
            }
        }
        Ok(Outcome::Again)
    }

    /// Tells the limit of the frame before: nobody knows a frame's length earlier.
    fn pay(&mut self, way: &mut Way<'_>) -> Result<(), Instant> {
        if let Some(bytes) = self.owed {
            if !way.limit.is_none() {
                way.limit.take(1, bytes, Instant::now())?;
            }
            self.owed = None;
        }
        Ok(())
    }

    fn owe(&mut self, len: usize) {
        let bytes = u64::try_from(len.saturating_sub(HEADER));
        self.owed = Some(bytes.unwrap_or(u64::MAX));
    }

    /// Takes chains until the next frame has room, or there are no more.
    fn reserve(&mut self, way: &mut Way<'_>) -> Result<(), Broken> {
        let usual = if self.layout.large {
            MAX_FRAME
        } else {
            USUAL_FRAME
        };
        let want = self.waiting.map_or(usual, |len| len.max(usual));
        self.full = false;
        let mut malformed = 0;
        while self.room < want || self.slots.is_empty() {
            let alone = !self.layout.mergeable && !self.slots.is_empty();
            if alone || self.pieces.0.len() + MAX_PIECES > ALL_PIECES {
                self.full = true;
                break;
            }
            let Some(chain) = self.ring.next(way.mem)? else {
                // A ring that is all ours will not grow.
                self.full = self.slots.len() >= usize::from(self.ring.queue.size());
                break;
            };
            let head = chain.head_index();
            match self.collect(chain, way.mem) {
                Ok(slot) => {
                    self.room += slot.room;
                    self.slots.push_back(slot);
                }
                // Chains are used in order: finish what came before it first.
                Err(Malformed) if !self.slots.is_empty() => {
                    self.ring.queue.go_to_previous_position();
                    self.full = true;
                    break;
                }
                Err(Malformed) => {
                    malformed += 1;
                    if malformed > self.ring.queue.size() {
                        return Err(Broken);
                    }
                    self.complaint = Some("a buffer for it makes no sense");
                    self.ring.publish(way.mem, std::iter::once((head, 0)))?;
                }
            }
        }
        Ok(())
    }

    fn collect(
        &mut self,
        chain: DescriptorChain<&Memory>,
        mem: &Memory,
    ) -> Result<Slot, Malformed> {
        let head = chain.head_index();
        let before = self.pieces.0.len();
        let found = pieces(chain, mem, before + MAX_PIECES, &mut self.pieces.0);
        let new = self.pieces.0.get(before..).unwrap_or_default();
        let slot = Slot {
            head,
            pieces: new.len(),
            room: new.iter().map(|piece| piece.iov_len).sum(),
        };
        // §5.1.6.3.1: a buffer holds the header at least.
        if found.is_err() || slot.room < HEADER {
            self.pieces.0.truncate(before);
            return Err(Malformed);
        }
        Ok(slot)
    }

    /// Reads a frame into the buffers and, behind them, the room of our own.
    fn read(&mut self, taps: &mut Taps<'_>) -> Option<usize> {
        let tap = taps.next()?;
        let ours = self.pieces.0.len();
        if let Some(rest) = self.bounce.get_mut(self.room..) {
            self.pieces.0.push(IoVec {
                iov_base: rest.as_mut_ptr().cast(),
                iov_len: rest.len(),
            });
        }
        // SAFETY: the pieces lie in guest memory that the run holds, but for the
        // last, which lies in `bounce`; no reference into either is used meanwhile.
        let result = unsafe { tap.read(&self.pieces.0) };
        self.pieces.0.truncate(ours);
        match result {
            Ok(len) if len > HEADER => return Some(len),
            Ok(_) => {}
            Err(Errno::EAGAIN) => tap.readable = false,
            // The link is down, or the tap is gone: it says when that changes.
            Err(_) => {
                tap.readable = false;
                self.complaint = Some("the tap cannot be read");
            }
        }
        None
    }

    /// Hands the frame of `len` bytes in the reserved chains to the driver.
    fn deliver(&mut self, len: usize, way: &mut Way<'_>) -> Result<(), Broken> {
        let (mut left, mut count, mut used) = (len, 0u16, 0);
        for slot in &self.slots {
            if left == 0 {
                break;
            }
            left -= left.min(slot.room);
            count += 1;
            used += slot.pieces;
        }
        self.write(BUFFERS, &count.to_le_bytes());
        if !self.layout.flags {
            self.write(FLAGS, &[0]);
        }
        let mut left = len;
        let chains = self.slots.iter().take(count.into()).map(|slot| {
            let part = left.min(slot.room);
            left -= part;
            (slot.head, u32::try_from(part).unwrap_or(0))
        });
        self.ring.publish(way.mem, chains)?;
        for slot in self.slots.drain(..usize::from(count)) {
            self.room -= slot.room;
        }
        self.pieces.0.drain(..used);
        way.count.frames += 1;
        self.owe(len);
        way.count.bytes += self.owed.unwrap_or(0);
        Ok(())
    }

    /// Writes into the reserved chains.
    fn write(&self, offset: usize, bytes: &[u8]) {
        let mut skip = offset;
        let mut bytes = bytes;
        for piece in &self.pieces.0 {
            if skip >= piece.iov_len {
                skip -= piece.iov_len;
                continue;
            }
            let (now, later) = bytes.split_at(bytes.len().min(piece.iov_len - skip));
            // SAFETY: the piece lies in guest memory that the run holds, and has
            // now.len() bytes behind `skip`. The guest may race, for its own bytes
            // alone, and no reference into its memory exists.
            unsafe {
                let to = piece.iov_base.cast::<u8>().add(skip);
                std::ptr::copy_nonoverlapping(now.as_ptr(), to, now.len());
            }
            (skip, bytes) = (0, later);
            if bytes.is_empty() {
                break;
            }
        }
    }

    /// Copies the first `len` bytes, `room` at most, between the reserved chains and
    /// the room of our own.
    fn copy(&mut self, len: usize, direction: Direction) {
        let mut rest = self.bounce.get_mut(..len).unwrap_or_default();
        for piece in &self.pieces.0 {
            let (now, later) = rest.split_at_mut(rest.len().min(piece.iov_len));
            let theirs = piece.iov_base.cast::<u8>();
            // SAFETY: as in `write`: the piece has now.len() bytes.
            unsafe {
                match direction {
                    Direction::ToGuest => {
                        std::ptr::copy_nonoverlapping(now.as_ptr(), theirs, now.len());
                    }
                    Direction::FromGuest => {
                        std::ptr::copy_nonoverlapping(theirs, now.as_mut_ptr(), now.len());
                    }
                }
            }
            rest = later;
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Direction {
    ToGuest,
    FromGuest,
}

fn pieces(
    chain: DescriptorChain<&Memory>,
    mem: &Memory,
    most: usize,
    out: &mut Vec<IoVec>,
) -> Result<(), Malformed> {
    for (n, desc) in chain.enumerate() {
        if n == MAX_PIECES || !desc.is_write_only() {
            return Err(Malformed);
        }
        let len = usize::try_from(desc.len()).map_err(|_| Malformed)?;
        pieces::push(mem, desc.addr(), len, Permissions::Write, most, out)?;
    }
    Ok(())
}

/// The taps whose frames go to one queue.
#[derive(Debug)]
pub(super) struct Taps<'a> {
    all: &'a mut [Tap],
    /// The first of them, and from one to the next.
    first: usize,
    step: usize,
    turn: usize,
}

impl<'a> Taps<'a> {
    pub(super) fn new(all: &'a mut [Tap], first: usize, step: usize) -> Self {
        Self {
            all,
            first,
            step: step.max(1),
            turn: 0,
        }
    }

    fn mine(&self) -> impl Iterator<Item = usize> {
        (self.first..self.all.len()).step_by(self.step)
    }

    fn readable(&self) -> bool {
        self.mine()
            .any(|at| self.all.get(at).is_some_and(|tap| tap.readable))
    }

    /// The next that may have a frame.
    fn next(&mut self) -> Option<&mut Tap> {
        let count = self.mine().count();
        let at = (0..count)
            .map(|n| self.first + (self.turn + n) % count * self.step)
            .find(|at| self.all.get(*at).is_some_and(|tap| tap.readable))?;
        self.turn = (at - self.first) / self.step + 1;
        self.all.get_mut(at)
    }
}
