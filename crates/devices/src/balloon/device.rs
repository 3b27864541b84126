//! The device: its queues, and the way to it.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ids::VIRTIO_ID_BALLOON,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

use super::{Config, PAGE, QUEUE_SIZE, Release};
use crate::virtio::{
    Activation, Broken, ConfigSpace, Device, Event, Memory,
    turn::{Chain, Handled, Left, turn},
};

/// `VIRTIO_BALLOON_F_*`
const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;

/// Token of [`Control`].
const ASKED: u32 = 0;
/// Chains handled before others have their turn.
const TURN: usize = 16;
/// Most bytes of page numbers that are looked at in a chain. Linux sends 1 KiB.
const MOST_NUMBERS: usize = 4 << 10;
/// Bytes of page numbers read at once.
const NUMBERS: usize = 1024;
/// Most bytes of statistics that are looked at.
const MOST_STATS: usize = 640;
/// Bytes of one of them: a tag of 16 bits, a value of 64.
const STAT: usize = 10;

/// What the guest said about its memory: `VIRTIO_BALLOON_S_*` (§5.5.6.4) to value,
/// bytes or events. The guest's word, no more.
pub type Stats = BTreeMap<u16, u64>;

#[derive(Debug)]
struct Shared {
    space: Arc<ConfigSpace>,
    bell: EventFd,
    /// The target has changed.
    resized: AtomicBool,
    /// Statistics are wanted.
    wanted: AtomicBool,
    stats: Mutex<Option<Words>>,
}

/// Statistics as they came: the device's thread allocates nothing.
#[derive(Debug, Clone, Copy)]
struct Words {
    when: Instant,
    raw: [u8; MOST_STATS],
    len: usize,
}

impl Shared {
    fn stats(&self) -> MutexGuard<'_, Option<Words>> {
        // It is replaced as a whole, whoever panicked.
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn word(&self, at: u64) -> u32 {
        let mut raw = [0; 4];
        self.space.read(at, &mut raw);
        u32::from_le_bytes(raw)
    }
}

/// Asks the guest for pages, and for statistics. Any thread may; nothing waits.
#[derive(Debug, Clone)]
pub struct Control {
    shared: Arc<Shared>,
}

impl Control {
    /// How many pages the guest is to do without.
    pub fn set_target(&self, pages: u32) {
        self.shared.space.set(0, &pages.to_le_bytes());
        self.shared.resized.store(true, Ordering::Release);
        // Fails only when the counter is full: then it has been rung.
        let _ = self.shared.bell.write(1);
    }

    /// That number.
    pub fn target(&self) -> u32 {
        self.shared.word(0)
    }

    /// How many pages the guest says it does without.
    pub fn actual(&self) -> u32 {
        self.shared.word(4)
    }

    /// Asks the guest for statistics: later, [`Self::stats`] has them.
    pub fn request_stats(&self) {
        self.shared.wanted.store(true, Ordering::Release);
        let _ = self.shared.bell.write(1);
    }

