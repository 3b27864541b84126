//! The PCI bus and virtio's transport on it, as a driver sees them: Linux's own
//! sequence, every register in every state, and noise.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use walnut_devices::{
    pci::{Doorbells, Message, Messages, Root},
    virtio::{Activation, Broken, ConfigSpace, Device, Event, Memory, MemoryCell, Port, Worker},
};

const ECAM: u64 = 0xe000_0000;
const WINDOW: std::ops::Range<u64> = 0x8_0000_0000..0x8_1000_0000;
const VERSION_1: u64 = 1 << 32;
const FEATURES: u64 = VERSION_1 | 1 << 29 | 1 << 5;
const QUEUES: usize = 2;
const QUEUE_SIZE: u16 = 16;
/// Registers of the common configuration (virtio 1.3 §4.1.4.3), with their widths.
const REGISTERS: [(u64, usize); 21] = [
    (0x00, 4),
    (0x04, 4),
    (0x08, 4),
    (0x0c, 4),
    (0x10, 2),
    (0x12, 2),
    (0x14, 1),
    (0x15, 1),
    (0x16, 2),
    (0x18, 2),
    (0x1a, 2),
    (0x1c, 2),
    (0x1e, 2),
    (0x20, 4),
    (0x24, 4),
    (0x28, 4),
    (0x2c, 4),
    (0x30, 4),
    (0x34, 4),
    (0x38, 2),
    (0x3a, 2),
];
const STATUS: u64 = 0x14;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;

/// Returns every buffer, and interrupts for it.
#[derive(Debug)]
struct Echo {
    config: Arc<ConfigSpace>,
    active: Option<Activation>,
    returned: Arc<AtomicUsize>,
    hurdle: Arc<Hurdle>,
}

/// Where a device breaks on its way into service, when a test says so.
#[derive(Debug, Default)]
struct Hurdle {
    there: AtomicBool,
    reached: AtomicBool,
    held: Mutex<()>,
}

impl Device for Echo {
    fn id(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        self.active = Some(activation);
        if self.hurdle.there.load(Ordering::SeqCst) {
            self.hurdle.reached.store(true, Ordering::SeqCst);
            drop(self.hurdle.held.lock().unwrap());
            return Err(Broken);
        }
        Ok(())
    }

    fn event(&mut self, event: Event) -> Result<(), Broken> {
        let (Event::Queue(index), Some(active)) = (event, &mut self.active) else {
            return Ok(());
        };
        let memory: Memory = (*active.memory.memory()).clone();
        let queue = active.queues.get_mut(index).ok_or(Broken)?;
        if !queue.ready() {
            return Ok(());
        }
        let mut any = false;
        while let Some(chain) = queue.iter(&memory)?.next() {
            queue.add_used(&memory, chain.head_index(), 0)?;
            self.returned.fetch_add(1, Ordering::SeqCst);
            any = true;
        }
        if any {
            active.interrupt.queue(index);
        }
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.active.take().map(|a| a.queues).unwrap_or_default()
    }
}

/// What the hypervisor heard.
#[derive(Debug, Default)]
struct Heard {
    routes: Mutex<[Option<Message>; QUEUES + 1]>,
    sent: Mutex<Vec<usize>>,
}

impl Messages for Heard {
    fn route(&self, vector: usize, message: Option<Message>) {
        self.routes.lock().unwrap()[vector] = message;
    }

    fn send(&self, vector: usize) {
        self.sent.lock().unwrap().push(vector);
    }
}

#[derive(Debug, Clone, Default)]
struct Bells(Arc<Mutex<Vec<Option<u64>>>>);

impl Doorbells for Bells {
    fn moved(&self, first: Option<u64>) {
        self.0.lock().unwrap().push(first);
    }
}

