//! `walnut-oci`: the command line of an OCI runtime, for those who bring a bundle:
//! podman, docker, and scripts that call runc or crun.
//!
//! As `walnut` is, it is a client of the supervisor's Task API. A container's
//! supervisor stands for its first process: it has that one's streams, its PID is the
//! container's, and it ends with its exit code.

mod args;
mod bundle;
mod console;
mod context;
mod create;
mod delete;
mod events;
mod exec;
mod features;
mod hooks;
mod kill;
mod list;
mod network;
mod process;
mod report;
mod run;
mod spec;
mod start;
mod update;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, error::ErrorKind};

use self::{
    args::{Command, Exec, Global, Oci},
    context::Context,
};

/// runc's exit code where it is not the program's.
const EXIT_FAILURE: u8 = 1;
/// The same of `exec`, and of hooks.
const EXIT_EXEC_FAILURE: u8 = 255;

/// Whether the program was called by this name.
pub(crate) fn is_meant() -> bool {
    let name = std::env::args_os().next().unwrap_or_default();
    std::path::Path::new(&name).file_name() == Some("walnut-oci".as_ref())
}

/// The whole program.
pub(crate) fn main() -> ExitCode {
    let oci = match Oci::try_parse() {
        Ok(oci) => oci,
        Err(e) => {
            let _ = e.print();
            return match e.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(EXIT_FAILURE),
            };
        }
    };
    let level = if oci.global.debug { "debug" } else { "error" };
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("WALNUT_LOG")
                .unwrap_or_else(|_| level.into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let failure = match oci.command {
        Command::Exec(_) => EXIT_EXEC_FAILURE,
        _ => EXIT_FAILURE,
    };
    match act(oci.command, &oci.global) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            report::report(&oci.global, &e);
            ExitCode::from(match e.is::<hooks::Failed>() {
                true => EXIT_EXEC_FAILURE,
                false => failure,
            })
        }
    }
}

fn act(command: Command, global: &Global) -> Result<u8> {
    match command {
        // Before there is a second thread.
        Command::Exec(args) if args.detach => exec::behind(&args, |args, started| {
            block_on(exec_in(args, global, started))
        }),
        command => block_on(dispatch(command, global)),
    }
}

async fn exec_in(args: &Exec, global: &Global, started: exec::Started) -> Result<u8> {
    exec::exec(&Context::open(global)?, args, started).await
}

fn block_on(work: impl Future<Output = Result<u8>>) -> Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(work);
    // A thread that reads a terminal cannot be interrupted.
    runtime.shutdown_background();
    result
}

async fn dispatch(command: Command, global: &Global) -> Result<u8> {
    let done = match command {
        // These have no container.
        Command::Spec(args) => return spec::spec(&args).map(|()| 0),
        Command::Features => return features::features().map(|()| 0),
        other => other,
    };
    let context = Context::open(global)?;
    let done = match done {
        Command::Run(args) => return run::run(&context, &args).await,
        Command::Exec(args) => return exec::exec(&context, &args, exec::Started::nobody()).await,
        Command::Create(args) => create::create(&context, &args.source).await,
        Command::Start(args) => start::start(&context, &args.id).await,
        Command::State(args) => list::state(&context, &args.id),
        Command::Kill(args) => kill::kill(&context, &args).await,
        Command::Delete(args) => delete::delete(&context, &args).await,
        Command::Ps(args) => list::ps(&context, &args).await,
        Command::Pause(args) => kill::pause(&context, &args.id).await,
        Command::Resume(args) => kill::resume(&context, &args.id).await,
        Command::Update(args) => update::update(&context, &args).await,
        Command::Events(args) => events::events(&context, &args).await,
        Command::List(args) => list::list(&context, &args),
        Command::Spec(args) => spec::spec(&args),
        Command::Features => features::features(),
    };
    done.map(|()| 0)
}
