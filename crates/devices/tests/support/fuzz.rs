//! Any bytes as the deeds of a driver: `block`, `rng` and `balloon` each take an
//! input of a fuzzer's, and panic if the device does what it must not: write
//! outside of the buffers that it was given for writing, lose a chain, use one
//! twice, or serve nobody after a reset. The program that includes this has `direct`
//! and `rig` beside it; `fuzz/` at the root of the repository is one.

#![allow(dead_code, reason = "every test program uses its part")]

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use walnut_devices::{
    balloon::{self, Balloon},
    block::{self, Block},
    limit::{BucketConfig, LimitConfig},
    rng::Rng as Entropy,
    virtio::*,
};

use super::{
    direct::Direct,
    rig::{INDIRECT, NEXT, PATIENCE, Vring, WRITE},
};

pub(crate) const PAGE: u64 = 4096;
/// Rings, headers and tables are below, buffers above.
pub(crate) const DATA: u64 = 0x2_0000;
pub(crate) const TABLES: u64 = 0x1_8000;
const SEAM: u64 = 0x2_8000;
const HOLE: u64 = 0x3_0000;
const HOLE_END: u64 = 0x4_0000;
pub(crate) const END: u64 = 0x4_4000;
pub(crate) const RINGS: u64 = 0x1000;
pub(crate) const RING_SIZE: u16 = 16;
const DISK: u64 = 128 * 512;

/// Guest memory, all zeroes: always the same, as making it takes most of the time
/// that an input does.
pub(crate) fn memory() -> Memory {
    let part = |from: u64, to: u64| (GuestAddress(from), usize::try_from(to - from).unwrap());
    let parts = [part(0, SEAM), part(SEAM, HOLE), part(HOLE_END, END)];
    thread_local! {
        static MEMORY: RefCell<Option<Memory>> = const { RefCell::new(None) };
    }
    let make = || Memory::from_ranges(&parts).unwrap();
    let memory = MEMORY.with_borrow_mut(|memory| memory.get_or_insert_with(make).clone());
    for (at, len) in parts {
        memory.write_slice(&ZEROES[..len], at).unwrap();
    }
    memory
}

thread_local! {
    /// Memory before and after a kick.
    static PICTURES: Cell<(Vec<u8>, Vec<u8>)> = const { Cell::new((Vec::new(), Vec::new())) };
}

static ZEROES: [u8; 0x3_0000] = [0; 0x3_0000];

/// The input, of which there is always more: zeroes.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl Input<'_> {
    pub(crate) fn u8(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from(self.u8()) << 8 | u16::from(self.u8())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from(self.u16()) << 16 | u32::from(self.u16())
    }

    pub(crate) fn below(&mut self, n: u16) -> u16 {
        self.u8() as u16 % n
    }

    /// An address, mostly of a buffer.
    pub(crate) fn address(&mut self) -> u64 {
        const EDGES: [u64; 8] = [
            SEAM - 256,
            HOLE - 512,
            HOLE,
            HOLE_END - 8,
            END - 16,
            END,
            u64::MAX - 511,
            u64::MAX,
        ];
        match self.u8() {
            // Anything, rings and tables too.
            0 => u64::from(self.u32()) % END,
            1 => u64::from(self.u32()) << 32 | u64::from(self.u32()),
            n @ 2..16 => EDGES[usize::from(n % 8)] - u64::from(self.u8() % 2),
            n => DATA + u64::from(n) * 64 + u64::from(self.u8() % 64),
        }
    }

    pub(crate) fn len(&mut self) -> u32 {
        match self.u8() {
            0 => self.u32(),
            1..8 => 0,
            n @ 8..16 => u32::from(n - 8),
            n @ 16..64 => u32::from(n) % 8 * 512 + u32::from(self.u8() % 3),
            n @ 64..128 => u32::from(n) % 8 * 512,
            n => u32::from(n),
        }
    }
}

/// One queue, and what its driver knows about it.
pub(crate) struct Line {
    pub(crate) ring: Vring,
    /// Heads published and not yet used, with how often.
    out: BTreeMap<u16, u32>,
    /// The driver has written into its rings by hand: nothing is known.
    wild: bool,
}

