//! The thread of a device, and the way to it.
//!
//! Bells and kicks are eventfds that are watched by their edges and never read: every
//! write is an edge, and a counter of 64 bits does not fill up. That saves a system
//! call per kick, and the thread from having `read` at all.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
    },
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;

use super::{Activation, Broken, ConfigSpace, Device, Event, Interrupt, MemoryCell};

const BELL: u64 = 1 << 32;
const KICK: u64 = 2 << 32;
const WATCHED: u64 = 3 << 32;
/// Events taken from the kernel per call.
const BATCH: usize = 16;

/// Why a worker could not be made, or had to stop. Nothing a guest does ends here.
#[derive(Debug, thiserror::Error)]
#[error("{what} of a virtio device: {source}")]
pub struct WorkerError {
    what: &'static str,
    source: io::Error,
}

fn failed(what: &'static str) -> impl Fn(Errno) -> WorkerError {
    move |errno| WorkerError {
        what,
        source: errno.into(),
    }
}

/// A device at rest, for a snapshot.
#[derive(Debug, Clone, Default)]
pub struct Quiesced {
    /// Its queues, if it was active.
    pub queues: Option<Vec<virtio_queue::QueueState>>,
    /// [`Device::save`].
    pub state: Vec<u8>,
}

/// What is asked of the worker, and what it has answered.
#[derive(Debug, Default)]
struct Desk {
    activate: Option<Activation>,
    reset: bool,
    config: bool,
    /// Guest memory is another: see what it is now.
    remap: bool,
    /// Rest: touch neither queues nor memory until it is taken back.
    pause: bool,
    stop: bool,
    /// The answer to `pause`, present while the device rests.
    rests: Option<Quiesced>,
    /// The worker is gone.
    ended: bool,
}

#[derive(Debug)]
struct Shared {
    desk: Mutex<Desk>,
    answered: Edge,
    /// Rung when `remap` has been seen to; of a device that maps memory.
    remapped: Option<Edge>,
    /// Rung after every request.
    bell: EventFd,
    /// A reset was asked for and not yet done.
    resetting: AtomicBool,
}

impl Shared {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        // Every request is one assignment: whole whoever panicked.
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_remapped(&self) {
        if let Some(remapped) = &self.remapped {
            remapped.ring();
        }
    }

    fn ask(&self, change: impl FnOnce(&mut Desk)) {
        change(&mut self.desk());
        // Fails only when the counter is full: then it has been rung.
        let _ = self.bell.write(1);
    }
}

/// A bell and who waits for it: one thread at a time, by no other call than
/// `epoll_wait`, which also keeps the time.
#[derive(Debug)]
struct Edge {
    bell: EventFd,
    epoll: Epoll,
}

impl Edge {
    fn new() -> Result<Self, Errno> {
        let bell = eventfd()?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        epoll.add(&bell, EpollEvent::new(flags, 0))?;
        Ok(Self { bell, epoll })
    }

    fn ring(&self) {
        // Fails only when the counter is full: then it has been rung.
        let _ = self.bell.write(1);
    }

    /// Returns when it has been rung since the last call; false if that took longer
    /// than `limit`.
    fn wait(&self, limit: Duration) -> bool {
        let limit = EpollTimeout::try_from(limit).unwrap_or(EpollTimeout::MAX);
        loop {
            match self.epoll.wait(&mut [EpollEvent::empty()], limit) {
                // Stopped and continued: the time begins anew.
                Err(Errno::EINTR) => {}
                other => return other.is_ok_and(|n| n > 0),
            }
        }
    }
}

fn eventfd() -> Result<EventFd, Errno> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
}

/// The transport's and the VMM's way to a device. Only [`Self::pause`] waits.
#[derive(Debug, Clone)]
pub struct Port {
    shared: Arc<Shared>,
    config: Arc<ConfigSpace>,
    kicks: Arc<[EventFd]>,
    id: u32,
    features: u64,
    queue_sizes: Arc<[u16]>,
    maps_memory: bool,
}

impl Port {
    /// The device's virtio ID.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Features offered.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The most entries of each queue.
    pub fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// The configuration space. After a write that changed something, call
    /// [`Self::config_written`].
    pub fn config(&self) -> &ConfigSpace {
        &self.config
    }

