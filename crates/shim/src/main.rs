//! `containerd-shim-walnut-v2`: the long-lived process of a sandbox.
//!
//! It owns the sandbox's life and serves containerd's Task API on a socket,
//! whoever started it. `walnut` starts it as `serve`, with the listening
//! socket, the container's lock and a lease as inherited descriptors; see
//! [`options`].

mod options;
mod owner;
mod service;
mod template;

use std::{os::fd::AsFd, process::ExitCode, sync::Arc};

use anyhow::{Context, Result};
use containerd_shim_protos::shim_async::create_task;
use tokio::net::UnixListener;
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::{
    options::{Command, Options},
    owner::Owner,
    service::TaskService,
};

fn main() -> ExitCode {
    let command = match options::parse(std::env::args().skip(1)) {
        Ok(Some(command)) => command,
        Ok(None) => return ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("containerd-shim-walnut-v2: {message}");
            return ExitCode::from(2);
        }
    };
    thrift();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("WALNUT_LOG")
                .unwrap_or_else(|_| "warn".into()),
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
        .and_then(|runtime| match command {
            Command::Serve(options) => runtime.block_on(serve(options)),
            Command::MakeTemplate(make) => runtime.block_on(template::make(make)),
        });
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
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

async fn serve(options: Options) -> Result<()> {
    let listener = std::os::unix::net::UnixListener::from(options.socket);
    listener
        .set_nonblocking(true)
        .context("set up the socket")?;
    let listener = UnixListener::from_std(listener).context("set up the socket")?;
    // Nobody but the owner may speak to the sandbox; the directory's mode says
    // so already, the lock says that it is ours.
    let lock = options.lock;
    let owner = Arc::new(Owner::new(
        options.id,
        options.container_dir,
        options.run_dir,
    ));
    let service = Arc::new(TaskService::new(owner.clone())?);
    let tasks = create_task(service.clone());
    // containerd 1.x asks for the same service under its older name.
    let older = create_task(service)
        .into_iter()
        .map(|(name, service)| (name.replace(".v3.", ".v2."), service));
    let mut server = Server::new()
        .register_service(tasks)
        .register_service(older.collect())
        .add_listener(Listener::from(listener));
    server.start().await.context("serve the Task API")?;
    owner.supervise(options.lease).await;
    server.shutdown().await.context("stop serving")?;
    owner.clean_up().await;
    // Held to the very end: whoever waits for it finds nothing left.
    let _ = lock.as_fd();
    drop(lock);
    Ok(())
}
