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
use walnut_image::{Image, Store};
use walnut_sandbox::{
    Checkpoint, Draft, Error, ImageRef, Journal, Layout, Lock, NamedVolumes, Record, RestartPolicy,
    Settings, reconcile,
};

use crate::{
    args::{ContainerArgs, CreateArgs, PullWhen, RunArgs},
    client::{self, Supervisor, fault, soon},
    create::{Host, NewContainer, Supervised},
    detach::DetachKeys,
    io::Fifos,
    network, pull, saved,
    terminal::{self, Raw},
};

pub(crate) async fn run(args: RunArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let container = &args.container;
    let front = Front {
        detach: args.detach,
        output: true,
        stdin: container.interactive,
        keys: args.keys.detach_keys,
        // What is started again does not end when somebody stops looking.
        stays: container.restart != RestartPolicy::No,
    };
    front.check(container.tty)?;
    let store = Store::open(layout.images())?;
    let image = image(&store, container).await?;
    let made = make(&layout, container, &image).await?;
    let source = Source {
        rootfs: image.rootfs,
        checkpoint: image.checkpoint,
        draft: None,
    };
    write_cidfile(container, &made.record.id)?;
    start(&layout, front, made, source).await
}

/// `walnut create`.
pub(crate) async fn create(args: CreateArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let store = Store::open(layout.images())?;
    let image = image(&store, &args.container).await?;
    if image.checkpoint.is_some() {
        bail!(
            "create {}: a checkpoint goes on at once; use `walnut run -d`",
            args.container.image
        );
    }
    let made = make(&layout, &args.container, &image).await?;
    write_cidfile(&args.container, &made.record.id)?;
    let record = made.rest()?;
    Journal::new(&layout.state).container(&record, "create", &[]);
    println!("{}", record.id);
    Ok(0)
}

/// The image that is asked for, fetched if need be.
async fn image(store: &Store, args: &ContainerArgs) -> Result<Image> {
    let show = match args.quiet {
        true => pull::Show::Nothing,
        false => pull::Show::Stderr,
    };
    let platform = args.platform.as_deref();
    if let Some(platform) = platform {
        pull::check_platform(platform)?;
    }
    match (store.resolve(&args.image), args.pull) {
        (Ok(image), PullWhen::Missing | PullWhen::Never) => Ok(image),
        (Err(e), PullWhen::Never) => Err(e.into()),
        (_, PullWhen::Missing | PullWhen::Always) => pull::fetch(store, &args.image, show).await,
    }
}

/// A container of an image, on disk.
async fn make(layout: &Layout, args: &ContainerArgs, image: &Image) -> Result<NewContainer> {
    match &image.checkpoint {
        None => {
            if let Some(name) = args.net.joins()? {
                let host = Host::of(layout, args, name)?;
                return NewContainer::create(layout, args, image, None, Some(host));
            }
            let settings = Settings::load()?;
            let attachments = network::plan(layout, &args.net, &settings).await?;
            NewContainer::create(layout, args, image, attachments, None)
        }
        Some(dir) => {
            let saved = Checkpoint::load(dir)?;
            saved::check(args, &saved)?;
            let lease = image.lease().context("use the image")?;
            let image = ImageRef {
                name: args.image.clone(),
                id: image.id.to_string(),
            };
            NewContainer::go_on(layout, args, &saved, lease, image)
        }
    }
}

/// What of a container is in front.
#[derive(Debug, Clone)]
pub(crate) struct Front {
    /// Nothing: its ID is printed.
    pub(crate) detach: bool,
    /// Its output.
    pub(crate) output: bool,
    /// Its input.
    pub(crate) stdin: bool,
    /// Keys that leave it behind.
    pub(crate) keys: DetachKeys,
    /// It does not end with this command.
    pub(crate) stays: bool,
}

