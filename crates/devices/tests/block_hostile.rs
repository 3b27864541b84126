//! The block device against a driver that keeps to nothing.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/direct.rs"]
mod direct;
#[path = "support/disk.rs"]
mod disk;
#[path = "support/rig.rs"]
mod rig;

use std::{
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, Ordering},
};

use direct::Direct;
use disk::*;
use rig::*;
use vm_memory::{Bytes, GuestAddress};
use walnut_devices::{block::*, virtio::*};

#[test]
fn chains_may_cross_regions_but_not_holes() {
    for mut bed in beds(Config::default()) {
        let data = noise(3, 4096);
        bed.put(SEAM - 1024, &data);
        assert_eq!(bed.write(0, &[(SEAM - 1024, 4096)]), (OK, 1));
        assert_eq!(bed.on_disk(0, 4096), data);
        assert_eq!(bed.read(0, &[(SEAM - 2048, 4096)]), (OK, 4097));
        assert_eq!(bed.get(SEAM - 2048, 4096), data);
        for at in [HOLE - 512, HOLE, HOLE_END - 512, 1 << 40] {
            assert_eq!(bed.read(0, &[(at, 1024)]), (IOERR, 1), "{at:#x}");
            assert_eq!(bed.write(0, &[(at, 1024)]), (IOERR, 1), "{at:#x}");
            assert_eq!(bed.read(0, &[(DATA, 512), (at, 1024)]), (IOERR, 1));
        }
        assert_eq!(bed.on_disk(0, 4096), data);
    }
}

#[test]
fn addresses_that_wrap_are_errors() {
    for mut bed in beds(Config::default()) {
        for (at, len) in [
            (u64::MAX - 511, 1024),
            (u64::MAX, 512),
            (0u64.wrapping_sub(512), 512),
        ] {
            assert_eq!(bed.read(0, &[(at, len)]), (IOERR, 1));
            assert_eq!(bed.write(0, &[(at, len)]), (IOERR, 1));
        }
        // The header, and the status.
        let chain = [(u64::MAX - 7, 16, false), (STATUS, 1, true)];
        assert_eq!(bed.chain(&chain), (IOERR, 1));
        bed.put(HEADER, &header(4, 0));
        let chain = [(HEADER, 16, false), (u64::MAX - 3, 5, true)];
        assert_eq!(bed.raw_chain(&chain), 0);
        bed.still_works();
    }
}

#[test]
fn odd_and_empty_lengths_are_errors() {
    for mut bed in beds(Config::default()) {
        for len in [1, 511, 513, 1000] {
            assert_eq!(bed.read(0, &[(DATA, len)]), (IOERR, 1));
            assert_eq!(bed.write(0, &[(DATA, len)]), (IOERR, 1));
        }
        assert_eq!(bed.read(0, &[]), (IOERR, 1));
        assert_eq!(bed.write(0, &[]), (IOERR, 1));
        assert_eq!(bed.read(0, &[(DATA, 511), (DATA, 1)]), (OK, 513));
        // Larger than any request that the driver was allowed.
        let huge = [(DATA, 4 << 20); 20];
        assert_eq!(bed.read(0, &huge), (IOERR, 1));
        bed.still_works();
    }
}

#[test]
fn unreadable_headers_are_errors() {
    for mut bed in beds(Config::default()) {
        for at in [HOLE, HOLE - 8, 1 << 50] {
            assert_eq!(bed.chain(&[(at, 16, false), (STATUS, 1, true)]), (IOERR, 1));
        }
        bed.put(HEADER, &header(4, 0));
        for len in [1, 8, 15] {
            assert_eq!(
                bed.chain(&[(HEADER, len, false), (STATUS, 1, true)]),
                (IOERR, 1)
            );
        }
        // None at all, one that the device may only write, and one after the data.
        assert_eq!(bed.chain(&[(STATUS, 1, true)]), (IOERR, 1));
        assert_eq!(
            bed.chain(&[(HEADER, 16, true), (STATUS, 1, true)]),
            (IOERR, 1)
        );
        let chain = [(DATA, 512, true), (HEADER, 16, false), (STATUS, 1, true)];
        assert_eq!(bed.chain(&chain), (IOERR, 1));
        bed.still_works();
    }
}

#[test]
fn without_a_status_byte_a_chain_is_returned_unused() {
    for mut bed in beds(Config::default()) {
        bed.put(HEADER, &header(1, 0));
        bed.put(DATA, &[7; 512]);
        let chains: [&[(u64, u32, bool)]; 4] = [
            &[(HEADER, 16, false)],
            &[(HEADER, 16, false), (DATA, 512, false)],
            &[(HEADER, 16, false), (DATA, 512, false), (HOLE, 1, true)],
            &[(HEADER, 16, false), (DATA, 512, false), (STATUS, 0, true)],
        ];
        for chain in chains {
            assert_eq!(bed.raw_chain(chain), 0);
        }
        assert_eq!(bed.on_disk(0, 512), [0; 512], "nothing was written");
        bed.still_works();
    }
}

