//! A device on its worker's thread, and a driver by hand: split rings in guest
//! memory that do what they are told, be it right or wrong.

#![allow(dead_code, reason = "every test program uses its part")]

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{Ordering, fence},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use walnut_devices::virtio::*;

/// How long a test waits for a condition before it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How long a pause may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// What the device has told its driver.
#[derive(Debug, Default, Clone)]
pub(crate) struct Told {
    pub(crate) queues: [u32; 8],
    pub(crate) config: u32,
    pub(crate) broken: bool,
}

/// The interrupt controller.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    told: Mutex<Told>,
    rung: Condvar,
}

impl Bell {
    pub(crate) fn told(&self) -> Told {
        self.told.lock().unwrap().clone()
    }

    fn tell(&self, change: impl FnOnce(&mut Told)) {
        change(&mut self.told.lock().unwrap());
        self.rung.notify_all();
    }
}

impl Interrupt for Bell {
    fn queue(&self, index: usize) {
        self.tell(|told| told.queues[index] += 1);
    }

    fn config(&self) {
        self.tell(|told| told.config += 1);
    }

    fn needs_reset(&self) {
        self.tell(|told| told.broken = true);
    }
}

/// A device on its thread.
pub(crate) struct Rig {
    pub(crate) port: Port,
    pub(crate) bell: Arc<Bell>,
    pub(crate) memory: MemoryCell,
    thread: Option<JoinHandle<()>>,
}

impl Rig {
    pub(crate) fn new(device: impl Device + 'static, memory: Memory) -> Rig {
        let (worker, port) = Worker::new(Box::new(device)).unwrap();
        Rig {
            port,
            bell: Arc::default(),
            memory: MemoryCell::new(memory),
            thread: Some(std::thread::spawn(move || worker.run().unwrap())),
        }
    }

    /// The driver is ready. Queues that are `None` it has left out.
    pub(crate) fn activate(&self, features: u64, rings: &[Option<&Vring>]) {
        let queues = rings
            .iter()
            .zip(self.port.queue_sizes())
            .map(|(ring, max)| match ring {
                Some(ring) => ring.queue(*max, features & 1 << 29 != 0),
                None => Queue::new(*max).unwrap(),
            })
            .collect();
        self.activate_with(features, queues);
    }

    pub(crate) fn activate_with(&self, features: u64, queues: Vec<Queue>) {
        self.port.activate(Activation {
            memory: self.memory.clone(),
            features,
            queues,
            interrupt: self.bell.clone(),
        });
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.port.kick(queue).unwrap().write(1).unwrap();
    }

    /// Resets the device as a driver does, and forgets what it was told.
    pub(crate) fn reset(&self) {
        self.port.reset();
        self.until("reset", || !self.port.resetting());
        *self.bell.told.lock().unwrap() = Told::default();
    }

    /// Waits for the condition; looks again at every interrupt, and sometimes.
    pub(crate) fn until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < PATIENCE, "never: {what}");
            let told = self.bell.told.lock().unwrap();
            let _ = self
                .bell
                .rung
                .wait_timeout(told, Duration::from_millis(2))
                .unwrap();
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.port.stop();
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.expect("the worker panicked");
        }
    }
}

/// One split virtqueue seen from the driver.
#[derive(Debug)]
pub(crate) struct Vring {
    pub(crate) mem: Memory,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    pub(crate) size: u16,
    pub(crate) avail_idx: u16,
    pub(crate) used_idx: u16,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
}

impl Vring {
    /// Takes 16 KiB from `base` on for `size` entries, 256 at most.
    pub(crate) fn new(mem: &Memory, base: u64, size: u16) -> Vring {
        let zero = vec![0; 0x4000];
        mem.write_slice(&zero, GuestAddress(base)).unwrap();
        Vring {
            mem: mem.clone(),
            desc: base,
            avail: base + 0x2000,
            used: base + 0x3000,
            size,
            avail_idx: 0,
            used_idx: 0,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
        }
    }

