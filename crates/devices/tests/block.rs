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
