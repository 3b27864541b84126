//! The descriptor behind a block device.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::stat::{SFlag, fstat},
};

use super::{MAX_QUEUES, SECTOR, task::Call};

/// Why a block device could not be made, or measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call on the disk's descriptor failed.
    #[error("{what} of a disk's descriptor: {source}")]
    Descriptor {
        /// What was attempted.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is no disk.
    #[error("a disk must be a regular file or a block device; pass a descriptor of one")]
    NotADisk,
    /// It cannot be used as asked.
    #[error("the disk's descriptor is open {how}; open it {need}")]
    Mode {
        /// How it is open.
        how: &'static str,
        /// How it should be.
        need: &'static str,
    },
    /// The number of queues makes no sense.
    #[error("a disk has 1 to {MAX_QUEUES} queues, not {0}")]
    Queues(u16),
    /// No `io_uring`, and nothing else was to do.
    #[error(
        "{what} an io_uring for a disk: {source}; allow it (kernel.io_uring_disabled, seccomp) or use the plain engine"
    )]
    Uring {
        /// What was attempted.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

fn failed(what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Descriptor {
        what,
        source: errno.into(),
    }
}

nix::ioctl_read!(blkgetsize64, 0x12, 114, libc::size_t);

/// The descriptor, and how many sectors it holds.
#[derive(Debug)]
pub(super) struct Disk {
    fd: OwnedFd,
    block: bool,
    sectors: AtomicU64,
}

impl Disk {
    /// Checks that the descriptor is what it has to be, and measures it.
    pub(super) fn new(fd: OwnedFd, read_only: bool) -> Result<Self, Error> {
        let mode = SFlag::from_bits_truncate(fstat(&fd).map_err(failed("get the state"))?.st_mode)
            & SFlag::S_IFMT;
        let block = mode == SFlag::S_IFBLK;
        if !block && mode != SFlag::S_IFREG {
            return Err(Error::NotADisk);
        }
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(failed("get the flags"))?;
        let flags = OFlag::from_bits_truncate(flags);
        let access = flags & OFlag::O_ACCMODE;
        // O_APPEND would make every write one at the end; io_uring gives up on
        // O_NONBLOCK instead of waiting for the disk.
        let wrong = if flags.contains(OFlag::O_PATH) || access == OFlag::O_WRONLY {
            Some(("without reading", "for reading"))
        } else if !read_only && access != OFlag::O_RDWR {
            Some((
                "for reading only",
                "for writing, or make the disk read-only",
            ))
        } else if flags.contains(OFlag::O_APPEND) {
            Some(("for appending", "without O_APPEND"))
        } else if flags.contains(OFlag::O_NONBLOCK) {
            Some(("non-blocking", "without O_NONBLOCK"))
        } else {
            None
        };
        if let Some((how, need)) = wrong {
            return Err(Error::Mode { how, need });
        }
        let disk = Self {
            fd,
            block,
            sectors: AtomicU64::new(0),
        };
        disk.measure()?;
        Ok(disk)
    }

    /// Asks the kernel how large the disk is. What is left of a last sector that is
    /// not whole is not part of it.
    pub(super) fn measure(&self) -> Result<u64, Error> {
        let bytes = if self.block {
            let mut size: libc::size_t = 0;
            // SAFETY: the call writes one u64 (the ioctl is declared with size_t)
            // to `size`, and this is a 64-bit target's size_t.
            unsafe { blkgetsize64(self.fd.as_raw_fd(), &raw mut size) }
                .map_err(failed("get the size"))?;
            u64::try_from(size).unwrap_or(0)
        } else {
            let size = fstat(&self.fd).map_err(failed("get the size"))?.st_size;
            u64::try_from(size).unwrap_or(0)
        };
        let sectors = bytes / SECTOR;
        self.sectors.store(sectors, Ordering::Release);
        Ok(sectors)
    }

    /// Its size when last measured.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    pub(super) fn raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// Does a call and waits for it: what it returns, or a negative error number.
    ///
    /// # Safety
    /// The pieces of the call must be mapped during it, writable if it reads.
    pub(super) unsafe fn perform(&self, call: &Call) -> i64 {
        let fd = self.raw_fd();
        loop {
            // SAFETY: the descriptor is ours; the caller vouches for the pieces.
            let result = unsafe {
                match *call {
                    Call::Read { iov, n, at } => libc::preadv(fd, iov, n, at) as i64,
                    Call::Write { iov, n, at } => libc::pwritev(fd, iov, n, at) as i64,
                    Call::Allocate { mode, at, len } => {
                        i64::from(libc::fallocate(fd, mode, at, len))
                    }
                    Call::Sync => i64::from(libc::fdatasync(fd)),
                }
            };
            if result >= 0 {
                return result;
            }
            match Errno::last() {
                Errno::EINTR => {}
                errno => return -i64::from(errno as i32),
            }
        }
    }
}
