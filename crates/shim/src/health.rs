//! How a container is: the check that its image or its user wants, run in it again and
//! again, and what becomes of the answers.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    time::{sleep, timeout},
};
use tracing::{debug, warn};
use walnut_sandbox::{
    ExecRequest, Health, HealthCheck, HealthResult, HealthStatus, Journal, Output, ProcessState,
    Record, Sandbox, StdioTargets, now_ns,
};

/// What the names of its processes begin with.
pub(crate) const EXEC: &str = "health-";
/// Most that is kept of what a check says, bytes.
const OUTPUT_MAX: usize = 4 << 10;
/// Checks that are kept.
const CHECKS_MAX: usize = 5;
/// Longest a check may take to die.
const KILL_GRACE: Duration = Duration::from_secs(5);
/// Largest bundle's `config.json`.
const SPEC_MAX: u64 = 4 << 20;

/// Checks a container until it ends.
pub(crate) async fn watch(
    dir: PathBuf,
    state: Option<PathBuf>,
    sandbox: Arc<Sandbox>,
    id: String,
    check: HealthCheck,
) {
    let begin = |record: &mut Record| {
        record.health.get_or_insert(Health {
            status: HealthStatus::Starting,
            failing: 0,
            checks: Vec::new(),
        });
    };
    if let Err(e) = Record::change(&dir, begin) {
        warn!("keep the container's health: {e}");
    }
    tokio::select! {
        _ = sandbox.wait(&id, "") => {}
        _ = sandbox.ended() => {}
        () = again_and_again(&dir, state.as_deref(), &sandbox, &id, &check) => {}
    }
}

async fn again_and_again(
    dir: &Path,
    state: Option<&Path>,
    sandbox: &Arc<Sandbox>,
    id: &str,
    check: &HealthCheck,
) {
    let began = now_ns();
    loop {
        let period = i64::try_from(check.start_period_ms).unwrap_or(i64::MAX);
        let young = now_ns().saturating_sub(began) < period.saturating_mul(1_000_000);
        sleep(check.pause(young)).await;
        let frozen = sandbox.state(id, "").map(|s| s.state);
        if matches!(frozen, Ok(ProcessState::Paused)) {
            continue;
        }
        let result = once(dir, sandbox, id, check).await;
        let mut news = None;
        let kept = Record::change(dir, |record| {
            let Some(health) = &mut record.health else {
                return;
            };
            let before = health.status;
            judge(health, result, check, young);
            news = (before != health.status).then_some(health.status);
        });
        match (kept, state, news) {
            (Ok(record), Some(state), Some(status)) => {
                let action = format!("health_status: {}", status.as_str());
                Journal::new(state).container(&record, &action, &[]);
            }
            (Err(e), ..) => warn!("keep the container's health: {e}"),
            _ => {}
        }
    }
}

/// What a result makes of a container's health.
fn judge(health: &mut Health, result: HealthResult, check: &HealthCheck, young: bool) {
    let well = result.code == 0;
    health.checks.push(result);
    let more = health.checks.len().saturating_sub(CHECKS_MAX);
    health.checks.drain(..more);
    if well {
        (health.status, health.failing) = (HealthStatus::Healthy, 0);
        return;
    }
    // A young one that is not well yet is starting, not ill.
    if young && health.status == HealthStatus::Starting {
        return;
    }
    health.failing = health.failing.saturating_add(1);
    if health.failing >= check.retries {
        health.status = HealthStatus::Unhealthy;
    }
}

async fn once(dir: &Path, sandbox: &Arc<Sandbox>, id: &str, check: &HealthCheck) -> HealthResult {
    let start = now_ns();
    // The program before may have left one that runs.
    let exec_id = format!("{EXEC}{start}");
    let (code, output) = match run(dir, sandbox, id, check, &exec_id).await {
        Ok(done) => done,
        Err(e) => (-1, format!("{e:#}")),
    };
    if let Err(e) = sandbox.delete(id, &exec_id).await {
        debug!("forget a check: {e}");
    }
    HealthResult {
        start,
        end: now_ns(),
        code,
        output,
    }
}

