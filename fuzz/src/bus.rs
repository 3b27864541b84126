//! The bus and virtio's transport, with a device on its thread behind it.

use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use vm_memory::{Bytes, GuestAddress};
use walnut_devices::{
    balloon::{self, Balloon},
    block::{self, Block},
    limit::LimitConfig,
    pci::{Doorbells, FunctionState, Message, Messages, Root},
    rng::Rng,
    virtio::{Device, Memory, MemoryCell, Port, Quiesced, Worker},
};

use super::{driver::Input, rig::PATIENCE};

const ECAM: u64 = 0xe000_0000;
const SLOT: u64 = ECAM + (1 << 15);
const BAR: u64 = 0x8_0000_8000;
const WINDOW: std::ops::Range<u64> = 0x8_0000_0000..0x8_1000_0000;
const MEMORY: usize = 0x2_0000;
const RINGS: u64 = 0x1000;
const STATUS: u64 = BAR + 0x14;
const NOTIFY: u64 = BAR + 0x3000;
/// Registers of the common configuration with their widths (virtio 1.3 §4.1.4.3).
const REGISTERS: [(u64, usize); 16] = [
    (0x00, 4),
    (0x08, 4),
    (0x0c, 4),
    (0x10, 2),
    (0x14, 1),
    (0x16, 2),
    (0x18, 2),
    (0x1a, 2),
    (0x1c, 2),
    (0x20, 4),
    (0x24, 4),
    (0x28, 4),
    (0x2c, 4),
    (0x30, 4),
    (0x34, 4),
    (0x20, 8),
];

/// Only what has a route may be sent.
#[derive(Debug, Default)]
struct Routes(Mutex<Vec<Option<Message>>>);

impl Messages for Routes {
    fn route(&self, vector: usize, message: Option<Message>) {
        let mut routes = self.0.lock().unwrap();
        assert!(vector < 64);
        if routes.len() <= vector {
            routes.resize(vector + 1, None);
        }
        routes[vector] = message;
    }

    fn send(&self, vector: usize) {
        let routes = self.0.lock().unwrap();
        assert!(routes[vector].is_some(), "a masked message was sent");
    }
}

#[derive(Debug)]
struct Bells;

impl Doorbells for Bells {
    fn moved(&self, _: Option<u64>) {}
}

struct Bus {
    root: Root,
    port: Port,
    memory: Memory,
    queues: u16,
}

impl Bus {
    fn read(&self, at: u64, len: usize) -> u64 {
        let mut raw = [0; 8];
        self.root.read(at, &mut raw[..len]);
        u64::from_le_bytes(raw)
    }

    fn write(&self, at: u64, len: usize, value: u64) {
        self.root.write(at, &value.to_le_bytes()[..len]);
    }

    fn set(&self, at: u64, len: usize, value: u64) {
        self.write(BAR + at, len, value);
    }

