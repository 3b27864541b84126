//! `walnut run`.

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
    pin::pin,
    task::Poll,
};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::{
    api::{CreateTaskRequest, Mount, ResizePtyRequest},
    shim_async::TaskClient,
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use walnut_image::Store;
use walnut_sandbox::{
    Checkpoint, Draft, Error, ImageRef, Layout, Lock, Record, Settings, reconcile,
};

use crate::{
    args::{PullWhen, RunArgs},
    client::{self, Supervisor, fault, soon},
    create::{NewContainer, Supervised},
    io::Fifos,
    network, pull, saved,
    terminal::{self, Raw},
};

pub(crate) async fn run(args: RunArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let store = Store::open(layout.images())?;
    let image = match (store.resolve(&args.image), args.pull) {
        (Ok(image), PullWhen::Missing | PullWhen::Never) => image,
        (Err(e), PullWhen::Never) => return Err(e.into()),
        (_, PullWhen::Missing | PullWhen::Always) => {
            pull::fetch(&store, &args.image, pull::Show::Stderr).await?
        }
    };
    let container = match &image.checkpoint {
        None => {
            let settings = Settings::load()?;
            let attachments = network::plan(&layout, &args.net, &settings).await?;
            NewContainer::create(&layout, &args, &image, attachments)?
        }
        Some(dir) => {
            let saved = Checkpoint::load(dir)?;
            saved::check(&args, &saved)?;
            let lease = image.lease().context("use the image")?;
            let image = ImageRef {
                name: args.image.clone(),
                id: image.id.to_string(),
            };
            NewContainer::go_on(&layout, &args, &saved, lease, image)?
        }
    };
    let source = Source {
        rootfs: image.rootfs,
        checkpoint: image.checkpoint,
        draft: None,
    };
    start(&layout, &args, container, source).await
}

/// Where a container's machine comes from.
#[derive(Debug)]
pub(crate) struct Source {
    /// The image's file.
    pub(crate) rootfs: PathBuf,
    /// What it goes on from, if it does not begin.
    pub(crate) checkpoint: Option<PathBuf>,
    /// Keeps that until the machine is there.
    pub(crate) draft: Option<Draft>,
}

/// Sees a container through that is on disk: to its end, or to its start if that is all
/// that is wanted.
pub(crate) async fn start(
    layout: &Layout,
    args: &RunArgs,
    container: NewContainer,
    source: Source,
) -> Result<u8> {
    if args.tty && !args.detach && args.interactive && !std::io::stdin().is_terminal() {
        bail!("the input is not a terminal; leave -t out, or use -i alone");
    }
    if let Some(path) = &args.cidfile {
        write_new(path, &container.record.id)
            .with_context(|| format!("write --cidfile {}", path.display()))?;
    }
    let mut supervised = container.supervise(args)?;
    let record = supervised.record.clone();
    let result = drive(layout, args, &mut supervised, source).await;
    finish(layout, args, &record, &mut supervised, result).await
}

fn write_new(path: &std::path::Path, text: &str) -> std::io::Result<()> {
    let mut file = std::fs::File::create_new(path)?;
    file.write_all(text.as_bytes())
}

/// Creates and starts the container; in front, sees it to its end.
async fn drive(
    layout: &Layout,
    args: &RunArgs,
    supervised: &mut Supervised,
    source: Source,
) -> Result<u8> {
    let Source {
        rootfs,
        checkpoint,
        draft,
    } = source;
    let record = &supervised.record;
    let supervisor = Supervisor::connect(layout, record).await?;
    let fifos = if args.detach {
        None
    } else {
        let dir = layout.sandbox(&record.id).join("io");
        Some(Fifos::create(&dir, args.interactive, args.tty)?)
    };
    let path = |name: &str| fifos.as_ref().map(|f| f.path(name)).unwrap_or_default();
    let request = CreateTaskRequest {
        id: record.id.clone(),
        bundle: layout.container(&record.id).display().to_string(),
        rootfs: vec![Mount {
            type_: "erofs".into(),
            source: rootfs.display().to_string(),
            options: vec!["ro".into()],
            ..Default::default()
        }],
        terminal: args.tty,
        stdin: path("stdin"),
        stdout: path("stdout"),
        stderr: path("stderr"),
        checkpoint: checkpoint
            .map(|dir| dir.display().to_string())
            .unwrap_or_default(),
        ..Default::default()
    };
    // The user may change their mind while the machine boots.
    tokio::select! {
        reply = supervisor.task.create(soon(), &request) => reply.map_err(fault)?,
        code = interrupted() => return Ok(code),
    };
    // The machine holds what it needs of it.
    drop(draft);
    let Some(fifos) = fifos else {
        supervisor.start("").await?;
        supervised.release()?;
        return Ok(0);
    };
    let raw = if args.tty { Raw::enter()? } else { None };
    if args.tty {
        resize(&supervisor.task, &supervisor.id, "").await;
    }
    let output = fifos.attach();
    let signals = Signals::new()?;
    let start = supervisor.start("");
    let code = attend(&supervisor, "", args.tty, signals, output, start).await;
    drop(raw);
    code
}

/// Signals that are passed on to a process. What comes from [`Self::new`] on is kept until
/// the process is there: make it before the process is started, whose first words may be
/// what somebody waits for to send one.
pub(crate) struct Signals(Vec<(SignalKind, Signal)>);

impl Signals {
    pub(crate) fn new() -> Result<Self> {
        let kinds = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
        ];
        let all = kinds.into_iter().map(|kind| Ok((kind, signal(kind)?)));
        let all: std::io::Result<_> = all.collect();
        Ok(Self(all.context("wait for signals")?))
    }

    /// Passes them on, for ever.
    async fn forward(self, supervisor: &Supervisor, exec_id: &str) {
        let each = self.0.into_iter().map(async |(kind, mut stream)| {
            loop {
                stream.recv().await;
                let number = kind.as_raw_value().unsigned_abs();
                // It may have ended this moment.
                let _ = supervisor.kill(exec_id, number).await;
            }
        });
        futures::future::join_all(each).await;
    }
}

