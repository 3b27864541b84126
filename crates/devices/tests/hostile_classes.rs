//! Classes of bugs that this field has had and that belong to no one device:
//! `docs/hostile-guests.md` says which test stands for which.

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
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, channel},
    },
};

use direct::Direct;
use disk::*;
use rig::*;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress};
use walnut_devices::{
    balloon::{self, Balloon},
    block::{Block, Config, SECTOR},
    limit::LimitConfig,
    rng::Rng as Entropy,
    virtio::*,
};

/// A device whose disk does not answer before it is told to.
#[derive(Debug)]
struct Stuck {
    config: Arc<ConfigSpace>,
    disk: Receiver<()>,
    entered: Arc<AtomicBool>,
    queues: Vec<Queue>,
}

impl Device for Stuck {
    fn id(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        VERSION_1
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        self.queues = activation.queues;
        Ok(())
    }

    fn event(&mut self, _: Event) -> Result<(), Broken> {
        self.entered.store(true, Ordering::SeqCst);
        let _ = self.disk.recv();
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        std::mem::take(&mut self.queues)
    }
}

/// Class 6: a slow disk starves no other device. The first worker hangs in its disk;
/// the second serves, is reset and serves again; and so does a real disk's.
#[test]
fn a_device_blocked_in_its_disk_stalls_no_other() {
    let (answer, disk) = channel();
    let entered = Arc::new(AtomicBool::new(false));
    let stuck = Stuck {
        config: Arc::new(ConfigSpace::new([0; 8], 0..0)),
        disk,
        entered: entered.clone(),
        queues: Vec::new(),
    };
    let mem = memory();
    let slow = Rig::new(stuck, mem.clone());
    let ring = Vring::new(&mem, 0x8_0000, 16);
    slow.activate(VERSION_1, &[Some(&ring)]);
    slow.until("it hangs", || entered.load(Ordering::SeqCst));
    let other = Rig::new(Entropy::new(LimitConfig::default()), mem.clone());
    for _ in 0..3 {
        let mut ring = Vring::new(&mem, RINGS, 16);
        other.activate(VERSION_1, &[Some(&ring)]);
        for _ in 0..20 {
            ring.add(&[(DATA, 64, true)]);
            other.kick(0);
            let mut used = None;
            other.until("entropy", || {
                used = ring.pop_used();
                used.is_some()
            });
            assert_eq!(used.unwrap().1, 64);
        }
        other.reset();
    }
    for mut bed in beds(Config::default()) {
        bed.still_works();
    }
    // It still hangs; and a driver that resets it is told so, and does not.
    slow.port.reset();
    assert!(slow.port.resetting());
    drop(answer);
    slow.until("reset", || !slow.port.resetting());
}

