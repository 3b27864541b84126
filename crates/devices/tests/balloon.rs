//! The memory balloon against a driver by hand.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/direct.rs"]
mod direct;
#[path = "support/rig.rs"]
mod rig;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use direct::Direct;
use rig::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use walnut_devices::{balloon::*, virtio::*};

const RINGS: u64 = 0x1_0000;
const LIST: u64 = 0x8_0000;
const DATA: u64 = 0x10_0000;
const SEAM: u64 = 0x20_0000;
const HOLE: u64 = 0x40_0000;
const HOLE_END: u64 = 0x80_0000;
const END: u64 = 0x90_0000;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;
const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 1 | 1 << 2 | 1 << 5;

type Freed = Arc<Mutex<Vec<(u64, u64)>>>;

#[derive(Debug)]
struct Recorder(Freed);

impl Release for Recorder {
    fn release(&self, at: GuestAddress, len: u64) {
        self.0.lock().unwrap().push((at.0, len));
    }
}

fn memory() -> Memory {
    let len = |n: u64| usize::try_from(n).unwrap();
    Memory::from_ranges(&[
        (GuestAddress(0), len(SEAM)),
        (GuestAddress(SEAM), len(HOLE - SEAM)),
        (GuestAddress(HOLE_END), len(END - HOLE_END)),
    ])
    .unwrap()
}

struct Bed {
    direct: Direct<Balloon>,
    control: Control,
    rings: Vec<Vring>,
    mem: Memory,
    freed: Freed,
}

impl Bed {
    fn new() -> Bed {
        let freed = Freed::default();
        let recorder = Box::new(Recorder(freed.clone()));
        Bed::with(recorder, freed, memory())
    }

    fn with(release: Box<dyn Release>, freed: Freed, mem: Memory) -> Bed {
        let device = Balloon::new(Config::default(), release).unwrap();
        let control = device.control();
        let direct = Direct::new(device, mem.clone());
        let mut bed = Bed {
            direct,
            control,
            rings: Vec::new(),
            mem,
            freed,
        };
        bed.activate(FEATURES);
        bed
    }

    fn activate(&mut self, features: u64) {
        self.rings = (0..4)
            .map(|n| Vring::new(&self.mem, RINGS + n * 0x4000, QUEUE_SIZE))
            .collect();
        let rings: Vec<_> = self.rings.iter().collect();
        self.direct.activate(features, &rings);
    }

    /// What a chain has the device release.
    fn chain(&mut self, queue: usize, chain: &[(u64, u32, bool)]) -> Vec<(u64, u64)> {
        let head = self.rings[queue].add(chain);
        self.direct.kick(queue);
        assert_eq!(self.rings[queue].pop_used(), Some((head, 0)));
        std::mem::take(&mut self.freed.lock().unwrap())
    }

    fn inflate(&mut self, pages: &[u32]) -> Vec<(u64, u64)> {
        let raw: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.mem.write_slice(&raw, GuestAddress(LIST)).unwrap();
        let len = u32::try_from(raw.len()).unwrap();
        self.chain(INFLATE, &[(LIST, len, false)])
    }

    fn send_stats(&mut self, stats: &[(u16, u64)]) {
        let mut raw = Vec::new();
        for (tag, value) in stats {
            raw.extend(tag.to_le_bytes());
            raw.extend(value.to_le_bytes());
        }
        self.mem.write_slice(&raw, GuestAddress(LIST)).unwrap();
        let len = u32::try_from(raw.len()).unwrap();
        self.rings[STATS].add(&[(LIST, len, false)]);
        self.direct.kick(STATS);
    }
}

#[test]
fn inflated_pages_are_released_in_runs() {
    let mut bed = Bed::new();
    assert_eq!(bed.inflate(&[0x100, 0x101, 0x102]), [(0x10_0000, 0x3000)]);
    // Downwards, as Linux hands them out, and scattered.
    assert_eq!(bed.inflate(&[0x102, 0x101, 0x100]), [(0x10_0000, 0x3000)]);
    assert_eq!(
        bed.inflate(&[0x100, 0x110, 0x10f, 0x111, 0x100]),
        [
            (0x10_0000, 0x1000),
            (0x10_f000, 0x3000),
            (0x10_0000, 0x1000)
        ]
    );
    // From one region into the next.
    assert_eq!(bed.inflate(&[0x1ff, 0x200]), [(SEAM - 0x1000, 0x2000)]);
    assert_eq!(bed.chain(DEFLATE, &[(LIST, 8, false)]), []);
    assert_eq!(bed.direct.bell.told().queues[INFLATE], 4);
}

