//! What is known of a sandbox's containers beyond what the sandbox knows: how
//! clients named their streams, where root file systems are mounted, and who waits
//! for whose end.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use tokio::task::{AbortHandle, JoinHandle};

use crate::{front::Streams, mount::Mounted};

/// The containers of a sandbox.
#[derive(Debug, Default)]
pub(crate) struct Tasks(Mutex<HashMap<String, Task>>);

/// A container.
#[derive(Debug, Default)]
struct Task {
    rootfs: Option<Mounted>,
    /// Who waits for the end of its machine.
    watch: Option<AbortHandle>,
    /// By exec ID; the first process's is empty.
    processes: HashMap<String, Process>,
}

#[derive(Debug, Default)]
struct Process {
    streams: Streams,
    follower: Option<JoinHandle<()>>,
    /// Its end is told of, or will be; and whether it has been.
    followed: Option<Told>,
}

/// Whether an end has been told of.
pub(crate) type Told = Arc<AtomicBool>;

/// Containers in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct TasksState(Vec<TaskState>);

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TaskState {
    id: String,
    /// Where its root file system is mounted.
    rootfs: Option<PathBuf>,
    processes: Vec<ProcessState>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProcessState {
    exec_id: String,
    streams: Streams,
    /// Somebody is yet to hear of its end.
    untold: bool,
}

impl Tasks {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Task>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Remembers a container.
    pub(crate) fn add(&self, id: &str, streams: Streams, rootfs: Option<Mounted>) {
        let process = Process {
            streams,
            ..Process::default()
        };
        let task = Task {
            rootfs,
            watch: None,
            processes: HashMap::from([(String::new(), process)]),
        };
        self.lock().insert(id.to_owned(), task);
    }

    /// Forgets a container. Its root file system, if it is mounted here, is unmounted when
    /// what this returns is dropped.
    pub(crate) fn remove(&self, id: &str) -> Option<Mounted> {
        let mut task = self.lock().remove(id)?;
        if let Some(watch) = task.watch.take() {
            watch.abort();
        }
        task.rootfs
    }

    /// Somebody waits for the end of a container's machine, for as long as it is known.
    pub(crate) fn watched(&self, id: &str, watch: AbortHandle) {
        match self.lock().get_mut(id) {
            Some(task) => task.watch = Some(watch),
            None => watch.abort(),
        }
    }

    /// The containers' names.
    pub(crate) fn ids(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    /// Whether a container is known.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.lock().contains_key(id)
    }

    /// Where root file systems are mounted, and one more.
    pub(crate) fn mount_points(&self, one_more: &Path) -> Vec<PathBuf> {
        let tasks = self.lock();
        let mounted = tasks.values().filter_map(|t| t.rootfs.as_ref());
        mounted
            .map(|m| m.0.to_path_buf())
            .chain([one_more.to_owned()])
            .collect()
    }

    /// Remembers a process of a container.
    pub(crate) fn add_exec(&self, id: &str, exec_id: &str, streams: Streams) {
        if let Some(task) = self.lock().get_mut(id) {
            let process = Process {
                streams,
                ..Process::default()
            };
            task.processes.insert(exec_id.to_owned(), process);
        }
    }

    /// Forgets it.
    pub(crate) fn remove_exec(&self, id: &str, exec_id: &str) {
        if let Some(task) = self.lock().get_mut(id) {
            task.processes.remove(exec_id);
        }
    }

    /// How a process's client named its streams.
    pub(crate) fn streams(&self, id: &str, exec_id: &str) -> Streams {
        let tasks = self.lock();
        let process = tasks.get(id).and_then(|t| t.processes.get(exec_id));
        process.map(|p| p.streams.clone()).unwrap_or_default()
    }

    /// Has `follow` wait for a process's end, to tell of it, unless somebody does already.
    pub(crate) fn follow(
        &self,
        id: &str,
        exec_id: &str,
        follow: impl FnOnce(Told) -> JoinHandle<()>,
    ) {
        let mut tasks = self.lock();
        let process = tasks.get_mut(id).and_then(|t| t.processes.get_mut(exec_id));
        if let Some(process) = process
            && process.follower.is_none()
        {
            let told = Told::default();
            process.followed = Some(told.clone());
            process.follower = Some(follow(told));
        }
    }

    /// What the next program makes them its own from ([`Self::take_over`]).
    pub(crate) fn state(&self) -> TasksState {
        let tasks = self.lock();
        let process = |(exec_id, process): (&String, &Process)| ProcessState {
            exec_id: exec_id.clone(),
            streams: process.streams.clone(),
            untold: process
                .followed
                .as_ref()
                .is_some_and(|told| !told.load(Ordering::Relaxed)),
        };
        let task = |(id, task): (&String, &Task)| TaskState {
            id: id.clone(),
            rootfs: task.rootfs.as_ref().map(|rootfs| rootfs.0.to_path_buf()),
            processes: task.processes.iter().map(process).collect(),
        };
        TasksState(tasks.iter().map(task).collect())
    }

    /// Those of the program before; whose ends are to be told of, by container and exec.
    pub(crate) fn take_over(state: TasksState) -> (Self, Vec<(String, String)>) {
        let mut untold = Vec::new();
        let mut tasks = HashMap::new();
        for TaskState {
            id,
            rootfs,
            processes,
        } in state.0
        {
            let mut task = Task {
                rootfs: rootfs.map(|path| Mounted(path.into())),
                watch: None,
                processes: HashMap::new(),
            };
            for process in processes {
                if process.untold {
                    untold.push((id.clone(), process.exec_id.clone()));
                }
                let streams = process.streams;
                let known = Process {
                    streams,
                    ..Process::default()
                };
                task.processes.insert(process.exec_id, known);
            }
            tasks.insert(id, task);
        }
        (Self(Mutex::new(tasks)), untold)
    }

    /// Takes those who wait for the ends of a container's processes: of the first alone,
    /// or of all others.
    pub(crate) fn followers(&self, id: &str, first: bool) -> Vec<JoinHandle<()>> {
        let mut tasks = self.lock();
        let Some(task) = tasks.get_mut(id) else {
            return Vec::new();
        };
        let processes = task.processes.iter_mut();
        processes
            .filter(|(exec_id, _)| exec_id.is_empty() == first)
            .filter_map(|(_, process)| process.follower.take())
            .collect()
    }
}
