//! The contract between host and guest: the messages and services generated
//! from `proto/agent.proto`, the ports they travel on, and the two ends of the
//! handshakes. Host and agent share this crate and nothing else; it knows no
//! machine, no container engine and no front end. `proto/supervisor.proto`, between
//! a supervisor and those on its host, is generated beside it.

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

/// Annotation of a container's spec, from the host: a JSON list of mount points whose tmpfs
/// begins with what it hides. An agent that does not know it leaves them empty.
pub const ANNOTATION_COPY_UP: &str = "walnut.copy-up";

#[allow(
    dead_code,
    missing_docs,
    missing_debug_implementations,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    trivial_casts,
    unknown_lints,
    unreachable_pub,
    unused_imports,
    unused_mut,
    unused_results,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
mod generated {
    /// Messages.
    pub mod agent {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }
    /// Service: `Agent` (server), `AgentClient`, `create_agent`.
    pub mod agent_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
    /// Messages.
    pub mod supervisor {
        include!(concat!(env!("OUT_DIR"), "/supervisor.rs"));
    }
    /// Service: `Supervisor` (server), `SupervisorClient`, `create_supervisor`.
    pub mod supervisor_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/supervisor_ttrpc.rs"));
    }
}

pub use generated::{agent, agent_ttrpc, supervisor, supervisor_ttrpc};
