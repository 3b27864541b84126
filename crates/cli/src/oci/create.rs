//! `walnut-oci create`, and the first half of `run`.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::{net::UnixListener, process::CommandExt},
    },
    process::{Child, Command},
};

use anyhow::{Context as _, Result, anyhow, bail};
use containerd_shim_protos::api::{ConnectRequest, CreateTaskRequest};
use oci_spec::runtime::Spec;
use walnut_sandbox::{Assets, BundleState, Bundles, SandboxDir};

use super::{
    args::Source,
    bundle::Bundle,
    console::Console,
    context::Context,
    hooks::{self, Point},
    network,
};
use crate::{
    client::{Supervisor, fault, soon},
    supervisor,
};

/// What a container's first process reads and writes.
#[derive(Debug)]
pub(super) enum Streams {
    /// What this program was given.
    Own,
    /// A terminal's inner side.
    Terminal(OwnedFd),
}

/// A container that has been built.
pub(super) struct Created {
    pub(super) state: BundleState,
    pub(super) spec: Spec,
    /// Its supervisor.
    pub(super) child: Child,
    pub(super) api: Supervisor,
}

pub(super) async fn create(context: &Context, source: &Source) -> Result<()> {
    let bundle = Bundle::load(&source.bundle)?;
    let streams = match (&source.console_socket, bundle.terminal()) {
        (Some(socket), true) => {
            let console = Console::open(bundle.console_size())?;
            Streams::Terminal(console.send(socket)?)
        }
        (None, true) => {
            bail!("cannot allocate tty if walnut-oci will detach without setting console socket")
        }
        (Some(_), false) => {
            bail!("cannot use console socket if walnut-oci will not detach or allocate tty")
        }
        (None, false) => Streams::Own,
    };
    build(context, source, bundle, streams).await?;
    Ok(())
}

/// Makes the container. On failure nothing of it is left.
pub(super) async fn build(
    context: &Context,
    source: &Source,
    bundle: Bundle,
    streams: Streams,
) -> Result<Created> {
    if source.preserve_fds > 0 {
        bail!("--preserve-fds: descriptors cannot be passed into another kernel");
    }
    let state = bundle.state(&context.bundles, &source.id);
    let launched = launch(&context.bundles, &state, &bundle, streams)?;
    let Launched { mut child, lease } = launched;
    let made = make(&state, &bundle.spec, &child).await;
    let made = made.and_then(|api| {
        if let Some(path) = &source.pid_file {
            write_pid(path, child.id())?;
        }
        // From here on it goes its own way.
        nix::unistd::write(&lease, b"d").context("let the container go its own way")?;
        Ok(api)
    });
    match made {
        Ok(api) => Ok(Created {
            state,
            spec: bundle.spec,
            child,
            api,
        }),
        Err(e) => {
            drop(lease);
            let status = child.wait().context("wait for the supervisor")?;
            // Gone by now, unless the supervisor did not live to do that.
            let _ = context.bundles.find(&state.id);
            Err(explain(e, status))
        }
    }
}

/// Who has lost a supervisor wants to know how.
fn explain(error: anyhow::Error, status: std::process::ExitStatus) -> anyhow::Error {
    use std::os::unix::process::ExitStatusExt;
    match status.signal() {
        Some(signal) => anyhow!("the sandbox's supervisor was killed by signal {signal}"),
        None => error,
    }
}

/// Has the supervisor build the container, between the hooks.
async fn make(state: &BundleState, spec: &Spec, child: &Child) -> Result<Supervisor> {
    let api = Supervisor::at(&state.socket(), &state.id).await?;
    // Once it answers it is where hooks look for the container.
    let connect = ConnectRequest {
        id: state.id.clone(),
        ..Default::default()
    };
    api.task.connect(soon(), &connect).await.map_err(fault)?;
    for point in [Point::Prestart, Point::CreateRuntime] {
        hooks::run(spec, point, state, child.id()).await?;
    }
    let request = CreateTaskRequest {
        id: state.id.clone(),
        bundle: state.bundle.display().to_string(),
        ..Default::default()
    };
    api.task.create(soon(), &request).await.map_err(fault)?;
    Ok(api)
}

/// A supervisor that has no container yet, and ends if the lease does.
struct Launched {
    child: Child,
    lease: OwnedFd,
}

