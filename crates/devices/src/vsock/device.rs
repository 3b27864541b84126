//! The device: three virtqueues and the muxer behind them.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::epoll::{EpollFlags, EpollTimeout};
use virtio_bindings::{virtio_config::VIRTIO_F_VERSION_1, virtio_ring::VIRTIO_RING_F_EVENT_IDX};
use virtio_queue::{Queue, QueueT};
use vm_memory::Bytes;

use super::{
    Config, Error, Log, Memory, SocketDir,
    muxer::{Muxer, Pumped},
    poller::{self, Token},
    ring::{self, Broken, RxRing},
    sys::IoVec,
};

/// Packets to the guest.
pub const RX_QUEUE: usize = 0;
/// Packets from the guest.
pub const TX_QUEUE: usize = 1;
/// Events to the guest.
pub const EVENT_QUEUE: usize = 2;
/// Number of virtqueues.
pub const QUEUES: usize = 3;
/// Most entries of a virtqueue.
pub const QUEUE_SIZE: u16 = 1024;
/// Virtio features offered: streams only, so no bit of the device's own; and no
/// indirect descriptors, whose tables Linux would allocate for every packet.
pub const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Batches of events taken from the host's sockets before others have their turn.
const POLLS: usize = 8;
/// Packets taken from the guest before others have their turn.
const TX_BUDGET: usize = 512;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.3 §5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// The queues whose driver wants an interrupt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Signals([bool; QUEUES]);

impl Signals {
    /// Whether the driver of queue `index` is to be interrupted.
    pub fn contains(self, index: usize) -> bool {
        self.0.get(index).copied().unwrap_or(false)
    }
}

#[derive(Debug)]
struct Vring {
    queue: Queue,
    running: bool,
    /// The driver wrote nonsense into it; it is left alone until it restarts.
    broken: bool,
    /// Something was added that the driver may want to know of.
    used: bool,
    /// The driver is to be interrupted whatever it asked for.
    forced: bool,
}

impl Vring {
    fn new() -> Result<Vring, Error> {
        Ok(Vring {
            queue: Queue::new(QUEUE_SIZE).map_err(|_| Error::Queue)?,
            running: false,
            broken: false,
            used: false,
            forced: false,
        })
    }

    fn usable(&self) -> bool {
        self.running && !self.broken
    }
}

/// A virtio socket device. One thread calls it; it never blocks but in
/// [`Device::wait`].
///
/// Life: the transport sets memory and queue addresses through
/// [`Device::set_memory`] and [`Device::queue_mut`] while the queue is stopped,
/// then calls [`Device::start`]. [`Device::stop`] keeps the connections, for a
/// machine that is paused; [`Device::reset`] ends them, for a guest that has
/// begun anew. All are safe in every order.
#[derive(Debug)]
pub struct Device {
    muxer: Muxer,
    vrings: [Vring; QUEUES],
    mem: Option<Arc<Memory>>,
    /// Work was left over: do not sleep.
    again: bool,
    /// The guest is yet to be told that its connections are gone.
    owe_reset: bool,
    events: Vec<(Token, EpollFlags)>,
}

impl Device {
    /// Creates the device and its listening socket `config.name` in `dir`.
    pub fn new(config: Config, dir: SocketDir, log: Log) -> Result<Device, Error> {
        Ok(Device {
            muxer: Muxer::new(config, dir, log)?,
            vrings: [Vring::new()?, Vring::new()?, Vring::new()?],
            mem: None,
            again: false,
            owe_reset: false,
            events: Vec::new(),
        })
    }

    /// The configuration space: the guest's CID (virtio 1.3 §5.10.4).
    pub fn config_space(&self) -> [u8; 8] {
        self.muxer.cid().to_le_bytes()
    }

    /// Connections in every state.
    pub fn connections(&self) -> usize {
        self.muxer.live()
    }

    /// Lets [`Self::wait`] report `number` when `fd` becomes readable: at every
    /// change if `edge`, as long as it is otherwise.
    pub fn watch(&self, fd: impl AsFd, number: u32, edge: bool) -> Result<(), Error> {
        self.muxer
            .poller
            .add_external(fd, number, edge)
            .map_err(|e| Error::Poll(e.into()))
    }

    /// Undoes [`Self::watch`].
    pub fn unwatch(&self, fd: impl AsFd) {
        // Fails only if it was not watched, which is what is wanted.
        let _ = self.muxer.poller.remove(fd);
    }

    /// Replaces guest memory.
    pub fn set_memory(&mut self, mem: Memory) {
        self.mem = Some(Arc::new(mem));
        for index in 0..QUEUES {
            self.check(index);
        }
    }

    /// A queue, for its addresses, size and indices.
    pub fn queue_mut(&mut self, index: usize) -> Option<&mut Queue> {
        self.vrings.get_mut(index).map(|vring| &mut vring.queue)
    }

    /// Takes a configured queue into service.
    pub fn start(&mut self, index: usize) {
        if let Some(vring) = self.vrings.get_mut(index) {
            vring.running = true;
            vring.broken = false;
            vring.queue.set_ready(true);
            // The driver may wait for an interrupt that was due before a pause.
            vring.forced = true;
        }
        self.check(index);
    }