/// A bus with one device, and what is seen of it.
struct Host {
    root: Arc<Root>,
    port: Port,
    memory: MemoryCell,
    heard: Arc<Heard>,
    bells: Bells,
    returned: Arc<AtomicUsize>,
    hurdle: Arc<Hurdle>,
    thread: Option<JoinHandle<()>>,
    bar: u64,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.port.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Host {
    fn new() -> Self {
        let returned = Arc::new(AtomicUsize::new(0));
        let hurdle = Arc::<Hurdle>::default();
        let device = Echo {
            config: Arc::new(ConfigSpace::new([1, 2, 3, 4, 5, 6, 7, 8], 4..8)),
            active: None,
            returned: Arc::clone(&returned),
            hurdle: Arc::clone(&hurdle),
        };
        let (worker, port) = Worker::new(Box::new(device)).unwrap();
        let thread = std::thread::spawn(move || worker.run().unwrap());
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let memory = MemoryCell::new(memory);
        let (heard, bells) = (Arc::<Heard>::default(), Bells::default());
        let root = Root::new(ECAM, WINDOW);
        let messages: Arc<dyn Messages> = heard.clone();
        root.add(
            port.clone(),
            memory.clone(),
            messages,
            Box::new(bells.clone()),
        )
        .unwrap();
        let mut host = Self {
            root: Arc::new(root),
            port,
            memory,
            heard,
            bells,
            returned,
            hurdle,
            thread: Some(thread),
            bar: 0,
        };
        host.bar = host.config(0x10, 4) & !0xf | host.config(0x14, 4) << 32;
        host
    }

    fn read(&self, address: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.root.read(address, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    fn write(&self, address: u64, len: usize, value: u64) {
        self.root.write(address, &value.to_le_bytes()[..len]);
    }

    /// Of the device's configuration space, in slot 1.
    fn config(&self, at: u64, len: usize) -> u64 {
        self.read(ECAM + (1 << 15) + at, len)
    }

    fn set_config(&self, at: u64, len: usize, value: u64) {
        self.write(ECAM + (1 << 15) + at, len, value);
    }

    fn get(&self, at: u64, len: usize) -> u64 {
        self.read(self.bar + at, len)
    }

    fn set(&self, at: u64, len: usize, value: u64) {
        self.write(self.bar + at, len, value);
    }

    /// The offset of capability `id`, the `nth` of its kind.
    fn capability(&self, id: u64, nth: usize) -> u64 {
        let mut at = self.config(0x34, 1);
        let mut left = nth;
        while at != 0 {
            if self.config(at, 1) == id {
                if left == 0 {
                    return at;
                }
                left -= 1;
            }
            at = self.config(at + 1, 1);
        }
        panic!("no capability {id} number {nth}");
    }

    fn enable_msix(&self) {
        for vector in 0..=QUEUES as u64 {
            self.set(TABLE + 16 * vector, 4, 0xfee0_0000);
            self.set(TABLE + 16 * vector + 8, 4, 0x20 + vector);
            self.set(TABLE + 16 * vector + 12, 4, 0);
        }
        let at = self.capability(0x11, 0);
        self.set_config(at + 2, 2, self.config(at + 2, 2) | 0x8000);
    }

    fn reset(&self) {
        self.set(STATUS, 1, 0);
        until("the reset is acknowledged", || self.get(STATUS, 1) == 0);
    }

    /// Up to `FEATURES_OK`.
    fn agree(&self) {
        self.reset();
        self.set(STATUS, 1, 1);
        self.set(STATUS, 1, 3);
        for half in 0..2 {
            self.set(0x08, 4, half);
            self.set(0x0c, 4, FEATURES >> (32 * half) & 0xffff_ffff);
        }
        self.set(STATUS, 1, 0xb);
        assert_eq!(self.get(STATUS, 1), 0xb);
    }

    fn set_up_queue(&self, index: u64) {
        let base = 0x1_0000 * (index + 1);
        self.set(0x16, 2, index);
        for (at, address) in [(0x20, base), (0x28, base + 0x1000), (0x30, base + 0x2000)] {
            self.set(at, 4, address);
            self.set(at + 4, 4, 0);
        }
        self.set(0x1a, 2, index + 1);
        self.set(0x1c, 2, 1);
        assert_eq!(self.get(0x1c, 2), 1);
    }

    /// A running driver with both queues.
    fn run(&self) {
        self.enable_msix();
        self.agree();
        self.set(0x10, 2, 0);
        for index in 0..QUEUES as u64 {
            self.set_up_queue(index);
        }
        self.set(STATUS, 1, 0xf);
    }

    /// Offers one buffer in queue `index` and kicks.
    fn offer(&self, index: u64, turn: u16) {
        let memory = self.memory.memory();
        let base = 0x1_0000 * (index + 1);
        let descriptor = [0u64, 8 | 2 << 32].map(u64::to_le_bytes).concat();
        memory.write_slice(&descriptor, GuestAddress(base)).unwrap();
        let ring = GuestAddress(base + 0x1000 + 4 + 2 * u64::from(turn % QUEUE_SIZE));
        memory.write_obj(0u16, ring).unwrap();
        let at = GuestAddress(base + 0x1000 + 2);
        memory.write_obj(turn + 1, at).unwrap();
        self.set(NOTIFY + 4 * index, 2, index);
    }
}

#[test]
fn it_is_found_as_linux_looks_for_it() {
    let host = Host::new();
    // The bridge, the device, nothing else.
    assert_eq!(host.read(ECAM, 4), 0x0008_1b36);
    assert_eq!(host.config(0, 4), 0x1044_1af4);
    assert_eq!(host.read(ECAM + (2 << 15), 4), 0xffff_ffff);
    assert_eq!(host.read(ECAM + (1 << 15) + 4096, 4), 0xffff_ffff);
    assert_eq!(host.config(0x06, 2) & 0x10, 0x10);
    // Where which structure is: common, ISR, device, notify.
    for (nth, kind, at) in [(0, 1, 0), (1, 3, ISR), (2, 4, DEVICE), (3, 2, NOTIFY)] {
        let cap = host.capability(0x09, nth);
        assert_eq!(host.config(cap + 3, 1), kind);
        assert_eq!(host.config(cap + 4, 1), 0, "BAR 0");
        assert_eq!(host.config(cap + 8, 4), at);
    }
    let cap = host.capability(0x09, 3);
    assert_eq!(host.config(cap + 16, 4), 4, "bytes between doorbells");
    let cap = host.capability(0x11, 0);
    assert_eq!(host.config(cap + 2, 2), QUEUES as u64);
    assert_eq!(host.config(cap + 4, 4), TABLE);
    assert_eq!(host.config(cap + 8, 4), PENDING);
    // The device's own configuration, of which the second half is writable.
    assert_eq!(host.get(DEVICE, 8), 0x0807_0605_0403_0201);
    host.set(DEVICE, 8, u64::MAX);
    assert_eq!(host.get(DEVICE, 8), 0xffff_ffff_0403_0201);
}

#[test]
fn a_bar_is_sized_moved_and_switched_off() {
    let host = Host::new();
    let bar = host.bar;
    assert!(WINDOW.contains(&bar) && bar.is_multiple_of(0x8000));
    // As pci_read_bases does.
    host.set_config(0x04, 2, 0);
    host.set_config(0x10, 4, 0xffff_ffff);
    host.set_config(0x14, 4, 0xffff_ffff);
    assert_eq!(host.config(0x10, 4), 0xffff_8004);
    assert_eq!(host.config(0x14, 4), 0xffff_ffff);
    assert_eq!(host.get(0x12, 2), 0xffff, "not decoded");
    let new = bar + 0x10_0000;
    host.set_config(0x10, 4, new & 0xffff_ffff);
    host.set_config(0x14, 4, new >> 32);
    host.set_config(0x04, 2, 2);
    assert_eq!(host.get(0x12, 2), 0xffff, "no longer here");
    assert_eq!(host.read(new + 0x12, 2), QUEUES as u64);
    let moves = host.bells.0.lock().unwrap().clone();
    assert_eq!(moves, [Some(bar + NOTIFY), None, Some(new + NOTIFY)]);
    // At the end of the address space there is no room for it.
    host.set_config(0x10, 4, 0xffff_ffff);
    host.set_config(0x14, 4, 0xffff_ffff);
    host.read(u64::MAX, 8);
    host.write(u64::MAX - 3, 8, 0);
}

#[test]
fn a_driver_runs_and_begins_anew() {
    let host = Host::new();
    for round in 1..=3 {
        host.heard.sent.lock().unwrap().clear();
        host.memory
            .memory()
            .write_slice(&[0; 0x4_0000], GuestAddress(0x1_0000))
            .unwrap();
        host.run();
        let before = host.returned.load(Ordering::SeqCst);
        for index in 0..QUEUES as u64 {
            for turn in 0..20 {
                host.offer(index, turn);
                let returned =
                    before + usize::try_from(index).unwrap() * 20 + usize::from(turn) + 1;
                until("it is returned", || {
                    host.returned.load(Ordering::SeqCst) == returned
                });
            }
        }
        until("both queues interrupt", || {
            let sent = host.heard.sent.lock().unwrap();
            sent.contains(&1) && sent.contains(&2)
        });
        assert_eq!(host.get(ISR, 1), 1, "round {round}");
        assert_eq!(host.get(ISR, 1), 0, "read once");
        host.reset();
        host.set(0x16, 2, 0);
        assert_eq!(host.get(0x1c, 2), 0);
        assert_eq!(host.get(0x20, 4), 0);
        assert_eq!(host.get(0x18, 2), u64::from(QUEUE_SIZE));
        assert_eq!(host.get(0x1a, 2), 0xffff);
        assert_eq!(host.get(0x10, 2), 0xffff);
    }
}

#[test]
fn features_that_were_not_offered_are_not_agreed_on() {
    let host = Host::new();
    for (features, agreed) in [
        (FEATURES, true),
        (VERSION_1, true),
        (FEATURES & !VERSION_1, false),
        (FEATURES | 1, false),
        (FEATURES | 1 << 63, false),
        (0, false),
    ] {
        host.reset();
        host.set(STATUS, 1, 1);
        host.set(STATUS, 1, 3);
        for half in 0..2 {
            host.set(0x08, 4, half);
            host.set(0x0c, 4, features >> (32 * half) & 0xffff_ffff);
        }
        host.set(STATUS, 1, 0xb);
        assert_eq!(host.get(STATUS, 1) == 0xb, agreed, "{features:#x}");
        // Too late.
        host.set(0x08, 4, 0);
        host.set(0x0c, 4, 0x1234_5678);
        let word = host.get(0x0c, 4);
        assert_eq!(word == 0x1234_5678, !agreed, "{features:#x}");
    }
}

#[test]
fn a_status_has_to_be_reached_step_by_step() {
    let host = Host::new();
    for status in 1..=255u64 {
        host.reset();
        host.set(STATUS, 1, status);
        let expected = match status & !0x40 & !0x80 {
            1 | 3 => status & !0x40,
            // Acknowledged, and the features were not: no features, no VERSION_1.
            0xb | 0xf => status & !0x40 & !0x8 & !0x4,
            0 => status & 0x80,
            _ => 0,
        };
        assert_eq!(host.get(STATUS, 1), expected, "{status:#x}");
    }
    // Bits are never taken back but by a reset.
    host.agree();
    for status in [1, 3, 8, 9] {
        host.set(STATUS, 1, status);
        assert_eq!(host.get(STATUS, 1), 0xb);
    }
}

/// CVE-2026-5747 and its kind: rings that move under a device that runs.
#[test]
fn ring_registers_change_only_when_they_may() {
    let host = Host::new();
    let rings = |host: &Host| -> Vec<u64> {
        (0..QUEUES as u64)
            .flat_map(|index| {
                host.set(0x16, 2, index);
                [(0x18, 2), (0x1c, 2), (0x20, 8), (0x28, 8), (0x30, 8)]
                    .map(|(at, len)| host.get(at, len))
            })
            .collect()
    };
    let write_all = |host: &Host| {
        for select in [0, 1, 2, 0xffff] {
            host.set(0x16, 2, select);
            for (at, _) in REGISTERS
                .into_iter()
                .filter(|(at, _)| (0x18..0x38).contains(at))
            {
                for len in 1..=8 {
                    for value in [0, 1, 8, 0x4141_4141_4141_4141, u64::MAX] {
                        // The vector is not the ring's.
                        if at != 0x1a {
                            host.set(at, len, value);
                        }
                    }
                }
            }
        }
    };
    // Before the features are agreed on.
    for status in [0, 1, 3, 0x81, 0x83] {
        host.reset();
        host.set(STATUS, 1, status & 1);
        host.set(STATUS, 1, status);
        let before = rings(&host);
        write_all(&host);
        assert_eq!(rings(&host), before, "status {status:#x}");
    }
    // While a queue is enabled, and while the device runs.
    for status in [0xb, 0xf, 0x8b, 0x8f] {
        host.agree();
        for index in 0..QUEUES as u64 {
            host.set_up_queue(index);
        }
        host.set(STATUS, 1, status);
        let before = rings(&host);
        write_all(&host);
        assert_eq!(rings(&host), before, "status {status:#x}");
    }
}

#[test]
fn odd_sizes_of_queues_are_not_taken() {
    let host = Host::new();
    host.agree();
    for size in (0..=40).chain([0x8000, 0xffff]) {
        host.set(0x18, 2, u64::from(QUEUE_SIZE));
        host.set(0x18, 2, size);
        let taken = size != 0 && size <= u64::from(QUEUE_SIZE) && size.is_power_of_two();
        let expected = if taken { size } else { u64::from(QUEUE_SIZE) };
        assert_eq!(host.get(0x18, 2), expected);
    }
}

#[test]
fn vectors_that_are_not_there_are_none() {
    let host = Host::new();
    for vector in [0, 1, 2, 3, 4, 0x7ff, 0xfffe, 0xffff] {
        let expected = if vector <= QUEUES as u64 {
            vector
        } else {
            0xffff
        };
        host.set(0x10, 2, vector);
        assert_eq!(host.get(0x10, 2), expected);
        host.set(0x16, 2, 1);
        host.set(0x1a, 2, vector);
        assert_eq!(host.get(0x1a, 2), expected);
    }
}

#[test]
fn masked_messages_wait() {
    let host = Host::new();
    host.run();
    let sent = || host.heard.sent.lock().unwrap().clone();
    // The vector's own mask.
    host.set(TABLE + 16 + 12, 4, 1);
    assert_eq!(host.heard.routes.lock().unwrap()[1], None);
    host.offer(0, 0);
    until("it is pending", || host.get(PENDING, 8) == 2);
    assert!(sent().is_empty());
    host.set(TABLE + 16 + 12, 4, 0);
    assert_eq!((sent(), host.get(PENDING, 8)), (vec![1], 0));
    let message = Message {
        address: 0xfee0_0000,
        data: 0x21,
    };
    assert_eq!(host.heard.routes.lock().unwrap()[1], Some(message));
    // The function's.
    let at = host.capability(0x11, 0);
    host.set_config(at + 2, 2, 0xc000);
    host.offer(1, 0);
    until("it is pending", || host.get(PENDING, 8) == 4);
    host.set_config(at + 2, 2, 0x8000);
    assert_eq!((sent(), host.get(PENDING, 8)), (vec![1, 2], 0));
    // Not enabled at all: nothing is sent, nothing waits.
    host.set_config(at + 2, 2, 0);
    host.offer(1, 1);
    until("it is returned", || {
        host.returned.load(Ordering::SeqCst) == 3
    });
    host.set_config(at + 2, 2, 0x8000);
    assert_eq!(sent(), [1, 2]);
}

/// A queue that reaches outside of memory: the device asks to be reset, and works
/// again afterwards.
#[test]
fn a_driver_that_breaks_a_queue_is_told() {
    let host = Host::new();
    host.enable_msix();
    host.agree();
    host.set(0x10, 2, 0);
    host.set_up_queue(0);
    host.set(0x16, 2, 1);
    host.set(0x24, 4, 0xffff_ffff);
    host.set(0x1c, 2, 1);
    host.set(STATUS, 1, 0xf);
    until("it needs a reset", || host.get(STATUS, 1) & 0x40 != 0);
    until("it says so", || {
        host.heard.sent.lock().unwrap().contains(&0)
    });
    assert_eq!(host.get(ISR, 1) & 2, 2);
    host.run();
    host.offer(0, 0);
    until("it works", || host.returned.load(Ordering::SeqCst) == 1);
}

/// The driver begins anew while the device breaks: that it broke is not the new driver's.
#[test]
fn a_reset_while_the_device_breaks_comes_to_its_end() {
    let host = Host::new();
    host.hurdle.there.store(true, Ordering::SeqCst);
    let held = host.hurdle.held.lock().unwrap();
    host.run();
    until("it breaks", || host.hurdle.reached.load(Ordering::SeqCst));
    host.set(STATUS, 1, 0);
    assert_ne!(host.get(STATUS, 1), 0, "it cannot know of the reset yet");
    drop(held);
    until("the reset is acknowledged", || host.get(STATUS, 1) == 0);
    assert_eq!(host.get(ISR, 1), 0);
    host.hurdle.there.store(false, Ordering::SeqCst);
    host.run();
    host.offer(0, 0);
    until("it works", || host.returned.load(Ordering::SeqCst) == 1);
}

/// A generator (SplitMix64), so that a failure can be had again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

#[test]
fn noise_from_two_processors_harms_nothing() {
    let host = Host::new();
    let noise = |seed: u64| {
        let mut random = Random(seed);
        for _ in 0..50_000 {
            let place = random.next();
            let base = match place % 8 {
                0 => ECAM + (place >> 8) % (1 << 20),
                1 => ECAM + (1 << 15) + (place >> 8) % 256,
                2..=4 => host.bar + (place >> 8) % 0x40,
                5 => host.bar + TABLE + (place >> 8) % 0x40,
                6 => host.bar + (place >> 8) % 0x9000,
                _ => random.next(),
            };
            let len = usize::try_from(random.next() % 9).unwrap();
            if place & 0x80 == 0 {
                host.read(base, len);
            } else {
                // Small values reach further than noise.
                let value = random.next() >> (random.next() % 64);
                host.write(base, len, value);
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| noise(1));
        scope.spawn(|| noise(2));
    });
    // It is put back, and works.
    host.set_config(0x10, 4, host.bar & 0xffff_ffff);
    host.set_config(0x14, 4, host.bar >> 32);
    host.set_config(0x04, 2, 2);
    host.memory
        .memory()
        .write_slice(&[0; 0x4_0000], GuestAddress(0x1_0000))
        .unwrap();
    let before = host.returned.load(Ordering::SeqCst);
    host.run();
    host.offer(0, 0);
    until("it works", || host.returned.load(Ordering::SeqCst) > before);
}
