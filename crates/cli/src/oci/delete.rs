//! `walnut-oci delete`, and the end of `run`.

use std::{
    fs,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use tokio::time::timeout;
use walnut_sandbox::{BundleState, BundleStatus, Error, Lock};

use super::{
    args::Delete,
    bundle,
    context::Context,
    hooks::{self, Point},
    kill,
};

/// Longest a container may take to die of SIGKILL, its machine to be ended, and its
/// supervisor to be killed.
const GRACE: Duration = Duration::from_secs(10);

pub(super) async fn delete(context: &Context, args: &Delete) -> Result<()> {
    let state = match context.bundles.find(&args.id) {
        Err(Error::NotFound(_)) if args.force => return Ok(()),
        other => other?,
    };
    match state.status {
        BundleStatus::Stopped => {}
        BundleStatus::Created => end(context, &state).await?,
        _ if args.force => end(context, &state).await?,
        status => bail!(
            "cannot delete container {} that is not stopped: {}",
            state.id,
            status.as_str()
        ),
    }
    remove(context, &state).await
}

/// Removes a container that has stopped.
pub(super) async fn remove(context: &Context, state: &BundleState) -> Result<()> {
    // Its supervisor may be at its last steps.
    gone(state, GRACE * 3)
        .await
        .context("wait for its sandbox's end")?;
    // Without its configuration nobody knows of hooks.
    let spec = bundle::saved(&context.bundles, &state.id);
    context.bundles.remove(&state.id)?;
    if let Ok(spec) = spec {
        hooks::run_all(&spec, Point::Poststop, state, 0).await;
    }
    Ok(())
}

/// Kills the container, then its machine, then its supervisor.
async fn end(context: &Context, state: &BundleState) -> Result<()> {
    if let Ok(supervisor) = context.supervisor(state).await {
        let killed = async {
            kill::send(&supervisor, 9, true).await?;
            gone(state, GRACE).await
        };
        if killed.await.is_ok() {
            return Ok(());
        }
        let _ = timeout(GRACE, supervisor.shutdown()).await;
    }
    if gone(state, GRACE).await.is_ok() {
        return Ok(());
    }
    kill_supervisor(state)?;
    gone(state, GRACE).await
}

/// Returns when a container's supervisor is gone.
async fn gone(state: &BundleState, longest: Duration) -> Result<()> {
    let lock = state.lock();
    let gone = tokio::task::spawn_blocking(move || Lock::wait_free(&lock));
    match timeout(longest, gone).await {
        Ok(done) => Ok(done.context("wait for the supervisor's end")??),
        Err(_) => bail!("the supervisor of container {} does not end", state.id),
    }
}

/// Kills the supervisor, if its PID is not another's by now.
fn kill_supervisor(state: &BundleState) -> Result<()> {
    // SAFETY: pidfd_open takes two numbers and gives a descriptor of our own.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, state.pid, 0) };
    let Some(fd) = i32::try_from(fd).ok().filter(|fd| *fd >= 0) else {
        return Ok(());
    };
    // SAFETY: the descriptor is open and nobody else's.
    let pidfd = unsafe { OwnedFd::from_raw_fd(fd) };
    let line = fs::read(format!("/proc/{}/cmdline", state.pid)).unwrap_or_default();
    let mut words = line.split(|byte| *byte == 0);
    let program = words
        .next()
        .map(|word| String::from_utf8_lossy(word).into_owned());
    let ours = program.is_some_and(|program| {
        Path::new(&program).file_name() == Some("containerd-shim-walnut-v2".as_ref())
    });
    if ours && words.any(|word| word == state.id.as_bytes()) {
        let number = std::os::fd::AsRawFd::as_raw_fd(&pidfd.as_fd());
        // SAFETY: pidfd_send_signal reads no memory where its third argument is null.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, number, libc::SIGKILL, 0, 0) };
    }
    Ok(())
}
