//! Every index that a queue can have, near every wrap (virtio 1.3 §2.7.6, §2.7.8).

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/direct.rs"]
mod direct;
#[path = "support/rig.rs"]
mod rig;

use direct::Direct;
use rig::*;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use walnut_devices::{limit::LimitConfig, rng::Rng as Entropy, virtio::*};

const RING: u64 = 0x1000;
const DATA: u64 = 0x8000;

/// The indices at which something could go wrong.
fn starts(size: u16) -> impl Iterator<Item = u16> {
    let near = (0..=4).map(|n| 0u16.wrapping_sub(n));
    let half = (0..=2).map(|n| 0x8000u16.wrapping_sub(n));
    let wrap = [size - 1, size, size.wrapping_neg(), size.wrapping_neg() - 1];
    near.chain(half).chain(wrap).chain([1, 2])
}

/// §2.7.6: of every size, from every index, every number of chains up to the size is
/// served once each and in order; more than the size is no queue.
#[test]
fn every_distance_between_the_indices_is_served_or_refused() {
    let mem = Memory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut direct = Direct::new(Entropy::new(LimitConfig::default()), mem.clone());
    let features = direct.device.features();
    for event_idx in [false, true] {
        let features = features & !(u64::from(!event_idx) << 29);
        for size in [1u16, 2, 4, 8, 16, 32, 64] {
            for start in starts(size) {
                let few = 0..=size.min(4);
                let many = size.saturating_sub(1)..=size + 2;
                for count in few.chain(many).chain([0x7fff, 0x8000, u16::MAX]) {
                    let ring = Vring::new(&mem, RING, size);
                    for index in 0..size {
                        ring.write_desc(index, DATA, 1, WRITE, 0);
                        // Where index `start + n` is, head `n`.
                        let slot = start.wrapping_add(index) % size;
                        let at = GuestAddress(ring.avail + 4 + u64::from(slot) * 2);
                        mem.write_obj(index, at).unwrap();
                    }
                    let at = GuestAddress(ring.avail + 2);
                    mem.write_obj(start.wrapping_add(count), at).unwrap();
                    let mut queue = ring.queue(64, event_idx);
                    queue.set_next_avail(start);
                    queue.set_next_used(start);
                    direct.activate_with(features, vec![queue]);
                    direct.kick(0);
                    let what = format!("size {size}, {start} and {count} more");
                    assert_eq!(direct.broken, count > size, "{what}");
                    let used: u16 = mem.read_obj(GuestAddress(ring.used + 2)).unwrap();
                    let mut served = 0;
                    if count <= size {
                        served = count;
                        if count > 0 {
                            assert_eq!(used, start.wrapping_add(count), "{what}");
                        }
                    }
                    for n in 0..served {
                        let slot = u64::from(start.wrapping_add(n) % size);
                        let at = GuestAddress(ring.used + 4 + slot * 8);
                        let element: [u32; 2] = [
                            mem.read_obj(at).unwrap(),
                            mem.read_obj(GuestAddress(at.0 + 4)).unwrap(),
                        ];
                        assert_eq!(element, [u32::from(n), 1], "{what}");
                    }
                    let back = direct.device.deactivate();
                    assert_eq!(back[0].next_avail(), start.wrapping_add(served), "{what}");
                    assert_eq!(back[0].next_used(), start.wrapping_add(served), "{what}");
                    direct.device.reset();
                }
            }
        }
    }
}

/// §2.7.6: every head that there is not breaks the device, and none of those that
/// there are.
#[test]
fn every_head_is_a_descriptor_or_breaks_the_device() {
    let mem = Memory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let mut direct = Direct::new(Entropy::new(LimitConfig::default()), mem.clone());
    let features = direct.device.features();
    let mut ring = Vring::new(&mem, RING, 16);
    for index in 0..16 {
        ring.write_desc(index, DATA, 1, WRITE, 0);
    }
    direct.activate(features, &[&ring]);
    for head in 0..=u16::MAX {
        ring.publish(head);
        direct.kick(0);
        assert_eq!(direct.broken, head >= 16, "{head}");
        if direct.broken {
            direct.device.deactivate();
            direct.device.reset();
            let at = GuestAddress(ring.used);
            mem.write_slice(&[0; 4], at).unwrap();
            (ring.used_idx, ring.avail_idx) = (0, 0);
            ring.set_avail_idx(0);
            direct.activate(features, &[&ring]);
        } else {
            assert_eq!(ring.pop_used(), Some((head, 1)));
        }
    }
}
