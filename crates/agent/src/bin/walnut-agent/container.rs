//! One container: its states, its processes, its places.
//!
//! Legal steps: creating → created → running → stopped. A container stops when
//! its first process ends, from whichever state.

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use walnut_agent::names::ContainerPaths;

use crate::cgroup::Cgroup;
use crate::process::Process;

/// Most execs of one container that are not removed yet.
pub(crate) const EXECS_MAX: usize = 256;

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Creating,
    Created,
    Running,
    Stopped,
}

/// A storage that is mounted for a container.
#[derive(Debug)]
pub(crate) struct Mount {
    pub(crate) point: String,
    /// A block device is mounted there.
    pub(crate) disk: bool,
}

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) paths: ContainerPaths,
    /// What RemoveContainer unmounts, in the order of mounting.
    pub(crate) mounts: Vec<Mount>,
    pub(crate) cgroup: Cgroup,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    first: Option<Arc<Process>>,
    started: bool,
    paused: bool,
    removing: bool,
    /// `None` while the exec is being started.
    execs: HashMap<String, Option<Arc<Process>>>,
}

/// Why an exec was not taken in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ExecRefused {
    Exists,
    Full,
}

impl Container {
    pub(crate) fn new(paths: ContainerPaths, mounts: Vec<Mount>) -> Self {
        Self {
            cgroup: Cgroup::new(paths.cgroup()),
            paths,
            mounts,
            inner: Mutex::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn state(&self) -> State {
        let inner = self.inner();
        match &inner.first {
            None => State::Creating,
            Some(first) if first.exit().is_some() => State::Stopped,
            Some(_) if inner.started => State::Running,
            Some(_) => State::Created,
        }
    }

    pub(crate) fn paused(&self) -> bool {
        self.inner().paused
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.inner().paused = paused;
    }

    /// The first process has been created.
    pub(crate) fn set_first(&self, process: Arc<Process>) {
        self.inner().first = Some(process);
    }

    /// Claims the removal; `false` if somebody else has it.
    pub(crate) fn begin_removal(&self) -> bool {
        !std::mem::replace(&mut self.inner().removing, true)
    }

    /// The removal failed and may be tried again.
    pub(crate) fn end_removal(&self) {
        self.inner().removing = false;
    }

    /// The first process, or an exec's; `None` if there is none, or not yet.
    pub(crate) fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        let inner = self.inner();
        if exec_id.is_empty() {
            return inner.first.clone();
        }
        inner.execs.get(exec_id).cloned().flatten()
    }

    /// Every process that the host knows.
    pub(crate) fn processes(&self) -> Vec<Arc<Process>> {
        let inner = self.inner();
        let execs = inner.execs.values().flatten();
        inner.first.iter().chain(execs).cloned().collect()
    }

    /// Forgets all execs; those that run go on.
    pub(crate) fn forget_execs(&self) {
        self.inner().execs.clear();
    }

    /// Keeps a place for an exec.
    pub(crate) fn reserve_exec(&self, exec_id: &str) -> Result<(), ExecRefused> {
        let mut inner = self.inner();
        if inner.execs.contains_key(exec_id) {
            return Err(ExecRefused::Exists);
        }
        if inner.execs.len() >= EXECS_MAX {
            return Err(ExecRefused::Full);
        }
        inner.execs.insert(exec_id.to_owned(), None);
        Ok(())
    }

    /// Fills an exec's place.
    pub(crate) fn set_exec(&self, exec_id: &str, process: Arc<Process>) {
        self.inner().execs.insert(exec_id.to_owned(), Some(process));
    }

    /// Forgets an exec.
    pub(crate) fn remove_exec(&self, exec_id: &str) {
        self.inner().execs.remove(exec_id);
    }

    /// Lets the created process run its program: it waits for a word on its
    /// socket. Needs no helper.
    pub(crate) fn start(&self) -> io::Result<()> {
        // Reached through a descriptor: the path may be too long for a socket.
        let folder = std::fs::File::open(self.paths.state())?;
        let name = format!("/proc/self/fd/{}/notify.sock", folder.as_raw_fd());
        let mut socket = UnixStream::connect(name)?;
        socket.write_all(b"start container")?;
        self.inner().started = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn execs_are_unique_and_bounded() {
        let container = Container::new(ContainerPaths::new("c").unwrap(), Vec::new());
        assert_eq!(container.state(), State::Creating);
        for n in 0..EXECS_MAX {
            container.reserve_exec(&n.to_string()).unwrap();
        }
        assert_eq!(container.reserve_exec("1"), Err(ExecRefused::Exists));
        assert_eq!(container.reserve_exec("x"), Err(ExecRefused::Full));
        container.remove_exec("1");
        assert!(container.reserve_exec("x").is_ok());
        assert!(container.process("x").is_none(), "still being started");
    }

    #[test]
    fn one_removal_at_a_time() {
        let container = Container::new(ContainerPaths::new("c").unwrap(), Vec::new());
        assert!(container.begin_removal());
        assert!(!container.begin_removal());
        container.end_removal();
        assert!(container.begin_removal());
    }
}
