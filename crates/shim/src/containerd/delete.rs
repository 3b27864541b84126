//! `delete`: containerd has lost the connection to a container's supervisor.
//!
//! It has lost it on purpose most of the time: after each container's deletion. So
//! the supervisor may have gone, or be going, or serve other containers of the same
//! sandbox, or have been killed.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::{
    api::{DeleteRequest, DeleteResponse, KillRequest, ShutdownRequest, StateRequest, WaitRequest},
    protobuf::{Message, MessageField},
    sandbox_api::ShutdownSandboxRequest,
    sandbox_async::SandboxClient,
    shim_async::TaskClient,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use ttrpc::{Code, asynchronous::Client, context};

use super::{Flags, Home, INIT_PID, SHIM_PID, read_pid, timestamp};
use crate::mount;

/// containerd waits five seconds for all of it, and does not ask again. This is when it
/// must be done, the rest being for the programs to start and to end in.
const ALL: Duration = Duration::from_millis(4700);
/// Of these one that is going gets so many,
const GOING: Duration = Duration::from_millis(2500);
/// and one that serves so many for each answer; one that was killed gets what is left.
const ANSWER: Duration = Duration::from_millis(700);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(5);
/// What is said of a container whose end nobody saw.
const EXIT_KILLED: u32 = 128 + 9;

/// Removes what is left of a container; gives the answer to containerd.
pub(crate) async fn delete(flags: &Flags) -> Result<Vec<u8>> {
    let begun = Instant::now();
    let home = Home::find(flags)?;
    let pid = read_pid(&home.bundle.join(INIT_PID));
    let going = || GOING.min(ALL.saturating_sub(begun.elapsed()) / 2);
    if !removed(&home, going())? && !forgotten(&home, &flags.id).await && !removed(&home, going())?
    {
        // It does not answer, and does not go.
        end(&home.path);
        // Until the kernel has taken it and its machine apart, which takes a while where
        // processors are busy.
        if !gone(&home, ALL.saturating_sub(begun.elapsed()))? {
            bail!("the supervisor of sandbox {} does not end", home.group);
        }
    }
    mount::unmount(&home.bundle.join("rootfs"));
    DeleteResponse {
        pid: pid.and_then(|pid| pid.try_into().ok()).unwrap_or_default(),
        exit_status: EXIT_KILLED,
        exited_at: MessageField::some(timestamp(walnut_sandbox::now_ns())),
        ..Default::default()
    }
    .write_to_bytes()
    .context("encode the answer")
}

/// Removes the sandbox once it has no supervisor. One that serves is not waited for.
fn removed(home: &Home, limit: Duration) -> Result<bool> {
    let begun = Instant::now();
    loop {
        if let Some(dir) = home.dirs.take(&home.path)? {
            dir.remove()?;
            return Ok(true);
        }
        if UnixStream::connect(home.socket()).is_ok() || begun.elapsed() > limit {
            return Ok(false);
        }
        sleep(PAUSE);
    }
}

/// Removes the sandbox whose supervisor has been killed, as soon as it is gone.
fn gone(home: &Home, limit: Duration) -> Result<bool> {
    let begun = Instant::now();
    while begun.elapsed() < limit {
        if let Some(dir) = home.dirs.take(&home.path)? {
            dir.remove()?;
            return Ok(true);
        }
        sleep(PAUSE);
    }
    Ok(false)
}

/// Has a supervisor that serves end and forget the container, and go if it was the last.
/// False if it does not answer.
async fn forgotten(home: &Home, id: &str) -> bool {
    let address = format!("unix://{}", home.socket().display());
    let Ok(client) = Client::connect(&address).await else {
        return false;
    };
    let sandboxes = SandboxClient::new(client.clone());
    let tasks = TaskClient::new(client);
    let forgotten = taken_away(&tasks, id).await;
    let idle = ShutdownRequest {
        id: id.into(),
        ..Default::default()
    };
    // It knows whether others need it.
    let _ = tasks.shutdown(soon(), &idle).await;
    if id == home.group {
        // A sandbox without a container of its own.
        let over = ShutdownSandboxRequest {
            sandbox_id: id.into(),
            ..Default::default()
        };
        let _ = sandboxes.shutdown_sandbox(soon(), &over).await;
    }
    forgotten
}

fn soon() -> context::Context {
    context::with_duration(ANSWER)
}

async fn taken_away(tasks: &TaskClient, id: &str) -> bool {
    let state = StateRequest {
        id: id.into(),
        ..Default::default()
    };
    match tasks.state(soon(), &state).await {
        Ok(_) => {}
        Err(e) => return is_unknown(&e),
    }
    let killed = KillRequest {
        id: id.into(),
        signal: 9,
        all: true,
        ..Default::default()
    };
    let _ = tasks.kill(soon(), &killed).await;
    let ended = WaitRequest {
        id: id.into(),
        ..Default::default()
    };
    let _ = tasks.wait(soon(), &ended).await;
    let deleted = DeleteRequest {
        id: id.into(),
        ..Default::default()
    };
    match tasks.delete(soon(), &deleted).await {
        Ok(_) => true,
        Err(e) => is_unknown(&e),
    }
}

fn is_unknown(error: &ttrpc::Error) -> bool {
    matches!(error, ttrpc::Error::RpcStatus(status) if status.code() == Code::NOT_FOUND)
}

/// Kills a supervisor, if the number that it wrote is still its own.
fn end(dir: &Path) {
    let Some(pid) = read_pid(&dir.join(SHIM_PID)) else {
        return;
    };
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let dir = dir.as_os_str().as_encoded_bytes();
    if line.split(|byte| *byte == 0).any(|arg| arg == dir) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}