pub(crate) struct Fuzz<D> {
    pub(crate) direct: Direct<D>,
    pub(crate) mem: Memory,
    pub(crate) lines: Vec<Line>,
    features: u64,
    /// The device may write beside its writable buffers.
    pub(crate) free: bool,
    /// How many chains the device may keep, by queue.
    pub(crate) keeps: fn(usize) -> u32,
}

impl<D: Device> Fuzz<D> {
    pub(crate) fn new(device: D, features: u64, cell: MemoryCell) -> Self {
        let mem = (*cell.memory()).clone();
        let mut direct = Direct::new(device, mem.clone());
        direct.memory = cell;
        let mut fuzz = Self {
            direct,
            mem,
            lines: Vec::new(),
            features,
            free: false,
            keeps: |_| 0,
        };
        fuzz.start();
        fuzz
    }

    fn start(&mut self) {
        let count = self.direct.device.queue_sizes().len() as u64;
        self.lines = (0..count)
            .map(|n| Line {
                ring: Vring::new(&self.mem, RINGS + n * 0x4000, RING_SIZE),
                out: BTreeMap::new(),
                wild: false,
            })
            .collect();
        let rings: Vec<_> = self.lines.iter().map(|line| &line.ring).collect();
        self.direct.activate(self.features, &rings);
    }

    pub(crate) fn restart(&mut self) {
        self.direct.drain();
        self.direct.device.deactivate();
        self.direct.device.reset();
        self.start();
    }

    pub(crate) fn rest(&mut self) {
        self.direct.device.quiesce();
        self.direct.drain();
        let broken = self.direct.broken;
        let queues = self.direct.device.deactivate();
        if broken {
            self.direct.device.reset();
            self.start();
        } else {
            self.direct.activate_with(self.features, queues);
        }
    }

    /// Whether two ranges have something in common.
    fn meet(a: &Range<u64>, b: &Range<u64>) -> bool {
        a.start < b.end && b.start < a.end
    }

    /// Follows a chain as the specification has it, and notes what may be written
    /// and what tables are read.
    fn walk(&self, line: &Line, head: u16, may: &mut Vec<Range<u64>>, read: &mut Vec<Range<u64>>) {
        let (mut table, mut size, mut index) = (line.ring.desc, RING_SIZE, head);
        let mut indirect = false;
        // More than any device follows.
        for _ in 0..300 {
            if index >= size {
                return;
            }
            let at = GuestAddress(table.wrapping_add(u64::from(index) * 16));
            let Ok(raw) = self.mem.read_obj::<[u8; 16]>(at) else {
                return;
            };
            let addr = u64::from_le_bytes(raw[..8].try_into().unwrap());
            let len = u32::from_le_bytes(raw[8..12].try_into().unwrap());
            let flags = u16::from_le_bytes(raw[12..14].try_into().unwrap());
            let next = u16::from_le_bytes(raw[14..].try_into().unwrap());
            if flags & INDIRECT != 0 {
                if indirect {
                    return;
                }
                (table, index, indirect) = (addr, 0, true);
                size = u16::try_from(len / 16).unwrap_or(u16::MAX);
                read.push(addr..addr.saturating_add(u64::from(len)));
                continue;
            }
            if flags & WRITE != 0 {
                may.push(addr..addr.saturating_add(u64::from(len)));
            }
            if flags & NEXT == 0 {
                return;
            }
            index = next;
        }
    }

    /// Takes a picture of memory.
    fn picture(&self, all: &mut Vec<u8>) {
        all.resize(usize::try_from(END).unwrap(), 0);
        let _ = self.mem.read(&mut all[..0x3_0000], GuestAddress(0));
        let _ = self.mem.read(&mut all[0x4_0000..], GuestAddress(HOLE_END));
    }

