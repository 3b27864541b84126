//! A process of a container as the host sees it: its state, its streams, and
//! the task that learns of its end.

use std::sync::Arc;

use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};

use crate::StdioTargets;

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitInfo {
    /// 0–255; 128 + signal after a signal.
    pub code: u32,
    /// Nanoseconds since the epoch.
    pub at: i64,
    /// The guest's OOM killer had a part in it.
    pub oom_killed: bool,
    /// The sentence that says why, where it was the sandbox that failed.
    pub error: Option<String>,
}

/// Where a process stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessState {
    /// Built, not executed.
    Created,
    /// Executed.
    Running,
    /// Frozen.
    Paused,
    /// Ended, its output delivered.
    Stopped(ExitInfo),
}

/// One process, first or exec.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) stdio: StdioTargets,
    pub(crate) close_stdin: Arc<Notify>,
    /// It has ended; its output may still be on its way.
    ended: watch::Sender<bool>,
    state: watch::Sender<ProcessState>,
    inner: std::sync::Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    pid: u32,
    outputs: Vec<JoinHandle<()>>,
    input: Option<JoinHandle<()>>,
}

impl Process {
    pub(crate) fn new(stdio: StdioTargets) -> Self {
        Self {
            stdio,
            close_stdin: Arc::new(Notify::new()),
            ended: watch::Sender::new(false),
            state: watch::Sender::new(ProcessState::Created),
            inner: std::sync::Mutex::default(),
        }
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Nothing below holds the lock across a panic that would matter.
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn attach(&self, outputs: Vec<JoinHandle<()>>, input: Option<JoinHandle<()>>) {
        let mut inner = self.inner();
        inner.outputs = outputs;
        inner.input = input;
    }

    pub(crate) fn pid(&self) -> u32 {
        self.inner().pid
    }

    pub(crate) fn set_pid(&self, pid: u32) {
        self.inner().pid = pid;
    }

    pub(crate) fn state(&self) -> ProcessState {
        self.state.borrow().clone()
    }

    /// Changes the state unless the process has stopped: that is final.
    pub(crate) fn set_state(&self, next: ProcessState) {
        self.state.send_if_modified(|state| {
            if matches!(state, ProcessState::Stopped(_)) || *state == next {
                return false;
            }
            *state = next;
            true
        });
    }

    /// Takes the tasks that copy its output; they end when its streams do.
    pub(crate) fn take_outputs(&self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut self.inner().outputs)
    }

    /// Tells those that copy its output whether it has ended.
    pub(crate) fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    /// It has ended: who takes its output has no reason to wait any more, and its input
    /// is nobody's.
    pub(crate) fn end(&self) {
        self.ended.send_replace(true);
        self.stop_input();
    }

    /// Ends the copying of its input.
    fn stop_input(&self) {
        if let Some(input) = self.inner().input.take() {
            input.abort();
        }
    }

    /// Returns when the process has stopped.
    pub(crate) async fn stopped(&self) -> ExitInfo {
        let mut state = self.state.subscribe();
        loop {
            if let ProcessState::Stopped(exit) = &*state.borrow_and_update() {
                return exit.clone();
            }
            // The sender lives as long as `self`.
            if state.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop_input();
        for output in self.take_outputs() {
            output.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stopped_is_final_and_told_to_late_comers() {
        let process = Process::new(StdioTargets::default());
        process.set_state(ProcessState::Running);
        let exit = ExitInfo {
            code: 3,
            at: 7,
            oom_killed: false,
            error: None,
        };
        process.set_state(ProcessState::Stopped(exit.clone()));
        process.set_state(ProcessState::Running);
        assert_eq!(process.stopped().await, exit);
        assert_eq!(process.stopped().await, exit);
    }
}
