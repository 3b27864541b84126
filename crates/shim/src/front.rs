//! Whom a supervisor works for. A sandbox is the same for `walnut` and for
//! containerd; what they are told of it, and when it ends, is not.

use std::{
    fmt::Debug,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use containerd_shim_protos::api::CreateTaskRequest;
use serde::{Deserialize, Serialize};
use walnut_protocol::supervisor::AboutResponse;
use walnut_sandbox::{
    Error, ExitInfo, Furnished, Input, Network, Output, Result, Sandbox, StdioTargets,
    machine::takeover::{Giver, NoState},
};

use crate::upgrade::FrontState;

/// Where a sandbox lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    /// Its name.
    pub(crate) id: &'a str,
    /// Its sockets.
    pub(crate) run_dir: &'a Path,
    /// The node's directories: state and run; none for one that stands alone.
    pub(crate) node: Option<(&'a Path, &'a Path)>,
    /// Its bundles are of Walnut's making.
    pub(crate) own: bool,
    /// As in [`ContainerRequest`](walnut_sandbox::ContainerRequest).
    pub(crate) named: bool,
    /// Where its network comes from, unless [`Front::furnish`] makes one.
    pub(crate) network: &'a Network,
}

/// What happens in a sandbox.
#[derive(Debug)]
pub(crate) enum Event<'a> {
    /// A container has been built.
    Created(&'a CreateTaskRequest),
    /// A container's program runs.
    Started { id: &'a str },
    /// A process has been announced.
    ExecAdded { id: &'a str, exec_id: &'a str },
    /// It runs.
    ExecStarted { id: &'a str, exec_id: &'a str },
    /// A process has ended; the container's first if `exec_id` is empty.
    Exited {
        id: &'a str,
        exec_id: &'a str,
        exit: &'a ExitInfo,
    },
    /// A container has been removed.
    Deleted { id: &'a str, exit: &'a ExitInfo },
    /// A container is frozen.
    Paused { id: &'a str },
    /// It goes on.
    Resumed { id: &'a str },
    /// The guest's kernel killed a process of a container, for want of memory.
    OutOfMemory { id: &'a str },
    /// A container has been saved.
    Checkpointed { id: &'a str, path: &'a str },
}

impl Event<'_> {
    /// The container that it is about.
    pub(crate) fn container(&self) -> &str {
        match self {
            Self::Created(request) => &request.id,
            Self::Started { id }
            | Self::ExecAdded { id, .. }
            | Self::ExecStarted { id, .. }
            | Self::Exited { id, .. }
            | Self::Deleted { id, .. }
            | Self::Paused { id }
            | Self::Resumed { id }
            | Self::OutOfMemory { id }
            | Self::Checkpointed { id, .. } => id,
        }
    }
}

/// Streams as a client names them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Streams {
    pub(crate) terminal: bool,
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Streams {
    /// The files of those that are named.
    pub(crate) fn targets(&self) -> StdioTargets {
        let some = |path: &str| (!path.is_empty()).then(|| PathBuf::from(path));
        StdioTargets {
            terminal: self.terminal,
            stdin: some(&self.stdin).map(Input::Path),
            stdout: some(&self.stdout).map(Output::Path),
            stderr: some(&self.stderr).map(Output::Path),
            returns: false,
        }
    }
}

/// How many containers a sandbox has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Count {
    /// That are there at all.
    pub(crate) all: usize,
    /// That have not ended.
    pub(crate) alive: usize,
}

/// One for whom a supervisor works.
#[async_trait]
pub(crate) trait Front: Debug + Send + Sync + 'static {
    /// Where its sandbox lies.
    fn place(&self) -> Place<'_>;

    /// Opens what the streams' names stand for.
    async fn streams(&self, id: &str, streams: &Streams) -> Result<StdioTargets>;

    /// Mounts are about to be made on these points, and on no others.
    fn mounting(&self, points: &[PathBuf]) -> Result<()>;

    /// Makes the network of a sandbox that is about to be made, if that is here to be made.
    /// What it is made of goes when supervision ends.
    async fn furnish(&self) -> Result<Option<Furnished>> {
        Ok(None)
    }

    /// The sandbox is up, for the container `id`.
    fn up(&self, sandbox: &Arc<Sandbox>, id: &str);

    /// Something happened.
    fn tell(&self, event: Event<'_>);

    /// The PID that stands for a process that is `pid` in the guest.
    fn pid(&self, pid: u32) -> u32 {
        pid
    }

    /// The same for all processes of a container.
    fn pids(&self, pids: Vec<u32>) -> Vec<u32> {
        pids
    }

    /// A process's exit code; an error where an exit code would be a lie. The API has no
    /// field for the reason; an exit code alone would be taken for the program's own.
    fn verdict(&self, exit: &ExitInfo) -> Result<u32> {
        match &exit.error {
            Some(reason) => Err(Error::Machine(reason.clone())),
            None => Ok(exit.code),
        }
    }

    /// Whether who connects is to hear that the container is not there. Others connect
    /// to see whether anybody answers.
    fn wants_container(&self) -> bool {
        false
    }

    /// Who asked for a container has gone before there was one.
    fn abandoned(&self, _: Count) {}

    /// Is asked to end.
    /// `id` is the container that the caller speaks of.
    fn shutdown(&self, id: &str, now: bool, count: Count);

    /// A container that has been saved is not to go on.
    async fn stop_saved(&self, sandbox: &Arc<Sandbox>, id: &str) -> Result<()>;

    /// Whose sandbox it is, for people.
    fn about(&self) -> AboutResponse;

    /// From now on nothing is begun that another program could not finish, or, again, it
    /// may be.
    fn hold(&self, _held: bool) {}

    /// What the next program makes the front end its own from.
    fn state(&self, giver: &mut Giver) -> std::result::Result<FrontState, NoState>;
}
