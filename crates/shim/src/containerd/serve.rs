//! The life of a sandbox's supervisor.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use ttrpc::asynchronous::Server;
use walnut_sandbox::{Layout, Lock, SandboxDir};

use super::{Pod, kept_options};
use crate::{
    connections::Connections,
    lease::Lease,
    options::{self, ServePod},
    server,
    service::{SandboxService, TaskService},
    upgrade::Upgrades,
};

/// How long a supervisor waits for its first container.
const UNWANTED: Duration = Duration::from_secs(60);

/// Supervises a sandbox of containerd's.
pub(crate) async fn serve(serve: ServePod) -> Result<()> {
    let socket = options::own(serve.socket_fd).context("take the socket")?;
    let lock = options::own(serve.lock_fd).context("take the lock")?;
    let lease = options::own(serve.lease_fd).context("take the lease")?;
    let dir = SandboxDir::inherited(serve.dir.clone(), Lock::inherited(lock));
    let layout = Layout::from_env()?;
    let options = kept_options(&serve.dir)?;
    let names = (serve.namespace, serve.id);
    let pod = Pod::new(names, dir, layout, serve.ttrpc_address.as_deref());
    let service = Arc::new(TaskService::new(pod.clone(), None)?);
    let sandboxes = Arc::new(SandboxService::new(service.clone(), options));
    let connections = Connections::new(socket.into()).context("set up the socket")?;
    let upgrades = Upgrades::new(
        connections.clone(),
        service.clone(),
        Some(sandboxes.clone()),
        None,
    );
    let sandboxes = Some(sandboxes);
    let server = server::start(connections, Vec::new(), &service, sandboxes, upgrades).await?;
    let lease = Lease::new(lease).context("watch the lease")?;
    tokio::spawn(async move {
        // Who started it may have been killed before containerd knew of it, and
        // containerd before it asked for a container.
        if !lease.broken().await {
            tokio::time::sleep(UNWANTED).await;
        }
        service.end_if_empty().await;
    });
    run(pod, server).await
}

/// From a sandbox that is served to its end.
pub(crate) async fn run(pod: Arc<Pod>, mut server: Server) -> Result<()> {
    pod.supervise().await;
    server.shutdown().await.context("stop serving")?;
    pod.clean_up();
    Ok(())
}
