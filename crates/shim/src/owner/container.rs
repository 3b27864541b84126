//! A container of `walnut`'s on disk: its record, kept true, and what goes with its end.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::timeout;
use tracing::{error, warn};
use walnut_sandbox::{ExitInfo, Journal, Layout, Lock, NamedVolumes, Record, Sandbox, Status};

use crate::{again, front::Event, health, lease::Lease};

/// Longest the end of a container may lag behind the end of its machine, or behind SIGKILL.
const END_GRACE: Duration = Duration::from_secs(5);
const SIGKILL: u32 = 9;

/// A container that is supervised here.
#[derive(Debug)]
pub(super) struct OwnContainer {
    pub(super) id: String,
    pub(super) dir: PathBuf,
    pub(super) run_dir: PathBuf,
    /// The container's, until the end.
    pub(super) lock: Mutex<Option<Lock>>,
    pub(super) lease: Lease,
}

/// Why supervision ends.
#[derive(Debug)]
pub(super) enum End {
    Exited(ExitInfo),
    Told(Option<String>),
}

/// What follows from the end of a container.
#[derive(Debug, Clone, Copy)]
pub(super) enum After {
    /// Its restart policy has its way.
    Policy,
    /// Its machine goes on for others.
    Outlived,
    /// Nothing: it has a part in another one's machine.
    Nothing,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl OwnContainer {
    /// The node's state and run directories, as the container's tell.
    pub(super) fn node(&self) -> Option<(&Path, &Path)> {
        let state = self.dir.parent()?.parent()?;
        Some((state, self.run_dir.parent()?))
    }

    /// Changes the record; a failure is logged, for a container must not end for
    /// a full disk.
    pub(super) fn update(&self, change: impl FnOnce(&mut Record)) {
        if let Err(e) = Record::change(&self.dir, change) {
            error!("keep the record: {e}");
        }
    }

    /// Writes down what has happened to the container.
    pub(super) fn happened(&self, action: &str, more: &[(&str, String)]) {
        let record = Record::load(&self.dir);
        if let (Some((state, _)), Ok(record)) = (self.node(), record) {
            Journal::new(state).container(&record, action, more);
        }
    }

    fn kept_before(&self) -> bool {
        Record::load(&self.dir).is_ok_and(|record| record.terms.kept)
    }

    /// It is in this sandbox.
    pub(super) fn built(&self, sandbox: &Sandbox) {
        let (memory, vcpus) = sandbox.size();
        let driver = sandbox.driver();
        let template = sandbox.template().map(str::to_owned);
        self.update(|record| {
            record.status = Status::Created;
            record.driver = Some(driver.into());
            record.memory = Some(memory);
            record.vcpus = Some(vcpus);
            record.template = template;
            record.shim_pid = Some(std::process::id());
        });
    }

    /// Looks after how it is, if that was asked for.
    pub(super) fn look_after(&self, sandbox: &Arc<Sandbox>) {
        let check = Record::load(&self.dir).ok();
        let Some(check) = check.and_then(|record| record.terms.health) else {
            return;
        };
        let state = self.node().map(|(state, _)| state.to_owned());
        let (dir, id) = (self.dir.clone(), self.id.clone());
        tokio::spawn(health::watch(dir, state, sandbox.clone(), id, check));
    }

    /// Keeps its record true to what has happened.
    pub(super) fn tell(&self, event: Event<'_>) {
        match event {
            Event::Started { .. } => {
                self.update(|record| {
                    record.status = Status::Running;
                    record.started_at = Some(walnut_sandbox::now_ns());
                    record.terms.kept = !record.auto_remove;
                });
                self.happened("start", &[]);
            }
            Event::Paused { .. } => {
                self.update(|record| record.status = Status::Paused);
                self.happened("pause", &[]);
            }
            Event::Resumed { .. } => {
                self.update(|record| record.status = Status::Running);
                self.happened("unpause", &[]);
            }
            // One that was there before is not made again.
            Event::Created(_) if !self.kept_before() => self.happened("create", &[]),
            Event::ExecStarted { exec_id, .. } if !exec_id.starts_with(health::EXEC) => {
                self.happened("exec_start", &[("execID", exec_id.to_owned())]);
            }
            Event::Checkpointed { .. } => self.happened("checkpoint", &[]),
            // The end is for who supervises; the rest is in no record.
            _ => {}
        }
    }

    /// Writes down how it ended, and whether it is to be started again.
    pub(super) fn record_end(&self, end: &End, after: After) {
        let mut was_waiting = false;
        self.update(|record| {
            if record.status == Status::Restarting {
                // It has ended before, and is not to be started after all.
                was_waiting = true;
                (record.status, record.shim_pid) = (Status::Exited, None);
                return;
            }
            if record.status == Status::Creating && !record.terms.kept {
                // `walnut` removes what never came to life.
                return;
            }
            record.shim_pid = None;
            match end {
                End::Exited(exit) => {
                    record.finished_at = Some(exit.at);
                    record.exit_code = Some(exit.code);
                    record.oom_killed = exit.oom_killed;
                    record.error = exit.error.clone();
                }
                End::Told(reason) => {
                    record.finished_at = Some(walnut_sandbox::now_ns());
                    record.exit_code = Some(137);
                    record.error = reason.clone();
                }
            }
            record.outlived = matches!(after, After::Outlived);
            // One that was told to end was told so by somebody.
            let ended = matches!(end, End::Exited(_)) && record.started_at.is_some();
            let again = matches!(after, After::Policy) && ended && again::wanted(record);
            record.status = match again {
                true => Status::Restarting,
                false => Status::Exited,
            };
        });
        if was_waiting {
            return;
        }
        let code = |record: Record| record.exit_code.unwrap_or_default().to_string();
        if let Ok(record) = Record::load(&self.dir) {
            if record.oom_killed {
                self.happened("oom", &[]);
            }
            self.happened("die", &[("exitCode", code(record))]);
        }
    }

    /// Ends it in a machine that others are in as well; the machine, if that does not end it.
    pub(super) async fn kill(&self, sandbox: &Arc<Sandbox>) {
        // It may have ended this moment, or never have been built.
        let killed = timeout(END_GRACE, async {
            match sandbox.kill(&self.id, "", SIGKILL, true).await {
                Ok(()) => sandbox.wait(&self.id, "").await.is_ok(),
                Err(_) => true,
            }
        });
        tokio::select! {
            killed = killed => if killed.is_err() {
                warn!(id = self.id, "it does not die; its machine is ended");
                sandbox.kill_machine().await;
            },
            _ = sandbox.ended() => {}
        }
    }

    /// Removes the container if it was to go with its end, or never came to life. True if it
    /// is to be started again.
    pub(super) fn clean_up(&self) -> bool {
        match Record::load(&self.dir) {
            Ok(record) if record.status == Status::Restarting => return true,
            Ok(record)
                if record.auto_remove
                    || record.status == Status::Creating && !record.terms.kept =>
            {
                self.happened("destroy", &[]);
                remove(&self.dir);
                self.remove_volumes(&record);
            }
            Ok(record) if record.outlived => self.update(|record| record.outlived = false),
            Ok(_) => {}
            Err(e) => warn!("read the record: {e}"),
        }
        false
    }

    /// Removes what nobody has named.
    fn remove_volumes(&self, record: &Record) {
        let Some((state, run)) = self.node() else {
            return;
        };
        let layout = Layout {
            state: state.to_owned(),
            run: run.to_owned(),
        };
        NamedVolumes::new(&layout).remove_anonymous(&layout, &record.terms.volumes);
    }

    /// Returns how it ended in a sandbox; never, if there is none.
    pub(super) async fn ended(&self, sandbox: Option<&Arc<Sandbox>>) -> ExitInfo {
        let Some(sandbox) = sandbox else {
            return std::future::pending().await;
        };
        let id = &self.id;
        tokio::select! {
            Ok(exit) = sandbox.wait(id, "") => exit,
            machine = sandbox.ended() => match timeout(END_GRACE, sandbox.wait(id, "")).await {
                Ok(Ok(exit)) => exit,
                // It was never started, so nobody waits for it.
                _ => ExitInfo {
                    code: 255,
                    at: walnut_sandbox::now_ns(),
                    oom_killed: false,
                    error: Some(machine.to_string()),
                },
            },
        }
    }
}

pub(super) fn remove(dir: &Path) {
    if let Err(e) = std::fs::remove_dir_all(dir)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        error!("remove {}: {e}", dir.display());
    }
}
