//! The network device on a real tap, in a network namespace of each test's own.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/rig.rs"]
mod rig;
#[path = "support/tap.rs"]
mod tap;

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use rig::{Bell, INDIRECT, NEXT, PATIENCE, Rig, Rng, Vring, WRITE};
use tap::{GUEST, HOST, Host, checksum_holds, frame, segment};
use vm_memory::{Bytes, GuestAddress};
use walnut_devices::{
    Log,
    limit::{BucketConfig, LimitConfig},
    net::{Config, Error, Net},
    virtio::{Activation, Device, Event, Memory, MemoryCell},
};

const MEMORY: usize = 4 << 20;
/// Rings from here on, 16 KiB each; buffers behind.
const RINGS: u64 = 0x1000;
const DATA: u64 = 1 << 20;
const EVENT_IDX: u64 = 1 << 29;
const MERGEABLE: u64 = 1 << 15;
const MQ: u64 = 1 << 22 | 1 << 17;
const GUEST_OFFLOADS: u64 = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 54 | 1 << 55;

fn config() -> Config {
    Config {
        mac: GUEST,
        mtu: Some(1500),
        offloads: true,
        ..Config::default()
    }
}

/// A device whose methods the test itself calls, so that nothing happens by chance.
struct Bed {
    net: Net,
    host: Host,
    memory: Memory,
    cell: MemoryCell,
    bell: Arc<Bell>,
    rings: Vec<Vring>,
    /// Where the next receive buffer goes.
    next: u64,
    /// Where each pair's receive buffers are, by their heads.
    buffers: [Vec<(u64, u32)>; 2],
}

impl Bed {
    fn new(pairs: usize, config: Config) -> Bed {
        let (taps, host) = tap::tap(pairs);
        let net = Net::new(taps, config, Log::new(|_| {})).unwrap();
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let rings = net.queue_sizes().iter().enumerate();
        let rings = rings.map(|(n, _)| Vring::new(&memory, RINGS + 0x4000 * n as u64, 256));
        Bed {
            rings: rings.collect(),
            cell: MemoryCell::new(memory.clone()),
            memory,
            bell: Arc::default(),
            net,
            host,
            next: DATA,
            buffers: [vec![(0, 0); 256], vec![(0, 0); 256]],
        }
    }

    fn boot(&mut self, features: u64) {
        self.boot_with(features, None).unwrap();
    }

    fn boot_with(&mut self, features: u64, skip: Option<usize>) -> Result<(), ()> {
        let event_idx = features & EVENT_IDX != 0;
        let rings = self.rings.iter().enumerate();
        let queues = rings
            .map(|(n, ring)| match skip {
                Some(skip) if skip == n => virtio_queue::QueueT::new(256).unwrap(),
                _ => ring.queue(256, event_idx),
            })
            .collect();
        let activation = Activation {
            memory: self.cell.clone(),
            features,
            queues,
            interrupt: self.bell.clone(),
        };
        self.net.activate(activation).map_err(drop)?;
        for index in 0..self.rings.len() {
            self.net.event(Event::Queue(index)).map_err(drop)?;
        }
        Ok(())
    }

    fn event(&mut self, event: Event) {
        self.net.event(event).unwrap();
    }

    /// Lets the device work until it wants to rest.
    fn settle(&mut self) {
        while self.net.deadline().is_some_and(|at| at <= Instant::now()) {
            self.event(Event::Deadline);
        }
    }

    /// Leaves receive buffers of `len` bytes in ring 2 × `pair`.
    fn leave(&mut self, pair: usize, count: usize, len: u32) {
        for _ in 0..count {
            if self.next + u64::from(len) > MEMORY as u64 {
                self.next = DATA;
            }
            let at = self.next;
            self.next += u64::from(len);
            let head = self.rings[2 * pair].add(&[(at, len, true)]);
            self.buffers[pair][usize::from(head)] = (at, len);
        }
    }

