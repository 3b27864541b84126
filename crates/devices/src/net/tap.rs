//! A tap's descriptor.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
};

use super::{Error, HEADER};

/// A piece of memory for the kernel to read or write: address and length.
pub(super) type IoVec = libc::iovec;

// linux/if_tun.h
const TUNGETIFF: u64 = 0x8004_54d2;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// Checksums are left to the reader (`TUN_F_CSUM`), segmentation of TCP, ECN in
/// such segments, segmentation of UDP.
pub(super) const CSUM: u32 = 0x01;
pub(super) const TSO4: u32 = 0x02;
pub(super) const TSO6: u32 = 0x04;
pub(super) const ECN: u32 = 0x08;
pub(super) const USO: u32 = 0x20 | 0x40;

/// One queue of a tap.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    /// There may be a frame to read.
    pub(super) readable: bool,
}

impl Tap {
    /// Takes the descriptor over, and makes it non-blocking.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, Error> {
        let tap = Self { fd, readable: true };
        let flags = tap
            .flags()
            .map_err(|e| Error::Tap("read the flags", e.into()))?;
        if flags & (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) != IFF_TAP | IFF_NO_PI | IFF_VNET_HDR {
            return Err(Error::Flags(flags));
        }
        let size = i32::try_from(HEADER).unwrap_or(12);
        // SAFETY: the call reads one int.
        Errno::result(unsafe { libc::ioctl(tap.fd.as_raw_fd(), request(TUNSETVNETHDRSZ), &size) })
            .map_err(|e| Error::Tap("set the header's size", e.into()))?;
        let modes = fcntl(&tap.fd, FcntlArg::F_GETFL)
            .map(OFlag::from_bits_truncate)
            .and_then(|modes| fcntl(&tap.fd, FcntlArg::F_SETFL(modes | OFlag::O_NONBLOCK)));
        modes.map_err(|e| Error::Tap("change the mode", e.into()))?;
        Ok(tap)
    }

    /// Another descriptor that takes messages, in a tap's place.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn stand_in(fd: OwnedFd) -> Self {
        Self { fd, readable: true }
    }

    fn flags(&self) -> Result<u16, Errno> {
        // struct ifreq: a name of 16 bytes, then the flags.
        let mut raw = [0u8; 40];
        // SAFETY: the call writes a struct ifreq, of 40 bytes, to `raw`.
        Errno::result(unsafe {
            libc::ioctl(self.fd.as_raw_fd(), request(TUNGETIFF), raw.as_mut_ptr())
        })?;
        Ok(u16::from_ne_bytes([raw[16], raw[17]]))
    }

    /// Says which frames the reader takes without finished checksums and in larger
    /// segments than the link's. For all queues of the tap.
    pub(super) fn set_offload(&self, flags: u32) -> Result<(), Errno> {
        // SAFETY: the call takes a number.
        Errno::result(unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                request(TUNSETOFFLOAD),
                libc::c_ulong::from(flags),
            )
        })
        .map(drop)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Reads a frame; how long it was, at most as long as there is room.
    ///
    /// # Safety
    /// Every piece of `room` must be mapped and writable during the call, and
    /// nothing may hold a reference into it.
    pub(super) unsafe fn read(&self, room: &[IoVec]) -> Result<usize, Errno> {
        // SAFETY: as the caller says.
        unsafe { again(|| libc::readv(self.fd.as_raw_fd(), room.as_ptr(), count(room))) }
    }

    /// Writes a frame, whole or not at all.
    ///
    /// # Safety
    /// Every piece of `frame` must be mapped and readable during the call.
    pub(super) unsafe fn write(&self, frame: &[IoVec]) -> Result<usize, Errno> {
        // SAFETY: as the caller says.
        unsafe { again(|| libc::writev(self.fd.as_raw_fd(), frame.as_ptr(), count(frame))) }
    }
}

/// The C libraries disagree on the type.
fn request(number: u64) -> libc::Ioctl {
    libc::Ioctl::try_from(number).unwrap_or_default()
}

fn count(pieces: &[IoVec]) -> libc::c_int {
    libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX)
}

fn again(call: impl Fn() -> isize) -> Result<usize, Errno> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) if Errno::last() == Errno::EINTR => {}
            Err(_) => return Err(Errno::last()),
        }
    }
}
