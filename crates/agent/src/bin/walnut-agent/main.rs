//! Init of the microVM, and the agent that the host talks to.
//!
//! Sets the guest up ([`init`]), then serves `proto/agent.proto` over vsock on
//! one thread: containers are built by a helper process ([`helper`]), their
//! streams are connections of their own ([`streams`], [`pump`]; [`gate`] holds
//! them while the machine is saved), and one
//! reaper ([`reaper`]) collects every process of the guest. As PID 1 it may
//! neither return nor panic: see [`power`].

mod adopt;
mod cgroup;
mod container;
mod cpus;
mod disk;
mod emulated;
mod events;
mod gate;
mod helper;
mod init;
mod memory;
mod netlink;
mod network;
mod ports;
mod power;
mod pressure;
mod process;
mod processes;
mod pump;
mod reaper;
mod remove;
mod scale;
mod service;
mod stats;
mod streams;
mod system;
mod table;

use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use walnut_protocol::{AGENT_PORT, READY_PORT, STREAM_PORT, agent_ttrpc, ready_line};

use power::{Fatal, fatal};
use service::Service;

fn main() {
    power::guard_against_panics();
    trim_malloc();
    if std::process::id() != 1 {
        eprintln!("walnut-agent: runs as init (PID 1) of a Walnut guest only");
        std::process::exit(1);
    }
    if let Err(e) = run() {
        fatal(&e.to_string());
    }
    fatal("the agent's server ended");
}

/// glibc's malloc is tuned for threads and speed; a small resident set wants
/// one arena that gives memory back.
fn trim_malloc() {
    const M_TRIM_THRESHOLD: libc::c_int = -1;
    const M_TOP_PAD: libc::c_int = -2;
    const M_MMAP_THRESHOLD: libc::c_int = -3;
    const M_ARENA_MAX: libc::c_int = -8;
    for (parameter, value) in [
        (M_ARENA_MAX, 1),
        (M_TRIM_THRESHOLD, 64 << 10),
        (M_TOP_PAD, 16 << 10),
        (M_MMAP_THRESHOLD, 64 << 10),
    ] {
        // SAFETY: mallopt takes integers; a refused value changes nothing.
        unsafe { libc::mallopt(parameter, value) };
    }
}

fn run() -> Result<(), Fatal> {
    init::set_up()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(2)
        .thread_keep_alive(Duration::from_secs(1))
        .thread_stack_size(128 << 10)
        .build()
        .map_err(|e| Fatal::new("start the runtime", e))?;
    runtime.block_on(serve())
}

async fn serve() -> Result<(), Fatal> {
    let reaper = reaper::start().map_err(|e| Fatal::new("watch for SIGCHLD", e))?;
    let streams = Arc::new(streams::Pending::default());
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT))
        .map_err(|e| Fatal::new("listen on the stream port", e))?;
    tokio::spawn(streams::accept(listener, Arc::clone(&streams)));
    let helpers = helper::Helpers::new(Arc::clone(&reaper));
    let service = Arc::new(Service::new(reaper, streams, helpers.clone())?);
    let control = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, AGENT_PORT))
        .map_err(|e| Fatal::new("listen on the control port", e))?;
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(control.into())
        .register_service(agent_ttrpc::create_agent(service));
    server
        .start()
        .await
        .map_err(|e| Fatal::new("start the server", e))?;
    if let Err(e) = tell_host().await {
        if e.raw_os_error() == Some(libc::ENODEV) {
            return Err(Fatal::new(
                "tell the host that the guest is ready",
                "the machine has no vsock device",
            ));
        }
        // The host may still find us by trying.
        eprintln!("walnut-agent: cannot tell the host that the guest is ready: {e}");
    }
    // The host now takes a moment to ask for a container: time to start the
    // process that will build it.
    helpers.prepare();
    std::future::pending::<()>().await;
    Ok(())
}

async fn tell_host() -> std::io::Result<()> {
    let mut stream = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, READY_PORT)).await?;
    stream.write_all(ready_line().as_bytes()).await?;
    stream.shutdown(std::net::Shutdown::Write)
}