    fn until(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "never: {what}");
            std::thread::yield_now();
        }
    }

    /// Puts the registers where they were.
    fn place(&self) {
        self.write(SLOT + 0x10, 8, BAR);
        self.write(SLOT + 0x04, 2, 2);
    }

    fn reset(&self) {
        self.write(STATUS, 1, 0);
        self.until("reset", |bus| bus.read(STATUS, 1) == 0);
    }

    /// As Linux does it, as far as DRIVER_OK.
    fn set_up(&self) {
        for status in [1, 3] {
            self.write(STATUS, 1, status);
        }
        for half in 0..2 {
            self.set(0x00, 4, half);
            let offered = self.read(BAR + 4, 4);
            self.set(0x08, 4, half);
            self.set(0x0c, 4, offered);
        }
        self.write(STATUS, 1, 11);
        for index in 0..u64::from(self.queues) {
            self.set(0x16, 2, index);
            self.set(0x18, 2, 16);
            let at = RINGS + index * 0x1000;
            for (register, part) in [(0x20, 0), (0x28, 0x400), (0x30, 0x800)] {
                self.set(register, 4, at + part);
                self.set(register + 4, 4, 0);
            }
            self.set(0x1c, 2, 1);
        }
        self.write(STATUS, 1, 15);
    }

    /// The first queue gives a buffer back.
    fn serves(&self) {
        self.memory
            .write_slice(&[0; 0x8000], GuestAddress(RINGS))
            .unwrap();
        let write = |value: u64, len: usize, at: u64| {
            let raw = value.to_le_bytes();
            self.memory
                .write_slice(&raw[..len], GuestAddress(at))
                .unwrap();
        };
        // One empty descriptor, head 0.
        write(0x1_0000, 8, RINGS);
        write(16, 4, RINGS + 8);
        write(2, 2, RINGS + 12);
        write(1, 2, RINGS + 0x402);
        self.set_up();
        assert_eq!(self.read(STATUS, 1), 15);
        self.write(NOTIFY, 2, 0);
        let at = GuestAddress(RINGS + 0x802);
        self.until("a used buffer", |bus| {
            bus.memory.read_obj::<u16>(at).unwrap() == 1
        });
    }
}

fn device(kind: u8, cell: &MemoryCell) -> Box<dyn Device> {
    match kind % 3 {
        0 => Box::new(Rng::new(LimitConfig::default())),
        1 => {
            let release = Box::new(balloon::Advise::new(cell.clone()));
            Box::new(Balloon::new(balloon::Config::default(), release).unwrap())
        }
        _ => {
            let file = tempfile::tempfile().unwrap();
            file.set_len(1 << 20).unwrap();
            let config = block::Config {
                engine: block::Engine::Plain,
                queues: 2,
                ..block::Config::default()
            };
            Box::new(Block::new(file.into(), config).unwrap())
        }
    }
}

/// Any access of any size at any place, in any order.
pub(crate) fn pci(data: &[u8]) {
    let mut input = Input(data);
    let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let cell = MemoryCell::new(memory.clone());
    let (worker, port) = Worker::new(device(input.u8(), &cell)).unwrap();
    let queues = u16::try_from(port.queue_sizes().len()).unwrap();
    let root = Root::new(ECAM, WINDOW);
    root.add(
        port.clone(),
        cell,
        Arc::new(Routes::default()),
        Box::new(Bells),
    )
    .unwrap();
    let bus = Bus {
        root,
        port,
        memory,
        queues,
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| worker.run().unwrap());
        play(&bus, &mut input);
        bus.place();
        bus.reset();
        bus.serves();
        bus.port.stop();
        thread.join().unwrap();
    });
}

/// A function is made what a snapshot says that was nearly right, or refuses to be;
/// then its driver does as above.
pub(crate) fn function(data: &[u8]) {
    let mut input = Input(data);
    let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let cell = MemoryCell::new(memory.clone());
    let kind = input.u8();
    let with = |prepare: &dyn Fn(&Root, Port), then: &mut dyn FnMut(&Bus)| {
        let (worker, port) = Worker::new(device(kind, &cell)).unwrap();
        let root = Root::new(ECAM, WINDOW);
        prepare(&root, port.clone());
        let queues = u16::try_from(port.queue_sizes().len()).unwrap();
        let bus = Bus {
            root,
            port,
            memory: memory.clone(),
            queues,
        };
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| worker.run().unwrap());
            then(&bus);
            bus.port.stop();
            thread.join().unwrap();
        });
    };
    let routes = || Arc::new(Routes::default());
    let mut saved = Vec::new();
    with(
        &|root, port| {
            root.add(port, cell.clone(), routes(), Box::new(Bells))
                .unwrap();
        },
        &mut |bus| {
            bus.place();
            bus.set_up();
            let rest = bus.port.pause(PATIENCE).unwrap();
            saved = postcard::to_allocvec(&bus.root.save(1, &rest).unwrap()).unwrap();
        },
    );
    for _ in 0..input.u8() % 8 {
        let at = usize::from(input.u16()) % saved.len();
        saved[at] ^= input.u8();
    }
    let Ok(state) = postcard::from_bytes::<FunctionState>(&saved) else {
        return;
    };
    with(
        &|root, port| {
            root.insert(1, port, cell.clone(), routes(), Box::new(Bells))
                .unwrap();
        },
        &mut |bus| {
            bus.port.pause(PATIENCE).unwrap();
            let taken = bus.root.restore(1, &state).is_ok();
            if taken {
                // It can be saved at once.
                bus.root.save(1, &Quiesced::default()).unwrap();
            }
            bus.port.resume();
            play(bus, &mut input);
            bus.place();
            bus.reset();
            bus.serves();
        },
    );
}

