//! containerd's side of the supervisor: how containerd starts it (shim v2), what
//! it tells containerd, and what is done when one of them has died.
//!
//! `containerd-shim-walnut-v2 -namespace N -id ID … start` ([`start`]) answers with
//! the address of the supervisor of the container's sandbox, which it starts if
//! there is none; that one is a [`Pod`]. `… delete` ([`delete`]) removes what a dead
//! one left.

mod args;
mod bootstrap;
mod delete;
mod events;
mod group;
mod info;
mod logger;
mod pod;
mod pod_config;
mod serve;
mod start;

pub(crate) use args::{Action, Flags, parse};
pub(crate) use delete::delete;
pub(crate) use events::timestamp;
use group::Outline;
pub(crate) use info::info;
pub(crate) use pod::{Pod, PodState};
pub(crate) use pod_config::read as pod_request;
pub(crate) use serve::{run, serve};
pub(crate) use start::start;

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use containerd_shim_protos::protobuf::{Message, well_known_types::any::Any};
use walnut_sandbox::{DaemonDirs, Layout};

/// The socket in a sandbox's directory.
const SOCKET: &str = "task.sock";
/// PID of the supervisor, beside it.
const SHIM_PID: &str = "shim.pid";
/// The runtime's options, as containerd gave them when the supervisor was started.
const OPTIONS: &str = "options";
/// PID that stands for a container's, in its bundle.
const INIT_PID: &str = "init.pid";

/// The sandbox that a container belongs to.
struct Home {
    dirs: DaemonDirs,
    /// The sandbox's directory, whether there is one or not.
    path: PathBuf,
    /// The sandbox's name.
    group: String,
    bundle: PathBuf,
}

impl Home {
    /// By the flags, in the bundle.
    fn find(flags: &Flags) -> Result<Self> {
        let bundle = match &flags.bundle {
            Some(bundle) => bundle.clone(),
            None => env::current_dir().context("find the bundle")?,
        };
        // Without a specification it is a sandbox that will get one.
        let outline = Outline::load(&bundle).unwrap_or_default();
        let group = outline.group(&flags.id).to_owned();
        let layout = Layout::from_env()?;
        let dirs = DaemonDirs::new(&layout.run)?;
        let path = dirs.path(&[&flags.address, &flags.namespace, &group]);
        Ok(Self {
            dirs,
            path,
            group,
            bundle,
        })
    }

    fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }
}

/// The options with which the supervisor of the sandbox in `dir` was started.
pub(crate) fn kept_options(dir: &Path) -> Result<Option<Any>> {
    match std::fs::read(dir.join(OPTIONS)) {
        Ok(bytes) => Ok(Some(Any::parse_from_bytes(&bytes)?)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).context("read the runtime's options"),
    }
}

/// A PID that was written to a file.
fn read_pid(file: &Path) -> Option<i32> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}