    /// Kicks a queue, and checks what came of it.
    pub(crate) fn kick(&mut self, queue: usize) {
        let mut may = Vec::new();
        let mut read = Vec::new();
        for line in &self.lines {
            for head in line.out.keys() {
                self.walk(line, *head, &mut may, &mut read);
            }
            let ring = &line.ring;
            read.push(ring.desc..ring.desc + u64::from(RING_SIZE) * 16);
            read.push(ring.avail..ring.avail + u64::from(RING_SIZE) * 2 + 6);
        }
        // What the device writes may change what it reads next.
        let known = !self.free
            && !self.lines.iter().any(|line| line.wild)
            && !may.iter().any(|a| read.iter().any(|b| Self::meet(a, b)));
        let used = self.lines.iter().map(|line| {
            let used = line.ring.used;
            used..used + u64::from(RING_SIZE) * 8 + 6
        });
        let used: Vec<_> = used.collect();
        let clobbered = may.iter().any(|a| used.iter().any(|b| Self::meet(a, b)));
        may.extend(used);
        let (mut before, mut after) = PICTURES.take();
        if known {
            self.picture(&mut before);
        }
        self.direct.kick(queue);
        if known {
            const PART: u64 = 512;
            self.picture(&mut after);
            let part = usize::try_from(PART).unwrap();
            let pages = before.chunks(part).zip(after.chunks(part));
            for (page, (old, new)) in (0u64..).zip(pages).filter(|(_, (old, new))| old != new) {
                for (at, (old, new)) in (page * PART..).zip(old.iter().zip(new)) {
                    let allowed = old == new || may.iter().any(|range| range.contains(&at));
                    assert!(allowed, "{at:#x} was written to");
                }
            }
        }
        PICTURES.set((before, after));
        if known && !clobbered && !self.direct.broken {
            self.settle(queue);
        } else {
            for line in &mut self.lines {
                line.wild = true;
            }
        }
        if self.direct.broken {
            self.restart();
        }
    }

    /// Every chain has been used once, but for those that have to wait.
    fn settle(&mut self, queue: usize) {
        let waits = self.direct.device.deadline().is_some();
        let line = &mut self.lines[queue];
        while let Some((head, _)) = line.ring.pop_used() {
            let left = line.out.get_mut(&head).expect("a chain was used twice");
            *left -= 1;
            if *left == 0 {
                line.out.remove(&head);
            }
        }
        let kept: u32 = line.out.values().sum();
        assert!(waits || kept <= (self.keeps)(queue), "chains were lost");
    }

