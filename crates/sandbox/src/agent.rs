//! The agent's client: one connection for control, one per stream, and its
//! errors in this crate's terms.

use std::time::Duration;

use tokio::net::UnixStream;
use ttrpc::{
    Code,
    asynchronous::{Client, transport::Socket},
    context,
};
use walnut_machine::Machine;
use walnut_protocol::{
    AGENT_PORT, STREAM_PORT, agent::HelloRequest, agent_ttrpc::AgentClient, write_stream_id,
};

use crate::{Error, Result};

/// Longest a request may take that does not wait for a process. Creating a
/// container on a loaded, emulated machine is the slowest.
const REQUEST_DEADLINE: Duration = Duration::from_secs(60);

/// Context of a request that must be answered soon.
pub(crate) fn soon() -> context::Context {
    context::with_duration(REQUEST_DEADLINE)
}

/// Context of a request that may wait for ever.
pub(crate) fn patient() -> context::Context {
    context::with_timeout(0)
}

/// Connects to the agent of a machine that is ready, and checks what it speaks.
pub(crate) async fn connect(machine: &dyn Machine) -> Result<AgentClient> {
    greet(machine.connect(AGENT_PORT).await?).await
}

/// Checks what the agent at the other end of a new connection speaks.
pub(crate) async fn greet(stream: UnixStream) -> Result<AgentClient> {
    let agent = AgentClient::new(Client::new(Socket::from(stream)));
    let hello = HelloRequest {
        protocol: walnut_protocol::PROTOCOL,
        ..Default::default()
    };
    let reply = agent
        .hello(soon(), &hello)
        .await
        .map_err(|e| fault("greet the agent", e))?;
    if reply.protocol != walnut_protocol::PROTOCOL {
        return Err(Error::Agent(format!(
            "greet the agent: it speaks protocol {}, this is {}; rebuild the initramfs",
            reply.protocol,
            walnut_protocol::PROTOCOL
        )));
    }
    Ok(agent)
}

/// Opens stream number `id`.
pub(crate) async fn stream(machine: &dyn Machine, id: u32) -> Result<UnixStream> {
    let mut stream = machine.connect(STREAM_PORT).await?;
    write_stream_id(&mut stream, id)
        .await
        .map_err(|e| Error::Agent(format!("open stream {id} to the guest: {e}")))?;
    Ok(stream)
}

/// The connection broke, so the answer lies in the machine's end.
pub(crate) fn is_broken(error: &ttrpc::Error) -> bool {
    !matches!(error, ttrpc::Error::RpcStatus(_))
}

/// An agent's error as one of ours.
pub(crate) fn fault(what: &str, error: ttrpc::Error) -> Error {
    let ttrpc::Error::RpcStatus(status) = &error else {
        return Error::Agent(format!(
            "{what}: the connection to the agent failed: {error}"
        ));
    };
    let text = status.message().to_owned();
    match status.code() {
        Code::NOT_FOUND => Error::NotFound(text),
        Code::ALREADY_EXISTS => Error::AlreadyExists(text),
        Code::FAILED_PRECONDITION => Error::WrongState(text),
        Code::INVALID_ARGUMENT if text.contains("exec: ") => {
            if text.contains("permission denied") {
                Error::ProgramDenied(text)
            } else if text.contains("not found") || text.contains("no such file") {
                Error::ProgramNotFound(text)
            } else {
                Error::Invalid(text)
            }
        }
        Code::INVALID_ARGUMENT => Error::Invalid(text),
        Code::DEADLINE_EXCEEDED => {
            Error::Agent(format!("{what}: the agent did not answer in time: {text}"))
        }
        _ => Error::Agent(format!("{what}: {text}")),
    }
}
