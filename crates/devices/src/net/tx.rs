//! A transmit queue: frames from the guest.

use std::time::{Duration, Instant};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, Permissions};

use super::{
    MAX_FRAME,
    header::{FRONT, Refused, Rules},
    ring::{Pieces, Vring},
    tap::{IoVec, Tap},
};
use crate::{
    limit::Limit,
    virtio::{
        Broken, Memory,
        pieces::{self, Malformed},
    },
};

use nix::errno::Errno;

/// Frames sent before others have their turn.
const BUDGET: usize = 128;
/// When a full tap is asked again. It says by itself when it has room only to who has
/// polled it, which would be one system call more to admit, for what hardly happens.
const FULL: Duration = Duration::from_millis(1);
/// Most pieces of a frame. Linux uses eighteen at most.
const MAX_PIECES: usize = 64;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing is left to be done until something happens.
    Rest,
    /// There is more; others may have waited long enough.
    Again,
    /// The limit lets nothing through before.
    Limited(Instant),
}

/// What is counted; see [`super::Counters`].
#[derive(Debug, Default)]
pub(super) struct Count {
    pub(super) frames: u64,
    pub(super) bytes: u64,
    pub(super) dropped: u64,
}

/// What a run works with, beside the queue.
#[derive(Debug)]
pub(super) struct Way<'a> {
    pub(super) mem: &'a Memory,
    pub(super) limit: &'a mut Limit,
    pub(super) count: &'a mut Count,
    pub(super) up: bool,
}

/// A transmit queue.
#[derive(Debug)]
pub(super) struct Tx {
    pub(super) ring: Vring,
    pieces: Pieces,
    /// The tap takes no frame; it will say when it does.
    pub(super) blocked: bool,
    /// Why the last frame was dropped, for the log.
    pub(super) complaint: Option<&'static str>,
}

enum Sent {
    /// It was, or never will be.
    Done,
    Full,
    Later(Instant),
}

impl Tx {
    pub(super) fn new() -> Self {
        Self {
            ring: Vring::default(),
            pieces: Pieces(Vec::with_capacity(MAX_PIECES + 1)),
            blocked: false,
            complaint: None,
        }
    }

    pub(super) fn start(&mut self, queue: Queue, event_idx: bool) {
        self.ring = Vring::new(queue, event_idx);
    }

    pub(super) fn stop(&mut self) -> Queue {
        self.blocked = false;
        std::mem::take(&mut self.ring).queue
    }

    /// Sends what the guest has for `tap`.
    pub(super) fn run(
        &mut self,
        tap: &Tap,
        rules: &Rules,
        way: &mut Way<'_>,
    ) -> Result<Outcome, Broken> {
        if !self.ring.queue.ready() {
            return Ok(Outcome::Rest);
        }
        self.blocked = false;
        let mem = way.mem;
        self.ring.queue.disable_notification(mem)?;
        for _ in 0..BUDGET {
            let Some(chain) = self.ring.next(mem)? else {
                if self.ring.queue.enable_notification(mem)? {
                    continue;
                }
                return Ok(Outcome::Rest);
            };
            let head = chain.head_index();
            let sent = self.send(chain, tap, rules, way);
            self.pieces.0.clear();
            match sent {
                Sent::Done => self.ring.publish(mem, std::iter::once((head, 0)))?,
                Sent::Full => {
                    self.ring.queue.go_to_previous_position();
                    self.blocked = true;
                    return Ok(Outcome::Limited(Instant::now() + FULL));
                }
                Sent::Later(at) => {
                    self.ring.queue.go_to_previous_position();
                    return Ok(Outcome::Limited(at));
                }
            }
        }
        Ok(Outcome::Again)
    }