    fn descriptor(&mut self, input: &mut Input<'_>, at: u64, last: u16) {
        let (addr, len) = (input.address(), input.len());
        let bits = input.u8();
        let mut flags = u16::from(bits & 3);
        if bits > 0xe0 {
            flags |= INDIRECT;
        }
        let next = input.below(last + 1);
        let (addr, len) = if flags & INDIRECT != 0 && bits > 0xe8 {
            (TABLES, 16 * u32::from(input.below(20)))
        } else {
            (addr, len)
        };
        let raw = [&addr.to_le_bytes()[..], &len.to_le_bytes()].concat();
        let raw = [&raw[..], &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        self.mem.write_slice(&raw, GuestAddress(at)).unwrap();
    }

    pub(crate) fn publish(&mut self, queue: usize, head: u16) {
        let line = &mut self.lines[queue];
        // No more than the ring holds, or it is no queue any more.
        if line.out.values().sum::<u32>() < u32::from(RING_SIZE) {
            *line.out.entry(head).or_default() += 1;
            line.ring.publish(head);
        }
    }

    /// Does what the input says; `special` are the device's own deeds.
    pub(crate) fn run(
        &mut self,
        mut input: Input<'_>,
        mut special: impl FnMut(&mut Self, &mut Input<'_>),
    ) {
        while !input.0.is_empty() {
            let queues = u16::try_from(self.lines.len()).unwrap();
            match input.u8() % 16 {
                0..4 => {
                    let queue = usize::from(input.below(queues));
                    let index = input.below(RING_SIZE);
                    let at = self.lines[queue].ring.desc + u64::from(index) * 16;
                    self.descriptor(&mut input, at, RING_SIZE);
                }
                4 => {
                    let at = TABLES + u64::from(input.below(20)) * 16;
                    self.descriptor(&mut input, at, 20);
                }
                5..7 => {
                    let queue = usize::from(input.below(queues));
                    let head = input.below(RING_SIZE);
                    self.publish(queue, head);
                }
                7..9 => {
                    let queue = usize::from(input.below(queues));
                    self.kick(queue);
                }
                9 => {
                    self.direct.event(match input.u8() % 5 {
                        0 => Event::Watched(u32::from(input.u8())),
                        1 => Event::Deadline,
                        2 => Event::Config,
                        _ => Event::Queue(usize::from(input.u16())),
                    });
                    // What was begun must not meet descriptors of a later time.
                    self.direct.drain();
                }
                10 => match input.u8() {
                    // A head, or an index, that cannot be.
                    0 => {
                        self.lines[0].wild = true;
                        let idx = input.u16();
                        self.lines[0].ring.set_avail_idx(idx);
                    }
                    1 => {
                        self.lines[0].wild = true;
                        let head = input.u16();
                        self.lines[0].ring.publish(head);
                    }
                    // Anything anywhere.
                    2 => {
                        self.lines.iter_mut().for_each(|line| line.wild = true);
                        let at = u64::from(input.u32()) % DATA;
                        let word = input.u32();
                        let _ = self.mem.write_obj(word, GuestAddress(at));
                    }
                    3..32 => self.rest(),
                    32..40 => self.restart(),
                    _ => {}
                },
                _ => special(self, &mut input),
            }
        }
        for queue in 0..self.lines.len() {
            self.kick(queue);
        }
        self.direct.drain();
        self.restart();
    }

    /// Whatever was done: after the reset a chain is served. Bytes written to it.
    pub(crate) fn serves(&mut self, queue: usize, chain: &[(u64, u32, bool)]) -> u32 {
        self.lines[queue].ring.add(chain);
        let start = Instant::now();
        self.direct.kick(queue);
        loop {
            if let Some((_, len)) = self.lines[queue].ring.pop_used() {
                return len;
            }
            assert!(start.elapsed() < PATIENCE, "a new driver is not served");
            std::thread::sleep(Duration::from_micros(50));
            self.direct.event(Event::Deadline);
        }
    }
}

/// A disk's content that tells what was read from it.
fn disk() -> File {
    let file = File::from(memfd_create("disk", MFdFlags::MFD_CLOEXEC).unwrap());
    let content: Vec<u8> = (0..DISK).map(|at| at.to_le_bytes()[1] | 1).collect();
    file.write_all_at(&content, 0).unwrap();
    file
}

/// The block device. The first byte says how it is made.
pub(crate) fn block(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.u8();
    let slow = BucketConfig {
        size: 2000,
        burst: 0,
        refill: Duration::from_micros(20),
    };
    let config = block::Config {
        read_only: kind & 1 != 0,
        queues: 1 + u16::from(kind >> 1 & 1),
        cache: match kind & 4 {
            0 => block::Cache::Writeback,
            _ => block::Cache::Volatile,
        },
        engine: match kind & 8 {
            0 => block::Engine::Plain,
            _ => block::Engine::Auto,
        },
        limit: LimitConfig {
            bytes: (kind & 16 != 0).then_some(slow),
            operations: None,
        },
        ..block::Config::default()
    };
    let file = disk();
    let device = Block::new(file.try_clone().unwrap().into(), config).unwrap();
    let resizer = device.resizer();
    let features = device.features() & !(u64::from(kind & 32) << 4);
    let mut fuzz = Fuzz::new(device, features, MemoryCell::new(memory()));
    fuzz.run(input, |fuzz, input| {
        let queue = usize::from(input.below(u16::try_from(fuzz.lines.len()).unwrap()));
        match input.u8() {
            0..8 => {
                let len = u64::from(input.u16()) % (2 * DISK);
                file.set_len(len).unwrap();
                if input.u8() % 2 == 0 {
                    resizer.resize().unwrap();
                }
            }
            // A header, and a chain that begins with it.
            n => {
                let index = input.below(RING_SIZE);
                let at = TABLES + 0x1000 + u64::from(index) * 16;
                let kind = [0u16, 1, 0, 1, 4, 8, 11, 13, 0xff][usize::from(n) % 9];
                let sector = match input.u8() {
                    0 => u64::from(input.u32()) << 32 | u64::from(input.u32()),
                    n => u64::from(n) % 132,
                };
                let head = [u64::from(kind), sector];
                fuzz.mem.write_obj(head[0], GuestAddress(at)).unwrap();
                fuzz.mem.write_obj(head[1], GuestAddress(at + 8)).unwrap();
                let (data, len) = (input.address(), input.len());
                let (two, three) = ((index + 1) % RING_SIZE, (index + 2) % RING_SIZE);
                let write = if kind.is_multiple_of(2) { WRITE } else { 0 };
                let ring = &fuzz.lines[queue].ring;
                ring.write_desc(index, at, 16, NEXT, two);
                ring.write_desc(two, data, len, NEXT | write, three);
                ring.write_desc(three, DATA + u64::from(index) * 8, 1, WRITE, 0);
                fuzz.publish(queue, index);
                if n % 2 == 0 {
                    fuzz.kick(queue);
                }
            }
        }
    });
    fuzz.mem.write_obj(8u128, GuestAddress(TABLES)).unwrap();
    let status = DATA + 100;
    fuzz.mem.write_obj(0xffu8, GuestAddress(status)).unwrap();
    let asked = [(TABLES, 16, false), (DATA, 20, true), (status, 1, true)];
    assert_eq!(fuzz.serves(0, &asked), 21);
    assert_eq!(fuzz.mem.read_obj::<u8>(GuestAddress(status)).unwrap(), 0);
}

/// The entropy device.
pub(crate) fn rng(data: &[u8]) {
    let mut input = Input(data);
    let slow = BucketConfig {
        size: 4096,
        burst: 100,
        refill: Duration::from_micros(20),
    };
    let limit = LimitConfig {
        bytes: (input.u8() % 2 == 0).then_some(slow),
        operations: None,
    };
    let device = Entropy::new(limit);
    let features = device.features();
    let mut fuzz = Fuzz::new(device, features, MemoryCell::new(memory()));
    fuzz.run(input, |fuzz, input| {
        let head = input.below(RING_SIZE);
        fuzz.publish(0, head);
        fuzz.kick(0);
    });
    assert_eq!(fuzz.serves(0, &[(DATA, 64, true)]), 64);
}

/// Only pages that are there may be released.
#[derive(Debug)]
struct Checked(MemoryCell);

impl balloon::Release for Checked {
    fn release(&self, at: GuestAddress, len: u64) {
        assert!(at.0.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0);
        let end = at.0.checked_add(len).expect("it wraps");
        assert!(end <= HOLE || (at.0 >= HOLE_END && end <= END), "{at:?}");
        balloon::Advise::new(self.0.clone()).release(at, len);
    }
}

/// The balloon. What it releases becomes zero, so all of memory may change.
pub(crate) fn balloon(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.u8();
    let config = balloon::Config {
        statistics: kind & 1 == 0,
        ..balloon::Config::default()
    };
    let cell = MemoryCell::new(memory());
    let device = Balloon::new(config, Box::new(Checked(cell.clone()))).unwrap();
    let control = device.control();
    let features = device.features();
    let mut fuzz = Fuzz::new(device, features, cell);
    fuzz.free = true;
    // One buffer of statistics.
    fuzz.keeps = |queue| u32::from(queue == 2);
    fuzz.run(input, |fuzz, input| match input.u8() {
        0..64 => {
            control.set_target(input.u32());
            fuzz.direct.event(Event::Watched(0));
        }
        64..96 => {
            control.request_stats();
            fuzz.direct.event(Event::Watched(0));
        }
        n => {
            let queues = u16::try_from(fuzz.lines.len()).unwrap();
            let queue = usize::from(input.below(queues));
            let index = input.below(RING_SIZE);
            let at = match n % 2 {
                0 => input.address(),
                _ => u64::from(input.u8()) * PAGE,
            };
            let len = match input.u8() % 4 {
                0 => input.len(),
                n => u32::from(n) * 4096,
            };
            let write = if queue > 1 { WRITE } else { 0 };
            fuzz.lines[queue].ring.write_desc(index, at, len, write, 0);
            fuzz.publish(queue, index);
            fuzz.kick(queue);
        }
    });
    let _ = (control.actual(), control.stats());
    assert_eq!(fuzz.serves(0, &[(DATA, 4, false)]), 0);
}
