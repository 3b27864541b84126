//! A pod's life on the host: start order, containers and their processes,
//! standard streams, records that outlive the supervisor, and recovery.
//!
//! A [`Sandbox`] is one machine with an agent in it and any number of
//! containers; the shim drives it. A [`Record`] is what is known of a container
//! on disk; [`reconcile`] removes what a killed supervisor left. [`Layout`] says
//! where things lie.
//!
//! It knows neither containerd's protocol nor a command line: front ends
//! translate to and from the types here.

mod agent;
mod cgroup;
mod error;
mod guest_spec;
mod layout;
mod lock;
mod log;
mod process;
mod record;
mod sandbox;
mod sizing;
mod start;
mod stdio;
mod template;

pub use error::{Error, Result};
pub use layout::{Assets, Layout};
pub use lock::Lock;
pub use log::{LogLine, LogReader};
pub use process::{ExitInfo, ProcessState};
pub use record::{ImageRef, Record, Status, find, list, now_ns, reconcile, remove};
pub use sandbox::{
    ContainerRequest, ContainerState, ExecRequest, RootfsMount, Sandbox, SandboxConfig,
};
pub use start::boot_deadline;
pub use stdio::StdioTargets;
pub use template::{Listed, Shape, Template, Templates, Wanted};
pub use walnut_machine as machine;
/// The host–guest protocol this build speaks.
pub use walnut_protocol::PROTOCOL;
pub use walnut_storage::find_virtiofsd;

/// Annotation in a bundle's `config.json`: file that receives the container's
/// output as JSON lines.
pub const ANNOTATION_LOG: &str = "dev.walnut.log";

/// Annotation in a bundle's `config.json`: `off` if the sandbox shall boot even where a
/// template could spare it that.
pub const ANNOTATION_TEMPLATE: &str = "dev.walnut.template";