/// Class 7: no format is looked for in a disk's bytes, whatever they look like.
#[test]
fn headers_of_image_formats_are_just_bytes() {
    let mut qcow2 = vec![0; 512];
    qcow2[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    // A backing file at byte 256, of 11 bytes; 64 KiB clusters; a size of 1 TiB.
    qcow2[8..16].copy_from_slice(&256u64.to_be_bytes());
    qcow2[16..20].copy_from_slice(&11u32.to_be_bytes());
    qcow2[20..24].copy_from_slice(&16u32.to_be_bytes());
    qcow2[24..32].copy_from_slice(&(1u64 << 40).to_be_bytes());
    qcow2[256..267].copy_from_slice(b"/etc/passwd");
    let mut headers = vec![qcow2];
    for magic in [
        &b"KDMV\x01\0\0\0"[..],
        b"vhdxfile",
        b"conectix",
        b"<<< Oracle VM VirtualBox Disk Image >>>",
        b"QED\0",
        b"LUKS\xba\xbe",
    ] {
        let mut header = magic.to_vec();
        header.resize(512, 0);
        headers.push(header);
    }
    for header in headers {
        let file = new_file();
        file.write_all_at(&header, 0).unwrap();
        for engine in ENGINES {
            let file = file.try_clone().unwrap();
            let mut bed = Bed::over(file, engine, Config::default());
            let mut sectors = [0; 8];
            bed.rig.port.config().read(0, &mut sectors);
            assert_eq!(u64::from_le_bytes(sectors), SECTORS);
            assert_eq!(bed.read(0, &[(DATA, 512)]), (OK, 513));
            assert_eq!(bed.get(DATA, 512), header);
            // Written by the guest, and looked at anew: the same.
            bed.put(DATA, &header);
            assert_eq!(bed.write(SECTORS - 1, &[(DATA, 512)]), (OK, 1));
            assert_eq!(bed.on_disk((SECTORS - 1) * SECTOR, 512), header);
            bed.restart();
            bed.still_works();
        }
    }
}

/// Class 13: an image that is read-only is so by its descriptor: a device that is
/// told to write to it all the same cannot.
#[test]
fn a_read_only_descriptor_holds_though_the_device_be_told_otherwise() {
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().set_len(SECTORS * SECTOR).unwrap();
    let content = noise(5, 4096);
    named.as_file().write_all_at(&content, 0).unwrap();
    for engine in ENGINES {
        let open = || std::fs::File::open(named.path()).unwrap();
        let config = Config {
            engine,
            ..Config::default()
        };
        assert!(Block::new(open().into(), config.clone()).is_err());
        let config = Config {
            read_only: true,
            ..config
        };
        let mut bed = Bed::over(open(), engine, config);
        // The driver agrees on all there is, and asks for what was not offered.
        for kind in [WRITE_OUT, DISCARD, ZEROES] {
            bed.put(DATA, &[0xff; 512]);
            let (status, _) = bed.request(kind, 0, &[(DATA, 512, false)]);
            assert_ne!(status, OK);
        }
        assert_eq!(bed.on_disk(0, 4096), content);
    }
}

/// Class 10: descriptors, heads and indices that another processor changes while
/// they are read. What a device has looked at once it has, so nothing is written
/// but where some descriptor allowed it.
#[test]
fn rings_that_change_while_they_are_read_harm_only_their_guest() {
    let release = |mem: &Memory| Box::new(balloon::Advise::new(MemoryCell::new(mem.clone())));
    let mem = memory();
    torn(Entropy::new(LimitConfig::default()), &mem, 0);
    let mem = memory();
    let device = Balloon::new(balloon::Config::default(), release(&mem)).unwrap();
    // Free pages that are reported.
    torn(device, &mem, 3);
    for engine in ENGINES {
        let mem = memory();
        let config = Config {
            engine,
            ..Config::default()
        };
        torn(Block::new(new_file().into(), config).unwrap(), &mem, 0);
    }
}

fn torn(device: impl Device, mem: &Memory, queue: usize) {
    const ALLOWED: u64 = DATA;
    const GUARD: u64 = DATA + 0x2000;
    let features = device.features();
    let count = device.queue_sizes().len() as u64;
    let mut rings: Vec<_> = (0..count)
        .map(|n| Vring::new(mem, RINGS + n * 0x4000, 16))
        .collect();
    let mut direct = Direct::new(device, mem.clone());
    direct.activate(features, &rings.iter().collect::<Vec<_>>());
    let guard = noise(8, 0x2000);
    mem.write_slice(&guard, GuestAddress(GUARD)).unwrap();
    mem.write_slice(&guard, GuestAddress(ALLOWED - 0x2000))
        .unwrap();
    let done = AtomicBool::new(false);
    let (desc, avail) = (rings[queue].desc, rings[queue].avail);
    std::thread::scope(|scope| {
        let flipper = scope.spawn(|| {
            let mut rng = Rng(0x5eed_0030);
            while !done.load(Ordering::Relaxed) {
                let at = desc + rng.below(16) * 16;
                let put = |value: u64, len: usize, at: u64| {
                    let raw = value.to_le_bytes();
                    mem.write_slice(&raw[..len], GuestAddress(at)).unwrap();
                };
                // Address and length by themselves: any pair of them fits.
                match rng.below(6) {
                    0 => put(ALLOWED + rng.below(8) * 512, 8, at),
                    1 => put(rng.pick(&[0, 1, 16, 512, 4096]), 4, at + 8),
                    2 => put(rng.below(4), 2, at + 12),
                    3 => put(rng.below(18), 2, at + 14),
                    4 => put(rng.below(18), 2, avail + 4 + rng.below(16) * 2),
                    _ => put(rng.next(), 8, ALLOWED + rng.below(512) * 8),
                }
            }
        });
        for round in 0..3000 {
            if direct.broken || round % 64 == 0 {
                direct.drain();
                direct.device.deactivate();
                direct.device.reset();
                rings = (0..count)
                    .map(|n| Vring::new(mem, RINGS + n * 0x4000, 16))
                    .collect();
                direct.activate(features, &rings.iter().collect::<Vec<_>>());
            }
            for head in 0..4 {
                rings[queue].publish(head);
            }
            direct.event(Event::Queue(queue));
            direct.drain();
            if round % 16 == 0 {
                direct.event(Event::Deadline);
            }
        }
        done.store(true, Ordering::Relaxed);
        flipper.join().unwrap();
    });
    direct.drain();
    for at in [GUARD, ALLOWED - 0x2000] {
        let mut now = vec![0; guard.len()];
        mem.read_slice(&mut now, GuestAddress(at)).unwrap();
        assert!(now == guard, "{at:#x} was written to");
    }
}