fn launch(
    bundles: &Bundles,
    state: &BundleState,
    bundle: &Bundle,
    streams: Streams,
) -> Result<Launched> {
    let assets = Assets::find()?;
    let dir = bundles.place(state, &bundle.config)?;
    let launched = spawn(bundles, state, bundle, streams, &assets, &dir);
    if launched.is_err() {
        let _ = bundles.remove(&state.id);
        let _ = dir.remove();
    }
    launched
}

fn spawn(
    bundles: &Bundles,
    state: &BundleState,
    bundle: &Bundle,
    streams: Streams,
    assets: &Assets,
    dir: &SandboxDir,
) -> Result<Launched> {
    let listener = UnixListener::bind(state.socket())
        .with_context(|| format!("create socket {}", state.socket().display()))?;
    let (lease, holder) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("make the supervisor's lease")?;
    let log = File::create(bundles.log(&state.id)).context("create the supervisor's log")?;
    let mut command = supervisor::command(assets);
    command
        .arg("serve-bundle")
        .args(["--id", &state.id])
        .arg("--container-dir")
        .arg(bundles.dir(&state.id))
        .arg("--run-dir")
        .arg(dir.path())
        .stderr(log);
    let copy = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned().context("use a stream");
    let (streams, terminal) = match streams {
        Streams::Own => {
            let own = [
                copy(&io::stdin())?,
                copy(&io::stdout())?,
                copy(&io::stderr())?,
            ];
            (Vec::from(own), None)
        }
        Streams::Terminal(slave) => {
            let number = slave.as_raw_fd();
            (vec![copy(&slave)?, slave], Some(number))
        }
    };
    let own = [
        ("--socket-fd", listener.as_raw_fd()),
        ("--lock-fd", dir.lock().as_fd().as_raw_fd()),
        ("--lease-fd", lease.as_raw_fd()),
    ];
    let names = ["--stdin-fd", "--stdout-fd", "--stderr-fd"];
    let streamed = names
        .into_iter()
        .zip(streams.iter().map(AsRawFd::as_raw_fd));
    let mut keep = Vec::new();
    for (name, fd) in own.into_iter().chain(streamed) {
        command.arg(name).arg(fd.to_string());
        keep.push(fd);
    }
    name_network(&mut command, &bundle.spec);
    // SAFETY: between fork and exec only async-signal-safe calls are made, on
    // descriptors that the parent keeps open until the child has executed.
    unsafe {
        command.pre_exec(move || detach(&keep, terminal));
    }
    let child = command
        .spawn()
        .with_context(|| format!("start the supervisor {}", assets.shim().display()))?;
    adjust_oom(&bundle.spec, child.id());
    Ok(Launched {
        child,
        lease: holder,
    })
}

/// Names the network namespace that the container's PID shall be in.
fn name_network(command: &mut Command, spec: &Spec) {
    if let Some(namespace) = network::namespace(spec) {
        command.arg("--network");
        match namespace.path() {
            Some(path) => command.arg(path),
            None => command.arg("new"),
        };
    }
}

/// A session of its own, with the terminal as its own, and of what is open here only
/// what it is to have.
fn detach(keep: &[RawFd], terminal: Option<RawFd>) -> io::Result<()> {
    /// linux/close_range.h.
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    // SAFETY: these calls take numbers, and are async-signal-safe.
    unsafe {
        if libc::setsid() < 0
            || libc::syscall(libc::SYS_close_range, 3, u32::MAX, CLOSE_RANGE_CLOEXEC) != 0
        {
            return Err(io::Error::last_os_error());
        }
        if let Some(terminal) = terminal
            && libc::ioctl(terminal, libc::TIOCSCTTY, 0) < 0
        {
            return Err(io::Error::last_os_error());
        }
        for fd in keep {
            if libc::fcntl(*fd, libc::F_SETFD, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// The machine goes as readily as the container would.
fn adjust_oom(spec: &Spec, pid: u32) {
    let process = spec.process().as_ref();
    if let Some(score) = process.and_then(|p| p.oom_score_adj()) {
        let file = format!("/proc/{pid}/oom_score_adj");
        if let Err(e) = fs::write(&file, score.to_string()) {
            tracing::warn!("set how readily the container is killed: {e}");
        }
    }
}

/// Writes a PID for whoever waits for the file: it is whole when it is there.
pub(super) fn write_pid(path: &std::path::Path, pid: u32) -> Result<()> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().context("--pid-file: not a file's name")?);
    let new = path.with_file_name(name);
    fs::write(&new, pid.to_string())
        .and_then(|()| fs::rename(&new, path))
        .with_context(|| format!("write the PID into {}", path.display()))
}
