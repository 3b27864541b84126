//! vhost-user back ends that do wrong, that do nothing, that die: the device
//! breaks, its thread goes on. And block and network devices over the protocol.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/backend.rs"]
mod backend;
#[path = "support/rig.rs"]
mod rig;

use std::{
    fs::{self, File},
    io::Write,
    os::unix::net::UnixStream,
    process::{Command, Stdio},
    time::Duration,
};

use backend::{FAULTS, Fault, Script, start};
use rig::{LIMIT, Rig, Vring, shared_memory};
use vm_memory::{Bytes, GuestAddress};
use walnut_devices::{
    Log, fs as virtiofs,
    vhost::{self, Error, Frontend, Limits, NetConfig},
    virtio::{Device, Memory},
};

const RING: u64 = 1 << 32 | 1 << 29 | 1 << 28;

fn log() -> Log {
    Log::new(|_| {})
}

fn limits() -> Limits {
    Limits::default()
}

/// To wait for a back end that does not answer.
const SHORT: Duration = Duration::from_millis(100);

fn filesystem(script: Script) -> (backend::Backend, Result<Frontend, Error>) {
    filesystem_within(script, limits())
}

fn filesystem_within(
    script: Script,
    limits: Limits,
) -> (backend::Backend, Result<Frontend, Error>) {
    let (backend, sock) = start(script);
    (backend, virtiofs::connect(sock, "tag", 8, limits, log()))
}

fn rings(memory: &Memory, count: usize) -> Vec<Vring> {
    (0..count)
        .map(|n| Vring::new(memory, 0x1000 + 0x4000 * n as u64, 64))
        .collect()
}

fn activate(rig: &Rig, rings: &[Vring]) {
    let all: Vec<_> = rings.iter().map(Some).collect();
    rig.activate(rig.port.features(), &all);
}

#[test]
fn a_back_end_gets_what_the_protocol_says() {
    let (backend, device) = filesystem(Script::default());
    let device = device.unwrap();
    assert_eq!((device.id(), device.features()), (26, RING));
    assert_eq!(device.queue_sizes(), [1024; 4]);
    let memory = shared_memory(2 << 20, Some(1 << 20));
    let rig = Rig::new(device, memory.clone());
    let mut rings = rings(&memory, 4);
    // The driver has left one out.
    let some: Vec<_> = rings
        .iter()
        .enumerate()
        .map(|(n, r)| (n != 2).then_some(r))
        .collect();
    rig.activate(RING, &some);
    rig.until("the last queue", || {
        backend.seen.lock().unwrap().bodies(18).len() == 3
    });
    // What the back end writes to its call is an interrupt.
    let mut call = backend.seen.lock().unwrap().calls[3]
        .as_ref()
        .unwrap()
        .try_clone()
        .unwrap();
    call.write_all(&1u64.to_ne_bytes()).unwrap();
    rig.until("an interrupt", || rig.bell.told().queues[3] == 1);
    // Buffers that were there before have been kicked for, and kicks arrive.
    rig.until("a kick", || {
        let seen = backend.seen.lock().unwrap();
        let mut count = [0; 8];
        nix::unistd::read(seen.kicks[1].as_ref().unwrap(), &mut count).is_ok()
    });
    rings[1].add(&[(0, 1, false)]);
    rig.kick(1);
    let seen = backend.seen.lock().unwrap();
    let mut count = [0; 8];
    nix::unistd::read(seen.kicks[1].as_ref().unwrap(), &mut count).unwrap();
    assert_eq!(count, 1u64.to_ne_bytes());

    let features = (RING | 1 << 30).to_le_bytes();
    assert_eq!(seen.bodies(2), [features]);
    // The table: guest addresses stand for ours.
    let mut table = vec![2, 0, 0, 0, 0, 0, 0, 0];
    for word in [0u64, 1 << 20, 0, 0, 1 << 32, 1 << 20, 1 << 32, 1 << 20] {
        table.extend(word.to_le_bytes());
    }
    assert_eq!(seen.bodies(5), [table]);
    assert_eq!(seen.memory.len(), 2);
    let mut ring = vec![3, 0, 0, 0, 0, 0, 0, 0];
    for word in [rings[3].desc, rings[3].used, rings[3].avail, 0] {
        ring.extend(word.to_le_bytes());
    }
    assert_eq!(seen.bodies(9)[2], ring);
    assert_eq!(seen.bodies(8)[2], [3, 0, 0, 0, 64, 0, 0, 0]);
    assert_eq!(seen.bodies(10)[2], [3, 0, 0, 0, 0, 0, 0, 0]);
}

