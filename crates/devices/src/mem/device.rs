//! The device: its queue, and the size that is asked for.

use std::{
    fmt::Debug,
    ops::Range,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ids::VIRTIO_ID_MEM,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestAddressSpace};

use super::{
    Blocks, Busy, Error, Region, Saved,
    request::{ANSWER, Answer, REQUEST, Request, State},
    saved,
};
use crate::virtio::{
    Activation, Broken, ConfigSpace, Device, Event, Interrupt, Memory, MemoryCell,
};

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver does not touch what is not
/// plugged, since nothing is there.
const UNPLUGGED_INACCESSIBLE: u32 = 1;
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << UNPLUGGED_INACCESSIBLE;
const QUEUE_SIZE: u16 = 64;
/// Requests served before others have their turn.
const BUDGET: usize = 32;
/// Most descriptors of a request.
const MAX_DESCRIPTORS: usize = 16;
/// Where the configuration space has the plugged and the requested size.
const PLUGGED: usize = 40;
const REQUESTED: usize = 48;
const CONFIG: usize = 56;

/// How much memory the guest is to have plugged. Any thread may say.
#[derive(Debug, Clone)]
pub struct Target {
    region: Region,
    requested: Arc<AtomicU64>,
    plugged: Arc<AtomicU64>,
    config: Arc<ConfigSpace>,
    bell: Arc<EventFd>,
    /// Set before the bell rings, which is never read.
    news: Arc<AtomicBool>,
}

impl Target {
    /// Asks the guest to plug or unplug until it has `bytes`, and lets it not plug
    /// more. It may take its time, and may never unplug all that it is asked for.
    pub fn set(&self, bytes: u64) -> Result<(), Error> {
        if bytes > self.region.size || !bytes.is_multiple_of(self.region.block) {
            return Err(Error::Size {
                wanted: bytes,
                region: self.region,
            });
        }
        self.requested.store(bytes, Ordering::Release);
        self.config.set(REQUESTED, &bytes.to_le_bytes());
        self.news.store(true, Ordering::Release);
        // Fails only when the counter is full: then it has been rung.
        let _ = self.bell.write(1);
        Ok(())
    }

    /// Bytes asked for.
    pub fn requested(&self) -> u64 {
        self.requested.load(Ordering::Acquire)
    }

    /// Bytes that the guest has plugged.
    pub fn plugged(&self) -> u64 {
        self.plugged.load(Ordering::Acquire)
    }
}

/// A memory device.
///
/// A reset of the driver's leaves everything plugged: the guest runs on it.
#[derive(Debug)]
pub struct Mem {
    region: Region,
    blocks: Box<dyn Blocks>,
    /// Which blocks are plugged.
    plugged: Vec<bool>,
    target: Target,
    config: Arc<ConfigSpace>,
    active: Option<Active>,
    again: bool,
}

#[derive(Debug)]
struct Active {
    memory: MemoryCell,
    interrupt: Arc<dyn Interrupt>,
    queue: Queue,
    /// The driver is to be interrupted whatever it asked for.
    forced: bool,
}

