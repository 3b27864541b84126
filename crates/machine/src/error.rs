//! The one error type of this crate's face.

use std::{io, path::PathBuf, time::Duration};

use walnut_protocol::HandshakeError;

use crate::{Exit, process::SpawnError};

/// Why a machine could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A [`crate::MachineSpec`] that no machine of this kind can be made from.
    #[error("machine {id}: {problem}")]
    Spec {
        /// The sandbox's name.
        id: String,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// A program the machine needs is not on this host.
    #[error("{program} was not found ({tried}); {advice}")]
    MissingProgram {
        /// Its name.
        program: &'static str,
        /// Where it was looked for.
        tried: String,
        /// How to get it.
        advice: &'static str,
    },
    /// A file of the machine could not be used.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// What was attempted, on what: "open kernel".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// An operation of the host failed that has no file to name.
    #[error("{what}: {source}")]
    Host {
        /// What was attempted.
        what: String,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A process could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The machine ended before it could do what was asked.
    #[error("{what}: {exit}")]
    Ended {
        /// What was attempted.
        what: &'static str,
        /// How it ended.
        exit: Exit,
    },
    /// The agent did not say in time that it serves.
    #[error("the agent did not answer within {deadline:?}; {hint}")]
    NotReady {
        /// The caller's deadline.
        deadline: Duration,
        /// What the guest said last, or that it was silent.
        hint: String,
    },
    /// The guest did not let go of a device in time.
    #[error(
        "the guest did not let go of the device {device} within {deadline:?}; \
         it is still attached, and may be in use in the guest"
    )]
    NotDetached {
        /// The device's name.
        device: String,
        /// The caller's deadline.
        deadline: Duration,
    },
    /// The guest said something else than the ready line.
    #[error("the guest's first words were not an agent's: {words:?}")]
    BadReady {
        /// What it said, cut to a line.
        words: String,
    },
    /// The vsock device or the guest refused a connection.
    #[error(transparent)]
    Connect(#[from] HandshakeError),
    /// The hypervisor refused a command or broke off.
    #[error("QEMU monitor, {command}: {reason}")]
    Monitor {
        /// The QMP command.
        command: String,
        /// What came back.
        reason: String,
    },
    /// A snapshot that no machine can be restored from.
    #[error("snapshot {}: {problem}", path.display())]
    Snapshot {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The driver was asked for by name, and this host cannot run it.
    #[error("driver {driver} cannot run here: {reason}")]
    Unusable {
        /// The driver's name.
        driver: &'static str,
        /// Why.
        reason: String,
    },
    /// A reason of a driver outside this crate.
    #[error("{0}")]
    Other(String),
}