    /// The descriptor to write to when queue `index` is kicked; a hypervisor may
    /// do that by itself (ioeventfd).
    pub fn kick(&self, index: usize) -> Option<&EventFd> {
        self.kicks.get(index)
    }

    /// `DRIVER_OK`. Ignored while a reset is under way.
    pub fn activate(&self, activation: Activation) {
        if !self.resetting() {
            self.shared.ask(|desk| desk.activate = Some(activation));
        }
    }

    /// The driver writes 0 to the status: it is to read something else until
    /// [`Self::resetting`] is false (§4.1.4.3.2).
    pub fn reset(&self) {
        self.shared.resetting.store(true, Ordering::Release);
        self.shared.ask(|desk| {
            desk.reset = true;
            desk.activate = None;
        });
    }

    /// Whether a reset is under way.
    pub fn resetting(&self) -> bool {
        self.shared.resetting.load(Ordering::Acquire)
    }

    /// The driver wrote to the configuration space.
    pub fn config_written(&self) {
        self.shared.ask(|desk| desk.config = true);
    }

    /// [`Device::maps_memory`].
    pub fn maps_memory(&self) -> bool {
        self.maps_memory
    }

    /// Has a device that maps guest memory see what its [`MemoryCell`] holds now. Waits for
    /// that at most `limit`; true if the device goes on with nothing else: it was told, or
    /// broke at that, or is not in service, or is gone. One thread at a time may call it,
    /// whoever pauses the device meanwhile.
    pub fn remap(&self, limit: Duration) -> bool {
        let Some(remapped) = &self.shared.remapped else {
            return true;
        };
        self.shared.ask(|desk| desk.remap = true);
        loop {
            let desk = self.shared.desk();
            if desk.ended || !desk.remap {
                return true;
            }
            drop(desk);
            if !remapped.wait(limit) {
                return false;
            }
        }
    }

    /// Lets the device finish what is in flight and rest, and says how it stands.
    /// Waits for that at most `limit`; `None` if it took longer (it is still asked
    /// to rest) or the worker is gone. One thread at a time may call it.
    pub fn pause(&self, limit: Duration) -> Option<Quiesced> {
        self.shared.ask(|desk| desk.pause = true);
        loop {
            let desk = self.shared.desk();
            if desk.rests.is_some() || desk.ended {
                return desk.rests.clone();
            }
            drop(desk);
            // What rings is an answer, or one to an earlier request that was late.
            if !self.shared.answered.wait(limit) {
                return None;
            }
        }
    }

    /// Lets the device go on.
    pub fn resume(&self) {
        self.shared.ask(|desk| {
            desk.pause = false;
            desk.rests = None;
        });
    }

    /// Whether the worker is gone: it touches nothing any more.
    pub fn ended(&self) -> bool {
        self.shared.desk().ended
    }

    /// Whether both lead to one device.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Lets the worker's thread end, once nothing is in flight.
    pub fn stop(&self) {
        self.shared.ask(|desk| desk.stop = true);
    }
}

/// What the device's thread runs.
#[derive(Debug)]
pub struct Worker {
    device: Box<dyn Device>,
    shared: Arc<Shared>,
    kicks: Arc<[EventFd]>,
    epoll: Epoll,
    /// Set while the device is active.
    active: Option<Active>,
    /// Active, but broken: it rests until the driver resets it.
    broken: bool,
    /// The device has been told to rest, and does.
    paused: bool,
    /// What it goes on with afterwards.
    resting: Option<Activation>,
}

/// What an active device was given, but for the queues.
#[derive(Debug)]
struct Active {
    memory: MemoryCell,
    features: u64,
    interrupt: Arc<dyn Interrupt>,
}

