//! A virtio device whose queues another process serves.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use super::{
    Error,
    wire::{Channel, Request},
};
use crate::{
    Log,
    virtio::{Activation, Broken, ConfigSpace, Device, Event, Interrupt, Memory, MemoryCell},
};

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VHOST_USER_PROTOCOL_F_MQ`, `_REPLY_ACK`, `_CONFIG`.
const PROTOCOL_MQ: u64 = 1 << 0;
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
const PROTOCOL_CONFIG: u64 = 1 << 9;
/// Most regions of guest memory that every back end takes.
pub const MAX_REGIONS: usize = 8;
/// Most queues: the protocol's messages hold an index of eight bits.
const MAX_QUEUES: usize = 256;
/// The token of the back end's socket; calls have the index of their queue.
const SOCKET: u32 = u32::MAX;

/// What every kind of device has of the rings.
pub(crate) const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// How long a back end is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// All requests while the device is made: a back end just started may first
    /// have to set up its jail.
    pub connect: Duration,
    /// All requests to take the device into service, or out of it: the requests
    /// in flight are finished in this time.
    pub change: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            change: Duration::from_secs(10),
        }
    }
}

/// A connected back end, before its kind is made of it.
#[derive(Debug)]
pub(crate) struct Backend {
    channel: Channel,
    /// Virtio features that it offers.
    pub(crate) features: u64,
    protocol: u64,
}

impl Backend {
    /// Meets the back end; `config`: its configuration space is needed.
    pub(crate) fn meet(sock: OwnedFd, limits: Limits, config: bool) -> Result<Self, Error> {
        let mut channel = Channel::new(sock, limits.connect);
        let features = u64::from_le_bytes(channel.ask(Request::GetFeatures, &[])?);
        if features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(Error::Unfit("offers no virtio 1 device"));
        }
        let mut protocol = 0;
        if features & PROTOCOL_FEATURES != 0 {
            let offered = channel.ask(Request::GetProtocolFeatures, &[])?;
            let wanted = if config { PROTOCOL_CONFIG } else { 0 };
            protocol = u64::from_le_bytes(offered) & (PROTOCOL_MQ | PROTOCOL_REPLY_ACK | wanted);
            let chosen = protocol.to_le_bytes();
            channel.tell(Request::SetProtocolFeatures, &chosen, &[])?;
            channel.acks = protocol & PROTOCOL_REPLY_ACK != 0;
        }
        if config && protocol & PROTOCOL_CONFIG == 0 {
            return Err(Error::Unfit("tells no configuration"));
        }
        channel.tell(Request::SetOwner, &[], &[])?;
        Ok(Self {
            channel,
            features,
            protocol,
        })
    }

    /// How many queues it serves at most; `None` if it does not say.
    pub(crate) fn queues(&mut self) -> Result<Option<usize>, Error> {
        if self.protocol & PROTOCOL_MQ == 0 {
            return Ok(None);
        }
        let number = u64::from_le_bytes(self.channel.ask(Request::GetQueueNum, &[])?);
        Ok(Some(usize::try_from(number).unwrap_or(usize::MAX)))
    }

    /// The first `N` bytes of its configuration space.
    pub(crate) fn config<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let size = u32::try_from(N).map_err(|_| Error::Request("too long a configuration"))?;
        let mut body = vec![0; 12 + N];
        for (at, word) in [0, size, 0].into_iter().enumerate() {
            body[at * 4..at * 4 + 4].copy_from_slice(&u32::to_le_bytes(word));
        }
        let reply = self.channel.ask_long(Request::GetConfig, &body)?;
        let bytes = reply.get(12..).and_then(|bytes| bytes.try_into().ok());
        bytes.ok_or(Error::Unfit("tells no configuration of the usual size"))
    }
}

/// What a kind of device makes of a back end.
#[derive(Debug)]
pub(crate) struct Profile {
    /// Virtio ID.
    pub(crate) id: u32,
    /// Features of the device's own that the driver may have.
    pub(crate) features: u64,
    pub(crate) queues: usize,
    pub(crate) queue_size: u16,
    pub(crate) config: Vec<u8>,
}

/// A device that a vhost-user back end serves: see [`crate::fs::connect`],
/// [`super::block`], [`super::net`].
///
/// While it runs, its thread only forwards interrupts, and reads no eventfd: each
/// write to one is an edge. Kicks go straight to the back end.
#[derive(Debug)]
pub struct Frontend {
    channel: Channel,
    id: u32,
    features: u64,
    /// The back end's: what the front end offers by itself it must not be told of.
    known: u64,
    /// Acknowledged to the back end beside the driver's.
    hidden: u64,
    config: Arc<ConfigSpace>,
    queue_sizes: Vec<u16>,
    /// The back end reads these, the hypervisor writes them.
    kicks: Vec<EventFd>,
    /// The back end writes these.
    calls: Vec<EventFd>,
    active: Option<Active>,
    log: Log,
}

#[derive(Debug)]
struct Active {
    memory: MemoryCell,
    interrupt: Arc<dyn Interrupt>,
    queues: Vec<Queue>,
    /// Queues that the back end has.
    started: Vec<bool>,
}

impl Frontend {
    pub(crate) fn new(
        backend: Backend,
        limits: Limits,
        profile: Profile,
        log: Log,
    ) -> Result<Self, Error> {
        if profile.queues == 0 || profile.queues > MAX_QUEUES {
            return Err(Error::Request("it needs 1 to 256 queues"));
        }
        let eventfds = || {
            (0..profile.queues)
                .map(|_| EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK))
                .collect::<Result<Vec<_>, _>>()
                .map_err(|e| Error::EventFd(e.into()))
        };
        let mut channel = backend.channel;
        channel.set_limit(limits.change);
        Ok(Self {
            channel,
            id: profile.id,
            features: profile.features,
            known: backend.features,
            hidden: backend.features & PROTOCOL_FEATURES,
            config: Arc::new(ConfigSpace::new(profile.config, 0..0)),
            queue_sizes: vec![profile.queue_size; profile.queues],
            kicks: eventfds()?,
            calls: eventfds()?,
            active: None,
            log,
        })
    }

    fn start(&mut self, active: &mut Active, features: u64) -> Result<(), Error> {
        self.channel.begin();
        let features = features & self.features & self.known | self.hidden;
        let features = features.to_le_bytes();
        self.channel.tell(Request::SetFeatures, &features, &[])?;
        let memory = active.memory.memory();
        self.share(&memory)?;
        for index in 0..active.queues.len() {
            let queue = &active.queues[index];
            if queue.ready() {
                self.start_queue(index, queue, &memory)?;
                active.started[index] = true;
            }
        }
        Ok(())
    }

    /// Gives guest memory to the back end. Its addresses in our own process are
    /// none of the back end's business: it is told guest addresses in their place.
    fn share(&mut self, memory: &Memory) -> Result<(), Error> {
        let count = memory.num_regions();
        if count == 0 || count > MAX_REGIONS {
            return Err(Error::Memory("it has none, or more than 8, regions"));
        }
        let mut body = Vec::with_capacity(8 + count * 32);
        body.extend(u32::try_from(count).unwrap_or(0).to_le_bytes());
        body.extend([0; 4]);
        let mut files = Vec::with_capacity(count);
        for region in memory.iter() {
            let file = region.file_offset();
            let file = file.ok_or(Error::Memory("a region is no shared file; use a memfd"))?;
            let start = region.start_addr().raw_value();
            for word in [start, region.len(), start, file.start()] {
                body.extend(word.to_le_bytes());
            }
            files.push(file.file().as_fd());
        }
        self.channel.tell(Request::SetMemTable, &body, &files)
    }

    fn start_queue(&mut self, index: usize, queue: &Queue, mem: &Memory) -> Result<(), Error> {
        let number = u32::try_from(index).map_err(|_| Error::Request("too many queues"))?;
        let size = u64::from(queue.size());
        // The back end maps a ring by its first address.
        let rings = [
            (queue.desc_table(), 16 * size),
            (queue.used_ring(), 6 + 8 * size),
            (queue.avail_ring(), 6 + 2 * size),
        ];
        if !rings.iter().all(|(start, len)| within(mem, *start, *len)) {
            return Err(Error::Memory("the driver's ring crosses two regions"));
        }
        let state = |value: u16| [number.to_le_bytes(), u32::from(value).to_le_bytes()].concat();
        let channel = &mut self.channel;
        channel.tell(Request::SetVringNum, &state(queue.size()), &[])?;
        channel.tell(Request::SetVringBase, &state(queue.next_avail()), &[])?;
        let mut addresses = state(0);
        // Descriptors, used, available, log.
        for at in [rings[0].0, rings[1].0, rings[2].0, 0] {
            addresses.extend(at.to_le_bytes());
        }
        channel.tell(Request::SetVringAddr, &addresses, &[])?;
        let word = u64::from(number).to_le_bytes();
        for (request, fds) in [
            (Request::SetVringCall, &self.calls),
            (Request::SetVringKick, &self.kicks),
        ] {
            let fd = fds.get(index).ok_or(Error::Request("too many queues"))?;
            channel.tell(request, &word, &[fd.as_fd()])?;
        }
        if self.hidden & PROTOCOL_FEATURES != 0 {
            channel.tell(Request::SetVringEnable, &state(1), &[])?;
        }
        Ok(())
    }

    /// Takes the queues back. Where the back end does not say how far it has come,
    /// what it has used is what it has taken.
    fn stop(&mut self, active: &mut Active) -> Result<(), Error> {
        self.channel.begin();
        let mut result = Ok(());
        let memory = active.memory.memory();
        for (index, queue) in active.queues.iter_mut().enumerate() {
            if !active.started[index] {
                continue;
            }
            let asked = match &result {
                Ok(()) => self.stop_queue(index),
                Err(_) => Err(Error::Closed),
            };
            // The ring is in the guest's memory, but its owner is the guest.
            let used = queue.used_idx(&*memory, Ordering::Acquire);
            let used = used.map_or(queue.next_used(), |used| used.0);
            queue.set_next_used(used);
            match asked {
                // QEMU's virtiofsd looks how far it has come before it stops: what it takes
                // in between it would do again, from descriptors that are others' by then.
                Ok(base) if behind(base, used, queue.size()) => queue.set_next_avail(used),
                Ok(base) => queue.set_next_avail(base),
                Err(e) => {
                    queue.set_next_avail(used);
                    result = result.and(Err(e));
                }
            }
        }
        result
    }

    fn stop_queue(&mut self, index: usize) -> Result<u16, Error> {
        let number = u32::try_from(index).map_err(|_| Error::Request("too many queues"))?;
        let state = [number.to_le_bytes(), [0; 4]].concat();
        let reply: [u8; 8] = self.channel.ask(Request::GetVringBase, &state)?;
        let [a, b, c, d, base @ ..] = reply;
        let base = u16::try_from(u32::from_le_bytes(base));
        match base {
            Ok(base) if u32::from_le_bytes([a, b, c, d]) == number => Ok(base),
            _ => Err(Error::Protocol(Request::GetVringBase.name())),
        }
    }

    fn complain(&mut self, error: &Error) {
        self.log
            .say(format_args!("virtio device {}: {error}", self.id));
    }
}

/// Whether more has been used of a queue than was taken, which cannot be.
fn behind(taken: u16, used: u16, size: u16) -> bool {
    (1..=size).contains(&used.wrapping_sub(taken))
}

/// Whether one region of `mem` holds the whole range.
fn within(mem: &Memory, start: u64, len: u64) -> bool {
    mem.find_region(GuestAddress(start)).is_some_and(|region| {
        let offset = start - region.start_addr().raw_value();
        len <= region.len() - offset
    })
}

impl Device for Frontend {
    fn id(&self) -> u32 {
        self.id
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn watched(&self) -> Vec<(BorrowedFd<'_>, u32)> {
        let calls = self.calls.iter().zip(0..).map(|(fd, n)| (fd.as_fd(), n));
        calls.chain([(self.channel.fd(), SOCKET)]).collect()
    }

    fn external_kicks(&self) -> Option<Vec<BorrowedFd<'_>>> {
        Some(self.kicks.iter().map(|fd| fd.as_fd()).collect())
    }

    fn maps_memory(&self) -> bool {
        true
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        let mut active = Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
            started: vec![false; activation.queues.len()],
            queues: activation.queues,
        };
        let result = self.start(&mut active, activation.features);
        self.active = Some(active);
        result.map_err(|e| {
            self.complain(&e);
            Broken
        })
    }

    fn event(&mut self, event: Event) -> Result<(), Broken> {
        match event {
            // Only after an activation: there may be buffers that were never kicked.
            Event::Queue(index) => {
                if let Some(kick) = self.kicks.get(index) {
                    // Fails when the counter is full: then it is readable.
                    let _ = kick.write(1);
                }
            }
            Event::Watched(SOCKET) => {
                if !self.channel.alive() {
                    self.complain(&Error::Closed);
                    return Err(Broken);
                }
            }
            Event::Watched(index) => {
                let index = usize::try_from(index).unwrap_or(usize::MAX);
                if index < self.calls.len()
                    && let Some(active) = &self.active
                {
                    active.interrupt.queue(index);
                }
            }
            Event::Deadline | Event::Config => {}
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let Some(mut active) = self.active.take() else {
            return Vec::new();
        };
        if let Err(e) = self.stop(&mut active) {
            self.complain(&e);
        }
        // The driver may wait for an interrupt that was due before a pause. One too
        // many does no harm.
        for index in (0..active.queues.len()).filter(|index| active.started[*index]) {
            active.interrupt.queue(index);
        }
        active.queues
    }
}