/// Passes signals and window sizes on until the process has ended and its output
/// has been shown. `start` starts it, if that is not done yet.
pub(crate) async fn attend(
    supervisor: &Supervisor,
    exec_id: &str,
    terminal: bool,
    signals: Signals,
    output: impl Future<Output = ()>,
    start: impl Future<Output = Result<()>>,
) -> Result<u8> {
    let window = async {
        if !terminal {
            return std::future::pending().await;
        }
        let mut changes = signal(SignalKind::window_change())?;
        loop {
            changes.recv().await;
            resize(&supervisor.task, &supervisor.id, exec_id).await;
        }
        #[allow(unreachable_code)]
        Ok::<_, std::io::Error>(())
    };
    let ended = async {
        let mut waiting = pin!(supervisor.wait(exec_id));
        // Asked before it is started: with what ends at once its supervisor ends, before
        // it could be asked.
        if let Poll::Ready(code) = futures::poll!(waiting.as_mut()) {
            return code;
        }
        start.await?;
        let (code, ()) = tokio::join!(waiting, output);
        code
    };
    tokio::select! {
        code = ended => code,
        () = signals.forward(supervisor, exec_id) => Ok(0),
        failed = window => failed.map(|()| 0).context("wait for window changes"),
    }
}

pub(crate) async fn resize(task: &TaskClient, id: &str, exec_id: &str) {
    let Some((width, height)) = terminal::size() else {
        return;
    };
    let request = ResizePtyRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        width,
        height,
        ..Default::default()
    };
    if let Err(e) = task.resize_pty(soon(), &request).await {
        tracing::debug!("resize the terminal: {e}");
    }
}

async fn interrupted() -> u8 {
    let (Ok(mut int), Ok(mut term)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = int.recv() => 130,
        _ = term.recv() => 143,
    }
}

/// Sees to it that what failed, or was in front, leaves what it should.
async fn finish(
    layout: &Layout,
    args: &RunArgs,
    record: &Record,
    supervised: &mut Supervised,
    result: Result<u8>,
) -> Result<u8> {
    if args.detach && result.is_ok() {
        println!("{}", record.id);
        return result;
    }
    if let Err(e) = &result
        && let Ok(supervisor) = Supervisor::connect(layout, record).await
    {
        tracing::debug!("end the sandbox after: {e:#}");
        let _ = supervisor.shutdown().await;
    }
    // Whatever became of that, nobody is left to wait for.
    supervised.abandon();
    client::gone(layout, &record.id).await?;
    let killed = supervised.shim_end();
    reconcile(layout)?;
    let never_ran = result.is_err()
        && walnut_sandbox::find(layout, &record.id).is_ok_and(|r| r.started_at.is_none());
    let lock = layout.container(&record.id).join("lock");
    if never_ran && let Some(lock) = Lock::try_take(&lock)? {
        walnut_sandbox::remove(layout, &record.id, &lock)?;
    }
    match (result, killed) {
        (Err(_), Some(status)) => Err(Error::Machine(format!(
            "the sandbox's supervisor ended unexpectedly ({status}); the container is gone"
        ))
        .into()),
        (Err(e), None) => Err(e),
        (Ok(code), _) => Ok(code),
    }
}