#[test]
fn pages_that_are_not_there_are_left_out() {
    let mut bed = Bed::new();
    let hole = u32::try_from(HOLE >> 12).unwrap();
    assert_eq!(
        bed.inflate(&[hole - 1, hole, hole + 1, u32::MAX, 0x100, u32::MAX - 1]),
        [(HOLE - 0x1000, 0x1000), (0x10_0000, 0x1000)]
    );
    // Lists that are not there, that the device is to write, that are not whole.
    assert_eq!(bed.chain(INFLATE, &[(HOLE, 64, false)]), []);
    assert_eq!(bed.chain(INFLATE, &[(u64::MAX - 7, 64, false)]), []);
    assert_eq!(bed.chain(INFLATE, &[(LIST, 64, true)]), []);
    assert_eq!(bed.chain(INFLATE, &[(LIST, 3, false)]), []);
    assert_eq!(bed.chain(INFLATE, &[(LIST, 0, false)]), []);
    assert_eq!(
        bed.chain(INFLATE, &[(LIST, 7, false)]),
        [(HOLE - 0x1000, 0x1000)]
    );
}

#[test]
fn an_enormous_list_is_looked_at_so_far_and_no_farther() {
    let mut bed = Bed::new();
    // Every other page, so that nothing is taken together.
    for n in 0..0x4_0000u32 {
        let page = 2 * (n % 0x100);
        bed.mem
            .write_obj(page, GuestAddress(DATA + u64::from(n) * 4))
            .unwrap();
    }
    let freed = bed.chain(INFLATE, &[(DATA, 0x10_0000, false)]);
    assert_eq!(freed.len(), 1024);
    let many: Vec<_> = (0..100)
        .map(|n| (DATA + n * 0x1000, 0x1000, false))
        .collect();
    assert_eq!(bed.chain(INFLATE, &many).len(), 1024);
    // And a turn ends, with the rest left for the next.
    for _ in 0..QUEUE_SIZE {
        bed.rings[INFLATE].add(&[(DATA, 64, false)]);
    }
    bed.direct.event(Event::Queue(INFLATE));
    assert!(bed.direct.due());
    let used = std::iter::from_fn(|| bed.rings[INFLATE].pop_used()).count();
    assert!(used < usize::from(QUEUE_SIZE));
    bed.direct.kick(INFLATE);
    let rest = std::iter::from_fn(|| bed.rings[INFLATE].pop_used()).count();
    assert_eq!(used + rest, usize::from(QUEUE_SIZE));
}

#[test]
fn free_pages_reported_are_released_whole_and_in_memory_alone() {
    let mut bed = Bed::new();
    let ranges = [
        (DATA, 0x40_000, true),
        (SEAM - 0x2000, 0x4000, true),
        (DATA + 1, 0x2000, true),
        (DATA + 0x800, 0x1000, true),
        (DATA, 0xfff, true),
        (DATA, 0, true),
        (HOLE - 0x1000, 0x2000, true),
        (HOLE, 0x1000, true),
        (u64::MAX - 0xfff, 0x1000, true),
        (u64::MAX - 0xffe, 0x2000, true),
        (0, u32::MAX, true),
        (u64::MAX, 0, true),
        (u64::MAX - 100, 0, true),
        (u64::MAX - 100, 1, true),
    ];
    assert_eq!(
        bed.chain(REPORTING, &ranges),
        [
            (DATA, 0x40_000),
            (SEAM - 0x2000, 0x4000),
            (DATA + 0x1000, 0x1000)
        ]
    );
    assert_eq!(bed.chain(REPORTING, &[(DATA, 0x1000, false)]), []);
    // A loop ends, and breaks nothing.
    bed.rings[REPORTING].write_desc(5, DATA, 0x1000, NEXT | WRITE, 5);
    bed.rings[REPORTING].publish(5);
    bed.direct.kick(REPORTING);
    assert_eq!(bed.rings[REPORTING].pop_used(), Some((5, 0)));
    assert!(bed.freed.lock().unwrap().len() <= usize::from(QUEUE_SIZE));
    bed.rings[REPORTING].publish(QUEUE_SIZE);
    bed.direct.kick(REPORTING);
    assert!(bed.direct.broken);
}

#[test]
fn queues_of_features_left_out_are_left_out_of_the_numbering() {
    let mut bed = Bed::new();
    bed.direct.device.deactivate();
    bed.activate(FEATURES & !(1 << 1));
    // Reporting has the number of statistics now.
    assert_eq!(bed.chain(2, &[(DATA, 0x1000, true)]), [(DATA, 0x1000)]);
    bed.direct.event(Event::Queue(3));
    bed.direct.event(Event::Queue(usize::MAX));
    assert!(!bed.direct.broken);
}

