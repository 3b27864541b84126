//! The asynchronous engine: one `io_uring` that can do nothing but read, write,
//! flush, allocate and free, on this one disk (`IORING_REGISTER_RESTRICTIONS`):
//! whoever takes over the process gets no other call out of it.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::Duration,
};

use io_uring::{IoUring, opcode, register::Restriction, squeue, types};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Error, MAX_TASKS, disk::Disk, task::Call};

/// Kernel threads that do what cannot be done without waiting.
const WORKERS: u32 = 16;
/// How long to leave the kernel alone when it has no memory for a request.
const PAUSE: Duration = Duration::from_millis(1);
/// The disk's number among the ring's files.
const DISK: types::Fixed = types::Fixed(0);

/// One ring, with at most one call per slot in it: neither its submissions nor its
/// completions can be more than there is room for.
pub(super) struct Uring {
    ring: IoUring,
    done: EventFd,
    in_flight: usize,
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Uring { what, source }
}

impl Uring {
    pub(super) fn new(disk: &Disk) -> Result<Self, Error> {
        let entries = u32::try_from(MAX_TASKS).unwrap_or(u32::MAX);
        let ring = IoUring::builder()
            .dontfork()
            .setup_r_disabled()
            .build(entries)
            .map_err(failed("make"))?;
        let done = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| failed("make an eventfd for")(errno.into()))?;
        let submitter = ring.submitter();
        submitter
            .register_files(&[disk.raw_fd()])
            .map_err(failed("register the disk with"))?;
        submitter
            .register_eventfd(done.as_raw_fd())
            .map_err(failed("register an eventfd with"))?;
        submitter
            .register_iowq_max_workers(&mut [WORKERS, WORKERS])
            .map_err(failed("bound the workers of"))?;
        submitter
            .register_restrictions(&mut [
                Restriction::sqe_op(opcode::Readv::CODE),
                Restriction::sqe_op(opcode::Writev::CODE),
                Restriction::sqe_op(opcode::Fsync::CODE),
                Restriction::sqe_op(opcode::Fallocate::CODE),
                Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
            ])
            .map_err(failed("restrict"))?;
        submitter
            .register_enable_rings()
            .map_err(failed("enable"))?;
        Ok(Self {
            ring,
            done,
            in_flight: 0,
        })
    }

    /// Becomes readable with every completion.
    pub(super) fn done(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }

    /// Begins a call for a slot; a result at once only if it cannot be.
    ///
    /// # Safety
    /// The list of pieces and what they point to must stay until [`Self::pop`] has
    /// returned the slot, or the engine has been dropped.
    pub(super) unsafe fn push(&mut self, slot: usize, call: &Call) -> Option<i64> {
        let offset = |at: i64| u64::try_from(at).unwrap_or(0);
        let entry = match *call {
            Call::Read { iov, n, at } => opcode::Readv::new(DISK, iov, n.unsigned_abs())
                .offset(offset(at))
                .build(),
            Call::Write { iov, n, at } => opcode::Writev::new(DISK, iov, n.unsigned_abs())
                .offset(offset(at))
                .build(),
            Call::Allocate { mode, at, len } => opcode::Fallocate::new(DISK, offset(len))
                .offset(offset(at))
                .mode(mode)
                .build(),
            Call::Sync => opcode::Fsync::new(DISK)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        };
        let entry = entry.user_data(u64::try_from(slot).unwrap_or(u64::MAX));
        // SAFETY: what the entry points to stays, as the caller promises.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            return Some(-i64::from(libc::EBUSY));
        }
        self.in_flight += 1;
        None
    }

    /// Hands what was pushed to the kernel; when to try again, if it has no memory.
    pub(super) fn submit(&mut self) -> Option<Duration> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Some(PAUSE),
                // An entry with an error ends a batch: the rest goes with the next.
                _ => {}
            }
        }
        None
    }

    /// The next completion: its slot, and its result.
    pub(super) fn pop(&mut self) -> Option<(usize, i64)> {
        let entry = self.ring.completion().next()?;
        self.in_flight = self.in_flight.saturating_sub(1);
        let slot = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
        Some((slot, i64::from(entry.result())))
    }
}

impl Drop for Uring {
    /// The kernel may still write to guest memory: waits until it has done so.
    fn drop(&mut self) {
        while self.in_flight > 0 {
            let want = usize::from(self.ring.completion().is_empty());
            if self.ring.submit_and_wait(want).is_err() {
                std::thread::sleep(PAUSE);
            }
            while self.pop().is_some() {}
        }
    }
}
