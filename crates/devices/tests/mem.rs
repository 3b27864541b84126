//! The memory device, with an owner of memory that really maps and unmaps.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/blocks.rs"]
mod blocks;
#[path = "support/rig.rs"]
mod rig;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use blocks::{BLOCK, COUNT, Owner, REGION};
use rig::{Bell, LIMIT, Rig, Rng, Vring};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};
use walnut_devices::{
    mem::{Error, Mem, Region, Target},
    virtio::{Activation, Device, Event, Memory, MemoryCell},
};

const RING: u64 = 0x1000;
const REQUEST: u64 = 0x8000;
const ANSWER: u64 = 0x9000;
const MEMORY: usize = 0x1_0000;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const BUSY: (u16, u16) = (2, 0);
const ERROR: (u16, u16) = (3, 0);

struct Bed {
    mem: Mem,
    owner: Owner,
    target: Target,
    ring: Vring,
    low: Memory,
    bell: Arc<Bell>,
}

fn request(kind: u16, addr: u64, blocks: u16) -> Vec<u8> {
    let mut raw = kind.to_le_bytes().to_vec();
    raw.resize(8, 0);
    raw.extend(addr.to_le_bytes());
    raw.extend(blocks.to_le_bytes());
    raw.resize(24, 0);
    raw
}

fn device() -> (Mem, Owner, Memory) {
    let low = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let owner = Owner {
        cell: MemoryCell::new(low.clone()),
        busy: Arc::default(),
        calls: Arc::default(),
    };
    let mem = Mem::new(REGION, Box::new(owner.clone())).unwrap();
    (mem, owner, low)
}

impl Bed {
    fn new() -> Bed {
        let (mem, owner, low) = device();
        let mut bed = Bed {
            target: mem.target(),
            ring: Vring::new(&low, RING, 16),
            bell: Arc::default(),
            mem,
            owner,
            low,
        };
        bed.boot();
        bed
    }

    fn boot(&mut self) {
        self.ring = Vring::new(&self.low, RING, 16);
        let activation = Activation {
            memory: self.owner.cell.clone(),
            features: self.mem.features(),
            queues: vec![self.ring.queue(64, true)],
            interrupt: self.bell.clone(),
        };
        self.mem.activate(activation).unwrap();
        self.mem.event(Event::Queue(0)).unwrap();
    }

    fn ask_with(&mut self, raw: &[u8], chain: &[(u64, u32, bool)]) -> u32 {
        self.low.write_slice(raw, GuestAddress(REQUEST)).unwrap();
        self.low
            .write_slice(&[0xee; 16], GuestAddress(ANSWER))
            .unwrap();
        self.ring.add(chain);
        self.mem.event(Event::Queue(0)).unwrap();
        self.ring.pop_used().unwrap().1
    }

    /// A request at block `first`, and the answer's type and state.
    fn ask(&mut self, kind: u16, first: u64, blocks: u16) -> (u16, u16) {
        let raw = request(
            kind,
            REGION.addr.wrapping_add(first.wrapping_mul(BLOCK)),
            blocks,
        );
        let chain = [(REQUEST, 24, false), (ANSWER, 10, true)];
        assert_eq!(self.ask_with(&raw, &chain), 10);
        let word = |at| self.low.read_obj::<u16>(GuestAddress(ANSWER + at)).unwrap();
        assert_eq!((word(2), word(4), word(6), word(10)), (0, 0, 0, 0xeeee));
        (word(0), word(8))
    }