/// Every answer wrong in every way: while the device is made, made active, taken
/// out of service.
#[test]
fn whatever_is_answered_nobody_waits_for_long() {
    // Five requests to meet, fourteen to begin, two to end.
    for at in 0..22 {
        for fault in FAULTS {
            let script = Script {
                queues: 2,
                fault: Some((at, fault)),
                ..Script::default()
            };
            let limits = Limits {
                connect: if at < 5 { SHORT } else { limits().connect },
                change: SHORT,
            };
            let (backend, device) = filesystem_within(script, limits);
            let Ok(device) = device else {
                assert!(at < 6, "{fault:?} at {at}");
                continue;
            };
            let memory = shared_memory(1 << 20, None);
            let count = device.queue_sizes().len().min(8);
            let rig = Rig::new(device, memory.clone());
            let rings = rings(&memory, count);
            activate(&rig, &rings);
            let done = || backend.seen.lock().unwrap().bodies(18).len() == count;
            rig.until("active or broken", || done() || rig.bell.told().broken);
            assert!(rig.port.pause(LIMIT).is_some(), "{fault:?} at {at}");
            rig.port.resume();
            rig.reset();
            drop(rig);
            let asked = backend.seen.lock().unwrap().requests.len();
            assert!(asked <= 100, "{fault:?} at {at}: {asked} requests");
        }
    }
}

#[test]
fn unfit_back_ends_are_refused() {
    let without = |features, protocol| {
        let script = Script {
            features,
            protocol,
            ..Script::default()
        };
        start(script)
    };
    let (_backend, sock) = without(1 << 30, 1);
    let result = virtiofs::connect(sock, "tag", 1, limits(), log());
    assert!(matches!(result, Err(Error::Unfit(_))));
    let (_backend, sock) = without(RING | 1 << 30, 1);
    assert!(matches!(
        vhost::block(sock, 1, limits(), log()),
        Err(Error::Unfit(_))
    ));
    for tag in ["", "a\0b", &"x".repeat(37)] {
        let (_backend, sock) = without(RING, 0);
        let result = virtiofs::connect(sock, tag, 1, limits(), log());
        assert!(matches!(result, Err(Error::Request(_))));
    }
    // The oldest protocol will do.
    let (_backend, sock) = without(RING, 0);
    let device = virtiofs::connect(sock, &"x".repeat(36), 3, limits(), log()).unwrap();
    assert_eq!(device.queue_sizes(), [1024; 2]);
}

#[test]
fn memory_that_cannot_be_shared_breaks_the_device() {
    let (_backend, device) = filesystem(Script::default());
    let memory = Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let rig = Rig::new(device.unwrap(), memory.clone());
    activate(&rig, &rings(&memory, 4));
    rig.until("broken", || rig.bell.told().broken);
}

/// Adjacent regions are one to the guest, two to the back end.
#[test]
fn a_ring_across_two_regions_breaks_the_device() {
    use vm_memory::FileOffset;
    let (backend, device) = filesystem(Script::default());
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x20_0000).unwrap();
    let part = |at: u64| {
        let file = FileOffset::new(file.try_clone().unwrap(), at);
        (GuestAddress(at), 0x10_0000, Some(file))
    };
    let memory = Memory::from_ranges_with_files([part(0), part(0x10_0000)]).unwrap();
    let rig = Rig::new(device.unwrap(), memory.clone());
    let mut rings = rings(&memory, 4);
    rings[1] = Vring::new(&memory, 0x10_0000 - 0x2200, 256);
    rings[1].desc = 0x10_0000 - 0x200;
    activate(&rig, &rings);
    rig.until("broken", || rig.bell.told().broken);
    assert_eq!(backend.seen.lock().unwrap().bodies(9).len(), 1);
}