    /// The next frame in ring 2 × `pair`: its header, and itself.
    fn receive(&mut self, pair: usize) -> Option<(Vec<u8>, Vec<u8>)> {
        let (mut bytes, mut left) = (Vec::new(), 1);
        while left > 0 {
            let Some((head, len)) = self.rings[2 * pair].pop_used() else {
                assert!(bytes.is_empty(), "a part of a frame");
                return None;
            };
            let (at, room) = self.buffers[pair][usize::from(head)];
            assert!(len <= room);
            let mut part = vec![0; usize::try_from(len).unwrap()];
            self.memory.read_slice(&mut part, GuestAddress(at)).unwrap();
            if bytes.is_empty() {
                left = u16::from_le_bytes(part[10..12].try_into().unwrap());
            }
            left -= 1;
            bytes.extend(part);
        }
        let frame = bytes.split_off(12);
        Some((bytes, frame))
    }

    /// Puts a frame into ring 2 × `pair` + 1, in pieces of the given lengths.
    fn send(&mut self, pair: usize, header: &[u8], frame: &[u8], cuts: &[usize]) {
        let mut message = header.to_vec();
        message.resize(12, 0);
        message.extend(frame);
        let at = MEMORY as u64 - 0x20000;
        self.memory.write_slice(&message, GuestAddress(at)).unwrap();
        let (mut chain, mut from) = (Vec::new(), 0);
        for cut in cuts.iter().chain([&message.len()]) {
            let to = message.len().min(from + cut);
            chain.push((at + from as u64, u32::try_from(to - from).unwrap(), false));
            from = to;
        }
        self.rings[2 * pair + 1].add(&chain);
        self.event(Event::Queue(2 * pair + 1));
        self.settle();
        assert!(self.rings[2 * pair + 1].pop_used().is_some(), "not sent");
    }
}

fn to_guest(len: usize, tag: u32) -> Vec<u8> {
    frame(GUEST, HOST, len, tag)
}

fn from_guest(len: usize, tag: u32) -> Vec<u8> {
    frame(HOST, GUEST, len, tag)
}

#[test]
fn frames_go_both_ways() {
    for features in [0, EVENT_IDX, MERGEABLE, MERGEABLE | EVENT_IDX, u64::MAX] {
        let mut bed = Bed::new(1, config());
        let features = features & bed.net.features();
        bed.leave(0, 100, 2048);
        bed.boot(features);
        for (tag, len) in (0..).zip([60, 61, 1000, 1514]) {
            bed.host.send(&to_guest(len, tag));
            bed.event(Event::Watched(0));
            let (header, frame) = bed.receive(0).unwrap();
            assert_eq!(frame, to_guest(len, tag));
            assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            for cuts in [&[][..], &[12], &[5, 5, 5], &[12, 14], &[26], &[40, 0, 2]] {
                bed.send(0, &[], &from_guest(len, tag), cuts);
                assert_eq!(bed.host.receive().unwrap().1, from_guest(len, tag));
            }
        }
        let told = bed.bell.told();
        assert!(told.queues[0] >= 4 && told.queues[1] >= 4);
        let counters = bed.net.counters();
        assert_eq!(counters.received.load(Ordering::Relaxed), 4);
        assert_eq!(counters.sent_bytes.load(Ordering::Relaxed), 6 * 2635);
        // As many came as were used.
        let queues = bed.net.deactivate();
        let next = virtio_queue::QueueT::next_avail(&queues[0]);
        assert_eq!((queues.len(), next), (2, 4));
    }
}

#[test]
fn large_segments_pass_whole_to_a_guest_that_takes_them() {
    let mut bed = Bed::new(1, config());
    bed.leave(0, 250, 1526);
    bed.boot(bed.net.features());
    for payload in [5_000, 40_000, 60_000] {
        let (header, frame) = segment(GUEST, HOST, payload, 1448);
        bed.host.send_with(&header, &frame).unwrap();
        bed.event(Event::Watched(0));
        let (got, data) = bed.receive(0).unwrap();
        assert_eq!(data, frame);
        assert_eq!(
            (got[0] & 1, got[1]),
            (1, 1),
            "a partial checksum, TCP over IPv4"
        );
        let count = u16::from_le_bytes(got[10..12].try_into().unwrap());
        assert_eq!(usize::from(count), (12 + frame.len()).div_ceil(1526));
        bed.leave(0, count.into(), 1526);
        // And from it.
        let (header, frame) = segment(HOST, GUEST, payload, 1448);
        bed.send(0, &header, &frame, &[12, 54, 4096, 30_000]);
        let (got, data) = bed.host.receive().unwrap();
        assert_eq!((data, &got[..2]), (frame, &header[..2]));
    }
}

