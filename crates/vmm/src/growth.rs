//! Memory that comes and goes: the blocks of [`walnut_devices::mem`].
//!
//! Address space for all of it is reserved from the start, and stays so: no address
//! of it ever means anything else. Three things make a block reachable, and each is
//! taken away before the block is said to be unplugged:
//!
//! - *the devices'* [`MemoryCell`] has regions for what is plugged and nothing else;
//! - *KVM's* slots, of 128 MiB, are there while any block of theirs is plugged: a
//!   guest that looks elsewhere finds no memory. (A slot cannot be split while the
//!   guest runs, and to remove one costs the guest all of its page tables, so not
//!   every block has its own);
//! - *the host's* mapping of a block that is not plugged allows nothing, so that
//!   neither KVM nor a device in the wrong gets a page there. A guest that looks at
//!   such a block beside plugged ones ends its machine.
//!
//! A device may be in the middle of a copy, or have a request in flight, with memory
//! as it was a moment ago: a block is unmapped only when no snapshot of the old
//! memory lives any more. Where one outlives its welcome, the guest is asked to try
//! again later. So it is where the processes that serve devices ([`BackEnds`]) cannot be told,
//! or would have to be told of more regions than they must take: none of them keeps, or is
//! led to, memory that the guest has given up.

mod restore;

use std::{
    fmt::Debug,
    fs::File,
    ops::Range,
    os::fd::AsRawFd,
    sync::{Arc, PoisonError},
    time::Duration,
};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::errno::Errno;
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestRegionMmap,
    mmap::MmapRegionBuilder,
};
use walnut_devices::{
    mem::{Blocks, Busy, Mem, Region, Target},
    vhost::MAX_REGIONS,
    virtio::{Memory, MemoryCell},
};
use walnut_vmm_api::Backing;

use crate::{
    Error,
    backends::BackEnds,
    jail::calls::{MEM_PRIVATE, MEM_SHARED, Thread},
    memory,
    prepared::Site,
    snapshot::Plugged,
};
use restore::Page;

/// Bytes of a block.
const BLOCK: u64 = 2 << 20;
/// Bytes of a slot of KVM's.
const SLOT: u64 = 128 << 20;
/// The first slot's number: those before are RAM's.
const FIRST_SLOT: u32 = 8;
/// How often, and how long, a device may still have old memory.
const PATIENCE: (u32, Duration) = (2000, Duration::from_millis(1));

/// KVM's slots of guest memory.
pub(crate) trait Slots: Send + Debug {
    /// Puts `len` bytes at a host address into the guest's address space, as slot
    /// `number`; no bytes remove the slot.
    fn set(&mut self, number: u32, guest: u64, host: usize, len: u64) -> Result<(), Errno>;
}

#[derive(Debug)]
struct Kvm(Arc<VmFd>);

impl Slots for Kvm {
    fn set(&mut self, number: u32, guest: u64, host: usize, len: u64) -> Result<(), Errno> {
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: 0,
            guest_phys_addr: guest,
            memory_size: len,
            userspace_addr: host as u64,
        };
        // SAFETY: the addresses are reserved for this guest until the process ends.
        unsafe { self.0.set_user_memory_region(region) }.map_err(|e| Errno::from_raw(e.errno()))
    }
}

/// The region's memory.
#[derive(Debug)]
struct Growth {
    /// Guest addresses.
    region: Range<u64>,
    /// The first one's place in this process, reserved up to the last one's.
    host: usize,
    /// How it is mapped.
    flags: i32,
    /// What it is made of, if it is shared or of huge pages.
    file: Option<Arc<File>>,
    /// Whether other processes map it.
    shared: bool,
    huge_pages: bool,
    /// RAM.
    base: Memory,
    cell: MemoryCell,
    back_ends: BackEnds,
    slots: Box<dyn Slots>,
    /// Which blocks are plugged.
    plugged: Vec<bool>,
    /// What they are made of.
    pages: Vec<Page>,
}

/// What the thread of a memory device calls.
pub(crate) fn thread(backing: Backing) -> &'static Thread {
    match in_file(backing) {
        true => &MEM_SHARED,
        false => &MEM_PRIVATE,
    }
}

