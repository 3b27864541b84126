//! `walnut-oci state`, `list` and `ps`.

use std::io::{self, Write};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use walnut_sandbox::BundleState;

use super::{
    args::{Format, List, Ps},
    context::Context,
};
use crate::output;

/// A container as runc describes it.
fn described(state: &BundleState, owner: &str) -> Value {
    let mut described = json!({
        "ociVersion": state.oci_version,
        "id": state.id,
        "pid": state.pid,
        "status": state.status.as_str(),
        "bundle": state.bundle,
        "rootfs": state.rootfs,
        "created": state.created,
        "owner": owner,
    });
    if !state.annotations.is_empty() {
        described["annotations"] = json!(state.annotations);
    }
    described
}

pub(super) fn state(context: &Context, id: &str) -> Result<()> {
    let state = context.bundles.find(id)?;
    output::json(&described(&state, "")).context("print the state")
}

pub(super) fn list(context: &Context, args: &List) -> Result<()> {
    let states = context.bundles.list()?;
    if args.quiet {
        let mut out = io::stdout().lock();
        for state in &states {
            writeln!(out, "{}", state.id)?;
        }
        return Ok(());
    }
    let owner = |state: &BundleState| {
        let user = nix::unistd::User::from_uid(state.owner.into())
            .ok()
            .flatten();
        user.map_or_else(|| format!("#{}", state.owner), |user| user.name)
    };
    match args.format {
        Format::Json => {
            let all: Vec<_> = states.iter().map(|s| described(s, &owner(s))).collect();
            writeln!(io::stdout(), "{}", json!(all))?;
        }
        Format::Table => {
            let rows: Vec<_> = states
                .iter()
                .map(|state| {
                    [
                        state.id.clone(),
                        state.pid.to_string(),
                        state.status.as_str().to_owned(),
                        state.bundle.display().to_string(),
                        state.created.clone(),
                        owner(state),
                    ]
                })
                .collect();
            output::table(["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"], &rows)?;
        }
    }
    Ok(())
}

/// Processes by their numbers: those of the container's kernel for people, that of its
/// supervisor for programs, which look a number up on this host (`docker top`).
pub(super) async fn ps(context: &Context, args: &Ps) -> Result<()> {
    let state = context.bundles.find(&args.id)?;
    let supervisor = context.supervisor(&state).await?;
    if args.format == Format::Json {
        writeln!(io::stdout(), "{}", json!([state.pid]))?;
        return Ok(());
    }
    let processes = supervisor.processes().await?;
    let pids = processes.iter().map(|process| process.pid);
    output::table(
        ["PID"],
        &pids.map(|pid| [pid.to_string()]).collect::<Vec<_>>(),
    )?;
    Ok(())
}
