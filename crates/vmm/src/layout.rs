//! Where what lies in the guest's physical address space.
//!
//! ```text
//! 0            RAM, at most 3 GiB (the tables below sit in its first MiB)
//! 0xc000_0000  32-bit window for PCI BARs
//! 0xe000_0000  ECAM, 1 MiB per bus
//! 0xfec0_0000  IOAPIC, local APIC, KVM's own pages
//! 4 GiB        the rest of RAM
//! above        memory that comes and goes (virtio-mem)
//! above        64-bit window for PCI BARs
//! ```

use vm_memory::GuestAddress;

/// End of the first piece of RAM at most, start of the 32-bit window.
pub(crate) const LOW_END: u64 = 0xc000_0000;
/// The second piece of RAM.
pub(crate) const HIGH_START: u64 = 1 << 32;
/// The 32-bit window for BARs.
pub(crate) const WINDOW32: std::ops::Range<u64> = LOW_END..ECAM;
/// The configuration space of the PCI buses.
pub(crate) const ECAM: u64 = 0xe000_0000;
/// Size of the 64-bit window.
pub(crate) const WINDOW64_SIZE: u64 = 16 << 30;

pub(crate) const IOAPIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM wants on Intel processors, out of everybody's way.
pub(crate) const KVM_TSS: usize = 0xfffb_d000;

/// The PVH start information and what it points at.
pub(crate) const START_INFO: GuestAddress = GuestAddress(0x6000);
pub(crate) const MODULES: GuestAddress = GuestAddress(0x6100);
pub(crate) const MEMORY_MAP: GuestAddress = GuestAddress(0x6200);
/// The descriptor table of the first moment.
pub(crate) const GDT: GuestAddress = GuestAddress(0x500);
/// The zero page of the Linux boot protocol.
pub(crate) const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// The command line, and the most bytes it may have.
pub(crate) const CMDLINE: GuestAddress = GuestAddress(0x20000);
pub(crate) const CMDLINE_MAX: usize = 4096;
/// End of conventional memory: the BIOS data area of old.
pub(crate) const CONVENTIONAL_END: u64 = 0x9fc00;
/// The generation ID, in a page that is nobody's RAM.
pub(crate) const GENERATION: GuestAddress = GuestAddress(0xd_f000);
/// ACPI tables, where the search of old began.
pub(crate) const ACPI: GuestAddress = GuestAddress(0xe0000);
/// The rest of RAM; the kernel comes here.
pub(crate) const HIGH_RAM: u64 = 0x10_0000;

/// The pieces of RAM: start and length.
pub(crate) fn ram(memory: u64) -> Vec<(u64, u64)> {
    let low = memory.min(LOW_END);
    let mut pieces = vec![(0, low)];
    if memory > low {
        pieces.push((HIGH_START, memory - low));
    }
    pieces
}

/// Alignment of [`growth`], and what its size is a multiple of: Linux uses no piece of a
/// region that is smaller.
pub(crate) const GROWTH_ALIGN: u64 = 128 << 20;

/// Where memory beyond what a machine boots with comes to lie: above RAM, and above
/// what 32 bits reach.
pub(crate) fn growth(memory: u64, max_memory: u64) -> std::ops::Range<u64> {
    let start = ram_end(memory).next_multiple_of(GROWTH_ALIGN);
    let size = max_memory.saturating_sub(memory);
    start..start.saturating_add(size.next_multiple_of(GROWTH_ALIGN))
}

fn ram_end(memory: u64) -> u64 {
    HIGH_START + memory.saturating_sub(LOW_END)
}

/// The 64-bit window of a machine whose memory grows so far: above all of it, in
/// naturally aligned gibibytes.
pub(crate) fn window64(memory: u64, max_memory: u64) -> std::ops::Range<u64> {
    let end = growth(memory, max_memory).end;
    let start = end.next_multiple_of(1 << 30).max(8 << 30);
    start..start + WINDOW64_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_add_up_and_windows_overlap_nothing() {
        for gib in [1u64, 2, 3, 4, 5, 12, 64, 512] {
            let memory = gib << 30;
            let pieces = ram(memory);
            assert_eq!(pieces.iter().map(|p| p.1).sum::<u64>(), memory);
            for more in [0, 2 << 20, 130 << 20, 1 << 30, 63 << 30] {
                let growth = growth(memory, memory + more);
                let window = window64(memory, memory + more);
                let size = growth.end - growth.start;
                assert!(size >= more && size - more < GROWTH_ALIGN);
                assert!((growth.start | size).is_multiple_of(GROWTH_ALIGN));
                assert!(growth.end <= window.start && growth.start >= HIGH_START);
                for (start, len) in &pieces {
                    assert!(start + len <= growth.start);
                    assert!(start + len <= WINDOW32.start || *start >= HIGH_START);
                }
            }
        }
    }
}