/// A memory device's region at these guest addresses.
pub(crate) fn region(addresses: &Range<u64>) -> Region {
    Region {
        addr: addresses.start,
        size: addresses.end - addresses.start,
        block: BLOCK,
    }
}

/// The memory device of a machine that can grow, and how to ask it. In a clone it has
/// what was plugged.
pub(crate) fn device(
    addresses: Range<u64>,
    backing: Backing,
    vm: &Arc<VmFd>,
    site: &Site,
    plugged: Option<&Plugged>,
) -> Result<(Mem, Target), Error> {
    let slots = Box::new(Kvm(Arc::clone(vm)));
    let region = region(&addresses);
    let mut blocks = Growth::new(addresses, backing, site, slots)?;
    if let Some(plugged) = plugged {
        blocks.fill(plugged)?;
    }
    let device = Mem::new(region, Box::new(blocks)).map_err(|e| Error::Config(e.to_string()))?;
    let target = device.target();
    Ok((device, target))
}

/// Whether memory lies in a file of its own.
fn in_file(backing: Backing) -> bool {
    backing.shared || backing.huge_pages
}

impl Growth {
    fn new(
        region: Range<u64>,
        backing: Backing,
        site: &Site,
        slots: Box<dyn Slots>,
    ) -> Result<Self, Error> {
        let size = region.end - region.start;
        let file = match in_file(backing) {
            true => Some(Arc::new(memory::memfd(size, backing.huge_pages)?)),
            false => None,
        };
        let blocks =
            usize::try_from(size / BLOCK).map_err(|_| Error::Memory("count", Errno::ENOMEM))?;
        let (host, flags) =
            reserve(size, file.as_deref()).map_err(|e| Error::Memory("reserve room for", e))?;
        Ok(Self {
            host,
            flags,
            region,
            file,
            shared: backing.shared,
            huge_pages: backing.huge_pages,
            base: Memory::clone(&site.memory.memory()),
            cell: site.memory.clone(),
            back_ends: site.back_ends.clone(),
            slots,
            plugged: vec![false; blocks],
            pages: vec![Page::Own; blocks],
        })
    }

    fn offset(&self, guest: u64) -> u64 {
        guest.saturating_sub(self.region.start)
    }

    fn at(&self, guest: u64) -> usize {
        self.host + usize::try_from(self.offset(guest)).unwrap_or(0)
    }

    fn blocks(&self, range: &Range<u64>) -> Range<usize> {
        let block = |at: u64| usize::try_from(self.offset(at) / BLOCK).unwrap_or(usize::MAX);
        block(range.start)..block(range.end)
    }

    fn mark(&mut self, range: &Range<u64>, plugged: bool) {
        let blocks = self.blocks(range);
        if let Some(blocks) = self.plugged.get_mut(blocks) {
            blocks.fill(plugged);
        }
    }

    /// Backs a range with memory (zeroed: [`Self::clean`]), or takes that away and gives it back to the
    /// host. The mapping itself stays, so that nothing else can come to lie there.
    fn back(&self, range: &Range<u64>, there: bool) -> Result<(), Errno> {
        let start = self.at(range.start) as *mut libc::c_void;
        let len = usize::try_from(range.end - range.start).map_err(|_| Errno::EINVAL)?;
        let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        if there && self.huge_pages {
            // Huge pages are to be had now, or a touch would be the machine's end.
            self.allocate(range, 0).inspect_err(|_| {
                // Those that could be had go back.
                let _ = self.allocate(range, hole);
            })?;
        }
        let protection = match there {
            true => libc::PROT_READ | libc::PROT_WRITE,
            false => libc::PROT_NONE,
        };
        // SAFETY: the range lies in the mapping of this region, and nobody holds a
        // reference into it.
        Errno::result(unsafe { libc::mprotect(start, len, protection) })?;
        if !there {
            // What fails here leaves pages that nobody can reach.
            let _ = match self.file {
                Some(_) => self.allocate(range, hole),
                // SAFETY: as above, and what is in it is lost on purpose.
                None => Errno::result(unsafe { libc::madvise(start, len, libc::MADV_DONTNEED) })
                    .map(drop),
            };
        }
        Ok(())
    }