#[test]
fn a_guest_that_takes_none_gets_the_links_segments() {
    let mut bed = Bed::new(1, config());
    bed.leave(0, 100, 1526);
    bed.boot(bed.net.features() & !GUEST_OFFLOADS);
    let (header, frame) = segment(GUEST, HOST, 5_000, 1448);
    bed.host.send_with(&header, &frame).unwrap();
    bed.event(Event::Watched(0));
    for payload in [1448, 1448, 1448, 656] {
        let (header, frame) = bed.receive(0).unwrap();
        assert_eq!((&header[..2], frame.len()), (&[0, 0][..], 54 + payload));
        assert!(checksum_holds(&frame));
    }
    // What it did not agree on is not sent either.
    let agreed = bed.net.features();
    bed.net.deactivate();
    bed.rings[1] = Vring::new(&bed.memory, RINGS + 0x4000, 256);
    bed.boot(agreed & !(1 << 11));
    let (header, frame) = segment(HOST, GUEST, 5_000, 1448);
    bed.send(0, &header, &frame, &[]);
    assert!(bed.host.receive().is_none());
    assert_eq!(bed.net.counters().send_dropped.load(Ordering::Relaxed), 1);
}

/// A frame larger than what the driver has left waits; others wait behind it.
#[test]
fn a_frame_waits_for_buffers() {
    let mut bed = Bed::new(1, config());
    bed.boot(bed.net.features());
    let (header, large) = segment(GUEST, HOST, 20_000, 1448);
    bed.host.send_with(&header, &large).unwrap();
    bed.host.send(&to_guest(100, 1));
    bed.event(Event::Watched(0));
    for count in 1..=13 {
        bed.leave(0, 1, 1526);
        // The device must ask for this kick.
        assert!(bed.rings[0].kick_wanted(), "{count}");
        bed.event(Event::Queue(0));
        assert!(bed.receive(0).is_none(), "{count}");
    }
    bed.leave(0, 1, 1526);
    assert!(bed.rings[0].kick_wanted());
    bed.event(Event::Queue(0));
    assert_eq!(bed.receive(0).unwrap().1, large);
    bed.leave(0, 1, 1526);
    assert!(bed.rings[0].kick_wanted());
    bed.event(Event::Queue(0));
    assert_eq!(bed.receive(0).unwrap().1, to_guest(100, 1));
    assert_eq!(bed.bell.told().queues[0], 3);
}

#[test]
fn what_fits_nowhere_is_dropped_and_the_next_arrives() {
    // One chain per frame, too small.
    let mut bed = Bed::new(1, config());
    bed.leave(0, 4, 512);
    bed.boot(bed.net.features() & !MERGEABLE & !GUEST_OFFLOADS);
    bed.host.send(&to_guest(600, 1));
    bed.host.send(&to_guest(500, 2));
    bed.host.send(&to_guest(1514, 3));
    bed.host.send(&to_guest(60, 4));
    bed.event(Event::Watched(0));
    assert_eq!(bed.receive(0).unwrap().1, to_guest(500, 2));
    assert_eq!(bed.receive(0).unwrap().1, to_guest(60, 4));
    assert_eq!(
        bed.net.counters().receive_dropped.load(Ordering::Relaxed),
        2
    );

    // Many chains, the whole ring too small.
    let mut bed = Bed::new(1, config());
    bed.rings[0] = Vring::new(&bed.memory, RINGS, 8);
    bed.leave(0, 8, 1526);
    bed.boot(bed.net.features());
    let (header, large) = segment(GUEST, HOST, 20_000, 1448);
    bed.host.send_with(&header, &large).unwrap();
    bed.host.send(&to_guest(60, 4));
    bed.event(Event::Watched(0));
    assert_eq!(bed.receive(0).unwrap().1, to_guest(60, 4));
}

