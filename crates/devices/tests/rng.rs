//! The entropy device against a driver by hand.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/direct.rs"]
mod direct;
#[path = "support/rig.rs"]
mod rig;

use std::time::{Duration, Instant};

use direct::Direct;
use rig::*;
use vm_memory::{Bytes, GuestAddress};
use walnut_devices::{
    limit::{BucketConfig, LimitConfig},
    rng::{self, MOST, QUEUE_SIZE},
    virtio::*,
};

const RING: u64 = 0x1_0000;
const DATA: u64 = 0x10_0000;
const SEAM: u64 = 0x20_0000;
const END: u64 = 0x40_0000;
const FEATURES: u64 = 1 << 32 | 1 << 29;

fn memory() -> Memory {
    let len = |n: u64| usize::try_from(n).unwrap();
    Memory::from_ranges(&[
        (GuestAddress(0), len(SEAM)),
        (GuestAddress(SEAM), len(END - SEAM)),
    ])
    .unwrap()
}

struct Bed {
    direct: Direct<rng::Rng>,
    ring: Vring,
    mem: Memory,
}

impl Bed {
    fn new(limit: LimitConfig) -> Bed {
        let mem = memory();
        let mut direct = Direct::new(rng::Rng::new(limit), mem.clone());
        let ring = Vring::new(&mem, RING, QUEUE_SIZE);
        direct.activate(FEATURES, &[&ring]);
        Bed { direct, ring, mem }
    }

    fn chain(&mut self, chain: &[(u64, u32, bool)]) -> u32 {
        let head = self.ring.add(chain);
        self.direct.kick(0);
        let (used, len) = self.ring.pop_used().expect("used");
        assert_eq!(used, head);
        len
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.mem.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }
}

fn blank(data: &[u8]) -> bool {
    data.iter().all(|byte| *byte == 0)
}

#[test]
fn buffers_are_filled_and_no_two_alike() {
    let mut bed = Bed::new(LimitConfig::default());
    assert_eq!(bed.chain(&[(DATA, 64, true)]), 64);
    let first = bed.get(DATA, 64);
    assert!(!blank(&first) && blank(&bed.get(DATA + 64, 64)));
    assert_eq!(bed.chain(&[(DATA, 33, true), (DATA + 100, 31, true)]), 64);
    let second = [bed.get(DATA, 33), bed.get(DATA + 100, 31)].concat();
    assert_ne!(first, second);
    assert!(bed.direct.bell.told().queues[0] >= 2);
    // Over the seam of two regions.
    assert_eq!(bed.chain(&[(SEAM - 32, 64, true)]), 64);
    assert!(!blank(&bed.get(SEAM - 32, 32)) && !blank(&bed.get(SEAM, 32)));
}

#[test]
fn an_enormous_request_gets_so_much_and_no_more() {
    let mut bed = Bed::new(LimitConfig::default());
    let most = u32::try_from(MOST).unwrap();
    assert_eq!(bed.chain(&[(DATA, 0x8_0000, true)]), most);
    assert!(blank(&bed.get(DATA + MOST as u64, 4096)));
    let many: Vec<_> = (0..32)
        .map(|n| (DATA + n * 0x1_0000, 0x1_0000, true))
        .collect();
    assert_eq!(bed.chain(&many), most);
    // One table of descriptors that all name the same megabytes.
    for n in 0..60_000u64 {
        let (at, next) = (DATA + n * 16, u16::try_from(n + 1).unwrap());
        bed.mem.write_obj(DATA, GuestAddress(at)).unwrap();
        bed.mem.write_obj(0u32, GuestAddress(at + 8)).unwrap();
        bed.mem
            .write_obj(NEXT | WRITE, GuestAddress(at + 12))
            .unwrap();
        bed.mem.write_obj(next, GuestAddress(at + 14)).unwrap();
    }
    bed.ring.write_desc(0, DATA, 60_000 * 16, INDIRECT, 0);
    bed.ring.publish(0);
    bed.direct.kick(0);
    assert_eq!(bed.ring.pop_used(), Some((0, 0)));
}

#[test]
fn what_is_not_writable_memory_is_left_alone_and_the_length_is_honest() {
    let mut bed = Bed::new(LimitConfig::default());
    assert_eq!(bed.chain(&[(DATA, 64, false)]), 0);
    assert!(blank(&bed.get(DATA, 64)));
    assert_eq!(bed.chain(&[(DATA, 64, true), (DATA + 64, 64, false)]), 64);
    for at in [END, END - 32, u64::MAX - 31, u64::MAX, 1 << 50] {
        assert_eq!(bed.chain(&[(at, 64, true)]), 0, "{at:#x}");
        assert_eq!(
            bed.chain(&[(DATA, 16, true), (at, 64, true)]),
            16,
            "{at:#x}"
        );
    }
    assert_eq!(bed.chain(&[(DATA, 0, true), (DATA, 8, true)]), 8);
    // A loop, and a head published twice.
    bed.ring.write_desc(9, DATA, 10, NEXT | WRITE, 9);
    for _ in 0..2 {
        bed.ring.publish(9);
    }
    bed.direct.kick(0);
    assert_eq!(bed.ring.pop_used(), Some((9, u32::from(QUEUE_SIZE) * 10)));
    assert_eq!(bed.ring.pop_used(), Some((9, u32::from(QUEUE_SIZE) * 10)));
    assert!(!bed.direct.broken);
    bed.ring.publish(QUEUE_SIZE);
    bed.direct.kick(0);
    assert!(bed.direct.broken);
}

#[test]
fn the_rate_is_kept() {
    let limit = LimitConfig {
        bytes: Some(BucketConfig {
            size: 100,
            burst: 28,
            refill: Duration::from_secs(3600),
        }),
        operations: None,
    };
    let mut bed = Bed::new(limit);
    for _ in 0..10 {
        bed.ring.add(&[(DATA, 64, true)]);
    }
    for _ in 0..3 {
        bed.direct.kick(0);
    }
    let used = std::iter::from_fn(|| bed.ring.pop_used()).count();
    assert_eq!(used, 2);
    assert!(bed.direct.device.deadline().unwrap() > Instant::now());
}

#[test]
fn on_a_thread_of_its_own_every_request_is_served() {
    let mem = memory();
    let limit = LimitConfig {
        operations: Some(BucketConfig {
            size: 10,
            burst: 0,
            refill: Duration::from_millis(5),
        }),
        bytes: None,
    };
    let rig = Rig::new(rng::Rng::new(limit), mem.clone());
    let mut ring = Vring::new(&mem, RING, QUEUE_SIZE);
    rig.activate(FEATURES, &[Some(&ring)]);
    for _ in 0..QUEUE_SIZE {
        ring.add(&[(DATA, 64, true)]);
    }
    rig.kick(0);
    let mut used = 0;
    rig.until("all served", || {
        used += std::iter::from_fn(|| ring.pop_used()).count();
        used == usize::from(QUEUE_SIZE)
    });
    assert!(rig.port.pause(LIMIT).is_some());
    rig.port.resume();
}
