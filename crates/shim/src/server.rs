//! The server of a supervisor's socket.

use std::{os::fd::OwnedFd, sync::Arc};

use anyhow::{Context, Result};
use containerd_shim_protos::{sandbox_async::create_sandbox, shim_async::create_task};
use ttrpc::asynchronous::{Server, transport::Listener};
use walnut_protocol::supervisor_ttrpc::create_supervisor;

use crate::{
    calls::Calls,
    connections::{Connections, Watched},
    service::{SandboxService, SharedSandboxService, TaskService},
    upgrade::Upgrades,
};

/// Serves the Task API on a socket that listens, for a supervisor that begins.
pub(crate) async fn listen(socket: OwnedFd, service: Arc<TaskService>) -> Result<Server> {
    let connections = Connections::new(socket.into()).context("set up the socket")?;
    let upgrades = Upgrades::new(connections.clone(), service.clone(), None, None);
    start(connections, Vec::new(), &service, None, upgrades).await
}

/// Serves on connections: the `first` ones, and those that come.
pub(crate) async fn start(
    connections: Arc<Connections>,
    first: Vec<Watched>,
    service: &Arc<TaskService>,
    sandboxes: Option<Arc<SandboxService>>,
    upgrades: Arc<Upgrades>,
) -> Result<Server> {
    let calls = Arc::new(Calls::new(service.clone()));
    let tasks = create_task(calls.clone());
    // containerd 1.x asks for the same service under its older name.
    let older = create_task(calls)
        .into_iter()
        .map(|(name, service)| (name.replace(".v3.", ".v2."), service));
    let mut server = Server::new()
        .register_service(tasks)
        .register_service(older.collect())
        .register_service(create_supervisor(upgrades))
        .add_listener(Listener::new(connections.stream(first)));
    if let Some(sandboxes) = sandboxes {
        let sandboxes = create_sandbox(Arc::new(SharedSandboxService(sandboxes)));
        server = server.register_service(sandboxes);
    }
    server.start().await.context("serve the Task API")?;
    Ok(server)
}