impl Mem {
    /// A device for `region`, with nothing plugged.
    pub fn new(region: Region, blocks: Box<dyn Blocks>) -> Result<Self, Error> {
        region.check()?;
        let mut bytes = vec![0; CONFIG];
        // Block size, node, address, size, usable size: all of it is usable.
        for (at, word) in [
            (0, region.block),
            (16, region.addr),
            (24, region.size),
            (32, region.size),
        ] {
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        let config = Arc::new(ConfigSpace::new(bytes, 0..0));
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell = EventFd::from_flags(flags).map_err(Error::EventFd)?;
        Ok(Self {
            region,
            blocks,
            plugged: vec![false; region.count()],
            target: Target {
                region,
                requested: Arc::default(),
                plugged: Arc::default(),
                config: Arc::clone(&config),
                bell: Arc::new(bell),
                news: Arc::default(),
            },
            config,
            active: None,
            again: false,
        })
    }

    /// A handle to the size that is asked for, for other threads.
    pub fn target(&self) -> Target {
        self.target.clone()
    }

    fn run(&mut self) -> Result<(), Broken> {
        self.again = false;
        let Some(mut active) = self.active.take() else {
            return Ok(());
        };
        let result = self.serve(&mut active);
        self.active = Some(active);
        self.again = result?;
        Ok(())
    }

    /// Serves requests; true if some are left. Each finds memory as the one before
    /// has left it: it may have taken away what the next lies in.
    fn serve(&mut self, active: &mut Active) -> Result<bool, Broken> {
        if !active.queue.ready() {
            return Ok(false);
        }
        let mut left = true;
        active
            .queue
            .disable_notification(&*active.memory.memory())?;
        for _ in 0..BUDGET {
            let mem = active.memory.memory();
            let mut iter = active.queue.iter(&*mem)?;
            let Some(chain) = iter.next() else {
                if active.queue.enable_notification(&*mem)? {
                    continue;
                }
                left = false;
                break;
            };
            let head = chain.head_index();
            let read = read(chain, &mem);
            drop(mem);
            let written = match read {
                None => 0,
                Some((raw, room)) => {
                    let request = Request::parse(&raw, &self.region);
                    let answer = request.map_or(Answer::Error, |it| self.answer(it));
                    write(&active.memory.memory(), &room, &answer.bytes())
                }
            };
            let mem = active.memory.memory();
            active.queue.add_used(&*mem, head, written)?;
        }
        let mem = active.memory.memory();
        let wanted = active.queue.needs_notification(&*mem)?;
        if std::mem::take(&mut active.forced) || wanted {
            active.interrupt.queue(0);
        }
        Ok(left)
    }

    /// Tells the driver of a new size, if there is one.
    fn tell(&self) {
        if let Some(active) = &self.active
            && self.target.news.swap(false, Ordering::AcqRel)
        {
            active.interrupt.config();
        }
    }

    fn answer(&mut self, request: Request) -> Answer {
        match request {
            Request::State(blocks) => Answer::State(match self.count(&blocks) {
                0 => State::Unplugged,
                n if n == blocks.len() => State::Plugged,
                _ => State::Mixed,
            }),
            Request::Plug(blocks) if self.count(&blocks) > 0 => Answer::Error,
            Request::Plug(blocks) => {
                let addresses = self.region.addresses(&blocks);
                let more = addresses.end - addresses.start;
                if self.target.plugged() + more > self.target.requested() {
                    return Answer::Nack;
                }
                match self.blocks.plug(addresses) {
                    Ok(()) => self.mark(blocks, true),
                    Err(Busy) => Answer::Busy,
                }
            }
            Request::Unplug(blocks) if self.count(&blocks) < blocks.len() => Answer::Error,
            Request::Unplug(blocks) => self.unplug(blocks),
            Request::UnplugAll => {
                for blocks in saved::runs(&self.plugged) {
                    if self.unplug(blocks) == Answer::Busy {
                        return Answer::Busy;
                    }
                }
                Answer::Ack
            }
        }
    }

    fn unplug(&mut self, blocks: Range<usize>) -> Answer {
        match self.blocks.unplug(self.region.addresses(&blocks)) {
            Ok(()) => self.mark(blocks, false),
            Err(Busy) => Answer::Busy,
        }
    }

    /// How many of these blocks are plugged.
    fn count(&self, blocks: &Range<usize>) -> usize {
        let some = self.plugged.get(blocks.clone()).unwrap_or_default();
        some.iter().filter(|plugged| **plugged).count()
    }

    /// Notes blocks that were all in the other state.
    fn mark(&mut self, blocks: Range<usize>, plugged: bool) -> Answer {
        let addresses = self.region.addresses(&blocks);
        let bytes = addresses.end - addresses.start;
        if let Some(some) = self.plugged.get_mut(blocks) {
            some.fill(plugged);
        }
        let now = if plugged {
            self.target.plugged() + bytes
        } else {
            self.target.plugged() - bytes
        };
        self.target.plugged.store(now, Ordering::Release);
        self.config.set(PLUGGED, &now.to_le_bytes());
        Answer::Ack
    }
}

/// Where an answer goes.
type Room = Vec<(GuestAddress, usize)>;

/// Copies a request, and finds the room for its answer; `None` if the chain does
/// not hold both.
fn read(chain: DescriptorChain<&Memory>, mem: &Memory) -> Option<([u8; REQUEST], Room)> {
    let mut raw = [0; REQUEST];
    let (mut have, mut left, mut room) = (0, ANSWER, Vec::new());
    for (n, desc) in chain.enumerate() {
        if n == MAX_DESCRIPTORS {
            return None;
        }
        let len = usize::try_from(desc.len()).ok()?;
        if desc.is_write_only() {
            let part = len.min(left);
            room.push((desc.addr(), part));
            left -= part;
        } else {
            let into = raw.get_mut(have..)?;
            let part = len.min(into.len());
            mem.read_slice(into.get_mut(..part)?, desc.addr()).ok()?;
            have += part;
        }
    }
    (have == REQUEST && left == 0).then_some((raw, room))
}

/// How many bytes of the answer were written: all, or those before a hole.
fn write(mem: &Memory, room: &Room, answer: &[u8; ANSWER]) -> u32 {
    let mut done = 0;
    for (addr, len) in room {
        let part = answer.get(done..done + len).unwrap_or_default();
        // Addresses must not wrap: the write would go on at zero.
        let end = addr.checked_add(u64::try_from(*len).unwrap_or(u64::MAX));
        if end.is_none() || mem.write_slice(part, *addr).is_err() {
            break;
        }
        done += len;
    }
    u32::try_from(done).unwrap_or(0)
}

impl Device for Mem {
    fn id(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn watched(&self) -> Vec<(BorrowedFd<'_>, u32)> {
        vec![(self.target.bell.as_fd(), 0)]
    }

    /// A driver that would touch what is not plugged is refused (§5.15.3.2).
    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        let features = activation.features;
        let mut queue = activation.queues.into_iter().next().ok_or(Broken)?;
        queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
            forced: queue.ready(),
            queue,
        });
        if features & 1 << UNPLUGGED_INACCESSIBLE == 0 {
            return Err(Broken);
        }
        // The size may have changed during a pause.
        self.tell();
        Ok(())
    }

    fn event(&mut self, event: Event) -> Result<(), Broken> {
        match event {
            Event::Queue(_) | Event::Deadline => self.run(),
            Event::Watched(_) => {
                self.tell();
                Ok(())
            }
            Event::Config => Ok(()),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.again.then(Instant::now)
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.again = false;
        self.active.take().map(|it| it.queue).into_iter().collect()
    }

    fn save(&self) -> Vec<u8> {
        let saved = Saved {
            region: self.region,
            requested: self.target.requested(),
            plugged: self.plugged.clone(),
        };
        saved.bytes()
    }

    /// Plugs what was plugged; what is in it is the affair of who owns memory.
    fn restore(&mut self, state: &[u8]) -> Result<(), Broken> {
        let saved = Saved::parse(state).ok_or(Broken)?;
        if saved.region != self.region || self.target.plugged() != 0 {
            return Err(Broken);
        }
        self.target.set(saved.requested).map_err(|_| Broken)?;
        let runs = saved.runs();
        let addresses: Vec<_> = runs
            .iter()
            .map(|blocks| self.region.addresses(blocks))
            .collect();
        self.blocks.plug_all(&addresses).map_err(|Busy| Broken)?;
        for blocks in runs {
            self.mark(blocks, true);
        }
        Ok(())
    }
}
