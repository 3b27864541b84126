//! Noise as a driver, for the block, the entropy and the balloon device; and the
//! two engines of the block device against each other.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/direct.rs"]
mod direct;
#[path = "support/disk.rs"]
mod disk;
#[path = "support/fuzz.rs"]
mod fuzz;
#[path = "support/rig.rs"]
mod rig;

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, Ordering},
};

use direct::Direct;
use disk::*;
use rig::*;
use vm_memory::{Address, Bytes, GuestAddress};
use walnut_devices::{block::*, virtio::*};

fn rounds(seed: u64, count: usize, run: impl Fn(&mut Vec<u8>)) {
    let mut rng = Rng(seed);
    for _ in 0..count {
        let len = 40 + usize::try_from(rng.below(1200)).unwrap();
        let mut data = noise(rng.next(), len);
        run(&mut data);
    }
}

#[test]
fn noise_does_no_harm_to_a_block_device_with_the_plain_engine() {
    rounds(1, 3000, |data| {
        data[0] &= !8;
        fuzz::block(data);
    });
}

#[test]
fn noise_does_no_harm_to_a_block_device_with_io_uring() {
    rounds(2, 1500, |data| {
        data[0] |= 8;
        fuzz::block(data);
    });
}

#[test]
fn noise_does_no_harm_to_the_entropy_device() {
    rounds(3, 2000, |data| fuzz::rng(data));
}

#[test]
fn noise_does_no_harm_to_the_balloon() {
    rounds(4, 2000, |data| fuzz::balloon(data));
}

/// Its kind, its sector, and its data.
type Request = (u32, u64, Vec<(u64, u32)>);

/// A device with one of the engines, and a request at a time.
struct Side {
    direct: Direct<Block>,
    mem: Memory,
    ring: Vring,
    file: File,
}

impl Side {
    fn new(engine: Engine) -> Side {
        let file = new_file();
        file.write_all_at(&noise(7, 1 << 20), 0).unwrap();
        let config = Config {
            engine,
            ..Config::default()
        };
        let device = Block::new(file.try_clone().unwrap().into(), config).unwrap();
        let mem = memory();
        let ring = Vring::new(&mem, RINGS, 256);
        let mut direct = Direct::new(device, mem.clone());
        direct.activate(VERSION_1 | 1 << 9, &[&ring]);
        Side {
            direct,
            mem,
            ring,
            file,
        }
    }

    /// Makes the requests available together; what came back of each.
    fn run(&mut self, requests: &[Request]) -> Vec<(u32, u8)> {
        let mut heads = Vec::new();
        for (n, (kind, sector, data)) in (0u64..).zip(requests) {
            let at = HEADER + n * 64;
            self.mem
                .write_slice(&header(*kind, *sector), GuestAddress(at))
                .unwrap();
            self.mem.write_obj(0xffu8, GuestAddress(at + 32)).unwrap();
            let mut chain = vec![(at, 16, false)];
            let writable = kind % 2 == 0;
            chain.extend(data.iter().map(|(at, len)| (*at, *len, writable)));
            chain.push((at + 32, 1, true));
            heads.push(self.ring.add(&chain));
        }
        self.direct.kick(0);
        let used: Vec<_> = std::iter::from_fn(|| self.ring.pop_used()).collect();
        assert_eq!(used.len(), requests.len());
        let outcome = |(n, head): (u64, &u16)| {
            let (_, len) = used.iter().find(|(used, _)| used == head).unwrap();
            let at = GuestAddress(HEADER + n * 64 + 32);
            (*len, self.mem.read_obj(at).unwrap())
        };
        (0u64..).zip(&heads).map(outcome).collect()
    }

    fn content(&self) -> (Vec<u8>, Vec<u8>) {
        let mut disk = vec![0; usize::try_from(SECTORS * 512 + 100).unwrap()];
        self.file.read_exact_at(&mut disk, 0).unwrap();
        let mut memory = vec![0; usize::try_from(HOLE - DATA).unwrap()];
        self.mem
            .read_slice(&mut memory, GuestAddress(DATA))
            .unwrap();
        (disk, memory)
    }
}

#[test]
fn both_engines_do_the_same() {
    let (mut plain, mut uring) = (Side::new(Engine::Plain), Side::new(Engine::IoUring));
    let mut rng = Rng(0x0b10_c000);
    for round in 0..400 {
        let seed = noise(rng.next(), 64 << 10);
        for side in [&plain, &uring] {
            side.mem.write_slice(&seed, GuestAddress(DATA)).unwrap();
        }
        // Requests that are under way together have nothing in common.
        let requests: Vec<_> = (0..1 + rng.below(12))
            .map(|n| {
                let kind = rng.pick(&[READ, READ, WRITE_OUT, WRITE_OUT, FLUSH, GET_ID, 99]);
                let sector = match rng.below(20) {
                    0 => SECTORS - rng.below(4),
                    1 => rng.next(),
                    _ => n * 160 + rng.below(64),
                };
                let mut at = DATA + n * 0x1_0000;
                let pieces = (0..rng.below(6)).map(|_| {
                    let len = match rng.below(10) {
                        0 => rng.below(1500),
                        _ => 512 * rng.below(16),
                    };
                    let piece = (at, u32::try_from(len).unwrap());
                    at += len + rng.below(300);
                    piece
                });
                (kind, sector, pieces.collect())
            })
            .collect();
        assert_eq!(plain.run(&requests), uring.run(&requests), "round {round}");
        if round % 20 == 19 {
            assert!(plain.content() == uring.content(), "round {round}");
        }
    }
}

#[test]
fn a_driver_that_changes_what_is_being_read_harms_only_itself() {
    for engine in ENGINES {
        let mut bed = Bed::over(new_file(), engine, Config::default());
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (mem, done) = (bed.mem.clone(), &done);
            let desc = bed.rings[0].desc;
            scope.spawn(move || {
                let mut rng = Rng(11);
                while !done.load(Ordering::Relaxed) {
                    let at = GuestAddress(desc + rng.below(16) * 16);
                    let word = match rng.below(4) {
                        0 => mem.write_obj(rng.pick(&[HEADER, DATA, HOLE, u64::MAX - 3]), at),
                        1 => {
                            mem.write_obj(rng.pick(&[1u32, 16, 512, 1 << 30]), at.unchecked_add(8))
                        }
                        2 => mem.write_obj(rng.u16() & 7, at.unchecked_add(12)),
                        _ => mem.write_obj(rng.u16() & 31, at.unchecked_add(14)),
                    };
                    word.unwrap();
                }
            });
            for round in 0..400u16 {
                for n in 0..64 {
                    bed.rings[0].publish((round + n) % 16);
                }
                for _ in 0..64 {
                    bed.next_used(0);
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        bed.restart();
        bed.still_works();
    }
}