    fn allocate(&self, range: &Range<u64>, mode: libc::c_int) -> Result<(), Errno> {
        let file = self.file.as_ref().ok_or(Errno::EBADF)?;
        let number = |n: u64| libc::off_t::try_from(n).map_err(|_| Errno::EINVAL);
        let (at, len) = (self.offset(range.start), range.end - range.start);
        // SAFETY: takes numbers and a descriptor that is open.
        Errno::result(unsafe { libc::fallocate(file.as_raw_fd(), mode, number(at)?, number(len)?) })
            .map(drop)
    }

    /// The slots that touch a range: number, guest address and length.
    fn slots(&self, range: &Range<u64>) -> Vec<(u32, Range<u64>)> {
        let first = self.offset(range.start) / SLOT;
        let last = self.offset(range.end).div_ceil(SLOT);
        (first..last)
            .map(|n| {
                let start = self.region.start + n * SLOT;
                let number = FIRST_SLOT + u32::try_from(n).unwrap_or(u32::MAX - FIRST_SLOT);
                (number, start..(start + SLOT).min(self.region.end))
            })
            .collect()
    }

    /// Whether any block of a range is plugged.
    fn any(&self, range: &Range<u64>) -> bool {
        let blocks = self.plugged.get(self.blocks(range));
        blocks.is_some_and(|blocks| blocks.contains(&true))
    }

    /// Backs a range, none of which is plugged, and shows it to KVM.
    fn show(&mut self, range: &Range<u64>) -> Result<(), Errno> {
        self.back(range, true)?;
        self.clean(range);
        for (number, slot) in self.slots(range) {
            if !self.any(&slot) {
                let (host, len) = (self.at(slot.start), slot.end - slot.start);
                self.slots.set(number, slot.start, host, len)?;
            }
        }
        Ok(())
    }

    /// Removes the slots of a range that have no plugged block. KVM removes every slot
    /// that it has; one that stayed would hold nothing that can be reached.
    fn drop_slots(&mut self, range: &Range<u64>) {
        for (number, slot) in self.slots(range) {
            if !self.any(&slot) {
                let host = self.at(slot.start);
                let _ = self.slots.set(number, slot.start, host, 0);
            }
        }
    }

    /// RAM, and a region for every run of plugged blocks.
    fn memory(&self) -> Option<Memory> {
        let mut regions: Vec<_> = self
            .base
            .iter()
            .map(|region| {
                let mapping = region.get_mmap();
                GuestRegionMmap::with_arc(mapping, vm_memory::GuestMemoryRegion::start_addr(region))
                    .map(Arc::new)
            })
            .collect::<Option<_>>()?;
        let mut at = 0;
        while let Some(from) = self.next(at, true) {
            let to = self.next(from, false).unwrap_or(self.plugged.len());
            let block = usize::try_from(BLOCK).ok()?;
            let guest = self.region.start + u64::try_from(from).ok()? * BLOCK;
            let mut builder = MmapRegionBuilder::new((to - from) * block)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(self.flags)
                .with_hugetlbfs(self.huge_pages);
            if let Some(file) = &self.file {
                let offset = FileOffset::from_arc(Arc::clone(file), self.offset(guest));
                builder = builder.with_file_offset(offset);
            }
            let host = self.at(guest) as *mut u8;
            // SAFETY: the run is mapped, and stays so while a snapshot of this memory
            // lives (`Self::replace`).
            let mapping = unsafe { builder.with_raw_mmap_pointer(host) }
                .build()
                .ok()?;
            regions.push(Arc::new(GuestRegionMmap::new(
                mapping,
                GuestAddress(guest),
            )?));
            at = to;
        }
        Memory::from_arc_regions(regions).ok()
    }

    /// The first block from `at` on that is, or is not, plugged.
    fn next(&self, at: usize, plugged: bool) -> Option<usize> {
        let rest = self.plugged.get(at..)?;
        rest.iter().position(|it| *it == plugged).map(|n| at + n)
    }

