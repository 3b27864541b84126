//! From a request to the calls that do it. No I/O happens here: an engine does the
//! call that a task asks for, tells the task what came of it, and asks again.

use std::{
    ptr,
    sync::{Arc, atomic::AtomicU64},
};

use nix::errno::Errno;
use vm_memory::{GuestAddress, VolatileSlice, bitmap::BitmapSlice};

use super::{
    Cache, MAX_SEGMENT_SECTORS, MAX_SEGMENTS, SECTOR, SEG_MAX, SERIAL_LEN, SIZE_MAX,
    request::{Kind, Request},
};
use crate::virtio::Memory;

/// `VIRTIO_BLK_S_*`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupp = 2,
}

/// Bytes of a segment of a discard or a write of zeroes (§5.2.6).
const SEGMENT_LEN: usize = 16;
/// [`MAX_SEGMENTS`] of them.
const SEGMENTS: usize = MAX_SEGMENTS as usize;
/// Bytes written for a serial number: that, and the status.
const SERIAL_USED: u32 = 21;
/// Times that a call is tried again when the kernel says so.
const RETRIES: u8 = 16;
/// Bytes at [`ZEROES`].
const ZEROES_LEN: usize = 4096;
/// Most pieces of one write of zeroes.
const ZEROES_PIECES: usize = 256;
/// A page of zeroes; nobody writes to it, the type keeps it out of the binary.
static ZEROES: [AtomicU64; ZEROES_LEN / 8] = [const { AtomicU64::new(0) }; ZEROES_LEN / 8];

/// A piece of guest memory, as the kernel takes it.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(super) struct Piece(libc::iovec);

// SAFETY: an address and a length; who uses the address vouches for the memory.
unsafe impl Send for Piece {}

impl Piece {
    pub(super) const EMPTY: Self = Self(libc::iovec {
        iov_base: ptr::null_mut(),
        iov_len: 0,
    });

    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn parts(&self) -> (usize, usize) {
        (self.0.iov_base.addr(), self.0.iov_len)
    }
}

/// Room for the pieces of one request.
#[derive(Debug)]
pub(super) struct Pieces<'a> {
    list: &'a mut [Piece],
    n: usize,
}

impl<'a> Pieces<'a> {
    pub(super) fn new(list: &'a mut [Piece]) -> Self {
        Self { list, n: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.n
    }

    /// Adds a piece; false if there is no room.
    pub(super) fn push<B: BitmapSlice>(&mut self, slice: &VolatileSlice<'_, B>) -> bool {
        let Some(to) = self.list.get_mut(self.n) else {
            return false;
        };
        *to = Piece(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        });
        self.n += 1;
        true
    }
}

/// A call to be done. Its pieces lie in the list of the task's slot.
#[derive(Debug, Clone, Copy)]
pub(super) enum Call {
    Read {
        iov: *const libc::iovec,
        n: i32,
        at: i64,
    },
    Write {
        iov: *const libc::iovec,
        n: i32,
        at: i64,
    },
    Allocate {
        mode: i32,
        at: i64,
        len: i64,
    },
    Sync,
}

/// What to do with a task.
#[derive(Debug, Clone, Copy)]
pub(super) enum Next {
    Call(Call),
    Done(Status),
}

/// What a request is measured against.
#[derive(Debug)]
pub(super) struct Rules<'a> {
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    pub(super) cache: Cache,
    /// The driver does not flush: every write has to.
    pub(super) write_through: bool,
    pub(super) serial: &'a [u8; SERIAL_LEN],
}

#[derive(Debug, Clone, Copy, Default)]
struct Segment {
    at: u64,
    len: u64,
    unmap: bool,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The pieces from `from` to `to`.
    Move {
        write: bool,
        from: usize,
        to: usize,
    },
    /// Segment `next`.
    Discard,
    Zero,
    /// The host cannot: zeroes are written into segment `next`.
    WriteZeroes,
    Sync,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) queue: usize,
    pub(super) head: u16,
    pub(super) status: GuestAddress,
    /// Keeps the memory that the pieces are in mapped.
    pub(super) memory: Arc<Memory>,
    /// Bytes written to the guest if all goes well, the status among them.
    pub(super) used: u32,
    step: Step,
    /// Where the present step goes on.
    at: u64,
    left: u64,
    segments: [Segment; SEGMENTS],
    count: usize,
    next: usize,
    /// The disk is flushed before the request is done.
    sync: bool,
    retries: u8,
}

/// Bytes that a request moves, for the rate limit.
pub(super) fn weight(request: &Request) -> u64 {
    match request.kind {
        Kind::Read => request.writable,
        Kind::Write => request.readable,
        _ => 0,
    }
}

/// A chain with a request and the memory it is in.
#[derive(Debug)]
pub(super) struct Origin {
    pub(super) queue: usize,
    pub(super) head: u16,
    pub(super) status: GuestAddress,
    pub(super) memory: Arc<Memory>,
}