#[test]
fn pairs_are_used_as_the_driver_says() {
    let mut bed = Bed::new(2, config());
    assert_eq!(bed.net.queue_sizes().len(), 5);
    bed.leave(0, 200, 256);
    bed.leave(1, 200, 256);
    bed.boot(bed.net.features());
    assert_eq!(bed.net.config().bytes()[8..10], [2, 0]);
    let set = |bed: &mut Bed, command: &[u8], answer: u8| {
        let at = MEMORY as u64 - 0x1000;
        bed.memory.write_slice(command, GuestAddress(at)).unwrap();
        bed.memory.write_obj(9u8, GuestAddress(at + 64)).unwrap();
        let data = u32::try_from(command.len() - 2).unwrap();
        bed.rings[4].add(&[(at, 2, false), (at + 2, data, false), (at + 64, 1, true)]);
        bed.event(Event::Queue(4));
        assert_eq!(bed.rings[4].pop_used().unwrap().1, 1);
        let got: u8 = bed.memory.read_obj(GuestAddress(at + 64)).unwrap();
        assert_eq!(got, answer, "{command:?}");
    };
    let burst = |bed: &mut Bed| {
        for n in 0..100u8 {
            let (header, mut frame) = segment(GUEST, HOST, 10, 0);
            // Another flow: another queue of the tap.
            frame[35] = n;
            let mut header = header;
            header[1] = 0;
            bed.host.send_with(&header, &frame).unwrap();
        }
        bed.event(Event::Watched(0));
        bed.event(Event::Watched(1));
        bed.settle();
        let mut counts = [0, 0];
        for (pair, count) in counts.iter_mut().enumerate() {
            while bed.receive(pair).is_some() {
                *count += 1;
            }
        }
        bed.leave(0, counts[0], 256);
        bed.leave(1, counts[1], 256);
        assert_eq!(counts[0] + counts[1], 100);
        counts
    };
    assert_eq!(
        burst(&mut bed),
        [100, 0],
        "one pair until the driver says more"
    );
    set(&mut bed, &[4, 0, 2, 0], 0);
    let counts = burst(&mut bed);
    assert!(counts[0] > 10 && counts[1] > 10, "{counts:?}");
    for bad in [
        &[4u8, 0, 0, 0][..],
        &[4, 0, 3, 0],
        &[4, 0, 255, 255],
        &[4, 1, 1, 0],
        &[0, 0, 1],
        &[4, 0, 1, 0, 0],
    ] {
        set(&mut bed, bad, 1);
    }
    let counts = burst(&mut bed);
    assert!(counts[1] > 10, "{counts:?}");
    assert_eq!(bed.net.save(), [1, 2, 0]);
    for pair in 0..2 {
        bed.send(pair, &[], &from_guest(77, 5), &[]);
        assert_eq!(bed.host.receive().unwrap().1, from_guest(77, 5));
    }
    set(&mut bed, &[4, 0, 1, 0], 0);
    assert_eq!(burst(&mut bed), [100, 0]);
    for bad in [
        &[][..],
        &[1],
        &[0, 1, 0],
        &[1, 0, 0],
        &[1, 3, 0],
        &[1, 1, 0, 0],
    ] {
        assert!(bed.net.restore(bad).is_err(), "{bad:?}");
    }
}

/// Without multi-queue the control queue is where the second pair would begin.
#[test]
fn queues_stand_where_the_features_say() {
    let mut bed = Bed::new(2, config());
    let features = bed.net.features() & !(1 << 22);
    bed.boot(features);
    let at = MEMORY as u64 - 0x1000;
    bed.rings[2].add(&[(at, 4, false), (at + 64, 1, true)]);
    bed.event(Event::Queue(2));
    assert_eq!(bed.rings[2].pop_used().unwrap().1, 1);
    assert_eq!(bed.bell.told().queues[2], 2);
    let queues = bed.net.deactivate();
    assert_eq!(queues.len(), 5);
    for (queue, ring) in queues.iter().zip(&bed.rings) {
        assert_eq!(virtio_queue::QueueT::desc_table(queue), ring.desc);
    }
    bed.boot(features & !MQ);
    assert_eq!(bed.net.deactivate().len(), 5);
}

