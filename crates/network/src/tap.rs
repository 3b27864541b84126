//! Taps.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use crate::{Error, Result};

// linux/if_tun.h
nix::ioctl_readwrite_bad!(
    set_interface,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

/// What the kernel is to call a tap, with a number of its own choice.
const NAME: &[u8] = b"walnut%d";

/// Whether a tap of this name is one of those.
pub(crate) fn is_ours(name: &str) -> bool {
    let number = name.strip_prefix("walnut");
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

/// A new tap with so many queues in the calling thread's namespace, and its name.
pub(crate) fn make(queues: u16) -> Result<(String, Vec<OwnedFd>)> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut name = NAME.to_vec();
    let mut all = Vec::with_capacity(queues.into());
    for _ in 0..queues.max(1) {
        let (file, given) = open(&name, flags).map_err(Error::system("make a tap"))?;
        name = given;
        all.push(file.into());
    }
    Ok((String::from_utf8_lossy(&name).into_owned(), all))
}

fn open(name: &[u8], flags: libc::c_int) -> io::Result<(File, Vec<u8>)> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: an ifreq of zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(name) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the ioctl reads name and flags of `request`, and writes its name.
    unsafe { set_interface(file.as_raw_fd(), &raw mut request) }?;
    let given = request.ifr_name.iter().take_while(|&&byte| byte != 0);
    let given = given.map(|byte| byte.cast_unsigned()).collect();
    Ok((file, given))
}
