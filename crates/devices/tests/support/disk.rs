//! A block device on its thread, and a driver that asks one thing at a time.

#![allow(dead_code, reason = "every test program uses its part")]

use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt};

use vm_memory::{Bytes, GuestAddress};
use walnut_devices::{block::*, virtio::*};

use super::rig::{Rig, Rng, Vring};

pub(crate) const READ: u32 = 0;
pub(crate) const WRITE_OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const ZEROES: u32 = 13;

pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
pub(crate) const UNSUPP: u8 = 2;

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;

/// The file's whole sectors; it has 100 bytes more.
pub(crate) const SECTORS: u64 = 2048;
pub(crate) const ENGINES: [Engine; 2] = [Engine::Plain, Engine::IoUring];

pub(crate) const RINGS: u64 = 0x1_0000;
pub(crate) const HEADER: u64 = 0x4_0000;
pub(crate) const STATUS: u64 = 0x4_1000;
const SEGMENTS: u64 = 0x4_2000;
const MANY: u64 = 0x5_0000;
pub(crate) const DATA: u64 = 0x10_0000;
const MANY_DATA: u64 = 0x20_0000;
/// Where a second region begins.
pub(crate) const SEAM: u64 = 0x40_0000;
pub(crate) const SEAM_LEN: u64 = 0x40_0000;
/// Where there is none.
pub(crate) const HOLE: u64 = SEAM + SEAM_LEN;
pub(crate) const HOLE_END: u64 = 0x100_0000;

pub(crate) fn memory() -> Memory {
    let size = |len: u64| usize::try_from(len).unwrap();
    Memory::from_ranges(&[
        (GuestAddress(0), size(SEAM)),
        (GuestAddress(SEAM), size(SEAM_LEN)),
        (GuestAddress(HOLE_END), 0x1000),
    ])
    .unwrap()
}

pub(crate) fn new_file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512 + 100).unwrap();
    file
}

pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    (0..len.div_ceil(8))
        .flat_map(|_| rng.next().to_le_bytes())
        .take(len)
        .collect()
}

pub(crate) fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut raw = kind.to_le_bytes().to_vec();
    raw.extend([0; 4]);
    raw.extend(sector.to_le_bytes());
    raw
}

pub(crate) struct Bed {
    pub(crate) rig: Rig,
    pub(crate) mem: Memory,
    pub(crate) rings: Vec<Vring>,
    pub(crate) file: File,
    pub(crate) resizer: Resizer,
    pub(crate) features: u64,
    expected: BTreeMap<u64, Vec<u8>>,
}

/// One for each engine.
pub(crate) fn beds(config: Config) -> impl Iterator<Item = Bed> {
    ENGINES
        .into_iter()
        .map(move |engine| Bed::over(new_file(), engine, config.clone()))
}

impl Bed {
    pub(crate) fn over(file: File, engine: Engine, config: Config) -> Bed {
        let mut bed = Bed::idle(file, engine, config);
        bed.start();
        bed
    }

    /// A device whose driver has not come up.
    pub(crate) fn idle(file: File, engine: Engine, config: Config) -> Bed {
        let config = Config { engine, ..config };
        let device = Block::new(file.try_clone().unwrap().into(), config).unwrap();
        assert_eq!(device.engine(), engine);
        let resizer = device.resizer();
        let mem = memory();
        Bed {
            rig: Rig::new(device, mem.clone()),
            mem,
            rings: Vec::new(),
            file,
            resizer,
            features: VERSION_1 | EVENT_IDX | 1 << 9,
            expected: BTreeMap::new(),
        }
    }

    pub(crate) fn start(&mut self) {
        let queues = self.rig.port.queue_sizes().len() as u64;
        self.rings = (0..queues)
            .map(|n| Vring::new(&self.mem, RINGS + n * 0x4000, 256))
            .collect();
        let rings: Vec<_> = self.rings.iter().map(Some).collect();
        self.rig.activate(self.features, &rings);
    }