/// Decides what a request comes down to: a task, or nothing to be done but to say
/// its status, and how many bytes were written. `list` holds its data in `pieces` pieces,
/// and is the slot's from now on.
pub(super) fn plan(
    origin: Origin,
    request: &Request,
    list: &[Piece],
    pieces: usize,
    rules: &Rules<'_>,
) -> Result<Task, (Status, u32)> {
    let pieces = list.get(..pieces).unwrap_or_default();
    let mut task = Task {
        queue: origin.queue,
        head: origin.head,
        status: origin.status,
        memory: origin.memory,
        used: 1,
        step: Step::Sync,
        at: request.at,
        left: 0,
        segments: [Segment::default(); SEGMENTS],
        count: 0,
        next: 0,
        sync: rules.write_through && rules.cache == Cache::Writeback,
        retries: 0,
    };
    let outcome = match request.kind {
        Kind::Read => task.transfer(request, rules, pieces.len()),
        Kind::Write | Kind::Discard | Kind::WriteZeroes if rules.read_only => Err(Status::IoErr),
        Kind::Write => task.transfer(request, rules, pieces.len()),
        Kind::Discard | Kind::WriteZeroes => task.read_segments(request, rules, pieces),
        Kind::Flush => {
            // Nothing was ever written to a read-only disk.
            let idle = rules.read_only || rules.cache == Cache::Volatile;
            if idle { Err(Status::Ok) } else { Ok(()) }
        }
        Kind::GetId if request.writable < SERIAL_LEN as u64 || request.readable > 0 => {
            Err(Status::IoErr)
        }
        Kind::GetId => {
            write_to(pieces, rules.serial);
            return Err((Status::Ok, SERIAL_USED));
        }
        Kind::Other(_) => Err(Status::Unsupp),
    };
    match outcome {
        Ok(()) => Ok(task),
        Err(status) => Err((status, 1)),
    }
}

/// Whether `len` bytes at `at` are on the disk, and not too many.
fn fits(at: u64, len: u64, most: u64, sectors: u64) -> bool {
    let end = at.checked_add(len);
    len > 0
        && len <= most
        && len.is_multiple_of(SECTOR)
        && end.is_some_and(|end| end.div_ceil(SECTOR) <= sectors && i64::try_from(end).is_ok())
}

impl Task {
    fn transfer(
        &mut self,
        request: &Request,
        rules: &Rules<'_>,
        pieces: usize,
    ) -> Result<(), Status> {
        let write = request.kind == Kind::Write;
        let (len, other) = if write {
            (request.readable, request.writable)
        } else {
            (request.writable, request.readable)
        };
        let most = u64::from(SEG_MAX) * u64::from(SIZE_MAX);
        if other > 0 || !fits(request.at, len, most, rules.sectors) {
            return Err(Status::IoErr);
        }
        self.left = len;
        self.step = Step::Move {
            write,
            from: 0,
            to: pieces,
        };
        if !write {
            self.sync = false;
            self.used = u32::try_from(len + 1).map_err(|_| Status::IoErr)?;
        }
        Ok(())
    }

    fn read_segments(
        &mut self,
        request: &Request,
        rules: &Rules<'_>,
        pieces: &[Piece],
    ) -> Result<(), Status> {
        let discard = request.kind == Kind::Discard;
        // Read once: what they say cannot change any more.
        let mut raw = [0; SEGMENTS * SEGMENT_LEN];
        let len = usize::try_from(request.readable).map_err(|_| Status::IoErr)?;
        let raw = raw.get_mut(..len).ok_or(Status::IoErr)?;
        if len == 0 || !len.is_multiple_of(SEGMENT_LEN) || request.writable > 0 {
            return Err(Status::IoErr);
        }
        read_from(pieces, raw);
        for (raw, to) in raw
            .as_chunks::<SEGMENT_LEN>()
            .0
            .iter()
            .zip(&mut self.segments)
        {
            let [
                s0,
                s1,
                s2,
                s3,
                s4,
                s5,
                s6,
                s7,
                n0,
                n1,
                n2,
                n3,
                f0,
                f1,
                f2,
                f3,
            ] = *raw;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let count = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            if flags > u32::from(!discard) {
                return Err(Status::Unsupp);
            }
            let at = sector.checked_mul(SECTOR).ok_or(Status::IoErr)?;
            let len = u64::from(count) * SECTOR;
            let most = u64::from(MAX_SEGMENT_SECTORS) * SECTOR;
            if !fits(at, len, most, rules.sectors) {
                return Err(Status::IoErr);
            }
            *to = Segment {
                at,
                len,
                unmap: flags & 1 != 0,
            };
            self.count += 1;
        }
        self.step = if discard { Step::Discard } else { Step::Zero };
        self.enter_segment();
        Ok(())
    }

    fn enter_segment(&mut self) {
        if let Some(segment) = self.segments.get(self.next) {
            self.at = segment.at;
            self.left = segment.len;
        }
    }

    /// The call to be done next. `list` is the slot's.
    pub(super) fn call(&self, list: &mut [Piece]) -> Next {
        match self.try_call(list) {
            Some(call) => Next::Call(call),
            None => Next::Done(Status::IoErr),
        }
    }

