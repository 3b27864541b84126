//! `containerd-shim-walnut-v2`: the long-lived process of a sandbox.
//!
//! It owns the sandbox's life and serves containerd's Task API on a socket,
//! whoever started it. `walnut` starts it as `serve`, with the listening
//! socket, the container's lock and a lease as inherited descriptors; see
//! [`options`]. containerd starts it as it starts any shim; see [`containerd`]. For the
//! OCI command line it stands for a container's first process; see [`oci`].

mod background;
mod calls;
mod checkpoint;
mod containerd;
mod fault;
mod front;
mod metrics;
mod mount;
mod oci;
mod options;
mod owner;
mod pool;
mod pressure;
mod service;
mod settings;
mod tasks;
mod template;

use std::{
    io::{Read, Write},
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use containerd_shim_protos::{sandbox_async::create_sandbox, shim_async::create_task};
use tokio::net::UnixListener;
use ttrpc::asynchronous::{Server, transport::Listener};
use walnut_sandbox::{Layout, Lock, Sandbox, SandboxDir};

use crate::{
    calls::Calls,
    containerd::{Action, Flags, Pod},
    front::Front,
    options::{Command, Options, ServePod},
    owner::Owner,
    service::{SandboxService, SharedSandboxService, TaskService},
};

/// Most that is read of a runtime's options.
const OPTIONS_MAX: u64 = 1 << 20;
/// How long a supervisor of containerd's waits for its first container.
const UNWANTED: Duration = Duration::from_secs(60);

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
    let level = match &command {
        Command::ServePod(serve) if serve.debug => "debug",
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
        Command::Serve(options) => serve(options, None).await,
        Command::MakeTemplate(make) => template::make(make).await,
        Command::FillPools(fill) => pool::fill(fill).await,
        Command::Containerd(action, flags) => answer(action, &flags).await,
        Command::ServePod(serve) => serve_pod(serve).await,
        Command::StandBy(stand_by) => {
            let Some(adopted) = pool::stand_by(stand_by).await? else {
                return Ok(0);
            };
            let (options, sandbox, kept) = adopted.into_parts();
            let served = serve(options, Some(sandbox)).await;
            drop(kept);
            served
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

/// Supervises a container, in the machine that stands by for it if there is one.
async fn serve(options: Options, standby: Option<Arc<Sandbox>>) -> Result<()> {
    // Nobody but the owner may speak to the sandbox; the directory's mode says
    // so already, the lock says that it is ours.
    let lock = options.lock;
    let owner = Arc::new(Owner::new(
        options.id,
        options.container_dir,
        options.run_dir,
        &lock,
    )?);
    let mut server = listen(options.socket, owner.clone(), standby).await?;
    owner.supervise(options.lease).await;
    server.shutdown().await.context("stop serving")?;
    owner.clean_up().await;
    // Held to the very end: whoever waits for it finds nothing left.
    let _ = lock.as_fd();
    drop(lock);
    Ok(())
}

/// Supervises a sandbox of containerd's.
async fn serve_pod(serve: ServePod) -> Result<()> {
    let socket = options::own(serve.socket_fd).context("take the socket")?;
    let lock = options::own(serve.lock_fd).context("take the lock")?;
    let lease = options::own(serve.lease_fd).context("take the lease")?;
    let dir = SandboxDir::inherited(serve.dir.clone(), Lock::inherited(lock));
    let layout = Layout::from_env()?;
    let options = containerd::kept_options(&serve.dir)?;
    let names = (serve.namespace, serve.id);
    let pod = Pod::new(names, dir, layout, serve.ttrpc_address.as_deref());
    let service = Arc::new(TaskService::new(pod.clone(), None)?);
    let sandboxes = Arc::new(SandboxService::new(service.clone(), options));
    let sandboxes = create_sandbox(Arc::new(SharedSandboxService(sandboxes)));
    let mut server = server(socket, &service)?.register_service(sandboxes);
    server.start().await.context("serve containerd")?;
    tokio::spawn(async move {
        // Who started it may have been killed before containerd knew of it, and
        // containerd before it asked for a container.
        if !owner::broken(lease).await {
            tokio::time::sleep(UNWANTED).await;
        }
        service.end_if_empty().await;
    });
    pod.supervise().await;
    server.shutdown().await.context("stop serving")?;
    pod.clean_up();
    Ok(())
}

/// Serves the Task API on a socket that listens.
async fn listen(
    socket: OwnedFd,
    front: Arc<dyn Front>,
    standby: Option<Arc<Sandbox>>,
) -> Result<Server> {
    let service = Arc::new(TaskService::new(front, standby)?);
    let mut server = server(socket, &service)?;
    server.start().await.context("serve the Task API")?;
    Ok(server)
}

/// A server of the Task API on a socket that listens.
fn server(socket: OwnedFd, service: &Arc<TaskService>) -> Result<Server> {
    let listener = std::os::unix::net::UnixListener::from(socket);
    listener
        .set_nonblocking(true)
        .context("set up the socket")?;
    let listener = UnixListener::from_std(listener).context("set up the socket")?;
    let calls = Arc::new(Calls::new(service.clone()));
    let tasks = create_task(calls.clone());
    // containerd 1.x asks for the same service under its older name.
    let older = create_task(calls)
        .into_iter()
        .map(|(name, service)| (name.replace(".v3.", ".v2."), service));
    Ok(Server::new()
        .register_service(tasks)
        .register_service(older.collect())
        .add_listener(Listener::from(listener)))
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
