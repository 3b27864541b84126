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
    let builder = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
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
        None => builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | pages),
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

fn duplicate(file: &File) -> Result<File, Error> {
    let fd = nix::fcntl::fcntl(
        file,
        nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(file.as_raw_fd()),
    )
    .map_err(|e| Error::Memory("share", e))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}