#[test]
fn limits_hold_back_and_let_go() {
    let limit = LimitConfig {
        bytes: None,
        operations: Some(BucketConfig {
            size: 5,
            burst: 0,
            refill: Duration::from_secs(3600),
        }),
    };
    let mut bed = Bed::new(
        1,
        Config {
            receive: limit,
            send: limit,
            ..config()
        },
    );
    bed.leave(0, 20, 256);
    bed.boot(bed.net.features());
    for tag in 0..20 {
        bed.host.send(&to_guest(100, tag));
        let frame = [vec![0; 12], from_guest(100, tag)].concat();
        let at = MEMORY as u64 - 0x20000 + u64::from(tag) * 256;
        bed.memory.write_slice(&frame, GuestAddress(at)).unwrap();
        bed.rings[1].add(&[(at, 112, false)]);
    }
    bed.event(Event::Watched(0));
    bed.event(Event::Queue(1));
    let (mut received, mut sent) = (0, 0);
    while bed.receive(0).is_some() {
        received += 1;
    }
    while bed.host.receive().is_some() {
        sent += 1;
    }
    // A frame's length is known only once it has arrived: one more.
    assert_eq!((received, sent), (6, 5));
    let at = bed.net.deadline().unwrap();
    assert!(at > Instant::now() + Duration::from_secs(60));
    // To be woken too early, or by others, changes nothing.
    bed.event(Event::Deadline);
    bed.event(Event::Watched(0));
    bed.event(Event::Queue(1));
    assert!(bed.receive(0).is_none() && bed.host.receive().is_none());
}

#[test]
fn a_guest_cannot_send_from_other_addresses() {
    let mut bed = Bed::new(
        1,
        Config {
            only_own_mac: true,
            ..config()
        },
    );
    bed.boot(bed.net.features());
    bed.send(0, &[], &frame(HOST, HOST, 100, 1), &[15]);
    bed.send(0, &[], &frame(HOST, [0xff; 6], 100, 1), &[]);
    assert!(bed.host.receive().is_none());
    bed.send(0, &[], &from_guest(100, 1), &[15]);
    assert_eq!(bed.host.receive().unwrap().1, from_guest(100, 1));
}

#[test]
fn a_link_that_is_down_carries_nothing() {
    let mut bed = Bed::new(1, config());
    bed.leave(0, 10, 2048);
    bed.boot(bed.net.features());
    let link = bed.net.link();
    link.set(false);
    bed.event(Event::Watched(u32::MAX));
    assert_eq!(
        (bed.net.config().bytes()[6], bed.bell.told().config),
        (0, 1)
    );
    bed.host.send(&to_guest(100, 1));
    bed.event(Event::Watched(0));
    bed.send(0, &[], &from_guest(100, 1), &[]);
    assert!(bed.receive(0).is_none() && bed.host.receive().is_none());
    link.set(true);
    bed.event(Event::Watched(u32::MAX));
    assert_eq!(
        (bed.net.config().bytes()[6], bed.bell.told().config),
        (1, 2)
    );
    assert_eq!(bed.receive(0).unwrap().1, to_guest(100, 1));
    // A change during a pause is told afterwards.
    bed.net.deactivate();
    link.set(false);
    bed.boot(bed.net.features());
    assert_eq!(bed.bell.told().config, 3);
}

#[test]
fn taps_of_another_kind_are_refused() {
    let log = || Log::new(|_| {});
    assert!(matches!(
        Net::new(vec![], config(), log()),
        Err(Error::Pairs(0))
    ));
    let (taps, _host) = tap::tap(1);
    let small = Config {
        mtu: Some(67),
        ..config()
    };
    assert!(matches!(Net::new(taps, small, log()), Err(Error::Mtu(67))));
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(
        Net::new(vec![file.into()], config(), log()),
        Err(Error::Tap(..))
    ));
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    for flags in [
        tap::IFF_TAP | tap::IFF_NO_PI,
        tap::IFF_TUN | tap::IFF_NO_PI | tap::IFF_VNET_HDR,
    ] {
        let tap = tap::open(flags);
        let result = Net::new(vec![tap], config(), log());
        assert!(matches!(result, Err(Error::Flags(_))), "{flags:#x}");
    }
}

