//! Every state of the transport, every access of every size at every offset
//! (virtio 1.3 §2.1, §4.1.4.3; PCI 3.0 §6.8.2).

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use vm_memory::{GuestAddress, GuestMemoryMmap};
use walnut_devices::{
    limit::LimitConfig,
    pci::{Doorbells, Message, Messages, Root},
    rng::Rng,
    virtio::{MemoryCell, Port, Worker},
};

const ECAM: u64 = 0xe000_0000;
const WINDOW: std::ops::Range<u64> = 0x8_0000_0000..0x8_1000_0000;
const BAR: u64 = 0x8_0000_8000;
const STATUS: u64 = BAR + 0x14;
const TABLE: u64 = BAR + 0x4000;
const PENDING: u64 = BAR + 0x5000;
const COMMON_SIZE: usize = 0x40;
/// The entropy device has a queue, so two vectors.
const TABLE_SIZE: usize = 32;

#[derive(Debug)]
struct Nobody;

impl Messages for Nobody {
    fn route(&self, vector: usize, _: Option<Message>) {
        assert!(vector < 2);
    }

    fn send(&self, _: usize) {}
}

impl Doorbells for Nobody {
    fn moved(&self, _: Option<u64>) {}
}

struct Bus {
    root: Root,
    port: Port,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.port.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Bus {
    fn new() -> Self {
        let device = Rng::new(LimitConfig::default());
        let (worker, port) = Worker::new(Box::new(device)).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
        let root = Root::new(ECAM, WINDOW);
        let cell = MemoryCell::new(memory);
        root.add(port.clone(), cell, Arc::new(Nobody), Box::new(Nobody))
            .unwrap();
        Self {
            root,
            port,
            thread: Some(std::thread::spawn(move || worker.run().unwrap())),
        }
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0xaa; len];
        self.root.read(at, &mut out);
        out
    }

    fn status(&self) -> u8 {
        self.bytes(STATUS, 1)[0]
    }

    fn write(&self, at: u64, data: &[u8]) {
        self.root.write(at, data);
    }

    fn reset(&self) {
        self.write(STATUS, &[0]);
        let start = Instant::now();
        while self.status() != 0 {
            assert!(start.elapsed() < Duration::from_secs(60), "never reset");
            std::thread::yield_now();
        }
    }

    /// By the steps of §3.1.1, with `VIRTIO_F_VERSION_1` if `agreed`.
    fn reach(&self, status: u8, agreed: bool) {
        self.reset();
        for step in [1, 3, 11, 15] {
            if step & !status != 0 {
                break;
            }
            if step == 11 && agreed {
                self.write(BAR + 0x08, &1u32.to_le_bytes());
                self.write(BAR + 0x0c, &1u32.to_le_bytes());
            }
            self.write(STATUS, &[step]);
        }
        if status & 128 != 0 {
            self.write(STATUS, &[status]);
        }
    }
}

const STATES: [u8; 5] = [0, 1, 3, 11, 15];

/// §2.1, §3.1.1: from every state that there is, every byte written leads where the
/// steps lead, and nowhere else. (A byte that is no state leads from reset to one of
/// these, so this is all of 256 times 256.)
#[test]
fn every_status_written_in_every_state_is_a_step_or_nothing() {
    let bus = Bus::new();
    let mut reached = 0;
    for agreed in [false, true] {
        for old in STATES.into_iter().flat_map(|state| [state, state | 128]) {
            if !agreed && old & 8 != 0 {
                continue;
            }
            bus.reach(old, agreed);
            for new in 0..=255u8 {
                if bus.status() != old {
                    bus.reach(old, agreed);
                    assert_eq!(bus.status(), old);
                }
                bus.write(STATUS, &[new]);
                if new == 0 {
                    bus.reset();
                    continue;
                }
                // What a driver cannot say: that the device needs a reset.
                let wanted = new & !64;
                let state = STATES.contains(&(wanted & !128));
                // Features are agreed on in state 3, before FEATURES_OK.
                let fit = old & 8 != 0;
                let expected = match state && old & !wanted == 0 {
                    false => old,
                    true if wanted & 8 != 0 && !fit => wanted & !12,
                    true => wanted,
                };
                assert_eq!(bus.status(), expected, "{new:#x} in {old:#x}");
                reached += 1;
            }
        }
    }
    assert_eq!(reached, (6 + 10) * 255);
}

