//! The contract between host and guest: the messages and services generated
//! from `proto/agent.proto`, the ports they travel on, and the two ends of the
//! handshakes. Host and agent share this crate and nothing else; it knows no
//! machine, no container engine and no front end.

mod handshake;

pub use handshake::{
    HandshakeError, READY_LINE_MAX, connect_hybrid, parse_ready_line, read_stream_id, ready_line,
    write_stream_id,
};

/// The protocol this crate speaks; see `HelloResponse.protocol`.
pub const PROTOCOL: u32 = 1;

/// Guest vsock port of the agent's ttrpc service.
pub const AGENT_PORT: u32 = 1024;
/// Guest vsock port on which stdio streams arrive.
pub const STREAM_PORT: u32 = 1025;
/// Host vsock port the agent calls once it serves; seen as `<uds>_1024`.
pub const READY_PORT: u32 = 1024;

/// Where the agent mounts what a sandbox needs, in the guest.
pub const GUEST_ROOT: &str = "/run/walnut";

#[allow(
    missing_debug_implementations,
    unreachable_pub,
    unused_imports,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/agent/mod.rs"));
}

pub use generated::{agent, agent_ttrpc};
