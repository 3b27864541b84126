//! The device: queues, limits and completions.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_WRITE_ZEROES,
    },
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ids::VIRTIO_ID_BLOCK,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::{
    Config, Engine, Error, MAX_PIECES, MAX_QUEUES, QUEUE_SIZE,
    disk::Disk,
    request,
    size::{Resizer, space},
    slots::Slots,
    task::{self, Call, Next, Origin, Pieces, Rules, Status, Task},
    uring::Uring,
};
use crate::{
    limit::Limit,
    virtio::{Activation, Broken, ConfigSpace, Device, Event, Interrupt, Memory, MemoryCell},
};

/// Token of the engine's completions.
const DONE: u32 = 0;
/// Token of [`Resizer`].
const RESIZED: u32 = 1;
/// Requests begun before others have their turn.
const TURN: usize = 256;
/// The same where each is waited for.
const PLAIN_TURN: usize = 16;

#[derive(Debug)]
enum Backend {
    Plain,
    Uring(Box<Uring>),
}

/// A queue in service.
#[derive(Debug)]
struct Line {
    queue: Queue,
    in_flight: u16,
    /// Something was used that the driver may want to know of.
    used: bool,
    /// There may be more in it.
    waiting: bool,
}

#[derive(Debug)]
struct Active {
    memory: MemoryCell,
    interrupt: Arc<dyn Interrupt>,
    lines: Vec<Line>,
    write_through: bool,
    /// Take nothing new.
    quiet: bool,
    broken: bool,
}

/// A block device. See the module's text.
#[derive(Debug)]
pub struct Block {
    // Dropped first: it waits for what the kernel still does with the slots.
    backend: Backend,
    slots: Slots,
    disk: Arc<Disk>,
    config: Config,
    space: Arc<ConfigSpace>,
    sizes: Vec<u16>,
    resizer: Resizer,
    resizes: u64,
    limit: Limit,
    active: Option<Active>,
    /// The limit lets nothing through before.
    blocked: Option<Instant>,
    /// Something is left to be done at once.
    again: Option<Instant>,
    /// The queue whose turn comes first.
    first: usize,
}

impl Block {
    /// A device for the disk behind `fd`: a regular file or a block device, open
    /// for what it is to do.
    pub fn new(fd: OwnedFd, config: Config) -> Result<Self, Error> {
        if config.queues == 0 || config.queues > MAX_QUEUES {
            return Err(Error::Queues(config.queues));
        }
        let disk = Arc::new(Disk::new(fd, config.read_only)?);
        let backend = match config.engine {
            Engine::Plain => Backend::Plain,
            Engine::IoUring => Backend::Uring(Box::new(Uring::new(&disk)?)),
            Engine::Auto => {
                Uring::new(&disk).map_or(Backend::Plain, |uring| Backend::Uring(Box::new(uring)))
            }
        };
        let space = Arc::new(space(&config, disk.sectors()));
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(
            |errno| Error::Descriptor {
                what: "make an eventfd for the size",
                source: errno.into(),
            },
        )?;
        Ok(Self {
            resizer: Resizer {
                disk: Arc::clone(&disk),
                space: Arc::clone(&space),
                bell: Arc::new(bell),
                count: Arc::default(),
            },
            resizes: 0,
            slots: Slots::new(),
            sizes: vec![QUEUE_SIZE; usize::from(config.queues)],
            limit: Limit::new(config.limit, Instant::now()),
            backend,
            disk,
            config,
            space,
            active: None,
            blocked: None,
            again: None,
            first: 0,
        })
    }

    /// The way to say that the disk has grown, or shrunk.
    pub fn resizer(&self) -> Resizer {
        self.resizer.clone()
    }

    /// The engine in use: never [`Engine::Auto`].
    pub fn engine(&self) -> Engine {
        match self.backend {
            Backend::Plain => Engine::Plain,
            Backend::Uring(_) => Engine::IoUring,
        }
    }

