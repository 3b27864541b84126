//! A process of a container as the host sees it: its state, its streams, and
//! the task that learns of its end.

use std::{io, sync::Arc};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::JoinHandle};
use walnut_machine::takeover::{Giver, Taker};

use crate::{
    Error, Result, StdioTargets,
    copy::{Closing, Copying, InputCopy, InputState, OutputCopy, OutputState, SharedLog},
    log::{LogState, LogWriter, Stream},
    stdio::{Sink, Source, TargetsState},
    takeover::taken,
};

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
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

/// Ends of streams that somebody brings who has come later.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    pub(crate) stdin: Option<Source>,
    pub(crate) stdout: Option<Sink>,
    pub(crate) stderr: Option<Sink>,
}

/// One process, first or exec.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) stdio: StdioTargets,
    pub(crate) close_stdin: Arc<Closing>,
    /// It has ended; its output may still be on its way.
    ended: watch::Sender<bool>,
    state: watch::Sender<ProcessState>,
    inner: std::sync::Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    pid: u32,
    outputs: Vec<Copying<OutputCopy>>,
    input: Option<Copying<InputCopy>>,
    log: Option<SharedLog>,
    /// Somebody learns of its end.
    followed: bool,
}

impl Process {
    pub(crate) fn new(stdio: StdioTargets) -> Self {
        Self {
            stdio,
            close_stdin: Arc::default(),
            ended: watch::Sender::new(false),
            state: watch::Sender::new(ProcessState::Created),
            inner: std::sync::Mutex::default(),
        }
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Nothing below holds the lock across a panic that would matter.
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn attach(
        &self,
        outputs: Vec<Copying<OutputCopy>>,
        input: Option<Copying<InputCopy>>,
        log: Option<SharedLog>,
    ) {
        let mut inner = self.inner();
        inner.outputs = outputs;
        inner.input = input;
        inner.log = log;
    }

    /// From now on somebody learns of its end.
    pub(crate) fn set_followed(&self) {
        self.inner().followed = true;
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

    /// Has its streams lead elsewhere as well.
    pub(crate) fn connect(&self, clients: Clients) -> Result<()> {
        let inner = self.inner();
        for (stream, sink) in [
            (Stream::Stdout, clients.stdout),
            (Stream::Stderr, clients.stderr),
        ] {
            let Some(sink) = sink else { continue };
            let copies = inner.outputs.iter().filter_map(|o| o.copy.upgrade());
            // What has no such stream says nothing on it: its reader sees the end.
            if let Some(copy) = copies.into_iter().find(|copy| copy.stream() == stream)
                && !copy.add(sink)
            {
                let full = "attach: too many are attached already; let one go";
                return Err(Error::Invalid(full.into()));
            }
        }
        let Some(source) = clients.stdin else {
            return Ok(());
        };
        let copy = inner.input.as_ref().and_then(|i| i.copy.upgrade());
        match copy.is_some_and(|copy| copy.replace(source)) {
            true => Ok(()),
            false => Err(Error::WrongState(
                "attach: its standard input is not open".into(),
            )),
        }
    }

    /// Takes the tasks that copy its output; they end when its streams do.
    pub(crate) fn take_outputs(&self) -> Vec<JoinHandle<()>> {
        let mut inner = self.inner();
        let outputs = inner.outputs.iter_mut();
        outputs.filter_map(|output| output.task.take()).collect()
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
        let input = self.inner().input.take();
        if let Some(task) = input.and_then(|input| input.task) {
            task.abort();
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

/// A process in a state ([`walnut_machine::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    pid: u32,
    state: ProcessState,
    stdio: TargetsState,
    outputs: Vec<OutputState>,
    input: Option<InputState>,
    /// Input shall end.
    closing: bool,
    log: Option<LogState>,
    pub(crate) followed: bool,
}

impl Process {
    /// For the next program.
    pub(crate) fn handed_over(&self, giver: &mut Giver) -> State {
        let inner = self.inner();
        let log = inner.log.as_ref();
        State {
            pid: inner.pid,
            state: self.state(),
            stdio: self.stdio.state(giver),
            outputs: inner
                .outputs
                .iter()
                .filter_map(|output| Some(output.copy.upgrade()?.state(giver)))
                .collect(),
            input: inner
                .input
                .as_ref()
                .and_then(|input| Some(input.copy.upgrade()?.state(giver))),
            closing: self.close_stdin.is_asked(),
            log: log.map(|log| log.lock().unwrap_or_else(|e| e.into_inner()).state()),
            followed: inner.followed,
        }
    }

    /// That of the program before, whose streams go on. Nobody learns of its end yet.
    pub(crate) fn take_over(state: State, taker: &mut Taker) -> Result<Self> {
        let process = Self::new(StdioTargets::take_over(state.stdio, taker)?);
        process.state.send_replace(state.state);
        if state.closing {
            process.close_stdin.ask();
        }
        let log = state.log.map(LogWriter::take_over).transpose()?;
        let log = log.map(|log| Arc::new(std::sync::Mutex::new(log)));
        let outputs = state.outputs.into_iter().map(|output| {
            let ended = process.ended();
            output.take_over(log.clone(), ended, taker)
        });
        let outputs: io::Result<_> = outputs.collect();
        let outputs = outputs.map_err(taken)?;
        let close = &process.close_stdin;
        let input = state
            .input
            .map(|input| input.take_over(close.clone(), taker));
        process.attach(outputs, input.transpose().map_err(taken)?, log);
        process.set_pid(state.pid);
        Ok(process)
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