    /// Lets the devices have memory as it is marked. If `gone`, returns when none has
    /// the memory of before any more, or puts that back.
    fn replace(&self, gone: bool) -> Result<(), Busy> {
        let new = self.memory().ok_or(Busy)?;
        if self.shared && new.num_regions() > MAX_REGIONS {
            return Err(Busy);
        }
        let put = |memory: Memory| {
            let cell = self.cell.lock();
            cell.unwrap_or_else(PoisonError::into_inner).replace(memory);
        };
        let old = self.cell.memory().into_inner();
        put(new);
        let told = self.back_ends.show();
        // One that could not be told of more memory broke, and reads none of it.
        if !gone || told && unused(&old) {
            return Ok(());
        }
        put(Memory::clone(&old));
        self.back_ends.show();
        Err(Busy)
    }
}

/// Waits until nobody else has a snapshot of memory; false if somebody keeps it.
fn unused(old: &Arc<Memory>) -> bool {
    for _ in 0..PATIENCE.0 {
        if Arc::strong_count(old) == 1 {
            return true;
        }
        std::thread::park_timeout(PATIENCE.1);
    }
    false
}

impl Blocks for Growth {
    fn plug(&mut self, range: Range<u64>) -> Result<(), Busy> {
        self.plug_all(&[range])
    }

    fn plug_all(&mut self, ranges: &[Range<u64>]) -> Result<(), Busy> {
        let mut result = Ok(());
        for range in ranges {
            result = result.and_then(|()| self.show(range));
            self.mark(range, true);
        }
        if result.is_err() || self.replace(false).is_err() {
            for range in ranges {
                self.mark(range, false);
            }
            for range in ranges {
                // What cannot be removed has not been there.
                self.drop_slots(range);
                self.wear(range);
                let _ = self.back(range, false);
            }
            return Err(Busy);
        }
        Ok(())
    }

    fn unplug(&mut self, range: Range<u64>) -> Result<(), Busy> {
        self.mark(&range, false);
        if self.replace(true).is_err() {
            self.mark(&range, true);
            return Err(Busy);
        }
        if self.back(&range, false).is_err() {
            self.mark(&range, true);
            let _ = self.replace(false);
            return Err(Busy);
        }
        self.wear(&range);
        self.drop_slots(&range);
        Ok(())
    }
}