/// Runs the check; its exit code, and what it said.
async fn run(
    dir: &Path,
    sandbox: &Arc<Sandbox>,
    id: &str,
    check: &HealthCheck,
    exec_id: &str,
) -> Result<(i32, String)> {
    let process = process(dir, &check.command)?;
    let (ours, theirs) = io::pipe().context("make a pipe")?;
    let writer = theirs.try_clone().context("make a pipe")?;
    let request = ExecRequest {
        exec_id: exec_id.to_owned(),
        process,
        stdio: StdioTargets {
            stdout: Some(Output::pipe(theirs.into())),
            stderr: Some(Output::pipe(writer.into())),
            ..StdioTargets::default()
        },
    };
    let mut reader = pipe::Receiver::from_owned_fd(ours.into()).context("read a pipe")?;
    sandbox.exec(id, request)?;
    let mut said = Vec::new();
    let reading = async {
        let mut chunk = [0; 1024];
        // What is too much is read all the same: who says it must not wait for ever.
        while let Ok(read @ 1..) = reader.read(&mut chunk).await {
            let room = OUTPUT_MAX.saturating_sub(said.len()).min(read);
            said.extend_from_slice(chunk.get(..room).unwrap_or_default());
        }
    };
    let whole = async {
        sandbox.start(id, exec_id).await?;
        let (exit, ()) = tokio::join!(sandbox.wait(id, exec_id), reading);
        exit
    };
    let exit = match timeout(Duration::from_millis(check.timeout_ms), whole).await {
        Ok(exit) => exit?,
        Err(_late) => {
            let killed = sandbox.kill(id, exec_id, 9, false).await;
            let _ = timeout(KILL_GRACE, sandbox.wait(id, exec_id)).await;
            debug!("a check took too long: {killed:?}");
            let late = format!("it took longer than {} ms", check.timeout_ms);
            return Ok((-1, late));
        }
    };
    let code = i32::try_from(exit.code).unwrap_or(-1);
    Ok((code, String::from_utf8_lossy(&said).into_owned()))
}

/// The container's own process, with another command.
fn process(dir: &Path, command: &[String]) -> Result<Vec<u8>> {
    let path = dir.join("config.json");
    let size = std::fs::metadata(&path).context("read the bundle")?.len();
    anyhow::ensure!(size <= SPEC_MAX, "read the bundle: {size} bytes");
    let bytes = std::fs::read(&path).context("read the bundle")?;
    let spec: Value = serde_json::from_slice(&bytes).context("read the bundle")?;
    let mut process = spec.get("process").cloned().context("read the bundle")?;
    process["args"] = json!(command);
    process["terminal"] = json!(false);
    Ok(serde_json::to_vec(&process)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(code: i32) -> HealthResult {
        HealthResult {
            start: 0,
            end: 1,
            code,
            output: String::new(),
        }
    }

    #[test]
    fn failures_in_a_row_make_it_unhealthy() {
        let check = HealthCheck {
            command: vec!["true".into()],
            interval_ms: 1000,
            timeout_ms: 1000,
            start_period_ms: 0,
            start_interval_ms: 100,
            retries: 2,
        };
        let mut health = Health {
            status: HealthStatus::Starting,
            failing: 0,
            checks: Vec::new(),
        };
        judge(&mut health, result(1), &check, true);
        assert_eq!((health.status, health.failing), (HealthStatus::Starting, 0));
        judge(&mut health, result(1), &check, false);
        assert_eq!((health.status, health.failing), (HealthStatus::Starting, 1));
        judge(&mut health, result(1), &check, false);
        assert_eq!(health.status, HealthStatus::Unhealthy);
        judge(&mut health, result(0), &check, false);
        assert_eq!((health.status, health.failing), (HealthStatus::Healthy, 0));
        for _ in 0..9 {
            judge(&mut health, result(-1), &check, false);
        }
        assert_eq!((health.checks.len(), health.failing), (CHECKS_MAX, 9));
    }
}
