//! What every command needs.

use std::{env, path::PathBuf};

use anyhow::{Context as _, Result, bail};
use walnut_sandbox::{BundleState, BundleStatus, Bundles, Error, Layout};

use super::args::Global;
use crate::client::Supervisor;

const ROOT: &str = "/run/walnut-oci";

/// The containers below a root.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) bundles: Bundles,
}

impl Context {
    pub(super) fn open(global: &Global) -> Result<Self> {
        let root = match &global.root {
            Some(root) => root.clone(),
            None if nix::unistd::geteuid().is_root() => ROOT.into(),
            None => env::var_os("XDG_RUNTIME_DIR")
                .map(|dir| PathBuf::from(dir).join("walnut-oci"))
                .context("find the root: give --root or set XDG_RUNTIME_DIR")?,
        };
        let layout = Layout::from_env()?;
        Ok(Self {
            bundles: Bundles::open(&root, &layout.run)?,
        })
    }

    /// A container's supervisor. In the words that runc has for it if there is none.
    pub(super) async fn supervisor(&self, state: &BundleState) -> Result<Supervisor> {
        let stopped = || Error::WrongState("container not running".into());
        if state.status == BundleStatus::Stopped {
            bail!(stopped());
        }
        let supervisor = Supervisor::at(&state.socket(), &state.id).await;
        Ok(supervisor.map_err(|_| stopped())?)
    }
}
