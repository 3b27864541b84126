//! The entropy device (virtio 1.3 §5.4): the host's `getrandom`, straight into the
//! guest's buffers.
//!
//! A buffer of whatever size gets [`MOST`] bytes at most, and the used length says
//! how many: more is a new request away, and so a matter of the rate limit.
//! Nothing is kept here that a clone of the guest could be given a second time.
//!
//! System calls once the guest runs, beside those of [`crate::virtio::Worker`]:
//! getrandom.

use std::{sync::Arc, time::Instant};

use nix::errno::Errno;
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ids::VIRTIO_ID_RNG,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

use crate::{
    limit::{Limit, LimitConfig},
    virtio::{
        Activation, Broken, ConfigSpace, Device, Event, Memory,
        turn::{Chain, Handled, Left, turn},
    },
};

/// Most bytes that one request gets.
pub const MOST: usize = 64 << 10;
/// Entries of the queue.
pub const QUEUE_SIZE: u16 = 64;
/// Requests served before others have their turn: a few milliseconds' work.
const TURN: usize = 16;

/// An entropy device.
#[derive(Debug)]
pub struct Rng {
    space: Arc<ConfigSpace>,
    limit: Limit,
    active: Option<Activation>,
    deadline: Option<Instant>,
}

impl Rng {
    /// A device that hands out as much as the limit says.
    pub fn new(limit: LimitConfig) -> Self {
        Self {
            space: Arc::new(ConfigSpace::new([], 0..0)),
            limit: Limit::new(limit, Instant::now()),
            active: None,
            deadline: None,
        }
    }

    fn serve(&mut self) -> Result<(), Broken> {
        let Self { active, limit, .. } = self;
        let Some(active) = active else {
            return Ok(());
        };
        let Some(queue) = active.queues.first_mut().filter(|queue| queue.ready()) else {
            return Ok(());
        };
        let now = Instant::now();
        if self.deadline.is_some_and(|at| now < at) {
            return Ok(());
        }
        self.deadline = None;
        let memory = active.memory.memory();
        let mut later = now;
        let (left, used) = turn(queue, &memory, TURN, |chain| {
            let most = room(chain.clone());
            let bytes = u64::try_from(most).unwrap_or(u64::MAX);
            match limit.take(1, bytes, now) {
                Ok(()) => Handled::Used(fill(&memory, chain, most)),
                Err(at) => {
                    later = at;
                    Handled::Later
                }
            }
        })?;
        if left != Left::Nothing {
            self.deadline = Some(later);
        }
        if used && queue.needs_notification(&*memory)? {
            active.interrupt.queue(0);
        }
        Ok(())
    }
}

/// The writable descriptors at the beginning of a chain; there should be no others.
fn buffers(chain: Chain<'_>) -> impl Iterator<Item = (GuestAddress, usize)> {
    chain
        .take(usize::from(QUEUE_SIZE))
        .take_while(|descriptor| descriptor.is_write_only())
        .map(|descriptor| {
            let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            (descriptor.addr(), len)
        })
}

/// Bytes that a request gets, if all is well with it.
fn room(chain: Chain<'_>) -> usize {
    let mut sum = 0;
    for (_, len) in buffers(chain) {
        sum = MOST.min(sum + len.min(MOST));
    }
    sum
}

/// Fills a chain's buffers with `most` bytes, or up to the first that is not in guest
/// memory; how many bytes that was. The driver may have changed them since they were
/// measured: it gets no more than it has paid for.
fn fill(memory: &Memory, chain: Chain<'_>, most: usize) -> u32 {
    let mut done = 0;
    for (at, len) in buffers(chain) {
        let part = len.min(most - done);
        if part == 0 {
            if done == most {
                break;
            }
            continue;
        }
        // Addresses must not wrap: the pieces would go on at zero.
        let end = u64::try_from(part).ok().and_then(|n| at.checked_add(n));
        if end.is_none() || !memory.check_range(at, part, Permissions::Write) {
            break;
        }
        let Ok(slices) = memory.get_slices(at, part, Permissions::Write) else {
            break;
        };
        for slice in slices.flatten() {
            let got = random(slice.ptr_guard_mut().as_ptr(), slice.len());
            done += got;
            if got < slice.len() {
                return u32::try_from(done).unwrap_or(0);
            }
        }
    }
    u32::try_from(done).unwrap_or(0)
}

/// Asks the host for `len` bytes; how many there were.
fn random(to: *mut u8, len: usize) -> usize {
    let mut done = 0;
    while done < len {
        // SAFETY: the piece was resolved in guest memory, which the caller keeps
        // mapped, and no reference into it exists. Not libc's own function: that
        // may keep state, and make other calls.
        let got = unsafe {
            libc::syscall(
                libc::SYS_getrandom,
                to.wrapping_add(done),
                len - done,
                0_u32,
            )
        };
        match usize::try_from(got) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(_) if Errno::last() == Errno::EINTR => {}
            Err(_) => break,
        }
    }
    done
}

impl Device for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.space
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        self.active = Some(activation);
        Ok(())
    }

    fn event(&mut self, event: Event) -> Result<(), Broken> {
        match event {
            Event::Queue(_) | Event::Deadline => self.serve(),
            Event::Watched(_) | Event::Config => Ok(()),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.deadline = None;
        self.active
            .take()
            .map_or_else(Vec::new, |active| active.queues)
    }
}
