//! Slots of the PCI bus, from which functions come and go while processors access
//! them.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use walnut_devices::{
    pci::{Doorbells, Message, Messages, Root, RootError, VirtioPci},
    virtio::{Activation, Broken, ConfigSpace, Device, Event, MemoryCell, Port, Worker},
};

const ECAM: u64 = 0xe000_0000;
const WINDOW: std::ops::Range<u64> = 0x8_0000_0000..0x8_1000_0000;
const EMPTY: u32 = 0xffff_ffff;
const ENTROPY: u32 = 0x1044_1af4;

/// Takes buffers and keeps them.
#[derive(Debug)]
struct Sink {
    config: Arc<ConfigSpace>,
    active: Option<Activation>,
}

impl Device for Sink {
    fn id(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        1 << 32
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        self.active = Some(activation);
        Ok(())
    }

    fn event(&mut self, _: Event) -> Result<(), Broken> {
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.active.take().map(|a| a.queues).unwrap_or_default()
    }
}

/// The messages of a function that must be dropped by who took it out.
#[derive(Debug)]
struct Owned {
    thread: std::thread::ThreadId,
    dropped: Arc<AtomicUsize>,
}

impl Messages for Owned {
    fn route(&self, _: usize, _: Option<Message>) {}
    fn send(&self, _: usize) {}
}

impl Drop for Owned {
    fn drop(&mut self) {
        assert_eq!(std::thread::current().id(), self.thread);
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Debug, Clone, Default)]
struct Bells(Arc<Mutex<Vec<Option<u64>>>>);

impl Doorbells for Bells {
    fn moved(&self, first: Option<u64>) {
        self.0.lock().unwrap().push(first);
    }
}

struct Bus {
    root: Arc<Root>,
    memory: MemoryCell,
    bells: Bells,
    dropped: Arc<AtomicUsize>,
}

/// A device, whose thread gives its worker back.
struct Served {
    slot: u8,
    port: Port,
    thread: JoinHandle<Worker>,
}

impl Bus {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        Self {
            root: Arc::new(Root::new(ECAM, WINDOW)),
            memory: MemoryCell::new(memory),
            bells: Bells::default(),
            dropped: Arc::default(),
        }
    }

    fn place(&self, running: bool) -> Result<Served, RootError> {
        let config = Arc::new(ConfigSpace::new([1, 2, 3, 4], 0..0));
        let device = Box::new(Sink {
            config,
            active: None,
        });
        let (mut worker, port) = Worker::new(device).unwrap();
        let messages = Arc::new(Owned {
            thread: std::thread::current().id(),
            dropped: Arc::clone(&self.dropped),
        });
        let bells = Box::new(self.bells.clone());
        let slot = match running {
            true => self
                .root
                .plug(port.clone(), self.memory.clone(), messages, bells),
            false => self
                .root
                .add(port.clone(), self.memory.clone(), messages, bells),
        }?;
        let thread = std::thread::spawn(move || {
            worker.serve().unwrap();
            worker
        });
        Ok(Served { slot, port, thread })
    }

    /// As a hypervisor does it.
    fn take_apart(&self, served: Served, function: Box<VirtioPci>) {
        assert!(function.port().same(&served.port));
        function.unplug();
        served.port.stop();
        let worker = served.thread.join().unwrap();
        assert!(served.port.ended());
        let before = self.dropped.load(Ordering::SeqCst);
        drop(worker);
        drop(function);
        assert_eq!(self.dropped.load(Ordering::SeqCst), before + 1);
    }

    fn read(&self, address: u64) -> u32 {
        let mut bytes = [0; 4];
        self.root.read(address, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&self, address: u64, value: u32) {
        self.root.write(address, &value.to_le_bytes());
    }
}

fn config(slot: u8) -> u64 {
    ECAM + (u64::from(slot) << 15)
}

