//! Where a guest's memory goes: what its kernel accounts for, beside what the host
//! holds for it.

use serde::Serialize;
use walnut_protocol::agent::GuestMemoryResponse;

/// A part of the guest's memory, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GuestPart {
    /// What it is.
    pub part: &'static str,
    /// How much. The last one may be less than nothing: pages that the guest counts as
    /// in use and has never touched, which the host need not hold.
    pub bytes: i64,
}

/// The parts of `held` bytes that the host holds for a guest of `machine` bytes, by what
/// the guest says; they add up to `held`.
pub fn guest_parts(machine: u64, held: u64, says: &GuestMemoryResponse) -> Vec<GuestPart> {
    // A guest may say anything; sums must not overflow for it.
    let signed = |bytes: u64| i64::try_from(bytes.min(1 << 52)).unwrap_or(0);
    let (machine, held) = (signed(machine), signed(held));
    let total = signed(says.total);
    // A `struct page` of 64 bytes for each 4096.
    let pages = machine / 64;
    let known = [
        ("initramfs with agent and helper; tmpfs", says.shmem),
        ("page cache of the image's files", says.cached),
        ("processes' anonymous memory", says.anonymous),
        ("slab", says.slab),
        (
            "kernel stacks, page tables, per CPU",
            says.stacks
                .saturating_add(says.page_tables)
                .saturating_add(says.per_cpu),
        ),
    ]
    .map(|(part, bytes)| GuestPart {
        part,
        bytes: signed(bytes),
    });
    let used = total - signed(says.free);
    let other = used - known.iter().map(|k| k.bytes).sum::<i64>();
    let mut parts = vec![
        GuestPart {
            part: "kernel image, firmware, other memory kept from the allocator",
            bytes: machine - total - pages,
        },
        GuestPart {
            part: "the kernel's array of pages (1/64 of the memory)",
            bytes: pages,
        },
    ];
    parts.extend(known);
    parts.push(GuestPart {
        part: "other pages of the kernel (drivers' buffers, vmalloc)",
        bytes: other,
    });
    let sum: i64 = parts.iter().map(|p| p.bytes).sum();
    parts.push(GuestPart {
        part: "free pages the host still holds, less pages in use never touched",
        bytes: held - sum,
    });
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_all_there_is() {
        let says = GuestMemoryResponse {
            total: 100 << 20,
            free: 70 << 20,
            shmem: 5 << 20,
            cached: 10 << 20,
            anonymous: 3 << 20,
            slab: 6 << 20,
            ..Default::default()
        };
        let parts = guest_parts(128 << 20, 50 << 20, &says);
        let sum: i64 = parts.iter().map(|p| p.bytes).sum();
        assert_eq!(sum, 50 << 20);
        assert_eq!(parts[0].bytes, 26 << 20);
        assert_eq!(parts[1].bytes, 2 << 20);
        // Whatever a guest says.
        let lies = GuestMemoryResponse {
            total: u64::MAX,
            free: 1,
            shmem: u64::MAX,
            stacks: u64::MAX,
            per_cpu: u64::MAX,
            ..Default::default()
        };
        let sum: i64 = guest_parts(1 << 20, 1 << 20, &lies)
            .iter()
            .map(|p| p.bytes)
            .sum();
        assert_eq!(sum, 1 << 20);
    }
}
