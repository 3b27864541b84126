//! The socket device, between a hostile guest and hostile programs on the host.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    time::Duration,
};

use vm_memory::{Bytes, GuestAddress};
use walnut_devices::vsock::{Config, RX_QUEUE, TX_QUEUE, Timeouts};

use super::{
    driver::Input,
    support::{Bed, config, driver::*},
};

const PORT: u32 = 600;
const MOST: usize = 12;

fn packet(input: &mut Input<'_>) -> Packet {
    let host = match input.u8() {
        0 => input.u32(),
        n @ 1..64 => (1 << 30) + u32::from(n) % 16,
        _ => PORT,
    };
    let guest = match host {
        PORT => 70 + u32::from(input.u8() % 8),
        _ => 5,
    };
    let mut packet = Packet::new(guest, host, u16::from(input.u8() % 9));
    packet.flags = u32::from(input.u8() % 4);
    match input.u8() {
        0 => packet.src_cid = u64::from(input.u32()),
        1 => packet.dst_cid = u64::from(input.u8() % 5),
        2 => packet.kind = input.u16(),
        3 => packet.op = input.u16(),
        4 => packet.flags = input.u32(),
        5..32 => packet.fwd_cnt = input.u32(),
        32..48 => packet.buf_alloc = input.u32(),
        48..60 => packet.buf_alloc = u32::from(input.u8()),
        60 => packet.src_port = input.u32(),
        61 => packet.dst_port = input.u32(),
        _ => {}
    }
    packet
}

/// The device, its guest and the host.
pub(crate) fn vsock(data: &[u8]) {
    let mut input = Input(data);
    let brief = input.u8() % 4 == 0;
    let no_time = Duration::ZERO;
    let timeouts = Timeouts {
        handshake: no_time,
        request: no_time,
        connect: no_time,
        close: no_time,
    };
    let mut bed = Bed::with(Config {
        max_connections: MOST,
        timeouts: if brief { timeouts } else { Timeouts::default() },
        ..config()
    });
    let listener = bed.listener(PORT);
    let mut streams: Vec<UnixStream> = Vec::new();
    let mut buffer = [0; 4096];
    while !input.0.is_empty() {
        match input.u8() % 16 {
            0..4 => {
                let mut packet = packet(&mut input);
                let len = match input.u8() {
                    0..128 => 0,
                    255 => 65_536,
                    n => u32::from(n),
                };
                packet.len = if input.u8() == 0 { input.u32() } else { len };
                let data = vec![7; usize::try_from(len).unwrap()];
                if let Some(chain) = bed.guest.driver.take_chain() {
                    bed.guest.driver.send_raw(chain, &packet, &data);
                }
            }
            4 => {
                if streams.len() < 20 {
                    streams.push(bed.client());
                }
            }
            5..8 => {
                let which = usize::from(input.u8());
                let count = streams.len().max(1);
                let Some(stream) = streams.get_mut(which % count) else {
                    continue;
                };
                let _ = match input.u8() % 8 {
                    0..3 => stream.write_all(b"CONNECT 5\n"),
                    3 => {
                        let bytes: Vec<_> = (0..input.u8() % 40).map(|_| input.u8()).collect();
                        stream.write_all(&bytes)
                    }
                    4 => stream.write(&[9; 3000]).map(drop),
                    5 => stream.read(&mut buffer).map(drop),
                    6 => stream.shutdown([Shutdown::Read, Shutdown::Write][which % 2]),
                    _ => {
                        streams.swap_remove(which % count);
                        Ok(())
                    }
                };
            }
            8 => {
                if let Ok((stream, _)) = listener.accept() {
                    let _ = stream.set_nonblocking(true);
                    streams.push(stream);
                }
            }
            // A descriptor, and a head.
            9 => {
                let mem = bed.guest.driver.mem.clone();
                let ring = match input.u8() % 2 {
                    0 => &mut bed.guest.driver.rx,
                    _ => &mut bed.guest.driver.tx,
                };
                let at = ring.desc + u64::from(input.u8() % 128) * 16;
                let addr = match input.u8() {
                    0 => u64::from(input.u32()) << 32 | u64::from(input.u32()),
                    1 => MEMORY as u64 - u64::from(input.u8()),
                    2 => u64::MAX - u64::from(input.u8()),
                    n => u64::from(n) * 4096,
                };
                let len = match input.u8() {
                    0 => input.u32(),
                    n => u32::from(n),
                };
                let (flags, next) = (u16::from(input.u8() % 8), u16::from(input.u8() % 130));
                Ring::write_desc(&mem, at, addr, len, flags, next);
            }
            10 => {
                let mem = bed.guest.driver.mem.clone();
                let ring = match input.u8() % 2 {
                    0 => &mut bed.guest.driver.rx,
                    _ => &mut bed.guest.driver.tx,
                };
                let head = match input.u8() {
                    255 => input.u16(),
                    n => u16::from(n % 128),
                };
                ring.publish(&mem, head);
            }
            11 => match input.u8() % 32 {
                0 => bed.device.stop(RX_QUEUE),
                1 => bed.device.start(RX_QUEUE),
                2 => bed.device.stop(TX_QUEUE),
                3 => bed.device.start(TX_QUEUE),
                4 => bed.device.reset(),
                5 => bed.device.transport_reset(),
                6 => bed.reboot(),
                7 => {
                    let idx = input.u16();
                    let at = bed.guest.driver.tx.avail + 2;
                    bed.guest
                        .driver
                        .mem
                        .write_obj(idx, GuestAddress(at))
                        .unwrap();
                }
                _ => {}
            },
            _ => {
                let mut events = Vec::new();
                bed.device.wait(&mut events).unwrap();
                bed.device.run();
                assert!(bed.device.connections() <= MOST);
                take(&mut bed);
            }
        }
    }
    // Whatever was done: a new guest is served. With no time at all nobody is.
    drop(streams);
    if !brief {
        bed.reboot();
        // Those who connected and left are found to be gone.
        bed.settle();
        bed.until("nobody is left", |bed| bed.device.connections() == 0);
        let (mut client, key) = bed.dial(9);
        client.write_all(b"well?").unwrap();
        bed.until("data", |bed| bed.guest.socket(key).inbox == b"well?");
    }
}

/// Takes what has arrived, whatever the rings have become: the driver by hand
/// believes the used ring, and these buffers may not be its own any more.
fn take(bed: &mut Bed) {
    let driver = &mut bed.guest.driver;
    for _ in 0..CHAINS {
        if driver.rx.pop_used(&driver.mem).is_none() {
            break;
        }
    }
}
