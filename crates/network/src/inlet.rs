//! Loopback of a pod's namespace, on the host: what connects to it there (containerd
//! does, for `kubectl port-forward`) means the pod's loopback, which is the guest's.
//!
//! One listener gets all TCP connections that are made to addresses of the namespace,
//! whatever their port: a BPF program at the kernel's lookup of sockets (`sk_lookup`,
//! Linux 5.9) picks it. No rule of a firewall is needed, and all of it goes with its
//! descriptors.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsRawFd, OwnedFd},
};

use crate::bpf::{self, instruction, number, words};

/// A listener for connections to a namespace's loopback.
#[derive(Debug)]
pub struct Inlet {
    listener: TcpListener,
    attachment: OwnedFd,
}

impl Inlet {
    /// For the calling thread's namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let listener = listener()?;
        let map = make_map()?;
        put(&map, &listener)?;
        let program = load(&map)?;
        let namespace = File::open("/proc/thread-self/ns/net")?;
        let attachment = attach(&program, &namespace)?;
        Ok(Self {
            listener,
            attachment,
        })
    }

    /// The listener, and what keeps connections coming. The address that a connection was
    /// made to ([`TcpStream::local_addr`](std::net::TcpStream::local_addr)) says which port
    /// is meant; [`is_meant`] whether it was one of loopback's.
    pub fn into_parts(self) -> (TcpListener, OwnedFd) {
        (self.listener, self.attachment)
    }
}

/// Whether a connection to this address is one to loopback.
pub fn is_meant(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

/// A non-blocking listener for both families, or for IPv4 alone where there is no other.
fn listener() -> io::Result<TcpListener> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

// linux/bpf.h
const MAP_UPDATE: libc::c_int = 2;
const LINK_CREATE: libc::c_int = 28;
const MAP_SOCKMAP: u32 = 15;
const PROG_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// The only place in the map.
const KEY: u32 = 0;

fn make_map() -> io::Result<OwnedFd> {
    let (key_size, value_size, entries) = (4, 8, 1);
    bpf::call_fd(
        bpf::MAP_CREATE,
        &words(&[MAP_SOCKMAP, key_size, value_size, entries]),
    )
}

fn put(map: &OwnedFd, socket: &TcpListener) -> io::Result<()> {
    let (key, value) = (KEY, u64::from(number(socket)));
    let mut attributes = words(&[number(map), 0]);
    for pointer in [
        (&raw const key).expose_provenance(),
        (&raw const value).expose_provenance(),
    ] {
        attributes.extend(u64::try_from(pointer).unwrap_or(0).to_ne_bytes());
    }
    attributes.extend(0u64.to_ne_bytes());
    bpf::call(MAP_UPDATE, &attributes).map(drop)
}

/// Picks the map's socket for TCP, and leaves everything else alone.
fn program(map: i32) -> Vec<u8> {
    use bpf::op::*;
    /// Of `struct bpf_sk_lookup`.
    const PROTOCOL: i16 = 12;
    [
        instruction(MOVE, (6, 1), 0, 0),
        instruction(LOAD_WORD, (2, 6), PROTOCOL, 0),
        instruction(UNLESS_EQUAL, (2, 0), 14, libc::IPPROTO_TCP),
        instruction(STORE_WORD, (10, 0), -4, KEY.cast_signed()),
        // The second half of a load of 64 bits; source 1 says "a map".
        instruction(LOAD_MAP, (1, 1), 0, map),
        instruction(0, (0, 0), 0, 0),
        instruction(MOVE, (2, 10), 0, 0),
        instruction(ADD_VALUE, (2, 0), 0, -4),
        instruction(CALL, (0, 0), 0, MAP_LOOKUP_ELEM),
        instruction(IF_EQUAL, (0, 0), 7, 0),
        instruction(MOVE, (7, 0), 0, 0),
        instruction(MOVE, (1, 6), 0, 0),
        instruction(MOVE, (2, 7), 0, 0),
        instruction(MOVE_VALUE, (3, 0), 0, 0),
        instruction(CALL, (0, 0), 0, SK_ASSIGN),
        instruction(MOVE, (1, 7), 0, 0),
        instruction(CALL, (0, 0), 0, SK_RELEASE),
        // SK_PASS
        instruction(MOVE_VALUE, (0, 0), 0, 1),
        instruction(EXIT, (0, 0), 0, 0),
    ]
    .concat()
}

fn load(map: &OwnedFd) -> io::Result<OwnedFd> {
    bpf::load(PROG_SK_LOOKUP, ATTACH_SK_LOOKUP, &program(map.as_raw_fd()))
}

fn attach(program: &OwnedFd, namespace: &File) -> io::Result<OwnedFd> {
    let flags = 0;
    let attributes = [number(program), number(namespace), ATTACH_SK_LOOKUP, flags];
    bpf::call_fd(LINK_CREATE, &words(&attributes))
}
