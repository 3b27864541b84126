//! `walnut-oci kill`, `pause` and `resume`.

use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use containerd_shim_protos::api::KillRequest;
use tokio::time::timeout;
use walnut_sandbox::{BundleStatus, Error};

use super::{args::Kill, context::Context};
use crate::{
    client::{Supervisor, fault, soon},
    values,
};

const SIGKILL: u32 = 9;
/// Longest a guest may take to kill a process.
const KILL_GRACE: Duration = Duration::from_secs(10);

pub(super) async fn kill(context: &Context, args: &Kill) -> Result<()> {
    let state = context.bundles.find(&args.id)?;
    let signal = values::signal(&args.signal).map_err(|e| anyhow!("{e}"))?;
    let supervisor = context.supervisor(&state).await?;
    send(&supervisor, signal, args.all).await
}

/// Sends a signal. What must die dies with its machine, if its kernel does not answer.
pub(super) async fn send(supervisor: &Supervisor, signal: u32, all: bool) -> Result<()> {
    let request = KillRequest {
        id: supervisor.id.clone(),
        signal,
        all,
        ..Default::default()
    };
    let sent = supervisor.task.kill(soon(), &request);
    if signal != SIGKILL {
        return match sent.await.map_err(fault) {
            Ok(_) => Ok(()),
            Err(e) => Err(ended(e)),
        };
    }
    match timeout(KILL_GRACE, sent).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(e)) => match fault(e) {
            e if matches!(e.downcast_ref(), Some(Error::NotFound(_))) => Err(ended(e)),
            _ => supervisor.shutdown().await,
        },
        Err(_) => supervisor.shutdown().await,
    }
}

/// In runc's words, where the container has ended meanwhile.
fn ended(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref() {
        Some(Error::NotFound(_) | Error::Machine(_)) => anyhow!("container not running"),
        _ => error,
    }
}

pub(super) async fn pause(context: &Context, id: &str) -> Result<()> {
    let state = context.bundles.find(id)?;
    if !matches!(state.status, BundleStatus::Running | BundleStatus::Created) {
        bail!(
            "container not running or created: {}",
            state.status.as_str()
        );
    }
    let supervisor = context.supervisor(&state).await?;
    supervisor.freeze(true).await
}

pub(super) async fn resume(context: &Context, id: &str) -> Result<()> {
    let state = context.bundles.find(id)?;
    if state.status != BundleStatus::Paused {
        bail!("container not paused");
    }
    let supervisor = context.supervisor(&state).await?;
    supervisor.freeze(false).await
}