/// On its thread, starved again and again: a wake-up that is lost stops it all.
#[test]
fn no_wakeup_is_lost() {
    const FRAMES: u32 = 20_000;
    /// Never more on the way than the tap holds.
    const WINDOW: u32 = 200;
    for features in [0, EVENT_IDX] {
        let (taps, host) = tap::tap(1);
        let net = Net::new(taps, config(), Log::new(|_| {})).unwrap();
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let mut rx = Vring::new(&memory, RINGS, 16);
        let mut tx = Vring::new(&memory, RINGS + 0x4000, 16);
        let features = net.features() & !EVENT_IDX & !GUEST_OFFLOADS | features;
        let rig = Rig::new(net, memory.clone());
        rig.activate(features, &[Some(&rx), Some(&tx)]);
        let mut rng = Rng(0x5eed_0010);
        let (mut sent, mut got, mut echoed) = (0, 0, 0);
        let start = Instant::now();
        while echoed < FRAMES {
            assert!(
                start.elapsed() < PATIENCE * 2,
                "stuck at {sent} {got} {echoed}"
            );
            if sent < FRAMES && sent - echoed < WINDOW {
                host.send(&to_guest(64, sent));
                sent += 1;
            }
            // A driver that leaves few buffers, late, and kicks only if asked.
            if rx.room() > 0 && rng.below(3) == 0 {
                let at = DATA + u64::from(sent % 64) * 256;
                rx.add(&[(at, 256, true)]);
                if features & EVENT_IDX == 0 || rx.kick_wanted() {
                    rig.kick(0);
                }
            }
            while tx.pop_used().is_some() {}
            if tx.room() > 0 && rx.pop_used().is_some() {
                got += 1;
                let at = DATA + 0x10000 + u64::from(got % 64) * 256;
                let message = [vec![0; 12], from_guest(64, got)].concat();
                memory.write_slice(&message, GuestAddress(at)).unwrap();
                tx.add(&[(at, 76, false)]);
                if features & EVENT_IDX == 0 || tx.kick_wanted() {
                    rig.kick(1);
                }
            }
            while let Some((_, frame)) = host.receive() {
                echoed += 1;
                assert_eq!(frame, from_guest(64, echoed));
            }
        }
    }
}

/// Rings without a meaning break the device, until its driver resets it.
#[test]
fn broken_rings() {
    let mut bed = Bed::new(1, config());
    for ring in 0..2 {
        for bad in 0..4 {
            bed.rings = (0..2)
                .map(|n| Vring::new(&bed.memory, RINGS + 0x4000 * n, 256))
                .collect();
            bed.boot(bed.net.features());
            match bad {
                0 => bed.rings[ring].set_avail_idx(257),
                1 => bed.rings[ring].set_avail_idx(0x8000),
                2 => bed.rings[ring].publish(256),
                _ => bed.rings[ring].publish(0xffff),
            }
            bed.host.send(&to_guest(60, 1));
            let mut result = bed.net.event(Event::Watched(0));
            result = result.and(bed.net.event(Event::Queue(ring)));
            assert!(result.is_err(), "{ring} {bad}");
            assert_eq!(bed.net.deactivate().len(), 2);
            bed.net.reset();
        }
    }
    bed.rings = (0..2)
        .map(|n| Vring::new(&bed.memory, RINGS + 0x4000 * n, 256))
        .collect();
    bed.leave(0, 20, 2048);
    bed.boot(bed.net.features());
    assert_eq!(bed.receive(0).unwrap().1, to_guest(60, 1));
    bed.send(0, &[], &from_guest(100, 1), &[]);
    assert_eq!(bed.host.receive().unwrap().1, from_guest(100, 1));
}