/// §4.1.4.3, §4.1.3.1: an access of every size at every offset of the common
/// configuration, in every state. A read is a part of the whole; a write of
/// another width than a register's changes nothing.
#[test]
fn every_access_to_the_common_configuration_is_harmless_in_every_state() {
    let bus = Bus::new();
    let narrow = |at: usize| match at {
        0x00 | 0x08 | 0x0c | 0x20 | 0x24 | 0x28 | 0x2c | 0x30 | 0x34 => 4,
        0x10 | 0x16 | 0x18 | 0x1a | 0x1c => 2,
        0x14 => 1,
        _ => 0,
    };
    for state in STATES {
        bus.reach(state, true);
        let whole = bus.bytes(BAR, COMMON_SIZE);
        for at in 0..COMMON_SIZE + 16 {
            for len in 0..=COMMON_SIZE {
                let place = BAR + at as u64;
                let read = bus.bytes(place, len);
                for (n, byte) in read.into_iter().enumerate() {
                    let expected = whole.get(at + n).copied().unwrap_or(0);
                    assert_eq!(byte, expected, "{len} bytes at {at:#x} in {state}");
                }
                let wide = len == 8 && [0x20, 0x28, 0x30].contains(&at);
                if len == narrow(at) && len > 0 || wide {
                    continue;
                }
                for fill in [0, 1, 0x55, 0xff] {
                    bus.write(place, &vec![fill; len]);
                }
                let after = bus.bytes(BAR, COMMON_SIZE);
                assert_eq!(after, whole, "{len} bytes at {at:#x} in {state}");
            }
        }
    }
}

/// PCI 3.0 §6.8.2: every access to the message table is to the bytes it names, and
/// beyond it there is nothing.
#[test]
fn every_access_to_the_message_table_is_to_its_bytes() {
    let bus = Bus::new();
    let mut model = vec![0; TABLE_SIZE];
    (model[12], model[28]) = (1, 1);
    let mut fill = 0u8;
    for at in (0..TABLE_SIZE + 20).chain([0x800, 0xff8, 0xfff]) {
        for len in 0..=40 {
            fill = fill.wrapping_add(59) | 1;
            let data: Vec<_> = (0..len).map(|n: u8| fill.wrapping_add(n) | 1).collect();
            bus.write(TABLE + at as u64, &data);
            for (n, byte) in data.iter().enumerate() {
                if let Some(to) = model.get_mut(at + n) {
                    *to = *byte;
                }
            }
            assert_eq!(bus.bytes(TABLE, TABLE_SIZE), model);
            let read = bus.bytes(TABLE + at as u64, usize::from(len));
            for (n, byte) in read.into_iter().enumerate() {
                assert_eq!(byte, model.get(at + n).copied().unwrap_or(0));
            }
        }
    }
    // Pending bits are read alone, and none is set.
    for at in 0..64 {
        for len in 0..=16 {
            bus.write(PENDING + at, &vec![0xff; len]);
            assert_eq!(bus.bytes(PENDING + at, len), vec![0; len]);
        }
    }
}

/// Every offset of a function's 4 KiB in the ECAM, with every size of access: who it
/// is never changes, and what follows the first 256 bytes is nothing.
#[test]
fn every_access_to_the_configuration_space_leaves_the_identity_alone() {
    let bus = Bus::new();
    let slot = ECAM + (1 << 15);
    let identity = |bus: &Bus| {
        [
            bus.bytes(slot, 4),
            bus.bytes(slot + 8, 4),
            bus.bytes(slot + 0x2c, 12),
        ]
    };
    let before = identity(&bus);
    for at in (0..300).chain(4080..4100) {
        for len in [0, 1, 2, 3, 4, 7, 8, 16] {
            for fill in [0xff, 0] {
                bus.write(slot + at, &vec![fill; len]);
                assert_eq!(identity(&bus), before, "{len} bytes at {at:#x}");
            }
        }
    }
    // It is put back, and answers.
    bus.write(slot + 0x10, &BAR.to_le_bytes());
    bus.write(slot + 4, &[2, 0]);
    bus.reach(15, true);
    assert_eq!(bus.status(), 15);
}