/// Maps `file`, or anonymous memory, so that nothing of it can be touched yet. Never
/// unmapped: the guest's KVM may know it as long as the process lives.
fn reserve(size: u64, file: Option<&File>) -> Result<(usize, i32), Errno> {
    let none = libc::PROT_NONE;
    let block = usize::try_from(BLOCK).map_err(|_| Errno::EINVAL)?;
    let len = usize::try_from(size).map_err(|_| Errno::ENOMEM)?;
    let room = len.checked_add(block).ok_or(Errno::ENOMEM)?;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let map = |at: usize, len: usize, flags: i32, fd: i32| {
        // SAFETY: a new mapping: wherever the kernel likes, or over one of our own.
        match unsafe { libc::mmap(at as *mut libc::c_void, len, none, flags, fd, 0) } {
            libc::MAP_FAILED => Err(Errno::last()),
            at => Ok(at.addr()),
        }
    };
    // Room for it at a multiple of a block, where the host can use huge pages.
    let at = map(0, room, anonymous, -1)?.next_multiple_of(block);
    let Some(file) = file else {
        return Ok((at, anonymous));
    };
    let shared = libc::MAP_SHARED | libc::MAP_NORESERVE;
    map(at, len, shared | libc::MAP_FIXED, file.as_raw_fd())?;
    Ok((at, shared))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::{
        collections::BTreeMap,
        os::unix::fs::MetadataExt,
        sync::{
            Mutex,
            atomic::{AtomicBool, Ordering},
        },
    };

    use vm_memory::{Bytes, GuestMemory, GuestMemoryRegion, Permissions};

    use super::*;

    pub(super) const START: u64 = 1 << 32;
    pub(super) const SIZE: u64 = SLOT + 3 * BLOCK;

    /// Slots by their number, as KVM would have them.
    #[derive(Debug, Clone, Default)]
    struct Table {
        slots: Arc<Mutex<BTreeMap<u32, (u64, u64)>>>,
        refuses: Arc<AtomicBool>,
    }

    impl Slots for Table {
        fn set(&mut self, number: u32, guest: u64, _: usize, len: u64) -> Result<(), Errno> {
            let mut slots = self.slots.lock().unwrap();
            match len {
                0 => return slots.remove(&number).map(drop).ok_or(Errno::EINVAL),
                _ if self.refuses.load(Ordering::Relaxed) => return Err(Errno::ENOMEM),
                _ => assert_eq!(slots.insert(number, (guest, len)), None),
            }
            Ok(())
        }
    }

    pub(super) struct Rig {
        pub(super) growth: Growth,
        pub(super) cell: MemoryCell,
        table: Table,
    }

    pub(super) fn rig(shared: bool) -> Rig {
        let backing = Backing {
            shared,
            huge_pages: false,
        };
        let ram = memory::create(4 << 20, backing).unwrap();
        let cell = MemoryCell::new(ram);
        let table = Table::default();
        let slots = Box::new(table.clone());
        let site = Site {
            memory: cell.clone(),
            shared,
            back_ends: BackEnds::default(),
        };
        let growth = Growth::new(START..START + SIZE, backing, &site, slots).unwrap();
        Rig {
            growth,
            cell,
            table,
        }
    }

    pub(super) fn blocks(range: Range<u64>) -> Range<u64> {
        START + range.start * BLOCK..START + range.end * BLOCK
    }

    impl Rig {
        /// Whether devices see a block, and whether the kernel could touch it for
        /// anybody: the same, whatever happens.
        pub(super) fn reachable(&self, block: u64) -> bool {
            let guest = START + block * BLOCK;
            let memory = self.cell.memory();
            let rights = Permissions::ReadWrite;
            let seen = GuestMemory::check_range(&*memory, GuestAddress(guest), 1 << 20, rights);
            let (from, to) = nix::unistd::pipe().unwrap();
            let at = self.growth.at(guest) as *const libc::c_void;
            // SAFETY: the kernel reads a byte, or says that it cannot.
            let wrote = unsafe { libc::write(to.as_raw_fd(), at, 1) } == 1;
            drop(from);
            assert_eq!(seen, wrote, "block {block}");
            seen
        }

        fn slots(&self) -> Vec<(u64, u64)> {
            self.table.slots.lock().unwrap().values().copied().collect()
        }
    }

    #[test]
    fn what_is_plugged_is_there_and_nothing_else_is() {
        for shared in [false, true] {
            let mut rig = rig(shared);
            assert!(!rig.reachable(0) && rig.slots().is_empty());
            rig.growth.plug(blocks(2..5)).unwrap();
            let there: Vec<bool> = (0..8).map(|n| rig.reachable(n)).collect();
            let wanted = [false, false, true, true, true, false, false, false];
            assert_eq!(there, wanted);
            assert_eq!(rig.slots(), [(START, SLOT)]);
            // One region for neighbours, whenever they came.
            rig.growth.plug(blocks(5..6)).unwrap();
            assert_eq!(rig.cell.memory().num_regions(), 2);
            let at = GuestAddress(START + 3 * BLOCK);
            let memory = rig.cell.memory();
            assert_eq!(memory.read_obj::<u64>(at).unwrap(), 0);
            memory.write_obj(7u64, at).unwrap();
            drop(memory);

            // A piece out of the middle.
            rig.growth.unplug(blocks(3..4)).unwrap();
            let there: Vec<bool> = (2..7).map(|n| rig.reachable(n)).collect();
            assert_eq!(there, [true, false, true, true, false]);
            assert_eq!(rig.slots(), [(START, SLOT)]);
            // It comes back empty.
            rig.growth.plug(blocks(3..4)).unwrap();
            assert_eq!(rig.cell.memory().read_obj::<u64>(at).unwrap(), 0);

            // Over the end of a slot, to the short one at the end.
            rig.growth.plug(blocks(62..67)).unwrap();
            assert_eq!(rig.slots(), [(START, SLOT), (START + SLOT, 3 * BLOCK)]);
            rig.growth.unplug(blocks(64..67)).unwrap();
            assert_eq!(rig.slots(), [(START, SLOT)]);
            assert!(rig.reachable(63) && !rig.reachable(64));
            rig.growth.unplug(blocks(62..64)).unwrap();
            rig.growth.unplug(blocks(2..6)).unwrap();
            assert!(rig.slots().is_empty());
            assert!((0..67).all(|n| !rig.reachable(n)));
            assert_eq!(rig.cell.memory().num_regions(), 1);
        }
    }

    #[test]
    fn memory_goes_back_to_the_host() {
        let mut rig = rig(true);
        rig.growth.plug(blocks(0..4)).unwrap();
        let held = |rig: &Rig| {
            rig.growth
                .file
                .as_ref()
                .unwrap()
                .metadata()
                .unwrap()
                .blocks()
                * 512
        };
        let fill = vec![1; usize::try_from(4 * BLOCK).unwrap()];
        let memory = rig.cell.memory();
        memory.write_slice(&fill, GuestAddress(START)).unwrap();
        drop(memory);
        assert_eq!(held(&rig), 4 * BLOCK);
        rig.growth.unplug(blocks(1..2)).unwrap();
        assert_eq!(held(&rig), 3 * BLOCK);
        // The neighbours are untouched.
        let memory = rig.cell.memory();
        for block in [0, 2, 3] {
            let at = GuestAddress(START + block * BLOCK);
            assert_eq!(memory.read_obj::<u8>(at).unwrap(), 1);
        }
        let region = memory.find_region(GuestAddress(START + 2 * BLOCK)).unwrap();
        assert_eq!(region.file_offset().unwrap().start(), 2 * BLOCK);
    }

    #[test]
    fn shared_memory_is_of_no_more_regions_than_back_ends_take() {
        let mut rig = rig(true);
        rig.growth.plug(blocks(0..20)).unwrap();
        // RAM is one of them, and so is what is above the last hole.
        let most = u64::try_from(MAX_REGIONS).unwrap() - 2;
        for n in 0..most {
            rig.growth.unplug(blocks(2 * n + 1..2 * n + 2)).unwrap();
        }
        assert_eq!(rig.cell.memory().num_regions(), MAX_REGIONS);
        let next = blocks(2 * most + 1..2 * most + 2);
        assert_eq!(rig.growth.unplug(next.clone()), Err(Busy));
        assert_eq!(rig.growth.plug(blocks(30..31)), Err(Busy));
        assert!(rig.reachable(2 * most + 1) && !rig.reachable(30));
        // From an end, or to one, always.
        rig.growth.unplug(blocks(19..20)).unwrap();
        rig.growth.plug(blocks(1..2)).unwrap();
        rig.growth.unplug(next).unwrap();
    }

    #[test]
    fn memory_that_a_device_still_has_stays() {
        let mut rig = rig(false);
        rig.growth.plug(blocks(0..2)).unwrap();
        let old = rig.cell.memory().into_inner();
        assert_eq!(rig.growth.unplug(blocks(0..1)), Err(Busy));
        old.write_obj(1u8, GuestAddress(START)).unwrap();
        assert!(rig.reachable(0) && rig.reachable(1));
        assert_eq!(rig.slots().len(), 1);
        drop(old);
        rig.growth.unplug(blocks(0..1)).unwrap();
        assert!(!rig.reachable(0) && rig.reachable(1));
    }

    #[test]
    fn a_slot_that_cannot_be_had_leaves_nothing() {
        let mut rig = rig(false);
        rig.table.refuses.store(true, Ordering::Relaxed);
        assert_eq!(rig.growth.plug(blocks(0..1)), Err(Busy));
        assert!(!rig.reachable(0) && rig.slots().is_empty());
        rig.table.refuses.store(false, Ordering::Relaxed);
        rig.growth.plug(blocks(0..1)).unwrap();
        assert!(rig.reachable(0));
    }
}