/// Malformed chains come back empty, and stand in nobody's way.
#[test]
fn malformed_chains_are_returned() {
    let end = MEMORY as u64;
    let mut bed = Bed::new(1, config());
    bed.boot(bed.net.features() & !GUEST_OFFLOADS);
    let bad: [&[(u64, u32, bool)]; 9] = [
        &[(DATA, 2048, false)],
        &[(DATA, 11, true)],
        &[(DATA, 0, true)],
        &[(end - 100, 2048, true)],
        &[(u64::MAX - 100, 2048, true)],
        &[(end, 2048, true)],
        &[(DATA, u32::MAX, true)],
        &[(DATA, 100, true), (DATA, 100, false)],
        &[(DATA, 1, true); 65],
    ];
    for chain in bad {
        bed.rings[0].add(chain);
        bed.leave(0, 1, 2048);
        bed.host.send(&to_guest(80, 3));
        bed.event(Event::Watched(0));
        assert_eq!(bed.rings[0].pop_used().unwrap().1, 0, "{chain:?}");
        assert_eq!(bed.receive(0).unwrap().1, to_guest(80, 3));
    }
    let bad: [&[(u64, u32, bool)]; 8] = [
        &[(DATA, 100, true)],
        &[(DATA, 25, false)],
        &[(DATA, 0, false)],
        &[(end - 50, 100, false)],
        &[(u64::MAX - 50, 100, false)],
        &[(DATA, u32::MAX, false)],
        &[(DATA, 0x20000, false)],
        &[(DATA, 2, false); 65],
    ];
    for chain in bad {
        bed.rings[1].add(chain);
        bed.event(Event::Queue(1));
        assert_eq!(bed.rings[1].pop_used().unwrap().1, 0, "{chain:?}");
        assert!(bed.host.receive().is_none(), "{chain:?}");
    }
}

/// One head many times, chains that loop, and no more than a turn's work at once.
#[test]
fn a_ring_full_of_one_head() {
    let mut bed = Bed::new(1, config());
    bed.boot(bed.net.features());
    bed.rings[0].write_desc(7, DATA, 2048, WRITE | NEXT, 7);
    bed.rings[1].write_desc(7, DATA, 64, NEXT, 7);
    for _ in 0..256 {
        bed.rings[0].publish(7);
        bed.rings[1].publish(7);
    }
    for tag in 0..50 {
        bed.host.send(&to_guest(1000, tag));
    }
    bed.event(Event::Watched(0));
    bed.event(Event::Queue(0));
    bed.event(Event::Queue(1));
    // A turn, then others may have theirs.
    assert!(bed.net.deadline().is_some());
    bed.settle();
    let mut used = 0;
    while bed.rings[1].pop_used().is_some() {
        used += 1;
    }
    assert_eq!(used, 256);
}