#[test]
fn what_the_back_end_says_of_a_ring_is_bounded() {
    for base in [0, 7, 65535, 65536, u32::MAX] {
        let (_backend, device) = filesystem(Script {
            base,
            ..Script::default()
        });
        let memory = shared_memory(1 << 20, None);
        let rig = Rig::new(device.unwrap(), memory.clone());
        activate(&rig, &rings(&memory, 4));
        let queues = rig.port.pause(LIMIT).unwrap().queues;
        if let Some(queues) = queues {
            let expected = match u16::try_from(base) {
                // One less than has been used.
                Ok(65535) | Err(_) => 0,
                Ok(base) => base,
            };
            assert_eq!(queues[0].next_avail, expected);
            assert_eq!(queues[0].next_used, 0);
        }
    }
}

/// QEMU's virtiofsd says how far it has come, and then goes on until it stops.
#[test]
fn what_was_used_was_taken_whatever_the_back_end_says() {
    for (said, used, taken) in [
        (5, 9, 9),
        (9, 9, 9),
        (12, 9, 12),
        (65530, 3, 3),
        (5, 5 + 64, 5 + 64),
        // Of a ring with 64 places: the guest's word means nothing.
        (5, 5 + 65, 5),
    ] {
        let (_backend, device) = filesystem(Script {
            base: said,
            ..Script::default()
        });
        let memory = shared_memory(1 << 20, None);
        let rig = Rig::new(device.unwrap(), memory.clone());
        let rings = rings(&memory, 4);
        activate(&rig, &rings);
        let at = GuestAddress(rings[0].used + 2);
        memory.write_obj::<u16>(used, at).unwrap();
        let queues = rig.port.pause(LIMIT).unwrap().queues.unwrap();
        assert_eq!(queues[0].next_avail, taken, "{said} {used}");
        assert_eq!(queues[0].next_used, used);
    }
}

#[test]
fn a_disk_says_what_the_back_end_says() {
    let mut config: Vec<u8> = (0..60).collect();
    config[34..36].fill(9);
    let features = RING | 1 << 30 | 1 << 6 | 1 << 9 | 1 << 12 | 1 << 11 | 1 << 40;
    let script = |queues| Script {
        features,
        queues,
        config: config.clone(),
        ..Script::default()
    };
    let (_backend, sock) = start(script(3));
    let disk = vhost::block(sock, 4, limits(), log()).unwrap();
    assert_eq!(disk.id(), 2);
    assert_eq!(disk.features(), RING | 1 << 6 | 1 << 9 | 1 << 12);
    assert_eq!(disk.queue_sizes(), [256; 3]);
    let told = disk.config().bytes();
    assert_eq!((&told[..34], &told[34..36]), (&config[..34], &[3, 0][..]));
    // None at all makes no device.
    let (_backend, sock) = start(script(0));
    assert!(matches!(
        vhost::block(sock, 4, limits(), log()),
        Err(Error::Unfit(_))
    ));
    // A configuration that is too short.
    let short = Script {
        config: vec![0; 59],
        ..Script::default()
    };
    let (_backend, sock) = start(short);
    assert!(vhost::block(sock, 4, limits(), log()).is_err());
}

