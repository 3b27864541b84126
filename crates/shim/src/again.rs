//! A container that is started again when it ends, as its restart policy wants it.
//!
//! There is no daemon that could do it: the supervisor becomes a new one, in the same
//! process and with the container's lock, and that starts the container by itself. So
//! nothing of the machine before is left in it, and nobody finds the container without a
//! supervisor in between.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{fs::DirBuilderExt, net::UnixListener, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use containerd_shim_protos::api::{CreateTaskRequest, Mount, StartRequest};
use nix::{
    fcntl::{FcntlArg, FdFlag, Flock, FlockArg, OFlag, fcntl},
    sys::stat::Mode,
    unistd::{mkfifo, pipe2, write},
};
use tokio::{sync::oneshot, time::sleep};
use walnut_protocol::supervisor::AttachRequest;
use walnut_sandbox::{Assets, Attachments, Lock, Record, Status};

use crate::{options, options::Options, service::TaskService};

/// Pause before the first start; each one is twice as long.
const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(60);
/// What has run for so long has not failed at its start.
const LASTED_NS: i64 = 10_000_000_000;

/// Whether a container that has ended is started again; counts that in its record.
pub(crate) fn wanted(record: &mut Record) -> bool {
    let lasted = record.finished_at.zip(record.started_at);
    if lasted.is_some_and(|(end, start)| end - start >= LASTED_NS) {
        record.restarts = 0;
    }
    let failed = record.exit_code != Some(0);
    let wanted = !record.stopped
        && !record.auto_remove
        && record.terms.rootfs.is_some()
        && record.terms.restart.wants(failed, record.restarts);
    if wanted {
        record.restarts = record.restarts.saturating_add(1);
    }
    wanted
}

/// Becomes the supervisor that starts it. Returns why not.
pub(crate) fn become_again(
    id: &str,
    container_dir: &Path,
    run_dir: &Path,
    lock: &Lock,
) -> anyhow::Error {
    let program = match Assets::find() {
        Ok(assets) => assets.shim(),
        Err(e) => return e.into(),
    };
    let fd = lock.as_fd();
    if let Err(e) = fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())) {
        return anyhow!("keep the lock: {e}");
    }
    let error = Command::new(&program)
        .arg("again")
        .args(["--id", id])
        .arg("--container-dir")
        .arg(container_dir)
        .arg("--run-dir")
        .arg(run_dir)
        .args(["--lock-fd", &fd.as_raw_fd().to_string()])
        .exec();
    anyhow!("execute {}: {error}", program.display())
}

/// What `again` is told, and what it makes for itself: the run directory with a socket in
/// it, and a lease that nobody holds.
pub(crate) fn options(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let (mut id, mut container_dir, mut run_dir, mut lock) = (None, None, None, None);
    while let Some(name) = args.next() {
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--id" => id = Some(value),
            "--container-dir" => container_dir = Some(PathBuf::from(value)),
            "--run-dir" => run_dir = Some(PathBuf::from(value)),
            "--lock-fd" => lock = Some(options::inherited(&name, &value)?),
            _ => return Err(format!("unknown option {name}")),
        }
    }
    let missing = |name: &str| format!("again needs {name}");
    let run_dir = run_dir.ok_or_else(|| missing("--run-dir"))?;
    let made = |e: anyhow::Error| format!("make {} again: {e:#}", run_dir.display());
    Ok(Options {
        id: id.ok_or_else(|| missing("--id"))?,
        container_dir: container_dir.ok_or_else(|| missing("--container-dir"))?,
        lock: Lock::inherited(lock.ok_or_else(|| missing("--lock-fd"))?),
        socket: listen(&run_dir).map_err(made)?.into(),
        lease: released().map_err(made)?,
        run_dir,
    })
}

fn listen(run_dir: &Path) -> Result<UnixListener> {
    match DirBuilder::new().mode(0o700).create(run_dir) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    File::create(run_dir.join("bundle"))?;
    let socket = run_dir.join("task.sock");
    let _ = fs::remove_file(&socket);
    Ok(UnixListener::bind(socket)?)
}

fn released() -> Result<std::os::fd::OwnedFd> {
    let (lease, holder) = pipe2(OFlag::O_CLOEXEC)?;
    write(&holder, b"d")?;
    Ok(lease)
}

/// Starts the container, after a pause; false if it is not to be started any more.
pub(crate) async fn start(
    service: &TaskService,
    id: &str,
    container_dir: &Path,
    run_dir: &Path,
) -> Result<bool> {
    let record = Record::load(container_dir)?;
    let doublings = record.restarts.saturating_sub(1).min(16);
    sleep((FIRST * 2_u32.pow(doublings)).min(LONGEST)).await;
    let rootfs = record.terms.rootfs.clone().context("it has no image")?;
    // Held for as long as this process lives: it keeps the image from being removed.
    let gone = || format!("its image {} is gone", record.image.name);
    let file = File::open(&rootfs).with_context(gone)?;
    let lease = Flock::lock(file, FlockArg::LockSharedNonblock);
    let lease = lease.map_err(|(_, e)| e).with_context(gone)?;
    std::mem::forget(lease);
    Attachments::again(container_dir)?;
    let now = Record::change(container_dir, |record| {
        if record.stopped {
            return;
        }
        record.status = Status::Creating;
        (record.started_at, record.finished_at) = (None, None);
        (record.exit_code, record.error, record.oom_killed) = (None, None, false);
        record.health = None;
    })?;
    if now.stopped {
        return Ok(false);
    }
    let stdin = match record.terms.stdin {
        true => Some(input(run_dir)?),
        false => None,
    };
    let path = stdin.as_ref().map(|(path, _)| path.display().to_string());
    let path = path.unwrap_or_default();
    let request = CreateTaskRequest {
        id: id.to_owned(),
        bundle: container_dir.display().to_string(),
        rootfs: vec![Mount {
            type_: "erofs".into(),
            source: rootfs.display().to_string(),
            options: vec!["ro".into()],
            ..Default::default()
        }],
        terminal: record.terminal,
        stdin: path.clone(),
        ..Default::default()
    };
    // Nobody is there who could go.
    let (_here, gone) = oneshot::channel();
    let said = |e: ttrpc::Error| match e {
        ttrpc::Error::RpcStatus(status) => anyhow!("{}", status.message()),
        other => anyhow!("{other}"),
    };
    service.create(request, gone).await.map_err(said)?;
    if stdin.is_some() {
        let hold = AttachRequest {
            id: id.to_owned(),
            stdin: path,
            ..Default::default()
        };
        service.attach(&hold).map_err(said)?;
    }
    let start = StartRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    service.start(start).await.map_err(said)?;
    Ok(true)
}

/// The FIFO that who attaches writes to, with both its ends open.
fn input(run_dir: &Path) -> Result<(PathBuf, File)> {
    let dir = run_dir.join("io");
    DirBuilder::new().mode(0o700).create(&dir)?;
    let path = dir.join("stdin");
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    Ok((path, file))
}