#[test]
fn sectors_out_of_range_are_errors() {
    for mut bed in beds(Config::default()) {
        assert_eq!(bed.read(SECTORS - 1, &[(DATA, 512)]), (OK, 513));
        for sector in [
            SECTORS,
            SECTORS - 1,
            SECTORS + 1,
            1 << 54,
            (1 << 55) - 1,
            1 << 55,
            1 << 63,
            u64::MAX / 512,
            u64::MAX - 1,
            u64::MAX,
        ] {
            assert_eq!(bed.read(sector, &[(DATA, 1024)]), (IOERR, 1), "{sector:#x}");
            assert_eq!(
                bed.write(sector, &[(DATA, 1024)]),
                (IOERR, 1),
                "{sector:#x}"
            );
            for kind in [DISCARD, ZEROES] {
                assert_eq!(
                    bed.segments(kind, &[(sector, 2, 0)]),
                    (IOERR, 1),
                    "{sector:#x}"
                );
            }
        }
        assert_eq!(bed.file.metadata().unwrap().len(), SECTORS * 512 + 100);
    }
}

#[test]
fn chains_without_an_end_are_returned_unused() {
    for mut bed in beds(Config::default()) {
        bed.put(HEADER, &header(0, 0));
        let ring = &mut bed.rings[0];
        // A loop, a next that is out of range, an indirect table within one, one that
        // is too long, one that is not whole, one outside of memory.
        ring.write_desc(10, HEADER, 16, NEXT, 11);
        ring.write_desc(11, DATA, 512, NEXT | WRITE, 11);
        ring.write_desc(20, HEADER, 16, NEXT, 256);
        ring.write_desc(21, HEADER, 16, NEXT, 0xffff);
        let (table, endless) = (DATA, DATA + 0x10_0000);
        let mem = bed.mem.clone();
        let desc = |at: u64, addr: u64, len: u32, flags: u16, next: u16| {
            let raw = [&addr.to_le_bytes()[..], &len.to_le_bytes()].concat();
            let raw = [&raw[..], &flags.to_le_bytes(), &next.to_le_bytes()].concat();
            mem.write_slice(&raw, GuestAddress(at)).unwrap();
        };
        desc(table, HEADER, 16, NEXT, 1);
        desc(table + 16, table, 32, INDIRECT, 0);
        for n in 0..60_000u16 {
            desc(endless + u64::from(n) * 16, HEADER, 1, NEXT, n + 1);
        }
        ring.write_desc(30, table, 32, INDIRECT, 0);
        ring.write_desc(31, endless, 60_000 * 16, INDIRECT, 0);
        ring.write_desc(32, table, 31, INDIRECT, 0);
        ring.write_desc(33, HOLE, 32, INDIRECT, 0);
        ring.write_desc(34, endless, !15, INDIRECT, 0);
        for head in [10, 20, 21, 30, 31, 32, 33, 34] {
            bed.rings[0].publish(head);
            assert_eq!(bed.next_used(0), (head, 0));
        }
        bed.still_works();
    }
}

#[test]
fn one_head_published_twice_is_served_twice_and_harms_nothing() {
    for mut bed in beds(Config::default()) {
        bed.put(DATA, &noise(4, 512));
        bed.put(HEADER, &header(1, 9));
        let ring = &mut bed.rings[0];
        ring.write_desc(0, HEADER, 16, NEXT, 1);
        ring.write_desc(1, DATA, 512, NEXT, 2);
        ring.write_desc(2, STATUS, 1, WRITE, 0);
        for _ in 0..200 {
            ring.publish(0);
        }
        for _ in 0..200 {
            assert_eq!(bed.next_used(0), (0, 1));
        }
        assert_eq!(bed.on_disk(9 * 512, 512), noise(4, 512));
        bed.still_works();
    }
}

#[test]
fn a_head_or_an_index_out_of_range_breaks_the_device_until_its_reset() {
    for mut bed in beds(Config::default()) {
        for breakage in 0..3 {
            match breakage {
                0 => bed.rings[0].publish(256),
                1 => bed.rings[0].publish(0xffff),
                _ => {
                    let idx = bed.rings[0].avail_idx.wrapping_add(257);
                    bed.rings[0].set_avail_idx(idx);
                }
            }
            bed.rig.kick(0);
            let bell = bed.rig.bell.clone();
            bed.rig.until("broken", || bell.told().broken);
            bed.restart();
            bed.still_works();
        }
    }
}

#[test]
fn broken_with_requests_in_flight_it_can_still_be_reset() {
    for mut bed in beds(Config::default()) {
        for round in 0..50 {
            for n in 0..20u16 {
                bed.publish_write_on(0, n, u64::from(n), 1);
            }
            bed.rings[0].publish(0xfff0);
            bed.rig.kick(0);
            if round % 2 == 0 {
                let bell = bed.rig.bell.clone();
                bed.rig.until("broken", || bell.told().broken);
            }
            bed.restart();
        }
        bed.still_works();
    }
}