fn play(bus: &Bus, input: &mut Input<'_>) {
    let mut room = [0; 300];
    while !input.0.is_empty() {
        let small = |input: &mut Input<'_>| match input.u8() {
            255 => u64::from(input.u32()) << 32 | u64::from(input.u32()),
            254 => u64::from(input.u16()),
            n => u64::from(n),
        };
        let len = |input: &mut Input<'_>| match input.u8() {
            n @ 0..16 => usize::from(n) * 18,
            n => usize::from(n) % 9,
        };
        match input.u8() % 16 {
            // A register, as it is meant.
            0..5 => {
                let (at, len) = REGISTERS[usize::from(input.below(16))];
                let value = small(input);
                bus.set(at, len, value);
            }
            5 => bus.set(
                0x14,
                1,
                [1, 3, 11, 15, 0, 64, 128, 9][usize::from(input.below(8))],
            ),
            // What a driver would write next, where the registers were at first.
            6 => {
                bus.place();
                if input.u8().is_multiple_of(4) {
                    bus.reset();
                }
                bus.set_up();
            }
            7 => bus.write(NOTIFY + u64::from(input.u8() % 32), 2, 0),
            // The BAR, any place and size.
            8 => {
                let at = BAR + u64::from(input.u16()) % 0x8100;
                let len = len(input);
                room[..len].fill(input.u8());
                bus.root.write(at, &room[..len]);
            }
            9 => {
                let at = BAR + u64::from(input.u16()) % 0x8100;
                let len = len(input);
                bus.root.read(at, &mut room[..len]);
            }
            // The messages' table and the capability.
            10 => {
                let at = BAR + 0x4000 + u64::from(input.u8());
                let value = small(input);
                bus.write(at, len(input) % 9, value);
            }
            11 => {
                let at = SLOT + u64::from(input.u8());
                let value = small(input);
                bus.write(at, len(input) % 9, value);
                assert_eq!(bus.read(SLOT, 2), 0x1af4);
            }
            12 => {
                let at = ECAM + u64::from(input.u32()) % (1 << 20);
                let len = len(input);
                bus.root.read(at, &mut room[..len]);
                bus.root.write(at, &room[..len]);
            }
            // Rings.
            13 => {
                let at = RINGS + u64::from(input.u16() % 0x3000);
                let word = small(input);
                let _ = bus.memory.write_obj(word, GuestAddress(at));
            }
            14 => {
                let at = small(input);
                bus.root.read(at, &mut room[..8]);
                bus.root.write(at, &room[..8]);
            }
            _ => {
                // Let the device have its turn.
                if input.u8().is_multiple_of(8) {
                    std::thread::yield_now();
                }
                let status = bus.read(STATUS, 1);
                assert!(
                    [0, 1, 3, 11, 15].contains(&(status & 0x3f))
                        || status & 128 != 0
                        || bus.read(SLOT + 4, 2) & 2 == 0
                        || bus.read(SLOT + 0x10, 8) & !15 != BAR,
                    "the status is {status:#x}"
                );
            }
        }
    }
}
