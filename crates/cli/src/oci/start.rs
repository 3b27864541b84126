//! `walnut-oci start`, and the second half of `run`.

use anyhow::{Result, bail};
use oci_spec::runtime::Spec;
use walnut_sandbox::{BundleState, BundleStatus, Error};

use super::{
    bundle,
    context::Context,
    hooks::{self, Point},
};
use crate::client::Supervisor;

pub(super) async fn start(context: &Context, id: &str) -> Result<()> {
    let state = context.bundles.find(id)?;
    match state.status {
        BundleStatus::Created => {}
        BundleStatus::Stopped => bail!("cannot start a container that has stopped"),
        BundleStatus::Creating => bail!("cannot start a container that is being created"),
        BundleStatus::Running | BundleStatus::Paused => {
            bail!("cannot start an already running container")
        }
    }
    let spec = bundle::saved(&context.bundles, id)?;
    let supervisor = context.supervisor(&state).await?;
    let pid = state.pid;
    execute(&supervisor, &spec, &state, pid).await
}

/// Has the program executed. A container whose program cannot be ends, as one does whose
/// program fails.
pub(super) async fn execute(
    supervisor: &Supervisor,
    spec: &Spec,
    state: &BundleState,
    pid: u32,
) -> Result<()> {
    if let Err(e) = supervisor.start("").await {
        let started = matches!(e.downcast_ref(), Some(Error::WrongState(_)));
        if !started {
            let _ = supervisor.shutdown().await;
        }
        return Err(e);
    }
    hooks::run_all(spec, Point::Poststart, state, pid).await;
    Ok(())
}
