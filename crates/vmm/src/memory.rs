//! Guest memory: made here, mapped into KVM by [`crate::machine`].

use std::{
    fs::File,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use nix::{errno::Errno, sys::memfd::MFdFlags};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, mmap::MmapRegionBuilder,
};
use walnut_devices::virtio::Memory;
use walnut_vmm_api::Backing;

use crate::{Error, layout};

/// Bytes of a huge page.
const HUGE_PAGE: u64 = 2 << 20;
const HUGE: usize = 2 << 20;

/// Memory of `size` bytes; a memfd if others map it as well.
///
/// Nothing is reserved: the host gives pages as the guest touches them. Private
/// memory is anonymous, which is quicker to fault in than a memfd's.
///
/// Huge pages are all reserved here, so that no touch can find the host without one.
pub(crate) fn create(size: u64, backing: Backing) -> Result<Memory, Error> {
    let huge = backing.huge_pages;
    if huge && !size.is_multiple_of(HUGE_PAGE) {
        return Err(Error::Config(format!(
            "{size} bytes of memory are no multiple of a huge page's 2 MiB"
        )));
    }
    let memfd = match backing.shared {
        true => Some(memfd(size, huge)?),
        false => None,
    };
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, len) in layout::ram(size) {
        let region = region(len, memfd.as_ref().map(|file| (file, offset)), huge)?;
        let region = GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or(Error::Memory("place", Errno::EINVAL))?;
        regions.push(region);
        offset += len;
    }
    GuestMemoryMmap::from_regions(regions).map_err(|_| Error::Memory("arrange", Errno::EINVAL))
}

/// Memory with what `file` holds, from its beginning, copy-on-write. The file must
/// be longer than that, and not change any more.
pub(crate) fn map_private(size: u64, file: &File) -> Result<Memory, Error> {
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, len) in layout::ram(size) {
        let size = usize::try_from(len).map_err(|_| Error::Memory("map", Errno::ENOMEM))?;
        let region = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(duplicate(file)?, offset))
            .build()
            .map_err(|_| Error::Memory("map from the snapshot", Errno::ENOMEM))?;
        let region = GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or(Error::Memory("place", Errno::EINVAL))?;
        regions.push(region);
        offset += len;
    }
    GuestMemoryMmap::from_regions(regions).map_err(|_| Error::Memory("arrange", Errno::EINVAL))
}

/// A sealed memfd of that size, which has no pages yet.
pub(crate) fn memfd(size: u64, huge: bool) -> Result<File, Error> {
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if huge {
        flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    }
    let fd = nix::sys::memfd::memfd_create(c"walnut-guest", flags)
        .map_err(|e| Error::Memory("create", e))?;
    let file = File::from(fd);
    file.set_len(size)
        .map_err(|e| Error::Memory("size", Errno::from_raw(e.raw_os_error().unwrap_or(0))))?;
    // Nobody who maps it can make it end under our feet.
    nix::fcntl::fcntl(
        &file,
        nix::fcntl::FcntlArg::F_ADD_SEALS(
            nix::fcntl::SealFlag::F_SEAL_SHRINK
                | nix::fcntl::SealFlag::F_SEAL_GROW
                | nix::fcntl::SealFlag::F_SEAL_SEAL,
        ),
    )
    .map_err(|e| Error::Memory("seal", e))?;
    Ok(file)
}

fn region(len: u64, file: Option<(&File, u64)>, huge: bool) -> Result<MmapRegion, Error> {
    let size = usize::try_from(len).map_err(|_| Error::Memory("map", Errno::ENOMEM))?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let builder = MmapRegionBuilder::new(size)
        .with_mmap_prot(prot)
        .with_hugetlbfs(huge);
    // A file of huge pages is mapped in these; reserved is what is not said not to be.
    let pages = match (huge, &file) {
        (false, _) => libc::MAP_NORESERVE,
        (true, Some(_)) => 0,
        (true, None) => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
    };
    let builder = match file {
        Some((file, offset)) => {
            let file = duplicate(file)?;
            builder
                .with_file_offset(FileOffset::new(file, offset))
                .with_mmap_flags(libc::MAP_SHARED | pages)
        }
        None if huge => builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | pages),
        None => {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | pages;
            // SAFETY: the pages are mapped for as long as the process lives, and
            // nobody else knows them.
            unsafe { builder.with_raw_mmap_pointer(aligned(size, prot, flags)?) }
                .with_mmap_flags(flags)
        }
    };
    builder.build().map_err(|_| match huge {
        true => Error::Config(format!(
            "the host has too few huge pages: {} of 2 MiB are needed, see HugePages_Free in \
             /proc/meminfo; set some aside (sysctl vm.nr_hugepages), or do without",
            len / HUGE_PAGE
        )),
        false => Error::Memory("map", Errno::ENOMEM),
    })
}

/// New pages that begin at a huge page, so that KVM maps one by one entry where the host
/// gives them; what is before and after them is given back.
fn aligned(size: usize, prot: i32, flags: i32) -> Result<*mut u8, Error> {
    let all = size
        .checked_add(HUGE)
        .ok_or(Error::Memory("map", Errno::ENOMEM))?;
    // SAFETY: a mapping of its own, wherever the kernel likes.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), all, prot, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(Error::Memory("map", Errno::last()));
    }
    let start: *mut u8 = start.cast();
    let before = start.align_offset(HUGE);
    // `before` is less than a huge page: both ends lie within the mapping.
    let (begin, end) = (
        start.wrapping_add(before),
        start.wrapping_add(before).wrapping_add(size),
    );
    for (at, len) in [(start, before), (end, HUGE - before)] {
        if len > 0 {
            // SAFETY: these pages are of the mapping above, and nobody has seen them.
            // Should it fail they stay, unused.
            unsafe { libc::munmap(at.cast(), len) };
        }
    }
    Ok(begin)
}

fn duplicate(file: &File) -> Result<File, Error> {
    let fd = nix::fcntl::fcntl(
        file,
        nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(file.as_raw_fd()),
    )
    .map_err(|e| Error::Memory("share", e))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

    use super::*;

    #[test]
    fn private_memory_begins_at_a_huge_page_and_is_all_there() {
        let memory = create(33 << 20, Backing::default()).map_err(|e| e.to_string());
        let memory = memory.as_ref().map(|memory| memory.iter().next());
        let Ok(Some(region)) = memory else {
            unreachable!("33 MiB are a region of memory: {memory:?}");
        };
        assert_eq!(region.as_ptr().align_offset(HUGE), 0);
        assert_eq!(region.len(), 33 << 20);
        for at in [0, region.len() - 1] {
            let at = usize::try_from(at).unwrap_or_default();
            // SAFETY: within the region.
            unsafe { region.as_ptr().wrapping_add(at).write_volatile(1) };
        }
    }
}