/// Whatever stands in rings, descriptors and headers: nothing is written but
/// where a descriptor allows it.
#[test]
fn any_ring_and_any_frame() {
    let mut rng = Rng(0x5eed_0011);
    let mut bed = Bed::new(2, config());
    let all = bed.net.features();
    for round in 0..150 {
        let pattern: Vec<u8> = (0..MEMORY)
            .map(|n| u8::try_from(n % 253).unwrap())
            .collect();
        bed.memory.write_slice(&pattern, GuestAddress(0)).unwrap();
        bed.rings = (0..5)
            .map(|n| Vring::new(&bed.memory, RINGS + 0x4000 * n, 256))
            .collect();
        bed.bell = Arc::default();
        let mut features = all;
        for bit in [EVENT_IDX, MERGEABLE, 1 << 22, 1 << 17, GUEST_OFFLOADS] {
            if rng.below(3) == 0 {
                features &= !bit;
            }
        }
        let mut allowed = vec![false; MEMORY];
        allowed[0x1000..0x1000 + 5 * 0x4000].fill(true);
        let mut alive = bed
            .boot_with(features, (rng.below(6) == 0).then_some(2))
            .is_ok();
        let indirect = DATA + 0x8_0000;
        for _ in 0..200 {
            if !alive {
                break;
            }
            let index = usize::try_from(rng.below(5)).unwrap();
            let at = u16::try_from(rng.below(64)).unwrap();
            let addr = match rng.below(8) {
                0 => rng.next(),
                1 => MEMORY as u64 - rng.below(3000),
                2 => u64::MAX - rng.below(3000),
                _ => DATA + rng.below(0x4_0000),
            };
            let len = match rng.below(8) {
                0 => rng.u32(),
                1 => u32::try_from(rng.below(30)).unwrap(),
                2 => 70_000,
                _ => u32::try_from(rng.below(3000)).unwrap(),
            };
            let mut flags = u16::try_from(rng.below(4)).unwrap();
            if rng.below(3) > 0 {
                flags = flags & NEXT
                    | if index % 2 == 0 && index < 4 {
                        WRITE
                    } else {
                        0
                    };
            }
            if rng.below(20) == 0 {
                flags |= INDIRECT;
            }
            let (addr, len) = match flags & INDIRECT {
                0 => (addr, len),
                // A table that lies in the data, whatever that is.
                _ => (indirect, u32::try_from(rng.below(9)).unwrap() * 16),
            };
            let next = u16::try_from(rng.below(70)).unwrap();
            let write_desc = |ring: &Vring, at, addr, len, flags, next| {
                ring.write_desc(at, addr, len, flags, next)
            };
            write_desc(&bed.rings[index], at, addr, len, flags, next);
            if flags & INDIRECT != 0 {
                let mut table = Vring::new(&bed.memory, 0x1000 + 0x4000 * 4, 256);
                table.desc = indirect;
                allowed[usize::try_from(indirect).unwrap()..][..160].fill(true);
                for n in 0..8 {
                    table.write_desc(n, DATA + rng.below(0x4_0000), 100, WRITE | NEXT, n + 1);
                }
                allowed[usize::try_from(DATA).unwrap()..][..0x4_1000].fill(true);
            } else if flags & WRITE != 0
                && let Ok(from) = usize::try_from(addr)
                && from < MEMORY
            {
                let to = from
                    .saturating_add(usize::try_from(len).unwrap())
                    .min(MEMORY);
                allowed[from..to].fill(true);
            }
            match rng.below(40) {
                0 => bed.rings[index].publish(rng.u16()),
                1 => {
                    let idx = rng.u16();
                    bed.rings[index].set_avail_idx(idx);
                }
                _ => bed.rings[index].publish(at),
            }
            if rng.below(2) == 0 {
                let len = usize::try_from(60 + rng.below(1400)).unwrap();
                // The tap may be full.
                let _ = bed.host.send_with(&[], &to_guest(len, round));
            }
            let event = match rng.below(4) {
                0 => Event::Watched(u32::try_from(rng.below(3)).unwrap()),
                1 => Event::Deadline,
                _ => Event::Queue(usize::try_from(rng.below(6)).unwrap()),
            };
            alive = bed.net.event(event).is_ok();
        }
        let mut bytes = vec![0; MEMORY];
        bed.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        let wrong = (0..MEMORY).find(|n| !allowed[*n] && bytes[*n] != pattern[*n]);
        assert_eq!(wrong, None, "round {round}");
        while bed.host.receive().is_some() {}
        assert_eq!(bed.net.deactivate().len(), 5);
        bed.net.reset();
    }
}

/// Class 10 of docs/hostile-guests.md: a header that another processor changes while
/// the device checks and sends it. What was checked is what is sent.
#[test]
fn a_header_that_changes_under_the_device_is_checked_once() {
    let own = config();
    let config = Config {
        only_own_mac: true,
        ..own
    };
    let mut bed = Bed::new(1, config);
    let all = bed.net.features();
    bed.boot(all & !(1 << 11 | 1 << 12 | 1 << 13 | 1 << 56 | GUEST_OFFLOADS));
    let at = MEMORY as u64 - 0x20000;
    let memory = bed.memory.clone();
    let done = std::sync::atomic::AtomicBool::new(false);
    let relaxed = std::sync::atomic::Ordering::Relaxed;
    let mut arrived = 0;
    std::thread::scope(|scope| {
        let flipper = scope.spawn(|| {
            let mut n = 0u8;
            while !done.load(relaxed) {
                n = n.wrapping_add(1);
                // Segments of TCP, which were not agreed on; another's address.
                memory.write_obj(n & 1, GuestAddress(at + 1)).unwrap();
                let last = own.mac[5] ^ (n >> 1 & 1);
                memory.write_obj(last, GuestAddress(at + 23)).unwrap();
            }
        });
        for tag in 0..4000 {
            bed.send(0, &[0, 0], &from_guest(100, tag), &[12, 30]);
            while let Some((header, frame)) = bed.host.receive() {
                assert_eq!((header[1], &frame[6..12]), (0, &own.mac[..]));
                arrived += 1;
            }
        }
        done.store(true, relaxed);
        flipper.join().unwrap();
    });
    // Some pass as they are written, before they are changed.
    assert!(arrived > 0);
}
