//! The block device against a driver by hand.

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
    time::{Duration, Instant},
};

use direct::Direct;
use disk::*;
use rig::*;
use vm_memory::{Bytes, GuestAddress};
use walnut_devices::{block::*, limit::*, virtio::*};

#[test]
fn what_is_written_is_read_back_and_in_the_file() {
    for mut bed in beds(Config::default()) {
        let data = noise(1, 8 * 512);
        bed.put(DATA, &data);
        assert_eq!(bed.write(3, &[(DATA, 512), (DATA + 512, 7 * 512)]), (OK, 1));
        assert_eq!(bed.on_disk(3 * 512, 8 * 512), data);
        let to = DATA + 0x10_0000;
        let parts = [(to, 1024), (to + 1024, 1), (to + 1025, 3 * 1024 - 1)];
        assert_eq!(bed.read(3, &parts), (OK, 8 * 512 + 1));
        assert_eq!(bed.get(to, 8 * 512), data);
        assert_eq!(bed.request(FLUSH, 0, &[]), (OK, 1));
        assert!(bed.rig.bell.told().queues[0] >= 3);
    }
}

#[test]
fn the_header_and_the_status_may_be_cut_anywhere() {
    for mut bed in beds(Config::default()) {
        let data = noise(2, 1024);
        bed.put(DATA, &header(1, 5));
        bed.put(DATA + 16, &data);
        // Header and data in one descriptor, a byte of it before.
        let chain = [
            (DATA, 1, false),
            (DATA + 1, 15 + 1024, false),
            (STATUS, 1, true),
        ];
        assert_eq!(bed.chain(&chain), (OK, 1));
        assert_eq!(bed.on_disk(5 * 512, 1024), data);
        // Data and status in one descriptor; empty ones between.
        bed.put(DATA, &header(0, 5));
        let chain = [
            (DATA, 16, false),
            (DATA, 0, false),
            (STATUS - 1024, 1025, true),
            (STATUS, 0, true),
        ];
        assert_eq!(bed.chain(&chain), (OK, 1025));
        assert_eq!(bed.get(STATUS - 1024, 1024), data);
    }
}

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
fn an_indirect_table_is_a_chain_as_good_as_any() {
    for mut bed in beds(Config::default()) {
        let table = DATA + 0x1000;
        bed.put(HEADER, &header(0, 1));
        bed.file.write_all_at(&[9; 512], 512).unwrap();
        for (n, (addr, len, flags)) in [
            (HEADER, 16u32, NEXT),
            (DATA, 512, NEXT | WRITE),
            (STATUS, 1, WRITE),
        ]
        .into_iter()
        .enumerate()
        {
            let at = table + n as u64 * 16;
            bed.mem.write_obj(addr, GuestAddress(at)).unwrap();
            bed.mem.write_obj(len, GuestAddress(at + 8)).unwrap();
            bed.mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
            let next = u16::try_from(n).unwrap() + 1;
            bed.mem.write_obj(next, GuestAddress(at + 14)).unwrap();
        }
        bed.rings[0].write_desc(7, table, 48, INDIRECT, 0);
        bed.rings[0].publish(7);
        assert_eq!(bed.next_used(0), (7, 513));
        assert_eq!(bed.get(DATA, 512), [9; 512]);
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
fn a_read_only_disk_refuses_every_change() {
    let config = Config {
        read_only: true,
        ..Config::default()
    };
    for mut bed in beds(config) {
        bed.put(DATA, &[1; 512]);
        assert_eq!(bed.write(0, &[(DATA, 512)]), (IOERR, 1));
        assert_eq!(bed.segments(DISCARD, &[(0, 1, 0)]), (IOERR, 1));
        assert_eq!(bed.segments(ZEROES, &[(0, 1, 0)]), (IOERR, 1));
        assert_eq!(bed.request(FLUSH, 0, &[]), (OK, 1));
        assert_eq!(bed.read(0, &[(DATA, 512)]), (OK, 513));
        assert_eq!(bed.on_disk(0, 512), [0; 512]);
        let features = bed.rig.port.features();
        assert_eq!(features >> 5 & 1, 1, "RO");
        assert_eq!(features & (1 << 13 | 1 << 14), 0, "DISCARD, WRITE_ZEROES");
    }
}

#[test]
fn discards_and_zeroes_do_what_they_say() {
    for mut bed in beds(Config::default()) {
        bed.file.write_all_at(&[0xaa; 64 << 10], 0).unwrap();
        assert_eq!(bed.segments(ZEROES, &[(1, 3, 0), (20, 9, 1)]), (OK, 1));
        assert_eq!(bed.on_disk(0, 512), [0xaa; 512]);
        assert_eq!(bed.on_disk(512, 3 * 512), [0; 3 * 512]);
        assert_eq!(bed.on_disk(4 * 512, 16 * 512), [0xaa; 16 * 512]);
        assert_eq!(bed.on_disk(20 * 512, 9 * 512), [0; 9 * 512]);
        assert_eq!(bed.on_disk(29 * 512, 512), [0xaa; 512]);
        let (status, used) = bed.segments(DISCARD, &[(64, 8, 0)]);
        assert!([OK, UNSUPP].contains(&status) && used == 1);
        let eight: Vec<_> = (0..8).map(|n| (n, 1, 0)).collect();
        assert_eq!(bed.segments(ZEROES, &eight), (OK, 1));
        assert_eq!(bed.on_disk(0, 4096), [0; 4096]);
        let nine: Vec<_> = (0..9).map(|n| (n, 1, 0)).collect();
        assert_eq!(bed.segments(ZEROES, &nine), (IOERR, 1));
        assert_eq!(bed.segments(ZEROES, &[]), (IOERR, 1));
        assert_eq!(bed.segments(ZEROES, &[(0, 0, 0)]), (IOERR, 1));
        assert_eq!(bed.segments(ZEROES, &[(0, 1 << 22, 0)]), (IOERR, 1));
        assert_eq!(bed.segments(ZEROES, &[(0, u32::MAX, 0)]), (IOERR, 1));
        assert_eq!(bed.segments(ZEROES, &[(0, 1, 2)]), (UNSUPP, 1));
        assert_eq!(bed.segments(DISCARD, &[(0, 1, 1)]), (UNSUPP, 1));
        bed.put(DATA, &[0; 64]);
        assert_eq!(bed.request(ZEROES, 0, &[(DATA, 17, false)]), (IOERR, 1));
        assert_eq!(bed.file.metadata().unwrap().len(), SECTORS * 512 + 100);
    }
}

#[test]
fn zeroes_are_written_where_the_host_has_no_call_for_them() {
    // A tmpfs has no FALLOC_FL_ZERO_RANGE.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for engine in ENGINES {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(dir.path().join("disk"))
            .unwrap();
        file.write_all_at(&vec![0xbb; 8 << 20], 0).unwrap();
        let mut bed = Bed::over(file, engine, Config::default());
        assert_eq!(
            bed.segments(ZEROES, &[(8, 10_000, 0), (10_010, 5, 1)]),
            (OK, 1)
        );
        assert_eq!(bed.on_disk(7 * 512, 512), [0xbb; 512]);
        assert_eq!(bed.on_disk(8 * 512, 10_000 * 512), vec![0; 10_000 * 512]);
        assert_eq!(bed.on_disk(10_008 * 512, 1024), [0xbb; 1024]);
        assert_eq!(bed.on_disk(10_010 * 512, 5 * 512), [0; 5 * 512]);
        assert_eq!(bed.on_disk(10_015 * 512, 512), [0xbb; 512]);
    }
}

#[test]
fn it_tells_its_serial_number_and_refuses_what_it_does_not_know() {
    let config = Config {
        serial: *b"walnut-0123456789\0\0\0",
        ..Config::default()
    };
    for mut bed in beds(config) {
        bed.put(DATA, &[0xff; 64]);
        let split = [(DATA, 7, true), (DATA + 7, 25, true)];
        assert_eq!(bed.request(GET_ID, 0, &split), (OK, 21));
        assert_eq!(bed.get(DATA, 20), *b"walnut-0123456789\0\0\0");
        assert_eq!(bed.get(DATA + 20, 12), [0xff; 12]);
        assert_eq!(bed.request(GET_ID, 0, &[(DATA, 19, true)]), (IOERR, 1));
        for kind in [2, 3, 5, 10, 12, 14, 15, 16, 0x8000_0000, u32::MAX] {
            assert_eq!(bed.request(kind, 0, &[(DATA, 512, true)]), (UNSUPP, 1));
        }
    }
}

#[test]
fn a_driver_that_cannot_flush_and_a_disk_that_need_not() {
    for engine in ENGINES {
        for (cache, features) in [
            (Cache::Writeback, VERSION_1),
            (Cache::Volatile, VERSION_1 | 1 << 9),
        ] {
            let config = Config {
                cache,
                ..Config::default()
            };
            let mut bed = Bed::idle(new_file(), engine, config);
            bed.features = features;
            bed.start();
            bed.put(DATA, &[5; 512]);
            assert_eq!(bed.write(0, &[(DATA, 512)]), (OK, 1));
            assert_eq!(bed.segments(ZEROES, &[(1, 1, 0)]), (OK, 1));
            assert_eq!(bed.request(FLUSH, 0, &[]), (OK, 1));
            assert_eq!(bed.on_disk(0, 512), [5; 512]);
        }
    }
}

#[test]
fn growing_and_shrinking_is_told_and_what_is_gone_is_an_error() {
    for mut bed in beds(Config::default()) {
        bed.file.set_len(2 * SECTORS * 512).unwrap();
        let resizer = bed.resizer.clone();
        assert_eq!(resizer.resize().unwrap(), 2 * SECTORS);
        let bell = bed.rig.bell.clone();
        bed.rig.until("told", || bell.told().config == 1);
        let mut capacity = [0; 8];
        bed.rig.port.config().read(0, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), 2 * SECTORS);
        assert_eq!(bed.read(2 * SECTORS - 1, &[(DATA, 512)]), (OK, 513));
        // Shrunk, and nobody has said so: the kernel finds nothing there.
        bed.file.set_len(512).unwrap();
        assert_eq!(bed.read(1, &[(DATA, 512)]), (IOERR, 1));
        assert_eq!(bed.read(0, &[(DATA, 1024)]), (IOERR, 1));
        assert_eq!(resizer.resize().unwrap(), 1);
        assert_eq!(bed.write(1, &[(DATA, 512)]), (IOERR, 1));
        assert_eq!(bed.file.metadata().unwrap().len(), 512);
    }
}

