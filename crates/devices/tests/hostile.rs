//! A guest that means harm. Whatever it writes, the device lives, stays within
//! its limits and serves the next guest.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::io::Write;

use support::{Bed, Rng, config, driver::*, pull};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use walnut_devices::vsock::{EVENT_QUEUE, QUEUES, RX_QUEUE, TX_QUEUE};

/// After whatever has happened: a fresh guest must be served.
fn still_works(bed: &mut Bed) {
    bed.reboot();
    bed.guest.echo = true;
    let (mut client, _) = bed.dial(9);
    client.write_all(b"well?").unwrap();
    let mut got = Vec::new();
    bed.until("echo", |_| {
        pull(&mut client, &mut got);
        got == b"well?"
    });
}

/// A header in which anything may be wrong, but often little is.
fn packet(rng: &mut Rng, ports: &[(u32, u32)]) -> Packet {
    let (guest, host) = ports[usize::try_from(rng.below(ports.len() as u64)).unwrap()];
    let op = u16::try_from(rng.below(9)).unwrap();
    let mut packet = Packet::new(guest, host, op);
    packet.flags = u32::try_from(rng.below(5)).unwrap();
    match rng.below(12) {
        0 => packet.src_cid = rng.next(),
        1 => packet.dst_cid = rng.below(5),
        2 => packet.kind = rng.u16(),
        3 => packet.op = rng.u16(),
        4 => packet.flags = rng.u32(),
        5 => packet.fwd_cnt = rng.u32(),
        6 => packet.buf_alloc = rng.u32(),
        7 => packet.src_port = rng.u32(),
        8 => packet.dst_port = rng.u32(),
        _ => {}
    }
    packet
}

#[test]
fn any_packet_in_any_order() {
    let mut limited = config();
    limited.max_connections = 50;
    let mut bed = Bed::with(limited);
    let listener = bed.listener(600);
    let mut rng = Rng(0x5eed_0001);
    let mut clients = Vec::new();
    let mut accepted = Vec::new();
    for round in 0..30_000u32 {
        if rng.below(40) == 0 {
            let mut client = bed.client();
            // May be refused at once, by the limit.
            let _ = client.write_all(b"CONNECT 5\nxx");
            clients.push(client);
            if clients.len() > 30 {
                clients.remove(usize::try_from(rng.below(30)).unwrap());
            }
        }
        if let Ok((stream, _)) = listener.accept() {
            accepted.push(stream);
            if accepted.len() > 20 {
                accepted.remove(0);
            }
        }
        let mut ports: Vec<_> = (0..4).map(|i| (70 + i, 600)).collect();
        ports.extend((0..30).map(|i| (5, (1 << 30) + round / 100 + i)));
        let mut packet = packet(&mut rng, &ports);
        let len =
            usize::try_from([0, 1, 100, 65536][usize::try_from(rng.below(4)).unwrap()]).unwrap();
        let data = vec![7; len];
        packet.len = u32::try_from(len).unwrap();
        if rng.below(8) == 0 {
            packet.len = rng.u32();
        }
        if let Some(chain) = bed.guest.driver.take_chain() {
            bed.guest.driver.send_raw(chain, &packet, &data);
        }
        let mut events = Vec::new();
        bed.device.wait(&mut events).unwrap();
        bed.device.run();
        bed.guest.driver.receive();
        assert!(bed.device.connections() <= 50);
    }
    drop(clients);
    drop(accepted);
    still_works(&mut bed);
}