    /// The queue as a transport would hand it over.
    pub(crate) fn queue(&self, max: u16, event_idx: bool) -> Queue {
        let mut queue = Queue::new(max).unwrap();
        queue.set_size(self.size);
        let (desc, avail, used) = (self.desc, self.avail, self.used);
        queue
            .try_set_desc_table_address(GuestAddress(desc))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(avail))
            .unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue
    }

    pub(crate) fn write_desc(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = self.desc + u64::from(index) * 16;
        self.mem.write_obj(addr, GuestAddress(at)).unwrap();
        self.mem.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.mem.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a chain of buffers (address, length, writable) available; its head.
    pub(crate) fn add(&mut self, chain: &[(u64, u32, bool)]) -> u16 {
        let at = self.free.len() - chain.len();
        let indices = self.free.split_off(at);
        for (n, (addr, len, writable)) in chain.iter().enumerate() {
            let next = indices.get(n + 1);
            let flags = u16::from(next.is_some()) * NEXT + u16::from(*writable) * WRITE;
            self.write_desc(indices[n], *addr, *len, flags, next.copied().unwrap_or(0));
        }
        let head = indices[0];
        self.chains[usize::from(head)] = indices;
        self.publish(head);
        head
    }

    /// Makes a head available, whatever it is.
    pub(crate) fn publish(&mut self, head: u16) {
        let slot = self.avail + 4 + u64::from(self.avail_idx % self.size) * 2;
        self.mem.write_obj(head, GuestAddress(slot)).unwrap();
        fence(Ordering::SeqCst);
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
        self.want_interrupt();
    }

    pub(crate) fn set_avail_idx(&mut self, idx: u16) {
        self.avail_idx = idx;
        let at = GuestAddress(self.avail + 2);
        self.mem.store(idx, at, Ordering::Release).unwrap();
    }

    /// With EVENT_IDX: interrupt at the very next use.
    fn want_interrupt(&self) {
        let at = GuestAddress(self.avail + 4 + u64::from(self.size) * 2);
        self.mem
            .store(self.used_idx, at, Ordering::Release)
            .unwrap();
    }

    /// Whether the device asked to be kicked for the last chain.
    pub(crate) fn kick_wanted(&self) -> bool {
        fence(Ordering::SeqCst);
        let at = GuestAddress(self.used + 4 + u64::from(self.size) * 8);
        let event: u16 = self.mem.load(at, Ordering::Acquire).unwrap();
        event == self.avail_idx.wrapping_sub(1)
    }

    /// The next chain that the device has used: its head, and bytes written.
    pub(crate) fn pop_used(&mut self) -> Option<(u16, u32)> {
        let at = GuestAddress(self.used + 2);
        let idx: u16 = self.mem.load(at, Ordering::Acquire).unwrap();
        if idx == self.used_idx {
            return None;
        }
        let slot = self.used + 4 + u64::from(self.used_idx % self.size) * 8;
        self.used_idx = self.used_idx.wrapping_add(1);
        self.want_interrupt();
        let head: u32 = self.mem.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.mem.read_obj(GuestAddress(slot + 4)).unwrap();
        let head = u16::try_from(head).unwrap();
        if let Some(chain) = self.chains.get_mut(usize::from(head)) {
            self.free.append(chain);
        }
        Some((head, len))
    }

    /// Descriptors that are not in use.
    pub(crate) fn room(&self) -> usize {
        self.free.len()
    }
}

/// Reproducible noise (xorshift64*).
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::try_from(self.next() >> 48).unwrap()
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::try_from(self.next() >> 32).unwrap()
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }
}

/// Guest memory of `size` bytes that other processes can map, in two regions with
/// a hole between them if `split` says where.
pub(crate) fn shared_memory(size: usize, split: Option<usize>) -> Memory {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use vm_memory::FileOffset;
    let file = memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap();
    let file = Arc::new(std::fs::File::from(file));
    file.set_len(size as u64).unwrap();
    let part = |at: u64, offset: usize, len: usize| {
        let file = FileOffset::from_arc(file.clone(), offset as u64);
        (GuestAddress(at), len, Some(file))
    };
    let regions = match split {
        None => vec![part(0, 0, size)],
        Some(at) => vec![part(0, 0, at), part(1 << 32, at, size - at)],
    };
    Memory::from_ranges_with_files(regions).unwrap()
}