#[test]
fn the_target_is_told_and_what_the_guest_says_is_read() {
    let mut bed = Bed::new();
    bed.control.set_target(77);
    bed.direct.event(Event::Watched(0));
    assert_eq!(bed.direct.bell.told().config, 1);
    let mut target = [0; 4];
    let space = bed.direct.device.config().clone();
    space.read(0, &mut target);
    assert_eq!((u32::from_le_bytes(target), bed.control.target()), (77, 77));
    assert!(!space.write(0, &[1; 4]), "the target is not the guest's");
    assert!(space.write(4, &70u32.to_le_bytes()));
    bed.direct.event(Event::Config);
    assert_eq!(bed.control.actual(), 70);
    bed.direct.device.deactivate();
    bed.direct.device.reset();
    assert_eq!((bed.control.actual(), bed.control.target()), (0, 77));
    // Asked while nobody was there to hear it.
    bed.control.set_target(5);
    bed.activate(FEATURES);
    assert_eq!(bed.direct.bell.told().config, 2);
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let mut bed = Bed::new();
    assert!(bed.control.stats().is_none());
    bed.send_stats(&[(4, 1000), (5, 2000), (0xffff, u64::MAX)]);
    assert_eq!(bed.rings[STATS].pop_used(), None, "the buffer is kept");
    let stats = |bed: &Bed| bed.control.stats().unwrap().1;
    assert_eq!(
        stats(&bed),
        BTreeMap::from([(4, 1000), (5, 2000), (0xffff, u64::MAX)])
    );
    bed.control.request_stats();
    bed.direct.event(Event::Watched(0));
    assert!(bed.rings[STATS].pop_used().is_some());
    bed.send_stats(&[(4, 1)]);
    assert_eq!(stats(&bed), BTreeMap::from([(4, 1)]));
    // A rest gives the buffer back, and nothing twice.
    let rests = bed.direct.device.deactivate();
    assert!(bed.rings[STATS].pop_used().is_some());
    bed.direct.activate_with(FEATURES, rests);
    bed.send_stats(&[(4, 2)]);
    assert_eq!(stats(&bed), BTreeMap::from([(4, 2)]));
    assert_eq!(bed.rings[STATS].pop_used(), None);
    // Two buffers, enormous ones, and some that are not there.
    let many: Vec<_> = (0..5000).map(|n| (n, 1)).collect();
    bed.send_stats(&many);
    assert!(stats(&bed).len() <= 64);
    assert!(bed.rings[STATS].pop_used().is_some());
    for chain in [(HOLE, 100, false), (LIST, 100, true), (u64::MAX, 10, false)] {
        bed.rings[STATS].add(&[chain]);
        bed.direct.kick(STATS);
        assert!(bed.rings[STATS].pop_used().is_some());
        assert!(stats(&bed).is_empty());
    }
}

/// Bytes of a mapping that are resident.
fn resident(mem: &Memory, at: u64, len: usize) -> usize {
    let host = mem.get_host_address(GuestAddress(at)).unwrap();
    let mut pages = vec![0u8; len / 4096];
    // SAFETY: the range is mapped, and there is a byte for each of its pages.
    let result = unsafe { libc::mincore(host.cast(), len, pages.as_mut_ptr()) };
    assert_eq!(result, 0);
    pages.iter().filter(|page| **page & 1 != 0).count() * 4096
}

#[test]
fn released_memory_is_the_hosts_again_private_or_shared() {
    for shared in [false, true] {
        let mem = if shared {
            shared_memory(usize::try_from(HOLE).unwrap(), None)
        } else {
            memory()
        };
        let release = Box::new(Advise::new(MemoryCell::new(mem.clone())));
        let mut bed = Bed::with(release, Freed::default(), mem.clone());
        let len = 0x8_0000;
        let fill = vec![7; len];
        mem.write_slice(&fill, GuestAddress(DATA)).unwrap();
        assert_eq!(resident(&mem, DATA, len), len);
        let half = u32::try_from(len / 2).unwrap();
        bed.chain(REPORTING, &[(DATA, half, true)]);
        assert_eq!(resident(&mem, DATA, len), len / 2);
        let first = u32::try_from((DATA + u64::from(half)) >> 12).unwrap();
        let pages: Vec<u32> = (first..first + half / 4096).collect();
        bed.inflate(&pages);
        assert_eq!(resident(&mem, DATA, len), 0);
        // It can be used again at once.
        mem.write_slice(&fill, GuestAddress(DATA)).unwrap();
        let mut back = vec![0; len];
        mem.read_slice(&mut back, GuestAddress(DATA)).unwrap();
        assert_eq!(back, fill);
        // What has gone meanwhile is not touched.
        let gone = Advise::new(MemoryCell::new(mem));
        gone.release(GuestAddress(1 << 40), 0x1000);
        gone.release(GuestAddress(u64::MAX - 0xfff), 0x2000);
    }
}