#[test]
fn any_descriptor_and_any_ring() {
    let mut bed = Bed::new();
    let mut rng = Rng(0x5eed_0002);
    let edges = [
        0,
        1,
        43,
        44,
        45,
        4096,
        MEMORY as u64 - 1,
        MEMORY as u64 - 44,
        MEMORY as u64,
    ];
    for round in 0..4_000 {
        if round % 100 == 99 {
            still_works(&mut bed);
        }
        let mem = bed.guest.driver.mem.clone();
        for queue in [RX_QUEUE, TX_QUEUE] {
            let ring = if queue == RX_QUEUE {
                &mut bed.guest.driver.rx
            } else {
                &mut bed.guest.driver.tx
            };
            for _ in 0..rng.below(12) {
                let addr = match rng.below(4) {
                    0 => rng.next(),
                    1 => u64::MAX - rng.below(100),
                    2 => edges[usize::try_from(rng.below(9)).unwrap()],
                    _ => rng.below(MEMORY as u64),
                };
                let len = match rng.below(3) {
                    0 => rng.u32(),
                    1 => u32::try_from(edges[usize::try_from(rng.below(9)).unwrap()]).unwrap(),
                    _ => 44 + u32::try_from(rng.below(5000)).unwrap(),
                };
                // NEXT, WRITE, INDIRECT in every mixture.
                let flags = u16::try_from(rng.below(8)).unwrap();
                let next = u16::try_from(rng.below(140)).unwrap();
                let at = ring.desc + rng.below(128) * 16;
                Ring::write_desc(&mem, at, addr, len, flags, next);
            }
            for _ in 0..rng.below(6) {
                let head = match rng.below(5) {
                    0 => rng.u16(),
                    _ => u16::try_from(rng.below(128)).unwrap(),
                };
                ring.publish(&mem, head);
                if rng.below(4) == 0 {
                    // The same head twice.
                    ring.publish(&mem, head);
                }
            }
            if rng.below(50) == 0 {
                mem.write_obj(rng.u16(), GuestAddress(ring.avail + 2))
                    .unwrap();
            }
        }
        let mut client = bed.client();
        let _ = client.write_all(b"CONNECT 9\nnoise");
        let mut events = Vec::new();
        bed.device.wait(&mut events).unwrap();
        bed.device.run();
    }
    still_works(&mut bed);
}

#[test]
fn any_configuration_at_any_time() {
    let mut bed = Bed::new();
    let mut rng = Rng(0x5eed_0003);
    for round in 0..20_000 {
        if round % 500 == 499 {
            still_works(&mut bed);
        }
        let index = usize::try_from(rng.below(QUEUES as u64)).unwrap();
        match rng.below(12) {
            0 => bed.device.stop(index),
            1..=3 => bed.device.start(index),
            4 => bed.device.reset(),
            5 => bed.device.transport_reset(),
            6 => {
                let size = [4096, 1 << 20, MEMORY][usize::try_from(rng.below(3)).unwrap()];
                let base = GuestAddress(rng.below(3) << 20);
                let mem = GuestMemoryMmap::from_ranges(&[(base, size)]).unwrap();
                bed.device.set_memory(mem);
            }
            7 => bed.device.set_memory(bed.guest.driver.mem.clone()),
            8 => {
                let queue = bed.device.queue_mut(index).unwrap();
                queue.set_size(rng.u16());
                queue.set_event_idx(rng.below(2) == 0);
            }
            9 => {
                let queue = bed.device.queue_mut(index).unwrap();
                let low = Some(
                    rng.u32()
                        & if rng.below(2) == 0 {
                            u32::MAX
                        } else {
                            0x7f_fff0
                        },
                );
                let high = (rng.below(4) == 0).then(|| rng.u32());
                queue.set_desc_table_address(low, high);
                queue.set_avail_ring_address(low, high);
                queue.set_used_ring_address(low, high);
            }
            10 => {
                let queue = bed.device.queue_mut(index).unwrap();
                queue.set_next_avail(rng.u16());
                queue.set_next_used(rng.u16());
            }
            _ => {
                let packet = packet(&mut rng, &[(5, 600)]);
                if let Some(chain) = bed.guest.driver.take_chain() {
                    bed.guest.driver.send_raw(chain, &packet, &[]);
                }
            }
        }
        let mut events = Vec::new();
        bed.device.wait(&mut events).unwrap();
        bed.device.run();
    }
    still_works(&mut bed);
}

#[test]
fn resets_without_end_are_bounded() {
    let mut bed = Bed::new();
    // Nothing is taken from the receive queue, and every packet asks for a reset.
    bed.guest.driver.refill = false;
    for i in 0..100_000u32 {
        if let Some(chain) = bed.guest.driver.take_chain() {
            let packet = Packet::new(i, 9, RW);
            bed.guest.driver.send_raw(chain, &packet, &[]);
        }
        let mut events = Vec::new();
        bed.device.wait(&mut events).unwrap();
        bed.device.run();
    }
    bed.guest.driver.refill = true;
    let mut resets = 0;
    for _ in 0..CHAINS {
        resets += bed.guest.driver.receive().len();
        bed.device.run();
    }
    assert!((1..=1200).contains(&resets), "{resets}");
    still_works(&mut bed);
}