#[test]
fn a_function_comes_without_a_place_and_goes_without_a_trace() {
    let bus = Bus::new();
    let booted = bus.place(false).unwrap();
    let came = bus.place(true).unwrap();
    assert_eq!((booted.slot, came.slot), (1, 2));
    assert_eq!(bus.bells.0.lock().unwrap().len(), 1);
    // The guest finds it, places its BAR, and lets it be decoded.
    let at = config(2);
    assert_eq!(bus.read(at), ENTROPY);
    assert_eq!(bus.read(at + 0x04) & 0xffff, 0, "nothing is decoded");
    assert_eq!((bus.read(at + 0x10), bus.read(at + 0x14)), (4, 0));
    let bar = 0xd000_0000;
    bus.write(at + 0x10, 0xd000_0000);
    assert_eq!(bus.read(bar), EMPTY);
    bus.write(at + 0x04, 0x6);
    assert_eq!(bus.read(bar), 0, "device_feature_select");
    assert_eq!(
        bus.bells.0.lock().unwrap().last(),
        Some(&Some(bar + 0x3000))
    );

    let function = bus.root.remove(2).unwrap();
    assert_eq!((bus.read(at), bus.read(bar)), (EMPTY, EMPTY));
    bus.write(at + 0x04, 0);
    bus.write(bar + 0x14, 1);
    assert!(bus.root.remove(2).is_none(), "twice");
    bus.take_apart(came, function);
    assert_eq!(bus.bells.0.lock().unwrap().last(), Some(&None));
    // The bridge stays, and there is no slot 32.
    for slot in [0, 32, 255] {
        assert!(bus.root.remove(slot).is_none());
    }
    assert_eq!(bus.read(ECAM), 0x0008_1b36);
    assert_eq!(bus.read(config(1)), ENTROPY);
    // The next takes the slot, and knows nothing of the last.
    let next = bus.place(true).unwrap();
    assert_eq!(next.slot, 2);
    assert_eq!((bus.read(at + 0x10), bus.read(bar)), (4, EMPTY));
    for served in [booted, next] {
        let function = bus.root.remove(served.slot).unwrap();
        bus.take_apart(served, function);
    }
}

#[test]
fn a_full_bus_has_room_where_one_has_gone() {
    let bus = Bus::new();
    let mut all: Vec<_> = (1..32).map(|_| bus.place(true).unwrap()).collect();
    assert!(matches!(bus.place(true), Err(RootError::Full)));
    assert!(matches!(bus.place(false), Err(RootError::Full)));
    bus.dropped.store(0, Ordering::SeqCst);
    let seventh = all.remove(6);
    let function = bus.root.remove(7).unwrap();
    bus.take_apart(seventh, function);
    all.push(bus.place(true).unwrap());
    assert_eq!(all.last().unwrap().slot, 7);
    for served in all {
        let function = bus.root.remove(served.slot).unwrap();
        bus.take_apart(served, function);
    }
    assert_eq!(bus.dropped.load(Ordering::SeqCst), 32);
}

#[test]
fn who_takes_a_function_out_has_it_alone() {
    let bus = Arc::new(Bus::new());
    let done = Arc::new(AtomicBool::new(false));
    let guests: Vec<_> = (1u64..4)
        .map(|seed| {
            let (bus, done) = (Arc::clone(&bus), Arc::clone(&done));
            std::thread::spawn(move || {
                let mut noise = seed;
                let mut next = || {
                    noise ^= noise << 13;
                    noise ^= noise >> 7;
                    noise ^= noise << 17;
                    noise
                };
                while !done.load(Ordering::Relaxed) {
                    let slot = u8::try_from(1 + next() % 3).unwrap();
                    let bar = 0xd000_0000 + 0x8000 * u64::from(slot);
                    bus.write(config(slot) + 0x10, u32::try_from(bar).unwrap());
                    bus.write(config(slot) + 0x04, 0x6);
                    let at = (next() % 0x6000) & !3;
                    let value = u32::try_from(next() & 0xffff_ffff).unwrap();
                    bus.write(bar + at, value);
                    bus.read(bar + next() % 0x6000);
                    // A driver's steps, now and then to the end.
                    for status in [0, 1, 3, 0xb, 0xf] {
                        bus.root.write(bar + 0x14, &[status]);
                        bus.root.write(bar + 0x08, &1u32.to_le_bytes());
                        bus.root.write(bar + 0x0c, &1u32.to_le_bytes());
                    }
                    bus.read(config(slot) + next() % 4096);
                }
            })
        })
        .collect();
    for _ in 0..200 {
        let all: Vec<_> = (0..3).map(|_| bus.place(true).unwrap()).collect();
        std::thread::yield_now();
        for served in all {
            let function = bus.root.remove(served.slot).unwrap();
            bus.take_apart(served, function);
        }
    }
    done.store(true, Ordering::Relaxed);
    for guest in guests {
        guest.join().unwrap();
    }
    assert_eq!(bus.dropped.load(Ordering::SeqCst), 600);
}
