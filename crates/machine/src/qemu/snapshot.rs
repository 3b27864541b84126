//! Saving a machine and restoring clones of it, through QEMU's migration.
//!
//! Save: the machine stands; its vsock device is taken out (`sockets`); QEMU writes the
//! state of the others into a pipe, and no memory (`x-ignore-shared`), which the
//! supervisor copies meanwhile; the device is put back. Restore: the same, backwards,
//! on a QEMU that was started for the same machine without a kernel. It loads while
//! memory is being filled, and runs when all of it is there.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::json;
use tokio::{io::AsyncReadExt, net::unix::pipe};

use super::{
    Qemu, command,
    machine::{Given, QemuMachine, SOCKET, Shared},
    memory::Memory,
    qmp::{self, Qmp},
    sockets::{self, Sockets},
    state::{self, Header, refused},
};
use crate::{
    Driver, Error, MachineSpec, Snapshot, SnapshotFiles,
    agent::{Door, host},
    files::Devices,
};

/// How long QEMU may write or read a state, which takes it milliseconds.
const MIGRATION: Duration = Duration::from_secs(60);
/// Between two questions whether it has.
const AGAIN: Duration = Duration::from_millis(1);
/// QEMU's name for the descriptor it writes to.
const STATE: &str = "state";

/// A new file, removed again unless it is kept.
struct NewFile {
    path: PathBuf,
    keep: bool,
}