    /// Takes a queue out of service. Its indices stay, and so do connections.
    pub fn stop(&mut self, index: usize) {
        if let Some(vring) = self.vrings.get_mut(index) {
            vring.running = false;
            vring.queue.set_ready(false);
        }
        self.muxer.guest_up = self.guest_up();
    }

    /// Ends every connection: the guest that had them is no more.
    pub fn reset(&mut self) {
        self.muxer.reset();
        self.owe_reset = false;
    }

    /// Ends every connection and tells the guest, whose CID may have changed: for
    /// a machine that was restored from a snapshot.
    ///
    /// It is told in [`Self::run`], once its driver has left a buffer for that.
    pub fn transport_reset(&mut self) {
        self.muxer.reset();
        self.owe_reset = true;
    }

    fn tell_reset(&mut self, mem: &Memory) {
        let vring = &mut self.vrings[EVENT_QUEUE];
        if !self.owe_reset || !vring.usable() {
            return;
        }
        match send_event(&mut vring.queue, mem, TRANSPORT_RESET) {
            Ok(sent) => {
                self.owe_reset = !sent;
                vring.used |= sent;
            }
            Err(Broken) => self.break_down(EVENT_QUEUE),
        }
    }

    /// A queue that reaches outside of guest memory is not used.
    fn check(&mut self, index: usize) {
        if let Some(vring) = self.vrings.get_mut(index)
            && vring.running
        {
            let valid = self
                .mem
                .as_deref()
                .is_some_and(|mem| vring.queue.is_valid(mem));
            if !valid {
                self.break_down(index);
            }
        }
        self.muxer.guest_up = self.guest_up();
    }

    fn guest_up(&self) -> bool {
        self.vrings[RX_QUEUE].usable() && self.vrings[TX_QUEUE].usable()
    }

    fn break_down(&mut self, index: usize) {
        self.muxer.log.say(format_args!(
            "queue {index} is unusable: its rings make no sense; it rests until the driver resets it"
        ));
        if let Some(vring) = self.vrings.get_mut(index) {
            vring.broken = true;
        }
        self.muxer.guest_up = self.guest_up();
    }

    /// Waits for something to do, does what concerns the host's sockets, and
    /// appends the numbers of the owner's descriptors that are ready.
    pub fn wait(&mut self, external: &mut Vec<u32>) -> Result<(), Error> {
        let mut events = std::mem::take(&mut self.events);
        let result = self.muxer.poller.wait(self.timeout(), &mut events);
        for (token, flags) in events.drain(..) {
            match token {
                Token::External(number) => external.push(number),
                token => self.muxer.event(token, flags),
            }
        }
        self.events = events;
        self.muxer.expire(Instant::now());
        result.map_err(|e| Error::Poll(e.into()))
    }

    fn timeout(&self) -> EpollTimeout {
        if self.again {
            return EpollTimeout::ZERO;
        }
        match self.muxer.deadline() {
            None => EpollTimeout::NONE,
            Some(when) => {
                let left = when.saturating_duration_since(Instant::now());
                // Rounded up: waking early would only mean waking twice.
                EpollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(EpollTimeout::MAX)
            }
        }
    }

    /// Serves both directions as far as the guest allows, without waiting, and
    /// says which queues' drivers want an interrupt.
    pub fn run(&mut self) -> Signals {
        match self.mem.clone() {
            Some(mem) => self.run_on(&mem),
            None => {
                self.again = false;
                Signals::default()
            }
        }
    }

    /// [`Self::run`] on guest memory as it is now.
    pub(super) fn run_on(&mut self, mem: &Memory) -> Signals {
        self.again = false;
        self.tell_reset(mem);
        if self.guest_up() {
            if let Err(Broken) = self.run_tx(mem) {
                self.break_down(TX_QUEUE);
            }
            if let Err(Broken) = self.run_rx(mem) {
                self.break_down(RX_QUEUE);
            }
        }
        self.signals(mem)
    }

    /// Does what [`Self::wait`] does for the host's sockets, without waiting.
    /// False if there may be more to do at once.
    pub(super) fn poll(&mut self) -> Result<bool, Error> {
        let mut events = std::mem::take(&mut self.events);
        let mut result = Ok(false);
        for _ in 0..POLLS {
            if let Err(e) = self.muxer.poller.wait(EpollTimeout::ZERO, &mut events) {
                result = Err(Error::Poll(e.into()));
                break;
            }
            let last = events.len() < poller::BATCH;
            for (token, flags) in events.drain(..) {
                self.muxer.event(token, flags);
            }
            if last {
                result = Ok(true);
                break;
            }
        }
        self.events = events;
        self.muxer.expire(Instant::now());
        result
    }