#[test]
fn buffers_may_cross_regions_and_descriptors() {
    let half = MEMORY / 2;
    let mut bed = Bed::idle(config());
    // Two regions that touch, in the middle of nothing that the driver uses.
    bed.guest.driver = Driver::new(
        GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), half),
            (GuestAddress(half as u64), half + 4096),
        ])
        .unwrap(),
    );
    bed.boot();
    let (mut client, key) = bed.dial(5);
    // A packet whose header is in three pieces and whose payload crosses.
    let mem = bed.guest.driver.mem.clone();
    let spare = MEMORY as u64;
    let mut packet = Packet::new(key.0, key.1, RW);
    packet.len = 600;
    let raw = packet.bytes();
    let data = Rng(10).bytes(600);
    mem.write_slice(&raw[..10], GuestAddress(spare)).unwrap();
    mem.write_slice(&raw[10..30], GuestAddress(spare + 100))
        .unwrap();
    mem.write_slice(&raw[30..], GuestAddress(spare + 200))
        .unwrap();
    mem.write_slice(&data[..100], GuestAddress(spare + 214))
        .unwrap();
    mem.write_slice(&data[100..], GuestAddress(half as u64 - 250))
        .unwrap();
    let table = bed.guest.driver.tx.desc;
    let pieces = [
        (spare, 10),
        (spare + 100, 20),
        (spare + 200, 114),
        (half as u64 - 250, 500),
    ];
    for (i, (addr, len)) in (120u16..).zip(pieces) {
        let flags = u16::from(i < 123);
        Ring::write_desc(&mem, table + u64::from(i) * 16, addr, len, flags, i + 1);
    }
    bed.guest.driver.tx.publish(&mem, 120);
    let mut got = Vec::new();
    bed.until("the payload", |_| {
        pull(&mut client, &mut got);
        got.len() >= 600
    });
    assert!(got == data);
}

#[test]
fn the_event_queue_carries_a_transport_reset() {
    let mut bed = Bed::new();
    let (mut client, _) = bed.dial(5);
    let mem = bed.guest.driver.mem.clone();
    let mut ring = Ring::new(0x60_0000, 4096);
    Ring::write_desc(&mem, ring.desc, 0x61_0000, 8, 2, 0);
    ring.publish(&mem, 0);
    support::set_up(bed.device.queue_mut(EVENT_QUEUE).unwrap(), &ring);
    bed.device.start(EVENT_QUEUE);
    mem.write_obj(u32::MAX, GuestAddress(0x61_0000)).unwrap();
    bed.device.transport_reset();
    assert!(bed.device.run().contains(EVENT_QUEUE));
    assert_eq!(ring.pop_used(&mem), Some((0, 4)));
    assert_eq!(mem.read_obj::<u32>(GuestAddress(0x61_0000)).unwrap(), 0);
    bed.until("close", |_| pull(&mut client, &mut Vec::new()));
    // No buffer left, and nothing breaks.
    bed.device.transport_reset();
    still_works(&mut bed);
}

#[test]
fn a_ring_that_breaks_under_a_connection_keeps_no_place() {
    let mut limited = config();
    limited.max_connections = 4;
    let mut bed = Bed::with(limited);
    for _ in 0..8 {
        let (mut client, _) = bed.dial(9);
        // No buffer is left but one that lies outside of the ring.
        let driver = &mut bed.guest.driver;
        while driver.rx.pop_used(&driver.mem).is_some() {}
        let (mem, rx) = (driver.mem.clone(), &mut driver.rx);
        rx.publish(&mem, 5000);
        for _ in 0..=QUEUE_SIZE {
            client.write_all(b"data").unwrap();
            let mut events = Vec::new();
            bed.device.wait(&mut events).unwrap();
            bed.device.run();
        }
        drop(client);
        bed.reboot();
        bed.until("nobody is left", |bed| bed.device.connections() == 0);
    }
    still_works(&mut bed);
}