    /// The latest statistics, and when they came.
    pub fn stats(&self) -> Option<(Instant, Stats)> {
        let words = (*self.shared.stats())?;
        let mut stats = Stats::new();
        let raw = words.raw.get(..words.len).unwrap_or_default();
        for [t0, t1, value @ ..] in raw.as_chunks::<STAT>().0 {
            stats.insert(u16::from_le_bytes([*t0, *t1]), u64::from_le_bytes(*value));
        }
        Some((words.when, stats))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// Which queue is what, by the features agreed on.
fn roles(features: u64) -> impl Iterator<Item = Role> {
    [
        (Role::Inflate, true),
        (Role::Deflate, true),
        (Role::Stats, features & STATS_VQ != 0),
        (Role::Reporting, features & REPORTING != 0),
    ]
    .into_iter()
    .filter_map(|(role, there)| there.then_some(role))
}

#[derive(Debug)]
struct Active {
    base: Activation,
    roles: Vec<Role>,
    /// Where a turn ended too early.
    waiting: Vec<bool>,
    /// The statistics' buffer, kept until they are wanted anew (§5.5.6.4).
    kept: Option<u16>,
}

/// A memory balloon. See the module's text.
#[derive(Debug)]
pub struct Balloon {
    features: u64,
    sizes: Vec<u16>,
    release: Box<dyn Release>,
    shared: Arc<Shared>,
    active: Option<Active>,
    again: Option<Instant>,
}

impl Balloon {
    /// A balloon that gives memory back by `release`. Fails if there are no more
    /// descriptors.
    pub fn new(config: Config, release: Box<dyn Release>) -> std::io::Result<Self> {
        let mut features = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        for (feature, there) in [
            (DEFLATE_ON_OOM, config.deflate_on_oom),
            (STATS_VQ, config.statistics),
            (REPORTING, config.reporting),
        ] {
            features |= if there { feature } else { 0 };
        }
        // Of `struct virtio_balloon_config`, the driver writes `actual`.
        let mut space = [0; 16];
        for (to, byte) in space.iter_mut().zip(config.target.to_le_bytes()) {
            *to = byte;
        }
        Ok(Self {
            features,
            sizes: roles(features).map(|_| QUEUE_SIZE).collect(),
            release,
            shared: Arc::new(Shared {
                space: Arc::new(ConfigSpace::new(space, 4..8)),
                bell: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
                resized: AtomicBool::new(false),
                wanted: AtomicBool::new(false),
                stats: Mutex::default(),
            }),
            active: None,
            again: None,
        })
    }

    /// The way to ask it for something.
    pub fn control(&self) -> Control {
        Control {
            shared: Arc::clone(&self.shared),
        }
    }

    fn serve(&mut self, index: usize) -> Result<(), Broken> {
        let Self {
            active, release, ..
        } = self;
        let Some(active) = active else {
            return Ok(());
        };
        let memory = active.base.memory.memory();
        let (Some(role), Some(queue), Some(waiting)) = (
            active.roles.get(index).copied(),
            active.base.queues.get_mut(index),
            active.waiting.get_mut(index),
        ) else {
            return Ok(());
        };
        if !queue.ready() {
            return Ok(());
        }
        let kept = &mut active.kept;
        let shared = &self.shared;
        let (left, used) = turn(queue, &memory, TURN, |chain| match role {
            Role::Inflate => {
                inflate(&memory, chain, &**release);
                Handled::Used(0)
            }
            // Pages come back when they are touched.
            Role::Deflate => Handled::Used(0),
            Role::Reporting => {
                report(&memory, chain, &**release);
                Handled::Used(0)
            }
            Role::Stats => {
                let head = chain.head_index();
                let words = read_stats(&memory, chain);
                *shared.stats() = Some(words);
                shared.wanted.store(false, Ordering::Release);
                // There is to be one buffer; any more go back at once.
                if kept.is_some() {
                    return Handled::Used(0);
                }
                *kept = Some(head);
                Handled::Kept
            }
        })?;
        *waiting = left != Left::Nothing;
        if used && queue.needs_notification(&*memory)? {
            active.base.interrupt.queue(index);
        }
        Ok(())
    }

    /// Serves the queues where something is left.
    fn serve_waiting(&mut self) -> Result<(), Broken> {
        for index in 0..self.sizes.len() {
            let waiting = |active: &Active| active.waiting.get(index).copied();
            if self.active.as_ref().and_then(waiting) == Some(true) {
                self.serve(index)?;
            }
        }
        Ok(())
    }

    /// Does what [`Control`] asks for.
    fn asked(&mut self) -> Result<(), Broken> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        if self.shared.resized.swap(false, Ordering::AcqRel) {
            active.base.interrupt.config();
        }
        if self.shared.wanted.load(Ordering::Acquire) && active.return_stats()? {
            let memory = active.base.memory.memory();
            if let Some((index, queue)) = active.stats_queue()
                && queue.needs_notification(&*memory)?
            {
                active.base.interrupt.queue(index);
            }
        }
        Ok(())
    }
}

impl Active {
    fn stats_queue(&mut self) -> Option<(usize, &mut Queue)> {
        let index = self.roles.iter().position(|role| *role == Role::Stats)?;
        Some((index, self.base.queues.get_mut(index)?))
    }

    /// Gives the statistics' buffer back, if there is one: the driver fills it anew.
    fn return_stats(&mut self) -> Result<bool, Broken> {
        let memory = self.base.memory.memory();
        let Some(head) = self.kept.take() else {
            return Ok(false);
        };
        if let Some((_, queue)) = self.stats_queue() {
            queue.add_used(&*memory, head, 0)?;
        }
        Ok(true)
    }
}

/// A run of pages, to be released at once.
#[derive(Debug)]
struct Run<'a> {
    release: &'a dyn Release,
    from: u64,
    to: u64,
}

impl Run<'_> {
    /// Adds a page, by its number, on either end, or begins anew.
    fn add(&mut self, page: u64) {
        if page == self.to {
            self.to += 1;
        } else if page + 1 == self.from {
            self.from = page;
        } else {
            self.flush();
            (self.from, self.to) = (page, page + 1);
        }
    }

    fn flush(&mut self) {
        if self.from < self.to {
            let (at, len) = (self.from * PAGE, (self.to - self.from) * PAGE);
            self.release.release(GuestAddress(at), len);
        }
        (self.from, self.to) = (0, 0);
    }
}

