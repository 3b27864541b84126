//! What is known of a sandbox's containers beyond what the sandbox knows: how
//! clients named their streams, where root file systems are mounted, and who waits
//! for whose end.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
};

use tokio::task::JoinHandle;

use crate::{front::Streams, mount::Mounted};

/// The containers of a sandbox.
#[derive(Debug, Default)]
pub(crate) struct Tasks(Mutex<HashMap<String, Task>>);

/// A container.
#[derive(Debug, Default)]
struct Task {
    rootfs: Option<Mounted>,
    /// By exec ID; the first process's is empty.
    processes: HashMap<String, Process>,
}

#[derive(Debug, Default)]
struct Process {
    streams: Streams,
    follower: Option<JoinHandle<()>>,
}

impl Tasks {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Task>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Remembers a container.
    pub(crate) fn add(&self, id: &str, streams: Streams, rootfs: Option<Mounted>) {
        let process = Process {
            streams,
            follower: None,
        };
        let task = Task {
            rootfs,
            processes: HashMap::from([(String::new(), process)]),
        };
        self.lock().insert(id.to_owned(), task);
    }

    /// Forgets a container. Its root file system, if it is mounted here, is unmounted when
    /// what this returns is dropped.
    pub(crate) fn remove(&self, id: &str) -> Option<Mounted> {
        self.lock().remove(id)?.rootfs
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
                follower: None,
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

    /// Has `follow` wait for a process's end, unless somebody does already.
    pub(crate) fn follow(&self, id: &str, exec_id: &str, follow: impl FnOnce() -> JoinHandle<()>) {
        let mut tasks = self.lock();
        let process = tasks.get_mut(id).and_then(|t| t.processes.get_mut(exec_id));
        if let Some(process) = process
            && process.follower.is_none()
        {
            process.follower = Some(follow());
        }
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
