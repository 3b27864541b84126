//! An owner of memory that comes and goes, which really maps and unmaps it.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use vm_memory::{GuestAddress, GuestAddressSpace, GuestRegionMmap, MmapRegion};
use walnut_devices::{
    mem::{Blocks, Busy, Region},
    virtio::{Memory, MemoryCell},
};

pub(crate) const BLOCK: u64 = 0x1_0000;
pub(crate) const COUNT: u64 = 16;
pub(crate) const REGION: Region = Region {
    addr: 1 << 32,
    size: COUNT * BLOCK,
    block: BLOCK,
};

/// Maps each block by itself.
#[derive(Debug, Clone)]
pub(crate) struct Owner {
    pub(crate) cell: MemoryCell,
    pub(crate) busy: Arc<AtomicBool>,
    pub(crate) calls: Arc<Mutex<Vec<Range<u64>>>>,
}

impl Owner {
    fn change(
        &self,
        range: Range<u64>,
        change: impl Fn(Memory, u64) -> Memory,
    ) -> Result<(), Busy> {
        assert!(range.start >= REGION.addr && range.end <= REGION.addr + REGION.size);
        let whole = |at: u64| at.is_multiple_of(BLOCK);
        assert!(range.start < range.end && whole(range.start) && whole(range.end));
        if self.busy.load(Ordering::Relaxed) {
            return Err(Busy);
        }
        self.calls.lock().unwrap().push(range.clone());
        let mut memory = Memory::clone(&self.cell.memory());
        let mut at = range.start;
        while at < range.end {
            memory = change(memory, at);
            at += BLOCK;
        }
        self.cell.lock().unwrap().replace(memory);
        Ok(())
    }
}

impl Blocks for Owner {
    fn plug(&mut self, range: Range<u64>) -> Result<(), Busy> {
        self.change(range, |memory, at| {
            let block = MmapRegion::new(usize::try_from(BLOCK).unwrap()).unwrap();
            let block = GuestRegionMmap::new(block, GuestAddress(at)).unwrap();
            memory.insert_region(Arc::new(block)).unwrap()
        })
    }

    fn unplug(&mut self, range: Range<u64>) -> Result<(), Busy> {
        self.change(range, |memory, at| {
            memory.remove_region(GuestAddress(at), BLOCK).unwrap().0
        })
    }
}