impl Front {
    /// Refuses a terminal that there is not.
    pub(crate) fn check(&self, tty: bool) -> Result<()> {
        if tty && !self.detach && self.stdin && !std::io::stdin().is_terminal() {
            bail!("the input is not a terminal; leave -t out, or use -i alone");
        }
        Ok(())
    }
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

/// How far a container has been seen through.
pub(crate) enum Outcome {
    /// To its end.
    Ended(u8),
    /// It goes on behind.
    Behind,
}

/// Sees a container through that is on disk: to its end, or to its start if that is all
/// that is wanted.
pub(crate) async fn start(
    layout: &Layout,
    front: Front,
    container: NewContainer,
    source: Source,
) -> Result<u8> {
    let mut supervised = container.supervise()?;
    let record = supervised.record.clone();
    let result = drive(layout, &front, &mut supervised, source).await;
    if front.detach && result.is_ok() {
        println!("{}", record.id);
        return Ok(0);
    }
    if let Ok(Outcome::Behind) = result {
        return Ok(0);
    }
    let result = result.map(|outcome| match outcome {
        Outcome::Ended(code) => code,
        Outcome::Behind => 0,
    });
    finish(layout, &front, &record, &mut supervised, result).await
}

pub(crate) fn write_cidfile(args: &ContainerArgs, id: &str) -> Result<()> {
    let Some(path) = &args.cidfile else {
        return Ok(());
    };
    let write = || {
        let mut file = std::fs::File::create_new(path)?;
        file.write_all(id.as_bytes())
    };
    write().with_context(|| format!("write --cidfile {}", path.display()))
}

/// Creates and starts the container; in front, sees it to its end.
async fn drive(
    layout: &Layout,
    front: &Front,
    supervised: &mut Supervised,
    source: Source,
) -> Result<Outcome> {
    let Source {
        rootfs,
        checkpoint,
        draft,
    } = source;
    let record = supervised.record.clone();
    let (terminal, opens) = (record.terminal, record.terms.stdin);
    let supervisor = Supervisor::connect(layout, &record).await?;
    let dir = layout.sandbox(&record.id).join("io");
    let output = front.output && !front.detach;
    let fifos = match output || opens {
        true => Some(Fifos::create(&dir, opens, terminal)?),
        false => None,
    };
    let path = |name: &str| {
        let fifos = fifos.as_ref().filter(|_| output || name == "stdin");
        fifos.map(|f| f.path(name)).unwrap_or_default()
    };
    let request = CreateTaskRequest {
        id: record.id.clone(),
        bundle: layout.container(&record.id).display().to_string(),
        rootfs: vec![Mount {
            type_: "erofs".into(),
            source: rootfs.display().to_string(),
            options: vec!["ro".into()],
            ..Default::default()
        }],
        terminal,
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
        code = interrupted() => return Ok(Outcome::Ended(code)),
    };
    // The machine holds what it needs of it.
    drop(draft);
    let hold = opens && (front.detach || !front.stdin);
    if hold && let Some(fifos) = &fifos {
        // Whoever attaches writes to it; it ends with the container.
        supervisor.hold_stdin("", &fifos.path("stdin")).await?;
    }
    let Some(fifos) = fifos.filter(|_| output) else {
        supervisor.start("").await?;
        supervised.release()?;
        return Ok(Outcome::Behind);
    };
    let raw = if terminal && front.stdin {
        Raw::enter()?
    } else {
        None
    };
    if terminal {
        resize(&supervisor.task, &supervisor.id, "").await;
    }
    let stdin = fifos.path("stdin");
    let keys = (terminal && raw.is_some()).then(|| front.keys.clone());
    let (output, keys) = fifos.attach_with(front.stdin && !hold, keys);
    let signals = Signals::new()?;
    let start = async {
        supervisor.start("").await?;
        if front.stays {
            supervised.release()?;
        }
        Ok(())
    };
    let left = async {
        keys.await;
        supervisor.hold_stdin("", &stdin).await
    };
    let ended = attend(&supervisor, "", terminal, signals, output, start);
    let outcome = tokio::select! {
        code = ended => code.map(Outcome::Ended),
        held = left => held.map(|()| Outcome::Behind),
    };
    drop(raw);
    if let Ok(Outcome::Behind) = outcome {
        supervised.release()?;
    }
    outcome
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
    if let Some(size) = terminal::size() {
        resize_to(task, id, exec_id, size).await;
    }
}

/// Gives a process's terminal a size: columns and rows.
pub(crate) async fn resize_to(
    task: &TaskClient,
    id: &str,
    exec_id: &str,
    (width, height): (u32, u32),
) {
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
    front: &Front,
    record: &Record,
    supervised: &mut Supervised,
    result: Result<u8>,
) -> Result<u8> {
    if let Err(e) = &result
        && let Ok(supervisor) = Supervisor::connect(layout, record).await
    {
        tracing::debug!("end the sandbox after: {e:#}");
        let _ = supervisor.shutdown().await;
    }
    if front.stays && result.is_ok() {
        // It may be started again meanwhile.
        return result;
    }
    // Whatever became of that, nobody is left to wait for.
    supervised.abandon();
    client::gone(layout, &record.id).await?;
    let killed = supervised.shim_end();
    reconcile(layout)?;
    let never_ran = result.is_err()
        && walnut_sandbox::find(layout, &record.id)
            .is_ok_and(|r| r.started_at.is_none() && !r.terms.kept);
    let lock = layout.container(&record.id).join("lock");
    if never_ran && let Some(lock) = Lock::try_take(&lock)? {
        walnut_sandbox::remove(layout, &record.id, &lock)?;
        NamedVolumes::new(layout).remove_anonymous(layout, &record.terms.volumes);
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