impl NewFile {
    fn create(what: &'static str, path: &Path) -> Result<(Self, File), Error> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC)
            .open(path);
        let file = file.map_err(file_error(what, path))?;
        let path = path.to_owned();
        Ok((Self { path, keep: false }, file))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { what, path, source }
}

/// Starts what waits for a disk on a thread of its own.
fn blocking(
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> impl Future<Output = io::Result<()>> {
    let task = tokio::task::spawn_blocking(work);
    async { task.await.unwrap_or_else(|e| Err(io::Error::other(e))) }
}

/// Waits until QEMU's migration is over, and well.
async fn migrated(qmp: &Qmp) -> Result<(), Error> {
    const COMMAND: &str = "query-migrate";
    let over = async {
        loop {
            let answer = qmp.execute(COMMAND).await?;
            let word = |name: &str| answer.get(name).and_then(|value| value.as_str());
            match word("status") {
                Some("completed") => return Ok(()),
                Some(status @ ("failed" | "cancelled" | "cancelling")) => {
                    let why = word("error-desc").unwrap_or(status);
                    return Err(qmp::failed(COMMAND, crate::process::quotable(why)));
                }
                _ => tokio::time::sleep(AGAIN).await,
            }
        }
    };
    tokio::time::timeout(MIGRATION, over)
        .await
        .unwrap_or_else(|_| {
            let late = format!("it has not ended within {MIGRATION:?}");
            Err(qmp::failed(COMMAND, late))
        })
}

/// Memory is mapped by both sides: QEMU need not write or read it.
async fn ignore_memory(qmp: &Qmp) -> Result<(), Error> {
    let capability = json!({ "capability": "x-ignore-shared", "state": true });
    let arguments = json!({ "capabilities": [capability] });
    let done = qmp.execute_with("migrate-set-capabilities", arguments);
    done.await.map(drop)
}

#[async_trait]
impl Snapshot for QemuMachine {
    async fn save(&self, to: &SnapshotFiles) -> Result<(), Error> {
        let (mut state, state_file) = NewFile::create("create the snapshot's state", &to.state)?;
        let (mut memory, memory_file) =
            NewFile::create("create the snapshot's memory", &to.memory)?;
        // A task of its own, for a caller who gives up must not leave the machine
        // without its vsock device.
        let shared = Arc::clone(&self.shared);
        let work = async move {
            let attempt = save(&shared, state_file, memory_file);
            shared.or_end("save the machine", attempt).await
        };
        tokio::spawn(work)
            .await
            .unwrap_or_else(|e| Err(Error::Other(format!("save the machine: {e}"))))?;
        (state.keep, memory.keep) = (true, true);
        Ok(())
    }
}

async fn save(shared: &Shared, state: File, memory: File) -> Result<(), Error> {
    const QUESTION: &str = "query-status";
    let mut registers = shared.registers.lock().await;
    let qmp = shared.monitor(QUESTION)?;
    let status = qmp.execute(QUESTION).await?;
    let problem = match status.get("status").and_then(|status| status.as_str()) {
        Some("paused") => None,
        // QEMU wants it so.
        Some("postmigrate") => Some("it has not run since it was saved; resume it in between"),
        _ => Some("it runs; pause it first"),
    };
    if let Some(problem) = problem {
        return Err(Error::Other(format!("save the machine: {problem}")));
    }
    let Some(pages) = shared.memory() else {
        return Err(qmp::failed(QUESTION, "QEMU is gone"));
    };
    let sockets = Sockets::ask(qmp).await?;
    let copy = blocking(move || pages.save(&memory));
    let outcome = without_sockets(qmp).await;
    let base = command::vsock_registers(&shared.spec);
    let back = sockets.put_back(qmp, &mut registers, base).await;
    let copied = copy.await;
    let stream = outcome?;
    back?;
    copied.map_err(host("write the snapshot's memory"))?;
    let disks = shared.disks();
    let came = u32::try_from(disks.len() - shared.spec.disks.len()).unwrap_or(u32::MAX);
    let spec = MachineSpec {
        spare_disks: shared.spec.spare_disks.saturating_sub(came),
        disks,
        ..shared.spec.clone()
    };
    let header = Header::new(shared.driver, qmp.version(), &spec, sockets);
    blocking(move || header.write(&state, &stream))
        .await
        .map_err(host("write the snapshot's state"))
}

/// Takes the vsock device out and lets QEMU write its state.
async fn without_sockets(qmp: &Qmp) -> Result<Vec<u8>, Error> {
    sockets::take_out(qmp).await?;
    ignore_memory(qmp).await?;
    let failed = |e: io::Error| Error::Host {
        what: "receive the machine's state".to_owned(),
        source: e,
    };
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    qmp.give(STATE, theirs).await?;
    rustix::io::ioctl_fionbio(&ours, true).map_err(|e| failed(e.into()))?;
    let ours = pipe::Receiver::from_owned_fd(ours).map_err(failed)?;
    let read = async {
        let mut stream = Vec::new();
        let most = u64::try_from(state::STREAM_MAX).unwrap_or(0);
        let mut bounded = ours.take(most + 1);
        tokio::time::timeout(MIGRATION, bounded.read_to_end(&mut stream))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(failed)?;
        match stream.len() > state::STREAM_MAX {
            false => Ok(stream),
            true => Err(qmp::failed(
                "migrate",
                "it writes more than any machine has",
            )),
        }
    };
    let write = async {
        let to = json!({ "uri": format!("fd:{STATE}") });
        qmp.execute_with("migrate", to).await?;
        migrated(qmp).await
    };
    let (stream, ()) = tokio::try_join!(read, write)?;
    Ok(stream)
}

/// Opens a file that a snapshot consists of.
fn open(what: &'static str, path: &Path) -> Result<File, Error> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(file_error(what, path))?;
    match file.metadata().map_err(file_error(what, path))?.is_file() {
        true => Ok(file),
        false => Err(refused(path, "it is no regular file")),
    }
}

/// Takes the `n`th share out of a machine that stands, or puts it back.
async fn realize(qmp: &Qmp, n: usize, there: bool) -> Result<(), Error> {
    let path = format!("/machine/peripheral/{}", command::share(n));
    let change = json!({ "path": path, "property": "realized", "value": there });
    qmp.execute_with("qom-set", change).await.map(drop)
}

/// The driver's [`crate::Restore::restore`].
pub(super) async fn restore(
    driver: &Qemu,
    spec: MachineSpec,
    from: &SnapshotFiles,
) -> Result<QemuMachine, Error> {
    let state = open("open the snapshot's state", &from.state)?;
    let saved = open("open the snapshot's memory", &from.memory)?;
    let header = Header::read(&state, &from.state)?;
    let clone = header.clone_of(driver.name(), spec);
    let spec = clone.map_err(|problem| refused(&from.state, problem))?;
    command::check_clone(&spec)?;
    let length = saved.metadata().map(|it| it.len());
    if length.map_err(file_error("look at the snapshot's memory", &from.memory))? != spec.memory {
        let problem = format!("it is not of the machine's {} bytes", spec.memory);
        return Err(refused(&from.memory, problem));
    }
    let memory = Arc::new(Memory::new(spec.memory).map_err(host("make the guest's memory"))?);
    let devices = Devices::open(&spec)?;
    let fill = {
        let memory = Arc::clone(&memory);
        blocking(move || memory.fill(&saved))
    };
    let state = OwnedFd::from(state);
    let uri = format!("fd:{}", state.as_raw_fd());
    let given = Given {
        door: Door::reopen(&spec.run_dir, SOCKET),
        memory,
        boot: None,
        devices,
        more: vec![state],
    };
    let machine = QemuMachine::spawn(driver, spec, given).await?;
    let shared = &machine.shared;
    let attempt = async {
        let qmp = shared.monitor("migrate-incoming")?;
        if qmp.version() != header.qemu {
            let (had, has) = (&header.qemu, qmp.version());
            let problem = format!("QEMU {had:?} wrote it; {has} cannot restore it");
            return Err(refused(&from.state, crate::process::quotable(&problem)));
        }
        ignore_memory(qmp).await?;
        sockets::take_out(qmp).await?;
        // Of them it has no state to load either.
        let shares = 0..shared.spec.shares.len();
        for n in shares.clone() {
            realize(qmp, n, false).await?;
        }
        // What it loads must agree with what stands in the rings.
        fill.await
            .map_err(file_error("read the snapshot's memory", &from.memory))?;
        shared.step("memory filled");
        qmp.execute_with("migrate-incoming", json!({ "uri": uri }))
            .await?;
        migrated(qmp).await?;
        shared.step("state loaded");
        for n in shares {
            realize(qmp, n, true).await?;
        }
        let mut registers = shared.registers.lock().await;
        let base = command::vsock_registers(&command::without_late(&shared.spec));
        header.sockets.put_back(qmp, &mut registers, base).await?;
        header.sockets.tell_reset(&mut registers).await?;
        qmp.execute("cont").await
    };
    shared.or_end("restore the machine", attempt).await?;
    shared.step("guest runs");
    Ok(machine)
}