#[test]
fn an_interface_has_its_address_and_link() {
    let script = Script {
        features: RING | 1 << 30 | 1 | 1 << 15 | 1 << 17 | 1 << 22,
        ..Script::default()
    };
    let (backend, sock) = start(script);
    let config = NetConfig {
        mac: [2, 0, 0, 0, 0, 7],
        mtu: Some(1400),
    };
    let net = vhost::net(sock, config, limits(), log()).unwrap();
    assert_eq!(net.id(), 1);
    let own = 1 << 3 | 1 << 5 | 1 << 16;
    assert_eq!(net.features(), RING | 1 | 1 << 15 | own);
    let bytes = [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0x78, 5];
    assert_eq!(net.config().bytes(), bytes);
    // The back end is told of what it offered alone.
    let memory = shared_memory(2 << 20, Some(1 << 20));
    let rig = Rig::new(net, memory.clone());
    activate(&rig, &rings(&memory, 2));
    rig.until("the last queue", || {
        backend.seen.lock().unwrap().bodies(18).len() == 2
    });
    let features = (RING | 1 << 30 | 1 | 1 << 15).to_le_bytes();
    assert_eq!(backend.seen.lock().unwrap().bodies(2), [features]);
}

/// A real server of disks.
#[test]
fn a_disk_of_a_real_back_end_is_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    fs::write(&image, [0x5a; 1 << 20]).unwrap();
    let socket = dir.path().join("sock");
    let mut server = Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!(
            "driver=file,node-name=d,filename={}",
            image.display()
        ))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        ))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let memory = shared_memory(1 << 20, None);
    let mut sock = None;
    let start = std::time::Instant::now();
    while sock.is_none() && start.elapsed() < rig::PATIENCE {
        sock = UnixStream::connect(&socket).ok();
        std::thread::yield_now();
    }
    let device = vhost::block(sock.unwrap().into(), 1, Limits::default(), log()).unwrap();
    let sectors = &device.config().bytes()[..8];
    assert_eq!(sectors, (2048u64).to_le_bytes());
    let rig = Rig::new(device, memory.clone());
    let mut ring = rings(&memory, 1).remove(0);
    activate(&rig, std::slice::from_ref(&ring));
    let mut request = |kind: u32, sector: u64, write: bool| {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        memory.write_slice(&header, GuestAddress(0x10000)).unwrap();
        memory.write_obj(0xffu8, GuestAddress(0x12000)).unwrap();
        let chain = [
            (0x10000, 16, false),
            (0x11000, 512, !write),
            (0x12000, 1, true),
        ];
        let head = ring.add(&chain);
        rig.kick(0);
        rig.until("done", || {
            ring.pop_used().is_some_and(|(got, _)| got == head)
        });
        let status: u8 = memory.read_obj(GuestAddress(0x12000)).unwrap();
        status
    };
    assert_eq!(request(0, 3, false), 0);
    let byte: u8 = memory.read_obj(GuestAddress(0x11000)).unwrap();
    assert_eq!(byte, 0x5a);
    memory
        .write_slice(&[7; 512], GuestAddress(0x11000))
        .unwrap();
    assert_eq!(request(1, 4, true), 0);
    assert!(rig.port.pause(LIMIT).is_some());
    rig.port.resume();
    assert_eq!(request(4, 0, false), 0);
    drop(rig);
    let mut bytes = [0; 1024];
    use std::os::unix::fs::FileExt;
    File::open(&image)
        .unwrap()
        .read_exact_at(&mut bytes, 2048 - 512)
        .unwrap();
    assert_eq!((bytes[511], bytes[512], bytes[1023]), (0x5a, 7, 7));
    server.kill().unwrap();
    server.wait().unwrap();
}

/// A fault is only a fault if it is noticed.
#[test]
fn the_faults_of_the_tests_are_faults() {
    for fault in FAULTS {
        let script = Script {
            fault: Some((0, fault)),
            ..Script::default()
        };
        let limits = Limits {
            connect: SHORT,
            change: SHORT,
        };
        let (_backend, device) = filesystem_within(script, limits);
        let harmless = matches!(fault, Fault::Refuse | Fault::Ones | Fault::Passes);
        assert_eq!(device.is_ok(), harmless, "{fault:?}: {device:?}");
    }
}