    /// Readable when [`Self::poll`] has something to do.
    pub(super) fn poll_fd(&self) -> BorrowedFd<'_> {
        self.muxer.poller.fd()
    }

    /// When to call [`Self::poll`] and [`Self::run_on`] at the latest.
    pub(super) fn due(&self) -> Option<Instant> {
        if self.again {
            return Some(Instant::now());
        }
        self.muxer.deadline()
    }

    /// Takes a queue into service that `mem` contains, event index set; `false` if
    /// it does not.
    pub(super) fn start_with(&mut self, index: usize, queue: Queue, mem: &Memory) -> bool {
        let Some(vring) = self.vrings.get_mut(index) else {
            return false;
        };
        let ready = queue.ready();
        let valid = !ready || queue.is_valid(mem);
        *vring = Vring {
            queue,
            running: ready && valid,
            broken: false,
            used: false,
            // As in `start`.
            forced: ready,
        };
        self.muxer.guest_up = self.guest_up();
        valid
    }

    /// Takes a queue out of service, and gives it back.
    pub(super) fn take_queue(&mut self, index: usize) -> Queue {
        let queue = match self.vrings.get_mut(index) {
            Some(vring) => {
                vring.running = false;
                std::mem::take(&mut vring.queue)
            }
            None => Queue::default(),
        };
        self.muxer.guest_up = self.guest_up();
        queue
    }

    /// Whether the driver has made a queue unusable.
    pub(super) fn is_broken(&self) -> bool {
        self.vrings
            .iter()
            .any(|vring| vring.running && vring.broken)
    }

    /// The host port that the next connection from the host gets.
    pub(super) fn next_port(&self) -> u32 {
        self.muxer.next_port()
    }

    /// Where host ports go on: another device's [`Self::next_port`], or anywhere. A
    /// guest that was restored may still hold sockets of the ports before.
    pub fn set_next_port(&mut self, port: u32) {
        self.muxer.set_next_port(port);
    }

    fn run_tx(&mut self, mem: &Memory) -> Result<(), Broken> {
        let vring = &mut self.vrings[TX_QUEUE];
        let mut payload: Vec<IoVec> = Vec::new();
        let mut budget = TX_BUDGET;
        let mut promised = false;
        loop {
            vring.queue.disable_notification(mem)?;
            let before = budget;
            while budget > 0
                && let Some(chain) = ring::next(&mut vring.queue, mem)?
            {
                budget -= 1;
                let head = chain.head_index();
                match ring::read_packet(mem, chain, &mut payload) {
                    Ok((header, whole)) => {
                        let payload = whole.then_some(payload.as_slice());
                        // SAFETY: the pieces lie in `mem`, which outlives the
                        // call, and hold header.len bytes if `whole`.
                        unsafe { self.muxer.packet(&header, payload) };
                    }
                    Err(ring::Malformed) => self
                        .muxer
                        .log
                        .say(format_args!("dropped a packet: its buffers make no sense")),
                }
                vring.queue.add_used(mem, head, 0)?;
                vring.used = true;
            }
            if budget == 0 {
                self.again = true;
                return Ok(());
            }
            if promised && budget == before {
                // The ring claims entries that cannot be read. (Once is nothing:
                // an entry may come between the last look and this one.)
                return Err(Broken);
            }
            promised = vring.queue.enable_notification(mem)?;
            if !promised {
                return Ok(());
            }
        }
    }

    fn run_rx(&mut self, mem: &Memory) -> Result<(), Broken> {
        let vring = &mut self.vrings[RX_QUEUE];
        vring.queue.disable_notification(mem)?;
        loop {
            let mut ring = RxRing::new(&mut vring.queue, mem);
            let pumped = self.muxer.pump(&mut ring);
            let used = ring.used;
            if ring.malformed > 0 {
                self.muxer.log.say(format_args!(
                    "returned {} receive buffers that make no sense",
                    ring.malformed
                ));
            }
            vring.used |= used > 0;
            match pumped? {
                Pumped::Idle => return Ok(()),
                Pumped::Again => {
                    self.again = true;
                    return Ok(());
                }
                Pumped::Starved => {}
            }
            if !vring.queue.enable_notification(mem)? {
                return Ok(());
            }
            if used == 0 {
                // Buffers have come meanwhile, or the ring lies: the next turn
                // tells, and lets others act in between.
                self.again = true;
                return Ok(());
            }
        }
    }

    fn signals(&mut self, mem: &Memory) -> Signals {
        let mut signals = Signals::default();
        for (vring, signal) in self.vrings.iter_mut().zip(&mut signals.0) {
            let used = std::mem::take(&mut vring.used);
            let forced = std::mem::take(&mut vring.forced);
            if vring.usable() {
                *signal = forced || (used && vring.queue.needs_notification(mem).unwrap_or(true));
            }
        }
        signals
    }
}

/// Writes an event; false when the driver has left no buffer for it.
fn send_event(queue: &mut Queue, mem: &Memory, event: u32) -> Result<bool, Broken> {
    let Some(mut chain) = ring::next(queue, mem)? else {
        return Ok(false);
    };
    let head = chain.head_index();
    let written = match chain.next() {
        Some(desc) if desc.is_write_only() && desc.len() >= 4 => {
            mem.write_slice(&event.to_le_bytes(), desc.addr()).is_ok()
        }
        _ => false,
    };
    queue.add_used(mem, head, if written { 4 } else { 0 })?;
    Ok(true)
}
