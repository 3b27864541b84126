//! The memory device.

use std::sync::{Arc, atomic::Ordering};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};
use walnut_devices::{
    mem::Mem,
    virtio::{Device, MemoryCell},
};

use super::{
    blocks::{BLOCK, COUNT, Owner, REGION},
    driver::{DATA, Fuzz, Input, RING_SIZE, TABLES, memory},
    rig::{NEXT, WRITE},
};

/// The memory device: what it says is plugged is what can be reached.
pub(crate) fn mem(data: &[u8]) {
    let input = Input(data);
    let cell = MemoryCell::new(memory());
    let owner = Owner {
        cell: cell.clone(),
        busy: Arc::default(),
        calls: Arc::default(),
    };
    let device = Mem::new(REGION, Box::new(owner.clone())).unwrap();
    let target = device.target();
    let features = device.features();
    let mut fuzz = Fuzz::new(device, features, cell.clone());
    let agrees = || {
        let memory = cell.memory();
        let there = |n: &u64| {
            let at = GuestAddress(REGION.addr + n * BLOCK);
            memory.check_range(at, usize::try_from(BLOCK).unwrap(), Permissions::ReadWrite)
        };
        let reachable = (0..COUNT).filter(there).count() as u64 * BLOCK;
        assert_eq!(reachable, target.plugged());
    };
    fuzz.run(input, |fuzz, input| match input.u8() {
        n @ 0..64 => {
            let _ = target.set(u64::from(n) % 18 * BLOCK);
            owner.busy.store(n >= 56, Ordering::Relaxed);
        }
        n => {
            let index = input.below(RING_SIZE);
            let at = TABLES + 0x1000 + u64::from(index) * 64;
            let kind = u64::from(n) % 5;
            let block = u64::from(input.below(19));
            let addr = REGION.addr + block * BLOCK + u64::from(input.u8() & 0x81);
            let count = match input.u8() {
                0 => u64::from(input.u16()),
                n => u64::from(n) % 18,
            };
            for (n, word) in (0..).zip([kind, addr, count]) {
                fuzz.mem.write_obj(word, GuestAddress(at + n * 8)).unwrap();
            }
            let two = (index + 1) % RING_SIZE;
            let ring = &fuzz.lines[0].ring;
            ring.write_desc(index, at, 24, NEXT, two);
            ring.write_desc(two, DATA + u64::from(index) * 16, 10, WRITE, 0);
            fuzz.publish(0, index);
            fuzz.kick(0);
            agrees();
        }
    });
    agrees();
    owner.busy.store(false, Ordering::Relaxed);
    fuzz.mem.write_obj(2u64, GuestAddress(TABLES)).unwrap();
    assert_eq!(fuzz.serves(0, &[(TABLES, 24, false), (DATA, 10, true)]), 10);
    assert_eq!(target.plugged(), 0);
}