    fn config(&self, at: usize) -> u64 {
        let bytes = self.mem.config().bytes();
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Whether devices can reach block `n`.
    fn reachable(&self, n: u64) -> bool {
        let mem = self.owner.cell.memory();
        let len = usize::try_from(BLOCK).unwrap();
        mem.check_range(
            GuestAddress(REGION.addr + n * BLOCK),
            len,
            Permissions::Write,
        )
    }
}

#[test]
fn blocks_come_and_go_as_asked_for() {
    let mut bed = Bed::new();
    assert_eq!(bed.mem.config().bytes().len(), 56);
    let told = [0, 16, 24, 32, 40, 48].map(|at| bed.config(at));
    assert_eq!(told, [BLOCK, REGION.addr, REGION.size, REGION.size, 0, 0]);
    // Nothing was asked for.
    assert_eq!(bed.ask(PLUG, 0, 1), NACK);
    bed.target.set(8 * BLOCK).unwrap();
    bed.mem.event(Event::Watched(0)).unwrap();
    assert_eq!((bed.bell.told().config, bed.config(48)), (1, 8 * BLOCK));
    assert_eq!(bed.ask(PLUG, 2, 4), ACK);
    assert_eq!(
        (bed.target.plugged(), bed.config(40)),
        (4 * BLOCK, 4 * BLOCK)
    );
    assert_eq!(bed.ask(PLUG, 5, 2), ERROR, "one is there already");
    assert_eq!(bed.ask(PLUG, 6, 5), NACK, "too many");
    assert_eq!(bed.ask(PLUG, 12, 4), ACK);
    assert_eq!(bed.ask(PLUG, 0, 1), NACK);
    assert_eq!(bed.ask(STATE, 2, 4), (0, 0));
    assert_eq!(bed.ask(STATE, 0, 2), (0, 1));
    assert_eq!(bed.ask(STATE, 0, 16), (0, 2));
    for n in 0..COUNT {
        assert_eq!(bed.reachable(n), (2..6).contains(&n) || n >= 12, "{n}");
    }
    assert_eq!(bed.ask(UNPLUG, 1, 2), ERROR, "one is not there");
    assert_eq!(bed.ask(UNPLUG, 3, 2), ACK);
    assert!(!bed.reachable(3) && !bed.reachable(4) && bed.reachable(5));
    // Zeroed again.
    let at = GuestAddress(REGION.addr + 5 * BLOCK);
    bed.owner.cell.memory().write_obj(7u64, at).unwrap();
    assert_eq!(bed.ask(UNPLUG, 5, 1), ACK);
    assert_eq!(bed.ask(PLUG, 5, 1), ACK);
    assert_eq!(bed.owner.cell.memory().read_obj::<u64>(at).unwrap(), 0);

    assert_eq!(bed.ask(UNPLUG_ALL, u64::MAX, 0), ACK);
    assert_eq!((bed.target.plugged(), bed.config(40)), (0, 0));
    assert!((0..COUNT).all(|n| !bed.reachable(n)));
    assert!(bed.bell.told().queues[0] > 10);
}

#[test]
fn a_smaller_target_takes_nothing_by_itself() {
    let mut bed = Bed::new();
    bed.target.set(4 * BLOCK).unwrap();
    assert_eq!(bed.ask(PLUG, 0, 4), ACK);
    bed.target.set(BLOCK).unwrap();
    assert_eq!(bed.target.plugged(), 4 * BLOCK);
    assert_eq!(bed.ask(PLUG, 8, 1), NACK);
    assert_eq!(bed.ask(UNPLUG, 1, 3), ACK);
    for bad in [1, BLOCK / 2, REGION.size + BLOCK, u64::MAX] {
        assert!(matches!(bed.target.set(bad), Err(Error::Size { .. })));
    }
    assert_eq!(bed.target.requested(), BLOCK);
    // Told during a pause.
    let before = bed.bell.told().config;
    bed.mem.deactivate();
    bed.target.set(2 * BLOCK).unwrap();
    bed.boot();
    assert_eq!(bed.bell.told().config, before + 1);
    // A driver's reset keeps what the guest runs on.
    bed.mem.deactivate();
    bed.mem.reset();
    assert_eq!(bed.target.plugged(), BLOCK);
    assert!(bed.reachable(0));
}

#[test]
fn an_owner_that_cannot_is_said_to_be_busy() {
    let mut bed = Bed::new();
    bed.target.set(4 * BLOCK).unwrap();
    bed.owner.busy.store(true, Ordering::Relaxed);
    assert_eq!(bed.ask(PLUG, 0, 2), BUSY);
    assert_eq!(bed.target.plugged(), 0);
    bed.owner.busy.store(false, Ordering::Relaxed);
    assert_eq!(bed.ask(PLUG, 0, 2), ACK);
    bed.owner.busy.store(true, Ordering::Relaxed);
    assert_eq!(bed.ask(UNPLUG, 0, 1), BUSY);
    assert_eq!(bed.ask(UNPLUG_ALL, 0, 0), BUSY);
    assert_eq!(bed.target.plugged(), 2 * BLOCK);
}

#[test]
fn requests_without_a_meaning_get_an_error() {
    let mut bed = Bed::new();
    bed.target.set(REGION.size).unwrap();
    for kind in [PLUG, UNPLUG, STATE] {
        for (first, blocks) in [
            (0, 0),
            (16, 1),
            (15, 2),
            (0, 17),
            (0, 0xffff),
            (1 << 46, 1),
            (u64::MAX, 1),
        ] {
            assert_eq!(
                bed.ask(kind, first, blocks),
                ERROR,
                "{kind} {first} {blocks}"
            );
        }
        let raw = request(kind, REGION.addr + 1, 1);
        bed.ask_with(&raw, &[(REQUEST, 24, false), (ANSWER, 10, true)]);
        assert_eq!(bed.low.read_obj::<u16>(GuestAddress(ANSWER)).unwrap(), 3);
    }
    assert_eq!(bed.ask(4, 0, 1), ERROR);
    assert_eq!(bed.ask(0xffff, 0, 1), ERROR);
    assert!(bed.owner.calls.lock().unwrap().is_empty());
}

#[test]
fn chains_without_a_request_or_room_do_nothing() {
    let end = MEMORY as u64;
    let bad: [&[(u64, u32, bool)]; 9] = [
        &[(REQUEST, 24, false)],
        &[(ANSWER, 10, true)],
        &[(REQUEST, 23, false), (ANSWER, 10, true)],
        &[(REQUEST, 24, false), (ANSWER, 9, true)],
        &[(REQUEST, 24, true), (ANSWER, 10, true)],
        &[(end - 8, 24, false), (ANSWER, 10, true)],
        &[(u64::MAX - 8, 24, false), (ANSWER, 10, true)],
        &[(REQUEST, 0, false), (ANSWER, 0, true)],
        &[(REGION.addr, 24, false), (ANSWER, 10, true)],
    ];
    let mut bed = Bed::new();
    bed.target.set(REGION.size).unwrap();
    for chain in bad {
        assert_eq!(
            bed.ask_with(&request(PLUG, REGION.addr, 1), chain),
            0,
            "{chain:?}"
        );
        assert_eq!(bed.target.plugged(), 0);
    }
    // In pieces, and with more room than needed.
    let chain = [
        (REQUEST, 2, false),
        (REQUEST + 2, 30, false),
        (ANSWER, 3, true),
        (ANSWER + 3, 30, true),
    ];
    assert_eq!(bed.ask_with(&request(PLUG, REGION.addr, 1), &chain), 10);
    assert_eq!(bed.target.plugged(), BLOCK);
}

/// A request that lies in the memory that it takes away, and so does the room for
/// its answer: it is done, and nobody touches what is gone.
#[test]
fn what_is_unplugged_is_out_of_reach_at_once() {
    let mut bed = Bed::new();
    bed.target.set(REGION.size).unwrap();
    assert_eq!(bed.ask(PLUG, 0, 2), ACK);
    let raw = request(UNPLUG, REGION.addr, 1);
    let high = REGION.addr + 64;
    bed.owner
        .cell
        .memory()
        .write_slice(&raw, GuestAddress(high))
        .unwrap();
    let chain = [(high, 24, false), (REGION.addr + 128, 10, true)];
    assert_eq!(bed.ask_with(&raw, &chain), 0);
    assert!(!bed.reachable(0) && bed.reachable(1));
    assert_eq!(bed.target.plugged(), BLOCK);
    // The ring itself goes: the device breaks, and works again after a reset.
    bed.mem.deactivate();
    let mut ring = Vring::new(&bed.owner.cell.memory(), REGION.addr + BLOCK, 16);
    let activation = Activation {
        memory: bed.owner.cell.clone(),
        features: bed.mem.features(),
        queues: vec![ring.queue(64, true)],
        interrupt: bed.bell.clone(),
    };
    bed.mem.activate(activation).unwrap();
    bed.low
        .write_slice(&request(UNPLUG_ALL, 0, 0), GuestAddress(REQUEST))
        .unwrap();
    ring.add(&[(REQUEST, 24, false), (ANSWER, 10, true)]);
    assert!(bed.mem.event(Event::Queue(0)).is_err());
    bed.mem.deactivate();
    bed.boot();
    assert_eq!(bed.ask(STATE, 0, 16), (0, 1));
}

#[test]
fn a_restored_device_has_what_was_plugged() {
    let mut bed = Bed::new();
    bed.target.set(8 * BLOCK).unwrap();
    assert_eq!(bed.ask(PLUG, 1, 3), ACK);
    assert_eq!(bed.ask(PLUG, 9, 2), ACK);
    bed.target.set(2 * BLOCK).unwrap();
    let state = bed.mem.save();

    let (mut mem, owner, _) = device();
    mem.restore(&state).unwrap();
    assert_eq!(mem.save(), state);
    assert_eq!(
        (mem.target().plugged(), mem.target().requested()),
        (5 * BLOCK, 2 * BLOCK)
    );
    let addr = REGION.addr;
    let expected = [
        addr + BLOCK..addr + 4 * BLOCK,
        addr + 9 * BLOCK..addr + 11 * BLOCK,
    ];
    assert_eq!(*owner.calls.lock().unwrap(), expected);
    assert!(mem.restore(&state).is_err(), "twice");
    for len in 0..state.len() {
        let (mut mem, owner, _) = device();
        assert!(mem.restore(&state[..len]).is_err());
        assert!(owner.calls.lock().unwrap().is_empty());
    }
    for at in 0..state.len() {
        for bit in 0..8 {
            let mut state = state.clone();
            state[at] ^= 1 << bit;
            let (mut mem, owner, _) = device();
            // May be another state that makes sense; the owner checks the ranges.
            let _ = mem.restore(&state);
            assert!(owner.calls.lock().unwrap().len() <= 8);
        }
    }
}

#[test]
fn a_driver_that_would_touch_what_is_not_there_is_refused() {
    let (mut mem, owner, low) = device();
    let ring = Vring::new(&low, RING, 16);
    let activation = Activation {
        memory: owner.cell.clone(),
        features: 1 << 32,
        queues: vec![ring.queue(64, true)],
        interrupt: Arc::<Bell>::default(),
    };
    assert!(mem.activate(activation).is_err());
    assert_eq!(mem.deactivate().len(), 1);
    let bad = Region { block: 3, ..REGION };
    assert_eq!(
        Mem::new(bad, Box::new(owner)).err(),
        Some(Error::Region(bad))
    );
}

/// On its thread: the driver hears of a new size, plugs, and is asked to rest.
#[test]
fn a_worker_drives_it() {
    let (mem, owner, low) = device();
    let target = mem.target();
    let mut ring = Vring::new(&low, RING, 16);
    let mut rig = Rig::new(mem, low.clone());
    rig.memory = owner.cell.clone();
    rig.activate(rig.port.features(), &[Some(&ring)]);
    target.set(3 * BLOCK).unwrap();
    rig.until("the new size", || rig.bell.told().config == 1);
    low.write_slice(&request(PLUG, REGION.addr, 3), GuestAddress(REQUEST))
        .unwrap();
    ring.add(&[(REQUEST, 24, false), (ANSWER, 10, true)]);
    rig.kick(0);
    rig.until("the answer", || ring.pop_used().is_some());
    assert_eq!(target.plugged(), 3 * BLOCK);
    let state = rig.port.pause(LIMIT).unwrap();
    assert_eq!(state.queues.unwrap()[0].next_avail, 1);
}

/// Whatever is asked: the books are right, and what is not plugged is not there.
#[test]
fn any_request_in_any_ring() {
    let mut rng = Rng(0x5eed_0020);
    let mut bed = Bed::new();
    let mut model = [false; 16];
    for round in 0..20_000u32 {
        if rng.below(10) == 0 {
            let _ = bed.target.set(rng.below(18) * BLOCK);
        }
        bed.owner.busy.store(rng.below(20) == 0, Ordering::Relaxed);
        let kind = u16::try_from(rng.below(5)).unwrap();
        let kind = if kind == UNPLUG_ALL && rng.below(10) > 0 {
            STATE
        } else {
            kind
        };
        let first = rng.below(18);
        let blocks = match rng.below(8) {
            0 => rng.u16(),
            _ => u16::try_from(rng.below(6)).unwrap(),
        };
        if rng.below(200) == 0 {
            // A ring of nonsense; then the driver begins anew.
            for at in 0..16 {
                let (addr, len) = (rng.below(MEMORY as u64 + 100), rng.u32());
                let flags = u16::try_from(rng.below(8)).unwrap();
                bed.ring
                    .write_desc(at, addr, len % 100, flags, rng.u16() % 17);
            }
            for _ in 0..8 {
                bed.ring.publish(rng.u16() % 17);
            }
            // A request of the round before may be found again, and done.
            let _ = bed.mem.event(Event::Queue(0));
            while bed.mem.deadline().is_some_and(|at| at <= Instant::now()) {
                let _ = bed.mem.event(Event::Deadline);
            }
            bed.mem.deactivate();
            bed.boot();
            for (n, plugged) in (0..).zip(&mut model) {
                *plugged = bed.reachable(n);
            }
            continue;
        }
        let answer = bed.ask(kind, first, blocks);
        let range =
            usize::try_from(first).unwrap()..usize::try_from(first + u64::from(blocks)).unwrap();
        match (answer, kind) {
            (ACK, PLUG) => model[range].fill(true),
            (ACK, UNPLUG) => model[range].fill(false),
            (_, UNPLUG_ALL) if answer == ACK => model.fill(false),
            _ => {}
        }
        let plugged = model.iter().filter(|plugged| **plugged).count();
        assert_eq!(
            bed.target.plugged(),
            plugged as u64 * BLOCK,
            "round {round}"
        );
        for (n, plugged) in (0..).zip(model) {
            assert_eq!(bed.reachable(n), plugged, "round {round}, block {n}");
        }
    }
}