#[test]
fn several_queues_at_once_and_full_rings() {
    let config = Config {
        queues: 4,
        ..Config::default()
    };
    for mut bed in beds(config) {
        let mut space = [0; 2];
        bed.rig.port.config().read(34, &mut space);
        assert_eq!(space, [4, 0]);
        for round in 0..20u64 {
            for queue in 0..4 {
                for n in 0..80u16 {
                    let sector = (u64::from(n) * 4 + queue as u64) % SECTORS;
                    bed.publish_write_on(queue, n, sector, round);
                }
                bed.rig.kick(queue);
            }
            for queue in 0..4 {
                for _ in 0..80 {
                    assert_eq!(bed.next_used(queue).1, 1);
                }
            }
            bed.assert_written();
        }
    }
}

#[test]
fn a_pause_waits_for_what_is_in_flight_and_goes_on_where_it_was() {
    for mut bed in beds(Config::default()) {
        for round in 0..30u64 {
            for n in 0..80u16 {
                bed.publish_write_on(0, n, u64::from(n), round);
            }
            bed.rig.kick(0);
            let rests = bed.rig.port.pause(LIMIT).expect("it rests");
            let queue = rests.queues.unwrap()[0];
            let used: u16 = bed
                .mem
                .read_obj(GuestAddress(bed.rings[0].used + 2))
                .unwrap();
            assert_eq!(queue.next_used, used);
            assert_eq!(queue.next_avail, used, "nothing is between");
            bed.rig.port.resume();
            for _ in 0..80 {
                assert_eq!(bed.next_used(0).1, 1);
            }
            bed.assert_written();
        }
    }
}