impl Worker {
    /// A worker for `device`, and the port to it. Everything is allocated here;
    /// [`Self::run`] then needs epoll, eventfds and what the device itself does.
    pub fn new(device: Box<dyn Device>) -> Result<(Self, Port), WorkerError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(failed("make an epoll instance"))?;
        let eventfd = || eventfd().map_err(failed("make an eventfd"));
        let watch = |fd: &dyn AsFd, flags, token| {
            epoll
                .add(fd, EpollEvent::new(EpollFlags::EPOLLIN | flags, token))
                .map_err(failed("watch a descriptor"))
        };
        let bell = eventfd()?;
        watch(&bell, EpollFlags::EPOLLET, BELL)?;
        let mut kicks = Vec::new();
        if let Some(external) = device.external_kicks() {
            for fd in external {
                let fd = fd.try_clone_to_owned().map_err(|source| WorkerError {
                    what: "duplicate an eventfd",
                    source,
                })?;
                // SAFETY: the device vouches for it being an eventfd; were it none,
                // writing to it would do nothing to our memory.
                kicks.push(unsafe { EventFd::from_owned_fd(fd) });
            }
        } else {
            for (index, _) in (0u64..).zip(device.queue_sizes()) {
                let kick = eventfd()?;
                watch(&kick, EpollFlags::EPOLLET, KICK | index)?;
                kicks.push(kick);
            }
        }
        let both = EpollFlags::EPOLLET | EpollFlags::EPOLLOUT;
        for (fd, token) in device.watched() {
            watch(&fd, both, WATCHED | u64::from(token))?;
        }
        let shared = Arc::new(Shared {
            desk: Mutex::default(),
            answered: Edge::new().map_err(failed("make an eventfd"))?,
            remapped: match device.maps_memory() {
                true => Some(Edge::new().map_err(failed("make an eventfd"))?),
                false => None,
            },
            bell,
            resetting: AtomicBool::new(false),
        });
        let kicks: Arc<[EventFd]> = kicks.into();
        let port = Port {
            shared: Arc::clone(&shared),
            config: Arc::clone(device.config()),
            kicks: Arc::clone(&kicks),
            id: device.id(),
            features: device.features(),
            queue_sizes: device.queue_sizes().into(),
            maps_memory: device.maps_memory(),
        };
        let worker = Self {
            device,
            shared,
            kicks,
            epoll,
            active: None,
            broken: false,
            paused: false,
            resting: None,
        };
        Ok((worker, port))
    }

    /// The epoll instance's number, for a seccomp filter.
    pub fn epoll_fd(&self) -> i32 {
        self.epoll.0.as_raw_fd()
    }

    /// Serves the device until [`Port::stop`], and drops it.
    pub fn run(mut self) -> Result<(), WorkerError> {
        self.serve()
    }

    /// Serves the device until [`Port::stop`]. Whoever then drops the worker needs
    /// what system calls that takes; here they are not needed.
    pub fn serve(&mut self) -> Result<(), WorkerError> {
        let result = self.go_on();
        let mut desk = self.shared.desk();
        desk.ended = true;
        // Nobody will: the way back to the driver must not be kept by it.
        desk.activate = None;
        drop(desk);
        self.shared.answered.ring();
        self.shared.tell_remapped();
        result
    }

    fn go_on(&mut self) -> Result<(), WorkerError> {
        let mut events = [EpollEvent::empty(); BATCH];
        loop {
            let n = match self.epoll.wait(&mut events, self.timeout()) {
                Err(Errno::EINTR) => 0,
                other => other.map_err(failed("wait for the events"))?,
            };
            for event in events.iter().take(n) {
                self.dispatch(event.data());
            }
            if self
                .device
                .deadline()
                .is_some_and(|at| at <= Instant::now())
            {
                self.tell(Event::Deadline);
            }
            if self.desk() {
                return Ok(());
            }
        }
    }

    fn dispatch(&mut self, token: u64) {
        let low = token & 0xffff_ffff;
        match token & !0xffff_ffff {
            // What it was rung for is on the desk.
            BELL => {}
            KICK => self.tell(Event::Queue(usize::try_from(low).unwrap_or(usize::MAX))),
            _ => self.tell(Event::Watched(u32::try_from(low).unwrap_or(u32::MAX))),
        }
    }

    /// Calls the device, if it is active and whole.
    fn tell(&mut self, event: Event) {
        // What is in flight comes back through a broken device as well: a reset, and
        // a pause, wait for it.
        let returning =
            matches!(event, Event::Watched(_) | Event::Deadline) && self.device.in_flight();
        if self.active.is_some()
            && (!self.broken || returning)
            && let Err(Broken) = self.device.event(event)
            && !self.broken
        {
            self.break_down();
        }
    }

    fn break_down(&mut self) {
        self.broken = true;
        if let Some(Active { interrupt, .. }) = &self.active {
            interrupt.needs_reset();
        }
    }

    fn timeout(&self) -> EpollTimeout {
        if self.active.is_none() || (self.broken && !self.device.in_flight()) {
            return EpollTimeout::NONE;
        }
        match self.device.deadline() {
            None => EpollTimeout::NONE,
            Some(when) => {
                let left = when.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return EpollTimeout::ZERO;
                }
                // Rounded up: waking early would only mean waking twice.
                EpollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(EpollTimeout::MAX)
            }
        }
    }

    /// Sees to the requests; true if the thread shall end.
    fn desk(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut desk = shared.desk();
        // First what was asked for first: a pause must not forget a driver that has
        // just become ready.
        if !self.paused
            && !desk.stop
            && let Some(activation) = desk.activate.take()
        {
            drop(desk);
            self.activate(activation);
            desk = shared.desk();
        }
        // What is in flight writes to guest memory and to queues: none of these
        // may go before it has come back.
        if (desk.reset || desk.pause || desk.stop || desk.remap) && self.device.in_flight() {
            self.device.quiesce();
            return false;
        }
        if desk.stop {
            return true;
        }
        if desk.reset {
            desk.reset = false;
            self.deactivate();
            self.resting = None;
            self.device.reset();
            shared.resetting.store(false, Ordering::Release);
        }
        if desk.pause != self.paused {
            self.paused = desk.pause;
            if desk.pause {
                self.resting = self.deactivate();
            } else if let Some(resting) = self.resting.take() {
                // It was active all the time: whoever says so again is ignored.
                desk.activate = Some(resting);
            }
        }
        if self.paused && desk.rests.is_none() {
            let queues =
                |activation: &Activation| activation.queues.iter().map(Queue::state).collect();
            desk.rests = Some(Quiesced {
                queues: self.resting.as_ref().map(queues),
                state: self.device.save(),
            });
            shared.answered.ring();
        }
        let activation = desk.activate.take_if(|_| !self.paused);
        let config = std::mem::take(&mut desk.config);
        let remap = desk.remap;
        drop(desk);
        if let Some(activation) = activation {
            self.activate(activation);
        }
        if remap {
            // A device that rests, or whose driver is not there, sees it when it goes on.
            if let Some(activation) = self.deactivate() {
                self.activate(activation);
            }
            shared.desk().remap = false;
            shared.tell_remapped();
        }
        if config {
            self.tell(Event::Config);
        }
        false
    }

    /// Takes the device out of service; what it was active with, if it was.
    fn deactivate(&mut self) -> Option<Activation> {
        let active = self.active.take()?;
        // A broken device stays so over a rest: its driver has been told.
        let broken = self.broken;
        let queues = self.device.deactivate();
        (!broken).then_some(Activation {
            memory: active.memory,
            features: active.features,
            queues,
            interrupt: active.interrupt,
        })
    }

    fn activate(&mut self, mut activation: Activation) {
        // A driver that is ready twice without a reset between is ignored.
        if self.active.is_some() {
            return;
        }
        self.active = Some(Active {
            memory: activation.memory.clone(),
            features: activation.features,
            interrupt: Arc::clone(&activation.interrupt),
        });
        self.broken = false;
        let event_idx = activation.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for queue in &mut activation.queues {
            queue.set_event_idx(event_idx);
        }
        let memory = activation.memory.memory();
        let valid = activation.queues.len() == self.kicks.len()
            && activation
                .queues
                .iter()
                .all(|queue| !queue.ready() || queue.is_valid(&*memory));
        if !valid || self.device.activate(activation).is_err() {
            self.break_down();
            return;
        }
        for index in 0..self.kicks.len() {
            self.tell(Event::Queue(index));
        }
    }
}