/// Whether `len` bytes at `at` are guest memory.
fn inside(memory: &Memory, at: GuestAddress, len: u64) -> bool {
    // Addresses must not wrap: the range would go on at zero. Nothing is nowhere.
    len > 0
        && at.checked_add(len).is_some()
        && usize::try_from(len).is_ok_and(|len| memory.check_range(at, len, Permissions::Write))
}

/// Releases the pages whose numbers (32 bits each) are in a chain.
fn inflate(memory: &Memory, chain: Chain<'_>, release: &dyn Release) {
    let mut run = Run {
        release,
        from: 0,
        to: 0,
    };
    let mut left = MOST_NUMBERS;
    for descriptor in chain.take(usize::from(QUEUE_SIZE)) {
        if descriptor.is_write_only() {
            break;
        }
        let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let mut part = len.min(left) & !3;
        left -= part;
        let mut at = descriptor.addr();
        while part > 0 {
            let mut raw = [0; NUMBERS];
            let now = part.min(NUMBERS);
            let Some(raw) = raw.get_mut(..now) else {
                break;
            };
            let next = at.checked_add(now as u64);
            let (Some(next), Ok(())) = (next, memory.read_slice(raw, at)) else {
                break;
            };
            for number in raw.as_chunks().0 {
                let page = u64::from(u32::from_le_bytes(*number));
                if inside(memory, GuestAddress(page * PAGE), PAGE) {
                    run.add(page);
                }
            }
            at = next;
            part -= now;
        }
    }
    run.flush();
}

/// Releases the whole pages in a chain's buffers.
fn report(memory: &Memory, chain: Chain<'_>, release: &dyn Release) {
    for descriptor in chain.take(usize::from(QUEUE_SIZE)) {
        let (at, len) = (descriptor.addr(), u64::from(descriptor.len()));
        if !descriptor.is_write_only() || !inside(memory, at, len) {
            continue;
        }
        let Some(from) = at.raw_value().checked_next_multiple_of(PAGE) else {
            continue;
        };
        let to = at.raw_value().saturating_add(len) / PAGE * PAGE;
        if from < to {
            release.release(GuestAddress(from), to - from);
        }
    }
}

/// Reads the statistics in a chain's first buffer; none if it is not there.
fn read_stats(memory: &Memory, mut chain: Chain<'_>) -> Words {
    let mut words = Words {
        when: Instant::now(),
        raw: [0; MOST_STATS],
        len: 0,
    };
    let descriptor = chain.next();
    if let Some(descriptor) = descriptor.filter(|descriptor| !descriptor.is_write_only()) {
        let at = descriptor.addr();
        let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let len = len.min(MOST_STATS);
        if let Some(raw) = words.raw.get_mut(..len)
            && inside(memory, at, len as u64)
            && memory.read_slice(raw, at).is_ok()
        {
            words.len = len;
        }
    }
    words
}

impl Device for Balloon {
    fn id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.shared.space
    }

    fn watched(&self) -> Vec<(BorrowedFd<'_>, u32)> {
        vec![(self.shared.bell.as_fd(), ASKED)]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        let mut active = Active {
            roles: roles(activation.features).collect(),
            waiting: vec![false; activation.queues.len()],
            kept: None,
            base: activation,
        };
        // Its buffer may have been given back when the device last rested.
        if let Some((index, _)) = active.stats_queue() {
            active.base.interrupt.queue(index);
        }
        self.active = Some(active);
        self.asked()
    }

    fn event(&mut self, event: Event) -> Result<(), Broken> {
        self.again = None;
        match event {
            Event::Queue(index) => self.serve(index)?,
            Event::Watched(_) => self.asked()?,
            Event::Deadline => self.serve_waiting()?,
            Event::Config => {}
        }
        let waiting = |active: &Active| active.waiting.contains(&true);
        if self.active.as_ref().is_some_and(waiting) {
            self.again = Some(Instant::now());
        }
        Ok(())
    }

    fn deadline(&self) -> Option<Instant> {
        self.again
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.again = None;
        let Some(mut active) = self.active.take() else {
            return Vec::new();
        };
        // Else it would be lost with this device. If the queue is broken, so be it.
        let _ = active.return_stats();
        active.base.queues
    }

    fn reset(&mut self) {
        // What the driver said, it has taken back.
        self.shared.space.set(4, &[0; 4]);
        *self.shared.stats() = None;
    }
}
