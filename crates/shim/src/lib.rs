//! `containerd-shim-walnut-v2`: the long-lived process of a sandbox.
//!
//! It owns the sandbox's life and serves containerd's Task API on a socket,
//! whoever started it. `walnut` starts it as `serve`, with the listening
//! socket, the container's lock and a lease as inherited descriptors; see
//! [`options`]. containerd starts it as it starts any shim; see [`containerd`]. For the
//! OCI command line it stands for a container's first process; see [`oci`].

mod again;
mod background;
mod calls;
mod checkpoint;
mod connections;
mod containerd;
mod fault;
mod front;
mod health;
mod lease;
mod metrics;
mod mount;
mod oci;
mod options;
mod owner;
mod pool;
mod pressure;
mod server;
mod service;
mod settings;
mod tasks;
mod template;
mod upgrade;

/// For the fuzz targets.
#[cfg(feature = "fuzzing")]
pub mod fuzz {
    /// What is read of the state of another supervisor, written again.
    pub fn state(bytes: &[u8]) -> Result<Vec<u8>, String> {
        crate::upgrade::State::parse(bytes)?.pack()
    }
}

use std::{
    io::{Read, Write},
    process::ExitCode,
};

use anyhow::{Context, Result};

use crate::{
    containerd::{Action, Flags},
    options::Command,
};

/// Most that is read of a runtime's options.
const OPTIONS_MAX: u64 = 1 << 20;

/// The whole program; its exit code.
pub fn main() -> ExitCode {
    // One that takes over has the arguments of the one before, for those who look for them.
    let parsed = match upgrade::inherited() {
        Ok(Some(state)) => Ok(Some(Command::TakeOver(state))),
        Ok(None) => options::parse(std::env::args().skip(1)),
        Err(e) => Err(format!("{e:#}")),
    };
    let command = match parsed {
        Ok(Some(command)) => command,
        Ok(None) => return ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("containerd-shim-walnut-v2: {message}");
            return ExitCode::from(2);
        }
    };
    thrift();
    let level = match &command {
        Command::ServePod(serve) if serve.debug => "debug",
        Command::TakeOver(_) if std::env::args().any(|arg| arg == "--debug") => "debug",
        _ => "warn",
    };
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("WALNUT_LOG")
                .unwrap_or_else(|_| level.into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    // One thread: the sandbox's processes are tied to the life of the thread
    // that spawned them, and a second stack would be memory for nothing.
    let run = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(1)
        .thread_stack_size(256 << 10)
        .build()
        .context("start the runtime")
        .and_then(|runtime| runtime.block_on(dispatch(command)));
    match run {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does it; the exit code.
async fn dispatch(command: Command) -> Result<u8> {
    let done = match command {
        // It ends as its container does.
        Command::ServeBundle(serve) => return oci::serve(serve).await,
        Command::Serve(options) => owner::serve(options, None).await,
        Command::Again(options) => owner::serve_again(options).await,
        Command::MakeTemplate(make) => template::make(make).await,
        Command::FillPools(fill) => pool::fill(fill).await,
        Command::Containerd(action, flags) => answer(action, &flags).await,
        Command::ServePod(serve) => containerd::serve(serve).await,
        Command::TakeOver(state) => return upgrade::take_over(state).await,
        Command::AboutTakingOver => upgrade::about(),
        Command::CheckTakingOver => upgrade::check(),
        Command::StandBy(stand_by) => {
            let Some(adopted) = pool::stand_by(stand_by).await? else {
                return Ok(0);
            };
            let (options, sandbox, kept) = adopted.into_parts();
            owner::serve(options, Some((sandbox, kept))).await
        }
    };
    done.map(|()| 0)
}

/// Keeps the heap in one arena that gives memory back: a thousand supervisors
/// share a node.
fn thrift() {
    // SAFETY: called before any other thread exists; the parameters are mallopt's.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
    }
}

/// Does what containerd asks for, and answers.
async fn answer(action: Action, flags: &Flags) -> Result<()> {
    let answer = match action {
        Action::Start => {
            let begun = containerd::start(flags)?;
            std::io::stdout()
                .write_all(&begun.answer)
                .context("answer")?;
            if let Some(mut lease) = begun.lease {
                // One that has been killed already is what containerd sees next, and asks to
                // have cleaned up; after a failure here it would not.
                let _ = lease.write_all(&[1]);
            }
            return Ok(());
        }
        Action::Delete => containerd::delete(flags).await?,
        Action::Info => {
            let mut options = Vec::new();
            let input = std::io::stdin().take(OPTIONS_MAX).read_to_end(&mut options);
            input.context("read the options")?;
            containerd::info(&options).context("describe the runtime")?
        }
    };
    std::io::stdout().write_all(&answer).context("answer")
}