    /// Begins what can be begun, and tells the driver what is done.
    fn serve(&mut self) -> Result<(), Broken> {
        let result = self.begin_all();
        // Even if the driver broke it: what has been begun must come back.
        self.submit();
        // What the page cache had is there at once: saves waiting to be told. Being
        // told brings us here again, so nothing that waits for room is forgotten.
        let reaped = if result.is_ok() { self.reap() } else { Ok(()) };
        self.submit();
        result
            .and(reaped)
            .and_then(|()| self.signal())
            .inspect_err(|_| {
                if let Some(active) = &mut self.active {
                    active.broken = true;
                }
            })
    }

    fn begin_all(&mut self) -> Result<(), Broken> {
        self.again = None;
        let mut left = match self.backend {
            Backend::Plain => PLAIN_TURN,
            Backend::Uring(_) => TURN,
        };
        let now = (!self.limit.is_none()).then(Instant::now);
        if let (Some(now), Some(at)) = (now, self.blocked) {
            if now < at {
                return Ok(());
            }
            self.blocked = None;
        }
        let count = self.sizes.len();
        for n in 0..count {
            let index = (self.first + n) % count;
            self.serve_queue(index, &mut left, now)?;
            if left == 0 {
                self.again = Some(Instant::now());
                // The next one goes first next time.
                self.first = (index + 1) % count;
                break;
            }
            if self.blocked.is_some() {
                self.first = index;
                break;
            }
        }
        Ok(())
    }

