//! `walnut-oci run`: `create` and `start`, and in front what follows.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    process::{Child, ExitStatus},
    thread::JoinHandle,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::signal::unix::{SignalKind, signal};
use walnut_sandbox::BundleStatus;

use super::{
    args::{Delete, Run},
    bundle::Bundle,
    console::{self, Console},
    context::Context,
    create::{self, Streams},
    delete, start,
};
use crate::terminal::{self, Raw};

const CHUNK: usize = 64 << 10;

pub(super) async fn run(context: &Context, args: &Run) -> Result<u8> {
    let source = &args.source;
    let bundle = Bundle::load(&source.bundle)?;
    let size = bundle.console_size();
    let (streams, master) = match (bundle.terminal(), &source.console_socket) {
        (true, Some(socket)) if args.detach => {
            let slave = Console::open(size)?.send(socket)?;
            (Streams::Terminal(slave), None)
        }
        (true, None) if args.detach => {
            bail!("cannot allocate tty if walnut-oci will detach without setting console socket")
        }
        (_, Some(_)) => {
            bail!("cannot use console socket if walnut-oci will not detach or allocate tty")
        }
        (true, None) => {
            let outer = terminal::size().and_then(|(columns, rows)| {
                Some((columns.try_into().ok()?, rows.try_into().ok()?))
            });
            // What the configuration says holds until the outer terminal changes.
            let console = Console::open(size.or(outer))?;
            (Streams::Terminal(console.slave), Some(console.master))
        }
        (false, None) => (Streams::Own, None),
    };
    let mut created = create::build(context, source, bundle, streams).await?;
    let shown = master.map(Shown::begin).transpose();
    let started = match &shown {
        Ok(_) => {
            let pid = created.child.id();
            start::execute(&created.api, &created.spec, &created.state, pid).await
        }
        Err(e) => Err(anyhow::anyhow!("show the terminal: {e}")),
    };
    let status = match started {
        Ok(()) if args.detach => return Ok(0),
        Ok(()) => {
            let master = shown
                .as_ref()
                .ok()
                .and_then(|s| s.as_ref())
                .map(|s| &s.master);
            attend(created.child, master).await
        }
        Err(e) => {
            let force = Delete {
                id: source.id.clone(),
                force: true,
            };
            delete::delete(context, &force).await?;
            let _ = created.child.wait();
            return Err(e);
        }
    };
    if let Ok(Some(shown)) = shown {
        shown.end();
    }
    let status = status?;
    let state = context.bundles.find(&source.id)?;
    if !args.keep && state.status == BundleStatus::Stopped {
        delete::remove(context, &state).await?;
    }
    match (status.code().map(u8::try_from), &state.error) {
        (Some(Ok(code)), None) => Ok(code),
        (_, Some(error)) => bail!("{error}"),
        _ => bail!("the sandbox's supervisor ended unexpectedly ({status})"),
    }
}

/// Passes signals and the window's size on until the container has ended.
async fn attend(mut child: Child, master: Option<&File>) -> Result<ExitStatus> {
    let pid = Pid::from_raw(i32::try_from(child.id()).context("read a PID")?);
    let passed = [
        (SignalKind::interrupt(), Signal::SIGINT),
        (SignalKind::terminate(), Signal::SIGTERM),
        (SignalKind::hangup(), Signal::SIGHUP),
        (SignalKind::quit(), Signal::SIGQUIT),
        (SignalKind::user_defined1(), Signal::SIGUSR1),
        (SignalKind::user_defined2(), Signal::SIGUSR2),
    ];
    let mut tasks = tokio::task::JoinSet::new();
    for (kind, number) in passed {
        let mut stream = signal(kind).context("wait for signals")?;
        tasks.spawn(async move {
            while stream.recv().await.is_some() {
                // The supervisor passes it on; it is waited for below, so the PID is its.
                let _ = kill(pid, number);
            }
        });
    }
    if let Some(master) = master {
        let mut changes = signal(SignalKind::window_change()).context("wait for signals")?;
        let master = master.try_clone().context("use the terminal")?;
        tasks.spawn(async move {
            while changes.recv().await.is_some() {
                if let Some(size) = terminal::size() {
                    console::resize(master.as_fd(), size);
                }
            }
        });
    }
    let ended = tokio::task::spawn_blocking(move || child.wait());
    let status = ended.await.context("wait for the container")?;
    tasks.abort_all();
    status.context("wait for the container")
}

/// A container's terminal, shown on the user's.
#[derive(Debug)]
struct Shown {
    master: File,
    output: JoinHandle<()>,
    raw: Option<Raw>,
}

impl Shown {
    fn begin(master: OwnedFd) -> io::Result<Self> {
        let master = File::from(master);
        let raw = Raw::enter()?;
        let (mut from, mut to) = (master.try_clone()?, master.try_clone()?);
        // Threads, for a read of a terminal or a file cannot be awaited. This one ends
        // with the program.
        std::thread::spawn(move || copy(&mut io::stdin().lock(), &mut to));
        let output = std::thread::spawn(move || copy(&mut from, &mut io::stdout().lock()));
        Ok(Self {
            master,
            output,
            raw,
        })
    }

    /// Returns when everything has been shown: the other side has gone.
    fn end(self) {
        let _ = self.output.join();
        drop(self.raw);
    }
}

fn copy(from: &mut impl Read, to: &mut impl Write) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(read @ 1..) => {
                let written = to.write_all(&buffer[..read]).and_then(|()| to.flush());
                if written.is_err() {
                    break;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            _ => break,
        }
    }
}
