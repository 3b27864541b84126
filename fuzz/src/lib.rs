//! The fuzz targets: one function each, which takes a fuzzer's input and panics if
//! something is done that must not be.
//!
//! The drivers by hand are those of the devices' tests (`crates/devices/tests/
//! support`): what is found here can be put there, and the other way round. The
//! parsers are checked by the crate itself (`fuzz` modules, feature `fuzzing`).
//!
//! Every target runs in [`bounds::within`]: what an input makes us allocate has a
//! limit, whatever it says.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a check fails by panicking"
)]

mod bounds;

#[path = "../../crates/devices/tests/support/backend.rs"]
mod backend;
#[path = "../../crates/devices/tests/support/blocks.rs"]
mod blocks;
#[path = "../../crates/devices/tests/support/direct.rs"]
mod direct;
#[path = "../../crates/devices/tests/support/fuzz.rs"]
mod driver;
#[path = "../../crates/devices/tests/support/rig.rs"]
mod rig;
#[path = "../../crates/devices/tests/support/mod.rs"]
mod support;

mod bus;
mod cable;
mod memory;
mod parsers;
mod remote;
mod snapshot;
mod sockets;

use bounds::within;

/// Bytes that a device and its driver by hand may take together: two pictures of
/// guest memory, and what a block device reserves.
const DEVICE: usize = 4 << 20;
/// Bytes that a parser may take: a message, and what it becomes.
const PARSER: usize = 1 << 20;

/// The state that a supervisor goes on from.
pub fn takeover(data: &[u8]) {
    within(PARSER, || parsers::takeover(data));
}

/// The record of a checkpoint.
pub fn checkpoint(data: &[u8]) {
    within(PARSER, || parsers::checkpoint(data));
}

/// The block device, either engine.
pub fn block(data: &[u8]) {
    within(DEVICE, || driver::block(data));
}

/// The entropy device.
pub fn rng(data: &[u8]) {
    within(DEVICE, || driver::rng(data));
}

/// The balloon.
pub fn balloon(data: &[u8]) {
    within(DEVICE, || driver::balloon(data));
}

/// The memory device, whose blocks are mapped and unmapped.
pub fn mem(data: &[u8]) {
    within(DEVICE, || memory::mem(data));
}

/// The network device, on sockets in a tap's place: a hostile guest, and frames.
pub fn net(data: &[u8]) {
    within(DEVICE, || cable::net(data));
}

/// The socket device: hostile packets, rings, and programs on the host.
pub fn vsock(data: &[u8]) {
    within(16 << 20, || sockets::vsock(data));
}

/// The transport: any access to the bus, with a device on its thread behind it.
pub fn pci(data: &[u8]) {
    within(DEVICE, || bus::pci(data));
}

/// Devices that a vhost-user back end serves: a hostile one, and a hostile guest.
pub fn vhost(data: &[u8]) {
    within(DEVICE, || remote::vhost(data));
}

/// The vhost-user protocol, byte by byte.
pub fn wire(data: &[u8]) {
    within(PARSER, || parsers::wire(data));
}

/// The `CONNECT` line.
pub fn handshake(data: &[u8]) {
    within(PARSER, || parsers::handshake(data));
}

/// The control protocol's messages.
pub fn control(data: &[u8]) {
    within(8 << 20, || parsers::control(data));
}

/// What devices find at the beginning of a chain: requests of a disk and of the
/// memory device, a frame's front, a socket packet's header.
pub fn requests(data: &[u8]) {
    within(PARSER, || parsers::requests(data));
}

/// The state of a device as a snapshot has it.
pub fn restore(data: &[u8]) {
    within(DEVICE, || snapshot::restore(data));
}

/// The header of a snapshot's state file.
pub fn envelope(data: &[u8]) {
    within(5 << 20, || snapshot::envelope(data));
}

/// The body of a snapshot's state file.
pub fn state(data: &[u8]) {
    within(5 << 20, || snapshot::state(data));
}

/// A function of the bus as a snapshot has it.
pub fn function(data: &[u8]) {
    within(5 << 20, || bus::function(data));
}