#[test]
fn a_pause_and_a_reset_come_though_the_driver_never_stops() {
    for mut bed in beds(Config::default()) {
        for reset in [false, true] {
            bed.restart();
            bed.put(HEADER, &header(WRITE_OUT, 0));
            let ring = &bed.rings[0];
            ring.write_desc(0, HEADER, 16, NEXT, 1);
            ring.write_desc(1, DATA, 4096, NEXT, 2);
            ring.write_desc(2, STATUS, 1, WRITE, 0);
            let (used, mut ring) = (ring.used, bed.rings.remove(0));
            let (mem, port) = (bed.mem.clone(), bed.rig.port.clone());
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let used: u16 = mem.read_obj(GuestAddress(used + 2)).unwrap();
                        if ring.avail_idx.wrapping_sub(used) < 200 {
                            ring.publish(0);
                        }
                        port.kick(0).unwrap().write(1).unwrap();
                    }
                });
                bed.rig.until("under way", || {
                    let used: u16 = bed.mem.read_obj(GuestAddress(used + 2)).unwrap();
                    used > 100
                });
                if reset {
                    bed.rig.reset();
                } else {
                    assert!(bed.rig.port.pause(LIMIT).is_some());
                    bed.rig.port.resume();
                }
                done.store(true, Ordering::Relaxed);
            });
        }
        bed.restart();
        bed.still_works();
    }
}

#[test]
fn told_to_be_quiet_it_begins_nothing_new() {
    let config = Config {
        engine: Engine::IoUring,
        ..Config::default()
    };
    let device = Block::new(new_file().into(), config).unwrap();
    let mem = memory();
    let mut ring = Vring::new(&mem, RINGS, 256);
    let mut direct = Direct::new(device, mem.clone());
    direct.activate(VERSION_1, &[&ring]);
    mem.write_slice(&header(READ, 0), GuestAddress(HEADER))
        .unwrap();
    ring.write_desc(0, HEADER, 16, NEXT, 1);
    ring.write_desc(1, DATA, 512, NEXT | WRITE, 2);
    ring.write_desc(2, STATUS, 1, WRITE, 0);
    for _ in 0..250 {
        ring.publish(0);
    }
    direct.event(Event::Queue(0));
    direct.device.quiesce();
    direct.event(Event::Queue(0));
    direct.drain();
    let begun = std::iter::from_fn(|| ring.pop_used()).count();
    assert!(begun < 250, "{begun}");
    // The rest is found when it goes on.
    let queues = direct.device.deactivate();
    direct.activate_with(VERSION_1, queues);
    direct.kick(0);
    assert_eq!(std::iter::from_fn(|| ring.pop_used()).count(), 250 - begun);
}

#[test]
fn memory_that_is_unplugged_stays_until_what_is_in_flight_has_come_back() {
    for engine in ENGINES {
        let config = Config {
            engine,
            ..Config::default()
        };
        let file = new_file();
        file.write_all_at(&[3; 4096], 0).unwrap();
        let device = Block::new(file.into(), config).unwrap();
        let mem = memory();
        let mut ring = Vring::new(&mem, RINGS, 256);
        let mut direct = Direct::new(device, mem.clone());
        direct.activate(VERSION_1, &[&ring]);
        mem.write_slice(&header(0, 0), GuestAddress(HEADER))
            .unwrap();
        for n in 0..8 {
            let data = SEAM + 0x1000 * n;
            ring.add(&[
                (HEADER, 16, false),
                (data, 4096, true),
                (data + 4096, 1, true),
            ]);
        }
        direct.event(Event::Queue(0));
        // All but the first region goes away.
        let (less, _) = mem.remove_region(GuestAddress(SEAM), SEAM_LEN).unwrap();
        direct.memory.lock().unwrap().replace(less.clone());
        ring.mem = less.clone();
        drop(mem);
        direct.drain();
        for _ in 0..8 {
            assert_eq!(ring.pop_used().unwrap().1, 4097);
        }
        // From now on it is not there.
        ring.add(&[(HEADER, 16, false), (SEAM, 512, true), (STATUS, 1, true)]);
        direct.kick(0);
        assert_eq!(ring.pop_used().unwrap().1, 1);
        let status: u8 = less.read_obj(GuestAddress(STATUS)).unwrap();
        assert_eq!(status, IOERR);
    }
}

#[test]
fn dropped_with_requests_in_flight_it_waits_for_them() {
    for engine in ENGINES {
        for _ in 0..20 {
            let config = Config {
                engine,
                ..Config::default()
            };
            let device = Block::new(new_file().into(), config).unwrap();
            let mem = memory();
            let mut ring = Vring::new(&mem, RINGS, 256);
            let mut direct = Direct::new(device, mem.clone());
            direct.activate(VERSION_1, &[&ring]);
            mem.write_slice(&header(1, 0), GuestAddress(HEADER))
                .unwrap();
            for n in 0..40 {
                let data = DATA + 0x1000 * n;
                ring.add(&[(HEADER, 16, false), (data, 4096, false), (STATUS, 1, true)]);
            }
            direct.event(Event::Queue(0));
            drop(direct);
        }
    }
}
