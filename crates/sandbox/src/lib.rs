//! A pod's life on the host: start order, containers and their processes,
//! standard streams, records that outlive the supervisor, and recovery.
//!
//! A [`Sandbox`] is one machine with an agent in it and any number of
//! containers; the shim drives it. A [`Record`] is what is known of a container
//! on disk; [`reconcile`] removes what a killed supervisor left. [`Layout`] says
//! where things lie. A [`Checkpoint`] is a container saved with its processes.
//!
//! It knows neither containerd's protocol nor a command line: front ends
//! translate to and from the types here.

mod agent;
mod attachments;
mod bundle;
mod cgroup;
mod checkpoint;
mod containers;
mod copy;
mod daemon;
mod descriptor;
mod disks;
mod error;
mod events;
mod file;
mod growth;
mod guest_spec;
mod host_kernel;
mod journal;
mod layout;
mod link;
mod lock;
mod log;
mod memory;
mod network;
mod plan;
mod pod;
mod pod_request;
mod pool;
mod ports;
mod process;
mod record;
mod sandbox;
mod settings;
mod similar;
mod sizing;
mod spec;
mod standby;
mod start;
mod stdio;
mod takeover;
mod template;
mod terms;
mod volumes;

/// For the fuzz targets.
#[cfg(feature = "fuzzing")]
pub mod fuzz {
    /// What is read of a checkpoint's record, written again, once all that is asked of it
    /// has been.
    pub fn checkpoint(bytes: &[u8]) -> Result<Vec<u8>, String> {
        let record = crate::Checkpoint::parse(bytes)?;
        let _ = (record.command(), record.rootfs(), record.stale());
        serde_json::to_vec(&record).map_err(|e| e.to_string())
    }
}

pub use attachments::{
    Attachments, ContainerLinks, Furnished, HostEntry, LinksState, NameServers, Names, NetworkLink,
    PublishedPort, Transport,
};
pub use bundle::{BundleState, BundleStatus, Bundles};
pub use checkpoint::{
    CHECKPOINT_FILE, CHECKPOINT_MAX, Checkpoint, CheckpointOptions, Draft, Drafts, SavedContainer,
};
pub use daemon::{DaemonDirs, SandboxDir, supervisors};
pub use descriptor::Inherited;
pub use error::{Error, Result};
pub use host_kernel::foreign_device;
pub use journal::{Happening, Journal, JournalReader};
pub use layout::{Assets, Layout};
pub use lock::Lock;
pub use log::{LineReader, LogLine, LogReader};
pub use network::Network;
pub use pod_request::PodRequest;
pub use pool::{
    Given, Handover, Joining, Member, Place, Pool, PoolSize, Pools, Post, Visit, Visitor,
    host_memory, join, leave,
};
pub use process::{ExitInfo, ProcessState};
pub use record::{ImageRef, Record, Status, find, joined, list, now_ns, reconcile, remove};
pub use sandbox::{
    ContainerRequest, ContainerState, ExecRequest, NameFiles, RootfsMount, Sandbox, SandboxConfig,
};
pub use settings::{Annotation, BOOT_TIMEOUT, Bytes, SETTINGS_FILE, Settings};
pub use similar::similar;
pub use sizing::PodLimits;
pub use spec::parse_spec;
pub use stdio::{Input, Output, StdioTargets};
pub use takeover::{Busy, Doing, SandboxState, Way};
pub use template::{Listed, Shape, Template, Templates, Wanted};
pub use terms::{
    Health, HealthCheck, HealthResult, HealthStatus, LogTerms, NamedVolume, RestartPolicy, Terms,
};
pub use volumes::{NamedVolumes, VolumeRecord};
pub use walnut_machine as machine;
pub use walnut_network as networks;
/// The host–guest protocol this build speaks.
pub use walnut_protocol::{
    PROTOCOL,
    agent::{
        ContainerStatsResponse as ContainerStats, GuestMemoryResponse, Process as GuestProcess,
    },
};
pub use walnut_storage::find_virtiofsd;

/// Annotation in a bundle's `config.json`: file that receives the container's
/// output as JSON lines.
pub const ANNOTATION_LOG: &str = "dev.walnut.log";

/// Annotation in a bundle's `config.json`: `true` if its program is to be the child of a
/// first process of ours, which passes signals on and reaps orphans.
pub const ANNOTATION_INIT: &str = "dev.walnut.init";

/// Annotation in a bundle's `config.json`: `off` if the sandbox shall boot even where a
/// template could spare it that.
pub const ANNOTATION_TEMPLATE: &str = "dev.walnut.template";
/// Annotation of a sandbox's first container: rules for what its guest may send, with `;`
/// between them, beside the node's.
pub const ANNOTATION_EGRESS: &str = "dev.walnut.egress";

/// Annotation of containerd's `Update`: memory, in bytes, that the sandbox shall give back
/// to the host if it can do without it; 0 for all.
pub const ANNOTATION_RECLAIM: &str = "dev.walnut.reclaim";

/// Number of the field in containerd's cgroup metrics that carries what the guest says of
/// its memory. containerd knows no such field, and passes over it.
pub const METRICS_GUEST_MEMORY: u32 = 1000;

/// Type of what `Pids` says of a process of `walnut`'s own containers.
pub const GUEST_PROCESS: &str = "walnut.agent.v1.Process";