    fn serve_queue(
        &mut self,
        index: usize,
        left: &mut usize,
        now: Option<Instant>,
    ) -> Result<(), Broken> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let quiet = active.quiet || active.broken;
        let Some(line) = active.lines.get_mut(index) else {
            return Ok(());
        };
        if quiet || !line.waiting || !line.queue.ready() {
            return Ok(());
        }
        let memory = active.memory.memory().into_inner();
        line.queue.disable_notification(&*memory)?;
        let mut announced = false;
        loop {
            let Some(line) = self.line(index) else {
                return Ok(());
            };
            // Full: it goes on when something is done.
            if line.in_flight >= line.queue.size() || *left == 0 {
                return Ok(());
            }
            let Some(slot) = self.slots.take() else {
                return Ok(());
            };
            let begun = self.begin(index, slot, &memory, now);
            if !matches!(begun, Ok(Begun::InFlight)) {
                self.slots.put_back(slot);
            }
            match begun? {
                Begun::Done | Begun::InFlight => {
                    *left -= 1;
                    announced = false;
                }
                Begun::Limited => return Ok(()),
                // It says that there is more, and there is not.
                Begun::Empty if announced => return Err(Broken),
                Begun::Empty => {
                    let Some(line) = self.line(index) else {
                        return Ok(());
                    };
                    if !line.queue.enable_notification(&*memory)? {
                        line.waiting = false;
                        return Ok(());
                    }
                    announced = true;
                }
            }
        }
    }

    fn line(&mut self, index: usize) -> Option<&mut Line> {
        self.active.as_mut()?.lines.get_mut(index)
    }

    /// Takes the next chain of a queue, and begins what it asks for.
    fn begin(
        &mut self,
        index: usize,
        slot: usize,
        memory: &Arc<Memory>,
        now: Option<Instant>,
    ) -> Result<Begun, Broken> {
        let Some(active) = &mut self.active else {
            return Ok(Begun::Empty);
        };
        let rules = Rules {
            sectors: self.disk.sectors(),
            read_only: self.config.read_only,
            cache: self.config.cache,
            write_through: active.write_through,
            serial: &self.config.serial,
        };
        let Some(line) = active.lines.get_mut(index) else {
            return Ok(Begun::Empty);
        };
        let Some(chain) = line.queue.iter(&**memory)?.next() else {
            return Ok(Begun::Empty);
        };
        let head = chain.head_index();
        let list = self.slots.list(slot);
        let parsed = request::parse(memory, chain, Pieces::new(list));
        if let Some(now) = now {
            let bytes = parsed.request.as_ref().map_or(0, task::weight);
            if let Err(at) = self.limit.take(1, bytes, now) {
                line.queue.go_to_previous_position();
                self.blocked = Some(at);
                return Ok(Begun::Limited);
            }
        }
        let Some(status) = parsed.status else {
            // Nowhere to say what is wrong with it.
            line.finish(memory, head, None, 0)?;
            return Ok(Begun::Done);
        };
        let Some(request) = parsed.request else {
            line.finish(memory, head, Some((status, Status::IoErr)), 1)?;
            return Ok(Begun::Done);
        };
        let origin = Origin {
            queue: index,
            head,
            status,
            memory: Arc::clone(memory),
        };
        match task::plan(origin, &request, list, parsed.pieces, &rules) {
            Err((outcome, used)) => {
                line.finish(memory, head, Some((status, outcome)), used)?;
                Ok(Begun::Done)
            }
            Ok(task) => self.go(slot, task, memory),
        }
    }

    fn go(&mut self, slot: usize, task: Task, memory: &Memory) -> Result<Begun, Broken> {
        let next = task.call(self.slots.list(slot));
        let queue = task.queue;
        if let Some(to) = self.slots.tasks.get_mut(slot) {
            *to = Some(task);
        }
        let Some(outcome) = self.run(slot, next) else {
            if let Some(line) = self.line(queue) {
                line.in_flight += 1;
            }
            return Ok(Begun::InFlight);
        };
        let task = self.slots.tasks.get_mut(slot).and_then(Option::take);
        if let (Some(task), Some(line)) = (task, self.line(queue)) {
            line.finish_task(memory, &task, outcome)?;
        }
        Ok(Begun::Done)
    }

    /// Does the calls of a slot's task until it is done, or in flight.
    fn run(&mut self, slot: usize, mut next: Next) -> Option<Status> {
        loop {
            let call = match next {
                Next::Done(status) => return Some(status),
                Next::Call(call) => call,
            };
            let result = self.perform(slot, &call)?;
            next = self.advance(slot, result);
        }
    }

    /// What the call returned; `None` if it is under way.
    fn perform(&mut self, slot: usize, call: &Call) -> Option<i64> {
        match &mut self.backend {
            // SAFETY: the pieces lie in the memory that the slot's task holds.
            Backend::Plain => Some(unsafe { self.disk.perform(call) }),
            // SAFETY: the same; the task stays in its slot, and the list where it
            // is, until the call has come back, for which the engine waits when it
            // is dropped.
            Backend::Uring(uring) => unsafe { uring.push(slot, call) },
        }
    }

    fn advance(&mut self, slot: usize, result: i64) -> Next {
        let from = slot * MAX_PIECES;
        let list = self.slots.pieces.get_mut(from..from + MAX_PIECES);
        match self.slots.tasks.get_mut(slot) {
            Some(Some(task)) => task.advance(result, list.unwrap_or_default()),
            _ => Next::Done(Status::IoErr),
        }
    }

    /// Takes what the engine has done.
    fn reap(&mut self) -> Result<(), Broken> {
        let Some(active) = &self.active else {
            return Ok(());
        };
        let memory = active.memory.memory().into_inner();
        let mut result = Ok(());
        loop {
            let Backend::Uring(uring) = &mut self.backend else {
                return result;
            };
            let Some((slot, value)) = uring.pop() else {
                return result;
            };
            let next = self.advance(slot, value);
            let Some(outcome) = self.run(slot, next) else {
                continue;
            };
            let Some(task) = self.slots.put_back(slot) else {
                continue;
            };
            let broken = self.active.as_ref().is_none_or(|active| active.broken);
            if let Some(line) = self.line(task.queue) {
                line.in_flight = line.in_flight.saturating_sub(1);
                if !broken && result.is_ok() {
                    result = line.finish_task(&memory, &task, outcome);
                }
            }
        }
    }

    fn submit(&mut self) {
        if let Backend::Uring(uring) = &mut self.backend
            && let Some(wait) = uring.submit()
        {
            self.again = Some(Instant::now() + wait);
        }
    }

    /// Interrupts for the queues that want one.
    fn signal(&mut self) -> Result<(), Broken> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let memory = active.memory.memory();
        for (index, line) in active.lines.iter_mut().enumerate() {
            if std::mem::take(&mut line.used) && line.queue.needs_notification(&*memory)? {
                active.interrupt.queue(index);
            }
        }
        Ok(())
    }

    /// Tells the driver of a size that it may not have seen.
    fn announce_size(&mut self) {
        let count = self.resizer.count.load(Ordering::Acquire);
        if count != self.resizes
            && let Some(active) = &self.active
        {
            self.resizes = count;
            active.interrupt.config();
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begun {
    /// The queue holds nothing.
    Empty,
    /// The limit says: later.
    Limited,
    Done,
    InFlight,
}

impl Line {
    fn finish(
        &mut self,
        memory: &Memory,
        head: u16,
        status: Option<(GuestAddress, Status)>,
        used: u32,
    ) -> Result<(), Broken> {
        let mut used = used;
        if let Some((at, status)) = status
            && memory.write_obj(status as u8, at).is_err()
        {
            used = 0;
        }
        self.queue.add_used(memory, head, used)?;
        self.used = true;
        Ok(())
    }

    fn finish_task(&mut self, memory: &Memory, task: &Task, status: Status) -> Result<(), Broken> {
        // A request that failed halfway has written nothing that counts.
        let mut used = if status == Status::Ok { task.used } else { 1 };
        if task.memory.write_obj(status as u8, task.status).is_err() {
            used = 0;
        }
        self.finish(memory, task.head, None, used)
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.config.queues > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        features
            | if self.config.read_only {
                1 << VIRTIO_BLK_F_RO
            } else {
                1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.space
    }

    fn watched(&self) -> Vec<(BorrowedFd<'_>, u32)> {
        let mut watched = vec![(self.resizer.bell.as_fd(), RESIZED)];
        if let Backend::Uring(uring) = &self.backend {
            watched.push((uring.done(), DONE));
        }
        watched
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        let lines = activation.queues.into_iter().map(|queue| Line {
            queue,
            in_flight: 0,
            used: false,
            waiting: true,
        });
        self.active = Some(Active {
            lines: lines.collect(),
            memory: activation.memory,
            interrupt: activation.interrupt,
            write_through: activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0,
            quiet: false,
            broken: false,
        });
        self.announce_size();
        Ok(())
    }

    fn event(&mut self, event: Event) -> Result<(), Broken> {
        match event {
            Event::Queue(index) => {
                if let Some(line) = self.line(index) {
                    line.waiting = true;
                }
            }
            Event::Watched(RESIZED) => self.announce_size(),
            Event::Watched(_) => {
                if let Err(broken) = self.reap() {
                    if let Some(active) = &mut self.active {
                        active.broken = true;
                    }
                    self.submit();
                    return Err(broken);
                }
            }
            Event::Deadline => {}
            Event::Config => return Ok(()),
        }
        self.serve()
    }

    fn deadline(&self) -> Option<Instant> {
        // Nothing new is begun then; what is in flight may have to be.
        let blocked = self.blocked.filter(|_| {
            let active = self.active.as_ref();
            active.is_some_and(|active| !active.quiet && !active.broken)
        });
        match (self.again, blocked) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    fn in_flight(&self) -> bool {
        self.slots.used() > 0
    }

    fn quiesce(&mut self) {
        if let Some(active) = &mut self.active {
            active.quiet = true;
        }
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.blocked = None;
        self.again = None;
        let active = self.active.take();
        active.map_or_else(Vec::new, |active| {
            active.lines.into_iter().map(|line| line.queue).collect()
        })
    }
}
