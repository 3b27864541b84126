//! Hooks of the host's (OCI runtime-spec "POSIX-platform Hooks"): programs that are
//! told of a container's state.

use std::{
    fmt,
    io::Write,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use oci_spec::runtime::{Hook, Spec};
use serde_json::{Value, json};
use tokio::{process::Child, time::timeout};
use tracing::warn;
use walnut_sandbox::{BundleState, BundleStatus};

/// When hooks are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Point {
    /// Before the container is built.
    Prestart,
    /// After those.
    CreateRuntime,
    /// The program runs.
    Poststart,
    /// The container has been deleted.
    Poststop,
}

impl Point {
    fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    fn status(self) -> BundleStatus {
        match self {
            Self::Prestart | Self::CreateRuntime => BundleStatus::Creating,
            Self::Poststart => BundleStatus::Running,
            Self::Poststop => BundleStatus::Stopped,
        }
    }

    fn of(self, spec: &Spec) -> Vec<Hook> {
        let Some(hooks) = spec.hooks() else {
            return Vec::new();
        };
        let hooks = match self {
            #[allow(deprecated)]
            Self::Prestart => hooks.prestart(),
            Self::CreateRuntime => hooks.create_runtime(),
            Self::Poststart => hooks.poststart(),
            Self::Poststop => hooks.poststop(),
        };
        hooks.clone().unwrap_or_default()
    }
}

/// A hook did not do what it is for. crun's exit code for it is not that of its other
/// failures.
#[derive(Debug)]
pub(super) struct Failed {
    point: Point,
    number: usize,
    path: PathBuf,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (point, path) = (self.point.name(), self.path.display());
        write!(f, "error running {point} hook #{} ({path})", self.number)
    }
}

/// Runs the hooks of a point, one after the other; the first that fails is the last.
pub(super) async fn run(spec: &Spec, point: Point, state: &BundleState, pid: u32) -> Result<()> {
    let told = told(state, point, pid).to_string();
    for (number, hook) in point.of(spec).iter().enumerate() {
        call(hook, &told).await.with_context(|| Failed {
            point,
            number,
            path: hook.path().clone(),
        })?;
    }
    Ok(())
}

/// Runs them all; what fails is a warning.
pub(super) async fn run_all(spec: &Spec, point: Point, state: &BundleState, pid: u32) {
    let told = told(state, point, pid).to_string();
    for hook in point.of(spec) {
        if let Err(e) = call(&hook, &told).await {
            warn!("{} hook {}: {e:#}", point.name(), hook.path().display());
        }
    }
}

/// The state as a hook reads it.
fn told(state: &BundleState, point: Point, pid: u32) -> Value {
    json!({
        "ociVersion": state.oci_version,
        "id": state.id,
        "status": point.status().as_str(),
        "pid": pid,
        "bundle": state.bundle,
        "annotations": state.annotations,
    })
}

async fn call(hook: &Hook, told: &str) -> Result<()> {
    let mut command = Command::new(hook.path());
    if let Some((name, rest)) = hook.args().as_deref().unwrap_or_default().split_first() {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        command.env(name, value);
    }
    // What it says is for whoever called; a container's streams are not its.
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = tokio::process::Command::from(command)
        .kill_on_drop(true)
        .spawn()
        .context("start it")?;
    if let Some(stdin) = child.stdin.take() {
        // In a thread: it may not read. That is no failure of its.
        let mut stdin = std::fs::File::from(stdin.into_owned_fd().context("use its input")?);
        let told = told.to_owned();
        std::thread::spawn(move || {
            let _ = stdin.write_all(told.as_bytes());
        });
    }
    let status = end(&mut child, hook).await?;
    if !status.success() {
        bail!("{status}");
    }
    Ok(())
}

async fn end(child: &mut Child, hook: &Hook) -> Result<std::process::ExitStatus> {
    let limit = hook.timeout().and_then(|s| u64::try_from(s).ok());
    let Some(seconds) = limit.filter(|seconds| *seconds > 0) else {
        return child.wait().await.context("wait for it");
    };
    match timeout(Duration::from_secs(seconds), child.wait()).await {
        Ok(status) => status.context("wait for it"),
        Err(_) => {
            child.kill().await.context("end it")?;
            bail!("it did not end within {seconds} s")
        }
    }
}