    fn send(
        &mut self,
        chain: DescriptorChain<&Memory>,
        tap: &Tap,
        rules: &Rules,
        way: &mut Way<'_>,
    ) -> Sent {
        let mut front = [0; FRONT];
        let len = match collect(chain, way.mem, &mut front, &mut self.pieces.0) {
            Ok(len) => len,
            Err(Malformed) => return self.refuse(way, "its buffers make no sense"),
        };
        if let Err(refused) = rules.check(&mut front) {
            let why = match refused {
                Refused::Offload => "it asks for an offload that was not agreed on",
                Refused::Source => "its source address is not the guest's",
            };
            return self.refuse(way, why);
        }
        if !way.up {
            way.count.dropped += 1;
            return Sent::Done;
        }
        let bytes = u64::try_from(len).unwrap_or(u64::MAX);
        if !way.limit.is_none()
            && let Err(at) = way.limit.ready_at(1, bytes, Instant::now())
        {
            return Sent::Later(at);
        }
        if let Some(first) = self.pieces.0.first_mut() {
            *first = IoVec {
                iov_base: front.as_mut_ptr().cast(),
                iov_len: FRONT,
            };
        }
        // SAFETY: the first piece is `front`, the others lie in `mem`, which
        // outlives the call.
        match unsafe { tap.write(&self.pieces.0) } {
            Ok(_) => {
                way.count.frames += 1;
                way.count.bytes += bytes;
                if !way.limit.is_none() {
                    // It is there: it was, a moment ago.
                    let _ = way.limit.take(1, bytes, Instant::now());
                }
                Sent::Done
            }
            Err(Errno::EAGAIN) => Sent::Full,
            // The kernel found fault with the frame, or the link is down.
            Err(_) => self.refuse(way, "the tap does not take it"),
        }
    }

    fn refuse(&mut self, way: &mut Way<'_>, why: &'static str) -> Sent {
        way.count.dropped += 1;
        self.complaint = Some(why);
        Sent::Done
    }
}

/// Copies a frame's front out of guest memory, which may change, and finds the
/// pieces of the rest; the first piece is left for the front. Its whole length
/// without the virtio header.
fn collect(
    chain: DescriptorChain<&Memory>,
    mem: &Memory,
    front: &mut [u8; FRONT],
    out: &mut Vec<IoVec>,
) -> Result<usize, Malformed> {
    out.clear();
    out.push(IoVec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    });
    let (mut have, mut total) = (0, 0usize);
    for (n, desc) in chain.enumerate() {
        if n == MAX_PIECES || desc.is_write_only() {
            return Err(Malformed);
        }
        let mut len = usize::try_from(desc.len()).map_err(|_| Malformed)?;
        let mut addr = desc.addr();
        total = total.checked_add(len).ok_or(Malformed)?;
        if total > MAX_FRAME {
            return Err(Malformed);
        }
        let part = len.min(FRONT - have);
        if part > 0 {
            mem.read_slice(&mut front[have..have + part], addr)
                .map_err(|_| Malformed)?;
            have += part;
            len -= part;
            let skip = u64::try_from(part).map_err(|_| Malformed)?;
            addr = addr.checked_add(skip).ok_or(Malformed)?;
        }
        pieces::push(mem, addr, len, Permissions::Read, MAX_PIECES + 1, out)?;
    }
    if have < FRONT {
        return Err(Malformed);
    }
    Ok(total - super::HEADER)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::limit::LimitConfig;

    /// A queue of 128 frames, all in the same buffer.
    fn queue(mem: &Memory) -> Queue {
        let mut queue = Queue::new(128).unwrap();
        queue.set_desc_table_address(Some(0x1000), None);
        queue.set_avail_ring_address(Some(0x2000), None);
        queue.set_used_ring_address(Some(0x3000), None);
        queue.set_ready(true);
        mem.write_obj(0x4000u64, GuestAddress(0x1000)).unwrap();
        mem.write_obj(1000u64, GuestAddress(0x1008)).unwrap();
        mem.write_obj(128u16, GuestAddress(0x2002)).unwrap();
        queue
    }

    /// A tap that is full holds the queue up, without a busy loop and without a
    /// loss, until it has room.
    #[test]
    fn a_full_tap_is_waited_for() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mem = Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let tap = Tap::stand_in(ours.into());
        let mut tx = Tx::new();
        tx.start(queue(&mem), true);
        let mut received = 0;
        let mut rounds = 0;
        while received < 128 {
            let mut limit = Limit::new(LimitConfig::default(), Instant::now());
            let mut count = Count::default();
            let mut way = Way {
                mem: &mem,
                limit: &mut limit,
                count: &mut count,
                up: true,
            };
            let outcome = tx.run(&tap, &Rules::default(), &mut way);
            if tx.blocked {
                // It is asked again, and not at once.
                let later = |at| at > Instant::now();
                assert!(matches!(outcome, Ok(Outcome::Limited(at)) if later(at)));
            }
            let before = received;
            while theirs.recv(&mut [0; 2000]).is_ok_and(|len| len == 1000) {
                received += 1;
            }
            let sent = u64::try_from(received - before).unwrap();
            assert_eq!((count.frames, count.dropped), (sent, 0));
            rounds += 1;
        }
        assert!(rounds > 1, "it was never full");
        let used: u16 = mem.read_obj(GuestAddress(0x3002)).unwrap();
        assert_eq!((used, tx.blocked), (128, false));
    }
}
