//! A tap in a network namespace of the calling thread's own, and the host's end of
//! it: a packet socket.

#![allow(dead_code, reason = "every test program uses its part")]

use std::{
    fs::{self, OpenOptions},
    mem::size_of,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use nix::{errno::Errno, sched};

/// A protocol that nothing on the host speaks (IEEE 802, local experimental).
pub(crate) const PROTOCOL: u16 = 0x88b5;
pub(crate) const HOST: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(crate) const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// The virtio header without the number of buffers, as packet sockets have it.
pub(crate) const HEADER: usize = 10;

const TUNSETIFF: u64 = 0x4004_54ca;
pub(crate) const IFF_TAP: i16 = 2;
pub(crate) const IFF_TUN: i16 = 1;
pub(crate) const IFF_NO_PI: i16 = 0x1000;
pub(crate) const IFF_VNET_HDR: i16 = 0x4000;
const IFF_MULTI_QUEUE: i16 = 0x0100;

fn ioctl(fd: &OwnedFd, number: u64, raw: &mut [u8; 40]) -> Result<(), Errno> {
    let number = libc::Ioctl::try_from(number).unwrap();
    // SAFETY: every call here takes a struct ifreq, of 40 bytes.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), number, raw.as_mut_ptr()) }).map(drop)
}

fn request(name: &str) -> [u8; 40] {
    let mut raw = [0; 40];
    raw[..name.len()].copy_from_slice(name.as_bytes());
    raw
}

/// Opens a queue of the tap `t0`.
pub(crate) fn open(flags: i16) -> OwnedFd {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    let fd = OwnedFd::from(file);
    let mut raw = request("t0");
    raw[16..18].copy_from_slice(&flags.to_ne_bytes());
    ioctl(&fd, TUNSETIFF, &mut raw).unwrap();
    fd
}

/// The host's end of a tap.
pub(crate) struct Host {
    sock: OwnedFd,
}

fn socket(domain: i32, kind: i32) -> OwnedFd {
    // SAFETY: a new descriptor, nobody else's.
    unsafe { OwnedFd::from_raw_fd(Errno::result(libc::socket(domain, kind, 0)).unwrap()) }
}

fn option<T>(sock: &OwnedFd, level: i32, name: i32, value: &T) {
    let len = libc::socklen_t::try_from(size_of::<T>()).unwrap();
    // SAFETY: the call reads `len` bytes of `value`.
    let result = unsafe {
        libc::setsockopt(
            sock.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            len,
        )
    };
    Errno::result(result).unwrap();
}

/// A tap with so many queues in a new namespace, up.
pub(crate) fn tap(queues: usize) -> (Vec<OwnedFd>, Host) {
    sched::unshare(sched::CloneFlags::CLONE_NEWNET).expect("tests of taps run as root");
    // The host shall send nothing by itself.
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let mut flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    if queues > 1 {
        flags |= IFF_MULTI_QUEUE;
    }
    let taps: Vec<_> = (0..queues).map(|_| open(flags)).collect();
    let control = socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC);
    let mut raw = request("t0");
    let up = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap();
    raw[16..18].copy_from_slice(&up.to_ne_bytes());
    ioctl(&control, libc::SIOCSIFFLAGS, &mut raw).unwrap();
    let mut raw = request("t0");
    ioctl(&control, libc::SIOCGIFINDEX, &mut raw).unwrap();
    let index = i32::from_ne_bytes(raw[16..20].try_into().unwrap());
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let sock = socket(libc::AF_PACKET, kind);
    option(
        &sock,
        libc::SOL_PACKET,
        15, /* PACKET_VNET_HDR */
        &1i32,
    );
    option(
        &sock,
        libc::SOL_PACKET,
        23, /* PACKET_IGNORE_OUTGOING */
        &1i32,
    );
    option(
        &sock,
        libc::SOL_SOCKET,
        libc::SO_RCVBUFFORCE,
        &(64i32 << 20),
    );
    option(
        &sock,
        libc::SOL_SOCKET,
        libc::SO_SNDBUFFORCE,
        &(64i32 << 20),
    );
    // SAFETY: zeroes are an empty address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    address.sll_ifindex = index;
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
    // SAFETY: the address is one of `len` bytes.
    let bound = unsafe { libc::bind(sock.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) };
    Errno::result(bound).unwrap();
    (taps, Host { sock })
}

impl Host {
    /// Sends a frame with a header of its own.
    pub(crate) fn send_with(&self, header: &[u8], frame: &[u8]) -> Result<(), Errno> {
        let mut message = header.to_vec();
        message.resize(HEADER, 0);
        message.extend(frame);
        nix::unistd::write(&self.sock, &message).map(drop)
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        self.send_with(&[], frame).unwrap();
    }

    /// The next frame that the guest has sent, its header first.
    pub(crate) fn receive(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut buffer = vec![0; 80 << 10];
        match nix::unistd::read(&self.sock, &mut buffer) {
            Ok(len) => {
                let frame = buffer[HEADER..len].to_vec();
                buffer.truncate(HEADER);
                Some((buffer, frame))
            }
            Err(Errno::EAGAIN) => None,
            Err(e) => panic!("receive: {e}"),
        }
    }
}

/// A frame of `len` bytes that nothing answers.
pub(crate) fn frame(to: [u8; 6], from: [u8; 6], len: usize, tag: u32) -> Vec<u8> {
    let mut frame = [to, from].concat();
    frame.extend(PROTOCOL.to_be_bytes());
    frame.extend(tag.to_be_bytes());
    let mut n = tag;
    while frame.len() < len {
        n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        frame.push(n.to_be_bytes()[0]);
    }
    frame
}

/// The sum of RFC 1071, not folded to its complement.
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b)));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

/// A TCP segment of `payload` bytes over IPv4 with a partial checksum, and the
/// virtio header that asks for segments of `size`.
pub(crate) fn segment(to: [u8; 6], from: [u8; 6], payload: usize, size: u16) -> (Vec<u8>, Vec<u8>) {
    let total = u16::try_from(40 + payload).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let check = !u16::try_from(sum(&ip)).unwrap();
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    let mut pseudo = ip[12..20].to_vec();
    pseudo.extend([0, 6]);
    pseudo.extend((total - 20).to_be_bytes());
    let mut tcp = vec![
        0x12, 0x34, 0x00, 0x50, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0x20, 0,
    ];
    tcp.extend(u16::try_from(sum(&pseudo)).unwrap().to_be_bytes());
    tcp.extend([0, 0]);
    let mut frame = [to, from].concat();
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(tcp);
    frame.extend((0..payload).map(|n| u8::try_from(n % 251).unwrap()));
    let mut header = vec![1, 1];
    for word in [54, size, 34, 16] {
        header.extend(u16::to_le_bytes(word));
    }
    (header, frame)
}

/// Whether a TCP segment's checksum is whole and right.
pub(crate) fn checksum_holds(frame: &[u8]) -> bool {
    let tcp = &frame[34..];
    let mut pseudo = frame[26..34].to_vec();
    pseudo.extend([0, 6]);
    pseudo.extend(u16::try_from(tcp.len()).unwrap().to_be_bytes());
    pseudo.extend(tcp);
    sum(&pseudo) == 0xffff
}