    fn try_call(&self, list: &mut [Piece]) -> Option<Call> {
        const HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        let at = i64::try_from(self.at).ok()?;
        let len = i64::try_from(self.left).ok()?;
        Some(match self.step {
            Step::Move { write, from, to } => {
                let pieces = list.get(from..to)?;
                let n = i32::try_from(pieces.len()).ok()?;
                let iov = pieces.as_ptr().cast();
                if write {
                    Call::Write { iov, n, at }
                } else {
                    Call::Read { iov, n, at }
                }
            }
            Step::Discard => Call::Allocate {
                mode: HOLE,
                at,
                len,
            },
            Step::Zero => {
                let unmap = self.segments.get(self.next)?.unmap;
                let mode = if unmap { HOLE } else { ZERO };
                Call::Allocate { mode, at, len }
            }
            Step::WriteZeroes => {
                let mut left = usize::try_from(self.left).ok()?;
                let mut n = 0;
                for piece in list.iter_mut().take(ZEROES_PIECES) {
                    let len = left.min(ZEROES_LEN);
                    if len == 0 {
                        break;
                    }
                    *piece = Piece(libc::iovec {
                        iov_base: ZEROES.as_ptr().cast_mut().cast(),
                        iov_len: len,
                    });
                    left -= len;
                    n += 1;
                }
                let iov = list.as_ptr().cast();
                Call::Write { iov, n, at }
            }
            Step::Sync => Call::Sync,
        })
    }

    /// Takes the result of the call: what it returned, or a negative error number.
    pub(super) fn advance(&mut self, result: i64, list: &mut [Piece]) -> Next {
        if let Ok(n) = u64::try_from(result) {
            self.retries = 0;
            return self.went_well(n, list);
        }
        let failed = |errno: Errno| result == -i64::from(errno as i32);
        if (failed(Errno::EINTR) || failed(Errno::EAGAIN)) && self.retries < RETRIES {
            self.retries += 1;
            return self.call(list);
        }
        match self.step {
            Step::Discard if failed(Errno::EOPNOTSUPP) => Next::Done(Status::Unsupp),
            Step::Zero if failed(Errno::EOPNOTSUPP) => {
                self.step = Step::WriteZeroes;
                self.call(list)
            }
            _ => Next::Done(Status::IoErr),
        }
    }

    fn went_well(&mut self, n: u64, list: &mut [Piece]) -> Next {
        match &mut self.step {
            Step::Sync => return Next::Done(Status::Ok),
            Step::Move { from, to, .. } => {
                consume(list, from, *to, n);
                self.moved(n);
            }
            Step::WriteZeroes => self.moved(n),
            Step::Discard | Step::Zero => self.left = 0,
        }
        if self.left > 0 {
            // The end of the file: it is smaller than it was.
            return if n == 0 {
                Next::Done(Status::IoErr)
            } else {
                self.call(list)
            };
        }
        self.next += 1;
        if self.next < self.count {
            self.enter_segment();
            return self.call(list);
        }
        if self.sync {
            self.step = Step::Sync;
            return self.call(list);
        }
        Next::Done(Status::Ok)
    }

    fn moved(&mut self, n: u64) {
        let n = n.min(self.left);
        self.left -= n;
        self.at += n;
    }
}

/// Drops the first `n` bytes of the pieces.
fn consume(list: &mut [Piece], from: &mut usize, to: usize, n: u64) {
    let mut n = usize::try_from(n).unwrap_or(usize::MAX);
    for piece in list.iter_mut().take(to).skip(*from) {
        if n < piece.0.iov_len {
            piece.0.iov_base = piece.0.iov_base.wrapping_byte_add(n);
            piece.0.iov_len -= n;
            return;
        }
        n -= piece.0.iov_len;
        *from += 1;
    }
}

/// Each of the first `len` bytes in the pieces, by runs.
fn runs(pieces: &[Piece], len: usize) -> impl Iterator<Item = (usize, VolatileSlice<'_>)> {
    let mut done = 0;
    pieces.iter().map_while(move |piece| {
        let part = piece.0.iov_len.min(len - done);
        let at = done;
        done += part;
        // SAFETY: a piece was resolved in guest memory that the request at hand
        // keeps mapped; volatile access is what guest memory needs.
        let slice = unsafe { VolatileSlice::new(piece.0.iov_base.cast(), part) };
        (part > 0).then_some((at, slice))
    })
}

fn write_to(pieces: &[Piece], bytes: &[u8]) {
    for (at, slice) in runs(pieces, bytes.len()) {
        if let Some(bytes) = bytes.get(at..) {
            slice.copy_from(bytes);
        }
    }
}

fn read_from(pieces: &[Piece], bytes: &mut [u8]) {
    for (at, slice) in runs(pieces, bytes.len()) {
        if let Some(bytes) = bytes.get_mut(at..) {
            slice.copy_to(bytes);
        }
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
mod tests;
