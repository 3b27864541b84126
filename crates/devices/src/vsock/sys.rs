//! The calls that move bytes between sockets and guest memory.
//!
//! Guest memory changes under our hands, so it never becomes a slice: the
//! kernel copies straight from and to it.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// A piece of memory for the kernel to read or write: address and length.
pub(super) type IoVec = libc::iovec;

/// Most pieces the kernel takes in one call.
const IOV_MAX: usize = 1024;

fn message(iov: &[IoVec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data; all zeroes is its empty value.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = iov.as_ptr().cast_mut();
    msg.msg_iovlen = iov.len().min(IOV_MAX);
    msg
}

fn check(result: isize) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| Errno::last())
}

/// Sends without waiting and without SIGPIPE.
///
/// # Safety
/// Every piece of `iov` must be mapped and readable during the call.
pub(super) unsafe fn send(sock: BorrowedFd<'_>, iov: &[IoVec]) -> Result<usize, Errno> {
    let msg = message(iov);
    // SAFETY: msg borrows iov, whose pieces the caller vouches for.
    check(unsafe {
        libc::sendmsg(
            sock.as_raw_fd(),
            &msg,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    })
}

/// Receives without waiting. The flag says that the call ended early at passed
/// descriptors (which are dropped), so that more may be readable though less
/// came than was asked for.
///
/// # Safety
/// Every piece of `iov` must be mapped and writable during the call, and nothing
/// may hold a reference into it.
pub(super) unsafe fn receive(sock: BorrowedFd<'_>, iov: &[IoVec]) -> Result<(usize, bool), Errno> {
    let mut msg = message(iov);
    // SAFETY: msg borrows iov, whose pieces the caller vouches for.
    let n = check(unsafe { libc::recvmsg(sock.as_raw_fd(), &mut msg, libc::MSG_DONTWAIT) })?;
    Ok((n, msg.msg_flags & libc::MSG_CTRUNC != 0))
}

/// Reads into memory of our own, without waiting; with `peek` the bytes stay where
/// they are.
pub(super) fn read(sock: BorrowedFd<'_>, into: &mut [u8], peek: bool) -> Result<usize, Errno> {
    let iov = [IoVec {
        iov_base: into.as_mut_ptr().cast(),
        iov_len: into.len(),
    }];
    let mut msg = message(&iov);
    let flags = libc::MSG_DONTWAIT | if peek { libc::MSG_PEEK } else { 0 };
    // SAFETY: msg borrows iov, whose piece is `into`.
    check(unsafe { libc::recvmsg(sock.as_raw_fd(), &mut msg, flags) })
}

/// A piece that covers `bytes`, for [`send`] alone.
pub(super) fn piece(bytes: &[u8]) -> IoVec {
    IoVec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}
