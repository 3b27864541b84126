//! `walnut-oci exec`: a process beside the container's first.
//!
//! This program stands for it, as the supervisor does for the first: it copies its
//! streams, passes signals on, and ends as it ends. With `--detach` it goes on behind.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::fd::OwnedFd,
    process,
};

use anyhow::{Context as _, Result, anyhow, bail};
use containerd_shim_protos::{
    api::ExecProcessRequest,
    protobuf::{MessageField, well_known_types::any::Any},
};
use nix::unistd::{ForkResult, fork};
use serde_json::Value;
use walnut_sandbox::{BundleState, BundleStatus, Error};

use super::{
    EXIT_EXEC_FAILURE,
    args::Exec,
    console::{Console, become_controlled},
    context::Context,
    create::write_pid,
    process::process,
};
use crate::{
    client::Supervisor,
    io::Fifos,
    run::{Signals, attend, resize},
    terminal::Raw,
};

/// What a process ends with that its container takes along: killed.
const EXIT_KILLED: u8 = 128 + 9;
/// First byte of what a detached process tells: it runs.
const RUNS: u8 = b'+';

/// Who is told that the process runs.
#[derive(Debug)]
pub(super) struct Started(Option<OwnedFd>);

impl Started {
    pub(super) fn nobody() -> Self {
        Self(None)
    }

    fn tell(self) {
        if let Some(fd) = self.0 {
            let _ = nix::unistd::write(&fd, &[RUNS]);
        }
    }
}

/// Lets `work` go on behind once the process runs; this process must have one thread.
pub(super) fn behind(args: &Exec, work: impl FnOnce(&Exec, Started) -> Result<u8>) -> Result<u8> {
    let (told, report) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("make a pipe")?;
    // SAFETY: there is one thread, so the child may do whatever this process may.
    match unsafe { fork() }.context("go on behind")? {
        ForkResult::Parent { child } => {
            drop(report);
            // The other end stays open for as long as the process runs.
            let mut told = File::from(told);
            let mut first = [0];
            let read = told.read(&mut first).context("wait for the process")?;
            if first.get(..read) != Some(&[RUNS]) {
                let mut text = first.get(..read).unwrap_or_default().to_vec();
                let _ = told.read_to_end(&mut text);
                bail!("{}", String::from_utf8_lossy(&text));
            }
            if let Some(path) = &args.pid_file {
                write_pid(path, child.as_raw().unsigned_abs())?;
            }
            Ok(0)
        }
        ForkResult::Child => {
            drop(told);
            let failed = report.try_clone();
            let code = match leave().and_then(|()| work(args, Started(Some(report)))) {
                Ok(code) => code,
                Err(e) => {
                    // After the process ran there is nobody left to tell.
                    if let Ok(failed) = failed {
                        let _ = File::from(failed).write_all(format!("{e:#}").as_bytes());
                    }
                    EXIT_EXEC_FAILURE
                }
            };
            process::exit(code.into())
        }
    }
}

/// A session of its own: what befalls the caller's is not the process's.
fn leave() -> Result<()> {
    nix::unistd::setsid().context("make a session")?;
    Ok(())
}

/// Runs the process to its end; its exit code.
pub(super) async fn exec(context: &Context, args: &Exec, started: Started) -> Result<u8> {
    let run = async {
        let state = context.bundles.find(&args.id)?;
        match state.status {
            BundleStatus::Created | BundleStatus::Running => {}
            other => bail!("cannot exec in a {} container", other.as_str()),
        }
        let process = process(context, args)?;
        let terminal = process["terminal"] == true;
        if args.console_socket.is_some() != (terminal && args.detach) {
            bail!(
                "exec: a terminal of a detached process, and of no other, needs --console-socket"
            );
        }
        anyhow::Ok((state, process))
    };
    let (state, process) = run.await.context("exec failed")?;
    let supervisor = context.supervisor(&state).await?;
    let mut id = [0; 8];
    getrandom::fill(&mut id).context("make an ID")?;
    let exec_id: String = id.iter().map(|b| format!("{b:02x}")).collect();
    let dir = state.run_dir.join(&exec_id);
    let session = Session {
        context,
        args,
        state: &state,
        supervisor: &supervisor,
        exec_id: &exec_id,
    };
    let result = session.run(&process, &dir, started).await;
    // Gone already when the sandbox is.
    let _ = fs::remove_dir_all(&dir);
    result
}

struct Session<'a> {
    context: &'a Context,
    args: &'a Exec,
    state: &'a BundleState,
    supervisor: &'a Supervisor,
    exec_id: &'a str,
}

impl Session<'_> {
    async fn run(&self, process: &Value, dir: &std::path::Path, started: Started) -> Result<u8> {
        let terminal = process["terminal"] == true;
        let fifos = Fifos::create(dir, true, terminal)?;
        let request = ExecProcessRequest {
            id: self.state.id.clone(),
            exec_id: self.exec_id.into(),
            terminal,
            stdin: fifos.path("stdin"),
            stdout: fifos.path("stdout"),
            stderr: fifos.path("stderr"),
            spec: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: serde_json::to_vec(process)?,
                ..Default::default()
            }),
            ..Default::default()
        };
        self.supervisor.exec(request).await.context("exec failed")?;
        if let Some(socket) = &self.args.console_socket {
            let size = &process["consoleSize"];
            let number = |name: &str| size[name].as_u64().and_then(|n| u16::try_from(n).ok());
            let console = Console::open(number("width").zip(number("height")))?;
            become_controlled(console.send(socket)?)?;
        }
        // Of a terminal that was made for it this does nothing.
        let raw = if terminal { Raw::enter()? } else { None };
        let signals = Signals::new()?;
        self.supervisor
            .start(self.exec_id)
            .await
            .context("exec failed")?;
        if !self.args.detach
            && let Some(path) = &self.args.pid_file
        {
            write_pid(path, process::id())?;
        }
        started.tell();
        if terminal {
            resize(&self.supervisor.task, &self.state.id, self.exec_id).await;
        }
        let code = attend(
            self.supervisor,
            self.exec_id,
            terminal,
            signals,
            fifos.attach(),
            std::future::ready(Ok(())),
        )
        .await;
        drop(raw);
        code.or_else(|e| self.explain(e))
    }

    /// A process whose supervisor has gone ended with its container.
    fn explain(&self, error: anyhow::Error) -> Result<u8> {
        let lost = matches!(
            error.downcast_ref(),
            Some(Error::Machine(_) | Error::NotFound(_))
        );
        let state = self.context.bundles.find(&self.state.id);
        let stopped = match state {
            Ok(state) => state.status == BundleStatus::Stopped,
            Err(_) => true,
        };
        match lost && stopped {
            true => Ok(EXIT_KILLED),
            false => Err(anyhow!("exec failed: {error:#}")),
        }
    }
}