#[test]
fn a_pause_knows_of_a_driver_that_has_just_become_ready() {
    for mut bed in beds(Config::default()) {
        for _ in 0..200 {
            bed.restart();
            let rests = bed.rig.port.pause(LIMIT).expect("it rests");
            assert!(rests.queues.expect("it is active")[0].ready);
            bed.rig.port.resume();
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

#[test]
fn the_rate_is_kept_and_nothing_starves() {
    let bucket = |size| {
        Some(BucketConfig {
            size,
            burst: 0,
            refill: Duration::from_secs(3600),
        })
    };
    for engine in ENGINES {
        for (limit, expected) in [
            (
                LimitConfig {
                    operations: bucket(5),
                    bytes: None,
                },
                5,
            ),
            (
                LimitConfig {
                    bytes: bucket(3 * 4096),
                    operations: None,
                },
                3,
            ),
            (
                LimitConfig {
                    bytes: bucket(100),
                    operations: None,
                },
                1,
            ),
        ] {
            let config = Config {
                engine,
                limit,
                ..Config::default()
            };
            let device = Block::new(new_file().into(), config).unwrap();
            let mem = memory();
            let mut ring = Vring::new(&mem, RINGS, 256);
            let mut direct = Direct::new(device, mem.clone());
            direct.activate(VERSION_1, &[&ring]);
            mem.write_slice(&header(0, 0), GuestAddress(HEADER))
                .unwrap();
            for _ in 0..10 {
                ring.add(&[(HEADER, 16, false), (DATA, 4096, true), (STATUS, 1, true)]);
            }
            for _ in 0..5 {
                direct.kick(0);
            }
            let used = std::iter::from_fn(|| ring.pop_used()).count();
            assert_eq!(used, expected);
            let at = direct.device.deadline().expect("it says when");
            assert!(at > Instant::now());
        }
        // The same with a rate that lets them through in the end.
        let quick = BucketConfig {
            size: 4096,
            burst: 4096,
            refill: Duration::from_millis(1),
        };
        let config = Config {
            limit: LimitConfig {
                bytes: Some(quick),
                operations: None,
            },
            ..Config::default()
        };
        let mut bed = Bed::over(new_file(), engine, config);
        for n in 0..40u16 {
            bed.publish_write_on(0, n, u64::from(n), 1);
        }
        bed.rig.kick(0);
        for _ in 0..40 {
            assert_eq!(bed.next_used(0).1, 1);
        }
        bed.assert_written();
    }
}

#[test]
fn only_a_disk_opened_for_its_purpose_will_do() {
    use std::fs::OpenOptions;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [0; 1024]).unwrap();
    let with = |options: &mut OpenOptions, read_only| {
        let config = Config {
            read_only,
            ..Config::default()
        };
        Block::new(options.open(&path).unwrap().into(), config)
    };
    use std::os::unix::fs::OpenOptionsExt;
    let nonblocking = libc::O_NONBLOCK;
    assert!(with(OpenOptions::new().read(true), true).is_ok());
    assert!(with(OpenOptions::new().read(true).write(true), true).is_ok());
    for (options, read_only) in [
        (OpenOptions::new().read(true), false),
        (OpenOptions::new().write(true), false),
        (OpenOptions::new().read(true).append(true), false),
        (
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(nonblocking),
            false,
        ),
    ] {
        let error = with(options, read_only).unwrap_err();
        assert!(matches!(error, Error::Mode { .. }), "{error}");
    }
    let null = std::fs::File::open("/dev/null").unwrap();
    let error = Block::new(null.into(), Config::default()).unwrap_err();
    assert!(matches!(error, Error::NotADisk));
    for queues in [0, 33] {
        let config = Config {
            queues,
            ..Config::default()
        };
        assert!(Block::new(new_file().into(), config).is_err());
    }
}
