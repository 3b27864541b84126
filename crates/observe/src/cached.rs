//! How much of a file the host's page cache holds.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
    ptr,
};

/// The number is the same on all architectures but one that is not served.
const CACHESTAT: libc::c_long = 451;
/// Bytes mapped at a time to ask `mincore`.
const WINDOW: u64 = 256 << 20;

/// `struct cachestat_range` and `struct cachestat` (linux/mman.h).
#[repr(C)]
struct Range {
    offset: u64,
    length: u64,
}

#[repr(C)]
#[derive(Default)]
struct Stat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// A file's size, and the bytes of it in the page cache. The kernel tells those who
/// own the file or may write it.
pub(crate) fn cached(path: &Path) -> io::Result<(u64, u64)> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        let kind = match meta.file_type().is_block_device() {
            // Its cache is the device's, and shared with whoever mounts it.
            true => "a block device",
            false => "no file",
        };
        return Err(io::Error::other(kind));
    }
    let size = meta.len();
    match by_cachestat(&file) {
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => Ok((size, by_mincore(&file, size)?)),
        other => Ok((size, other?)),
    }
}

/// Linux 6.5 and later.
fn by_cachestat(file: &File) -> io::Result<u64> {
    let all = Range {
        offset: 0,
        length: 0,
    };
    let mut stat = Stat::default();
    // SAFETY: the kernel reads one range and writes one stat, both of its layout.
    let rc = unsafe {
        libc::syscall(
            CACHESTAT,
            file.as_raw_fd(),
            &raw const all,
            &raw mut stat,
            0,
        )
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.cached.saturating_mul(page()))
}

fn by_mincore(file: &File, size: u64) -> io::Result<u64> {
    let mut pages = 0;
    let mut offset = 0;
    while offset < size {
        let window = WINDOW.min(size - offset);
        let len = usize::try_from(window).map_err(io::Error::other)?;
        let at = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let fd = file.as_raw_fd();
        // SAFETY: a new mapping, which nobody reads through.
        let map = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_NONE,
                libc::MAP_SHARED,
                fd,
                at,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let count = window.div_ceil(page());
        let mut each = vec![0_u8; usize::try_from(count).map_err(io::Error::other)?];
        // SAFETY: the mapping has `len` bytes, and `each` a byte for each page of it.
        let rc = unsafe { libc::mincore(map, len, each.as_mut_ptr()) };
        let failed = (rc < 0).then(io::Error::last_os_error);
        // SAFETY: our own mapping, made above.
        unsafe { libc::munmap(map, len) };
        if let Some(e) = failed {
            return Err(e);
        }
        pages += each.iter().fold(0, |sum, byte| sum + u64::from(byte & 1));
        offset += window;
    }
    Ok(pages.saturating_mul(page()))
}

/// Bytes of a page.
pub(crate) fn page() -> u64 {
    // SAFETY: takes a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_was_just_written_is_cached_by_either_count() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![1; 1 << 20]).unwrap();
        file.as_file().set_len(4 << 20).unwrap();
        let (size, cached) = cached(file.path()).unwrap();
        assert_eq!((size, cached), (4 << 20, 1 << 20));
        assert_eq!(by_mincore(file.as_file(), size).unwrap(), 1 << 20);
    }

    #[test]
    fn what_is_no_file_is_refused() {
        assert!(cached(Path::new("/dev/null")).is_err());
        assert!(cached(Path::new("/nowhere")).is_err());
    }
}