    pub(crate) fn restart(&mut self) {
        self.rig.reset();
        self.start();
    }

    pub(crate) fn put(&self, at: u64, data: &[u8]) {
        self.mem.write_slice(data, GuestAddress(at)).unwrap();
    }

    pub(crate) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.mem.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    pub(crate) fn on_disk(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.file.read_exact_at(&mut data, at).unwrap();
        data
    }

    /// Waits for the next chain used.
    pub(crate) fn next_used(&mut self, queue: usize) -> (u16, u32) {
        self.rig.kick(queue);
        let mut used = None;
        let ring = &mut self.rings[queue];
        self.rig.until("used", || {
            used = ring.pop_used();
            used.is_some()
        });
        used.unwrap()
    }

    /// Bytes written, of a chain that may be anything.
    pub(crate) fn raw_chain(&mut self, chain: &[(u64, u32, bool)]) -> u32 {
        let head = self.rings[0].add(chain);
        let (used, len) = self.next_used(0);
        assert_eq!(used, head);
        len
    }

    /// The same with a status at [`STATUS`].
    pub(crate) fn chain(&mut self, chain: &[(u64, u32, bool)]) -> (u8, u32) {
        self.put(STATUS, &[0xff]);
        let used = self.raw_chain(chain);
        (self.get(STATUS, 1)[0], used)
    }

    pub(crate) fn request(
        &mut self,
        kind: u32,
        sector: u64,
        data: &[(u64, u32, bool)],
    ) -> (u8, u32) {
        self.put(HEADER, &header(kind, sector));
        let mut chain = vec![(HEADER, 16, false)];
        chain.extend(data);
        chain.push((STATUS, 1, true));
        self.chain(&chain)
    }

    pub(crate) fn read(&mut self, sector: u64, data: &[(u64, u32)]) -> (u8, u32) {
        let data: Vec<_> = data.iter().map(|(at, len)| (*at, *len, true)).collect();
        self.request(READ, sector, &data)
    }

    pub(crate) fn write(&mut self, sector: u64, data: &[(u64, u32)]) -> (u8, u32) {
        let data: Vec<_> = data.iter().map(|(at, len)| (*at, *len, false)).collect();
        self.request(WRITE_OUT, sector, &data)
    }

    pub(crate) fn segments(&mut self, kind: u32, segments: &[(u64, u32, u32)]) -> (u8, u32) {
        let mut raw = Vec::new();
        for (sector, count, flags) in segments {
            raw.extend(sector.to_le_bytes());
            raw.extend(count.to_le_bytes());
            raw.extend(flags.to_le_bytes());
        }
        self.put(SEGMENTS, &raw);
        let len = u32::try_from(raw.len()).unwrap();
        self.request(kind, 0, &[(SEGMENTS, len, false)])
    }

    /// Makes a write of one sector available, with what is told apart by `round`.
    pub(crate) fn publish_write_on(&mut self, queue: usize, n: u16, sector: u64, round: u64) {
        let index = queue as u64 * 80 + u64::from(n);
        let (at, data_at) = (MANY + index * 64, MANY_DATA + index * 512);
        let data = noise(round << 32 | sector, 512);
        self.put(at, &header(WRITE_OUT, sector));
        self.put(data_at, &data);
        self.expected.insert(sector, data);
        self.rings[queue].add(&[(at, 16, false), (data_at, 512, false), (at + 32, 1, true)]);
    }

    /// What has been written is in the file.
    pub(crate) fn assert_written(&self) {
        for (sector, data) in &self.expected {
            assert_eq!(&self.on_disk(sector * 512, 512), data, "sector {sector}");
        }
    }

    pub(crate) fn still_works(&mut self) {
        let data = noise(99, 512);
        self.put(DATA, &data);
        assert_eq!(self.write(77, &[(DATA, 512)]), (OK, 1));
        assert_eq!(self.read(77, &[(DATA + 512, 512)]), (OK, 513));
        assert_eq!(self.get(DATA + 512, 512), data);
    }
}
