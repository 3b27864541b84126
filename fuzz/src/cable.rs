//! The network device.

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use vm_memory::{Bytes, GuestAddress};
use walnut_devices::{
    Log,
    limit::{BucketConfig, LimitConfig},
    net::{Config, Net},
    virtio::{Device, Event, MemoryCell},
};

use super::{
    driver::{DATA, Fuzz, Input, RING_SIZE, TABLES, memory},
    rig::{NEXT, WRITE},
};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn cable() -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
}

/// The network device, one or two pairs.
pub(crate) fn net(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.u8();
    let slow = BucketConfig {
        size: 2000,
        burst: 0,
        refill: std::time::Duration::from_micros(20),
    };
    let limit = LimitConfig {
        bytes: (kind & 4 != 0).then_some(slow),
        operations: None,
    };
    let config = Config {
        mac: MAC,
        mtu: (kind & 8 != 0).then_some(1500),
        only_own_mac: kind & 2 != 0,
        offloads: true,
        receive: limit,
        send: limit,
    };
    let (sockets, hosts): (Vec<_>, Vec<_>) = (0..=kind & 1).map(|_| cable()).unzip();
    let device = Net::on_sockets(sockets, config, Log::new(|_| {})).unwrap();
    let (link, counters) = (device.link(), device.counters());
    let mut features = device.features();
    for (bit, feature) in [(16, 15), (32, 29), (64, 22), (128, 11)] {
        if kind & bit != 0 {
            features &= !(1u64 << feature);
        }
    }
    let mut fuzz = Fuzz::new(device, features, MemoryCell::new(memory()));
    // Receive queues keep what there is no frame for, and a second pair is not in use
    // before the driver says so. Where the commands go, the features say.
    let control = if features & 1 << 22 != 0 { 4 } else { 2 };
    fuzz.keeps = match control {
        4 => |queue| if matches!(queue, 1 | 4) { 0 } else { u32::MAX },
        _ => |queue| if matches!(queue, 1 | 2) { 0 } else { u32::MAX },
    };
    if hosts.len() == 1 {
        fuzz.keeps = |queue| if queue == 1 { 0 } else { u32::MAX };
    }
    let pairs = u16::try_from(hosts.len()).unwrap();
    let mut buffer = vec![0; 70_000];
    fuzz.run(input, |fuzz, input| {
        let pair = usize::from(input.below(pairs));
        match input.u8() {
            // A frame for the guest.
            n @ 0..80 => {
                let len = match n {
                    0 => usize::from(input.u16()) + 2000,
                    n => usize::from(n) * 20,
                };
                buffer[..len].fill(n);
                let _ = nix::unistd::write(hosts[pair].as_fd(), &buffer[..len]);
                fuzz.direct
                    .event(Event::Watched(u32::try_from(pair).unwrap()));
                fuzz.kick(pair * 2);
            }
            80..84 => link.set(input.u8() % 2 == 0),
            // A command.
            84..100 if pairs > 1 => {
                let at = TABLES + 0x1000;
                let command = [4, 0, input.u8() % 4, input.u8() & 0x81];
                fuzz.mem.write_slice(&command, GuestAddress(at)).unwrap();
                let ring = &fuzz.lines[control].ring;
                ring.write_desc(0, at, u32::from(input.u8() % 6), NEXT, 1);
                ring.write_desc(1, DATA, u32::from(input.u8() % 3), WRITE, 0);
                fuzz.publish(control, 0);
                fuzz.kick(control);
            }
            // Room for a frame.
            n @ 100..160 => {
                let index = input.below(RING_SIZE);
                let (at, len) = (input.address(), input.len());
                let flags = WRITE | if n % 4 == 0 { NEXT } else { 0 };
                let next = (index + 1) % RING_SIZE;
                fuzz.lines[pair * 2]
                    .ring
                    .write_desc(index, at, len, flags, next);
                fuzz.publish(pair * 2, index);
            }
            // A frame of the guest's.
            n => {
                let index = input.below(RING_SIZE);
                let at = TABLES + 0x1000 + u64::from(index) * 64;
                let front = [input.u8() & 3, input.u8() & 0x87, 0, 0, 0, 0, 0, 0];
                fuzz.mem.write_slice(&front, GuestAddress(at)).unwrap();
                fuzz.mem.write_slice(&MAC, GuestAddress(at + 18)).unwrap();
                let (addr, len) = (input.address(), input.len());
                let two = (index + 1) % RING_SIZE;
                let cut = u32::from(input.u8()) % 64;
                let ring = &fuzz.lines[pair * 2 + 1].ring;
                ring.write_desc(index, at, cut, NEXT, two);
                ring.write_desc(two, addr, len, 0, 0);
                fuzz.publish(pair * 2 + 1, index);
                if n % 2 == 0 {
                    fuzz.kick(pair * 2 + 1);
                }
            }
        }
        for host in &hosts {
            while nix::unistd::read(host.as_fd(), &mut buffer).is_ok_and(|n| n > 0) {}
        }
    });
    for host in &hosts {
        while nix::unistd::read(host.as_fd(), &mut buffer).is_ok_and(|n| n > 0) {}
    }
    link.set(true);
    fuzz.direct.event(Event::Watched(u32::MAX));
    let mut frame = [0; 80];
    frame[18..24].copy_from_slice(&MAC);
    fuzz.mem.write_slice(&frame, GuestAddress(TABLES)).unwrap();
    assert_eq!(fuzz.serves(1, &[(TABLES, 80, false)]), 0);
    assert_eq!(nix::unistd::read(hosts[0].as_fd(), &mut buffer), Ok(80));
    let _ = counters;
}
