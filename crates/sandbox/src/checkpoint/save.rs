//! Saving a container that runs.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use tracing::{debug, warn};
use walnut_machine::{Machine, Pause, Snapshot};
use walnut_protocol::agent::{ContainerRequest as AgentContainer, Empty, SetClockRequest};

use super::{Attached, SavedContainer, Sealed, files, seal, unmake};
use crate::{
    Error, ProcessState, Result, Sandbox, agent::soon, containers::Container, guest_spec, now_ns,
};

/// How a checkpoint is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckpointOptions {
    /// The container does not run on: the caller ends it.
    pub exit: bool,
    /// It outlives the command that asked for it: digested, and on disk.
    pub lasting: bool,
}

/// What is saved, and what can do it.
struct Subject<'a> {
    pause: &'a dyn Pause,
    snapshot: &'a dyn Snapshot,
    container: AgentContainer,
    /// It stays so: it was paused before (as containerd does for its checkpoints).
    paused: bool,
}

impl<'a> Subject<'a> {
    /// `None` if the machine cannot be saved.
    fn of(machine: &'a dyn Machine, container: &Container) -> Option<Self> {
        Some(Self {
            pause: machine.as_pause()?,
            snapshot: machine.as_snapshot()?,
            container: container.request(),
            paused: container.init.state() == ProcessState::Paused,
        })
    }
}

impl Sandbox {
    /// Saves the container `id` with all its processes into the directory `to`. It runs
    /// on, or stands still for ever if that was asked for. One that is paused stays so;
    /// what goes on from it runs.
    ///
    /// Its processes are paused meanwhile, so that in a clone none of them runs before it
    /// has randomness, time, name and streams of its own. On failure the directory is as it
    /// was, and the container runs on.
    pub async fn checkpoint(
        self: &Arc<Self>,
        id: &str,
        to: &Path,
        options: CheckpointOptions,
    ) -> Result<()> {
        let (this, id, to) = (self.clone(), id.to_owned(), to.to_owned());
        // A task of its own: a caller who gives up must not leave the machine standing.
        let work = async move { this.checkpoint_whole(&id, to, options).await };
        let done = tokio::spawn(work).await;
        done.unwrap_or_else(|e| Err(Error::Machine(format!("save the container: {e}"))))
    }

    async fn checkpoint_whole(
        &self,
        id: &str,
        to: PathBuf,
        options: CheckpointOptions,
    ) -> Result<()> {
        let mut alone = Some(self.saving.write().await);
        let container = self.container(id)?;
        let (record, sealed) = self.what_to_seal(id, &container, options)?;
        if self.networked.load(Ordering::Relaxed) {
            return Err(Error::Invalid(format!(
                "save container {id}: its machine is on a network, and what is saved of one could not be on another; run it with --network none to save it"
            )));
        }
        let Some(subject) = Subject::of(self.machine.as_ref(), &container) else {
            return Err(self.cannot(id));
        };
        let began = Instant::now();
        let saved = self.save_standing(&subject, &to).await;
        // Until it is known to be whole if it shall not run on; else at once.
        if saved.is_err() || !options.exit {
            self.go_on(&subject).await;
            alone.take();
        }
        saved?;
        let ms = began.elapsed().as_secs_f64() * 1000.0;
        debug!(id, ms, "the machine is saved");
        let dir = to.clone();
        let written = tokio::task::spawn_blocking(move || seal(&dir, record, sealed)).await;
        let written = written.unwrap_or_else(|e| Err(Error::Machine(format!("write: {e}"))));
        if written.is_err() {
            unmake(&to);
            if options.exit {
                self.go_on(&subject).await;
            }
        }
        drop(alone);
        written
    }

    /// What the record will say, or why there can be none.
    fn what_to_seal(
        &self,
        id: &str,
        container: &Container,
        options: CheckpointOptions,
    ) -> Result<(SavedContainer, Sealed)> {
        let refuse = |why: &str| Err(Error::WrongState(format!("save container {id}: {why}")));
        match container.init.state() {
            ProcessState::Running | ProcessState::Paused => {}
            ProcessState::Created => return refuse("it has not been started"),
            ProcessState::Stopped(_) => return refuse("it has ended"),
        }
        if self.has_volumes() {
            return Err(Error::Invalid(format!(
                "save container {id}: it has volumes, and what its programs have open there only the volumes' server knows (virtio-fs keeps no state that could be saved)"
            )));
        }
        let disks = self.disks.lock().unwrap_or_else(|e| e.into_inner()).clone();
        if disks.iter().any(|attached| !attached.disk.read_only) {
            return Err(Error::Invalid(format!(
                "save container {id}: its root file system is a disk that it writes to, which no checkpoint holds"
            )));
        }
        let disks = disks.iter().map(Attached::saved).collect();
        let shape = self.shape.clone().map(|it| it.of_size(self.size.now()));
        let (Some(shape), Some(disks), Some(disk)) = (shape, disks, container.disk.clone()) else {
            return Err(self.cannot(id));
        };
        if self.container_ids().len() > 1 {
            return Err(Error::Invalid(format!(
                "save container {id}: there are others in its sandbox, whose state would be saved with it"
            )));
        }
        let stdio = &container.init.stdio;
        let saved = SavedContainer {
            id: id.to_owned(),
            guest_id: container.guest_id.clone(),
            disk,
            terminal: stdio.terminal,
            stdin: stdio.terminal || stdio.stdin.is_some(),
            spec: guest_spec::load(&container.bundle)?,
        };
        let sealed = Sealed {
            disks,
            shape,
            lasting: options.lasting,
        };
        Ok((saved, sealed))
    }

    fn cannot(&self, id: &str) -> Error {
        Error::Invalid(format!(
            "save container {id}: machines of the driver {} cannot be saved",
            self.driver
        ))
    }

    /// Brings everything to rest and saves it. Whatever comes of that, [`Self::go_on`]
    /// undoes the rest.
    async fn save_standing(&self, subject: &Subject<'_>, to: &Path) -> Result<()> {
        let paused = self.agent.pause_container(soon(), &subject.container).await;
        self.call("pause the container", paused).await?;
        let held = self.agent.hold_streams(soon(), &Empty::default()).await;
        self.call("hold the container's streams", held).await?;
        subject.pause.pause().await?;
        subject.snapshot.save(&files(to)).await?;
        Ok(())
    }

    /// Lets machine and container run on. What fails here has failed with the machine,
    /// whose end others notice.
    async fn go_on(&self, subject: &Subject<'_>) {
        if let Err(e) = subject.pause.resume().await {
            warn!("let the machine run on: {e}");
            return;
        }
        let now = SetClockRequest {
            realtime_ns: now_ns(),
            ..Default::default()
        };
        let nothing = Empty::default();
        let set = self.agent.set_clock(soon(), &now).await.map(drop);
        let open = self.agent.release_streams(soon(), &nothing).await.map(drop);
        let thawed = match subject.paused {
            true => Ok(()),
            false => {
                let thaw = self.agent.resume_container(soon(), &subject.container);
                thaw.await.map(drop)
            }
        };
        for done in [set, open, thawed] {
            if let Err(e) = done {
                warn!("let the container run on: {e}");
            }
        }
    }
}
