//! `walnut update` and `walnut rename`.

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;
use walnut_sandbox::{
    Attachments, Error, Journal, Layout, Lock, Record, RestartPolicy, Status, find,
};

use crate::{
    client::Supervisor,
    create::{check_free, check_name},
    signal::each,
    spec,
    values::{Cpus, Size},
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut update -m 1g --cpus 2 web
  walnut update --restart unless-stopped web db

A machine of walnut-vmm's grows and shrinks with its container; one of QEMU's keeps its size, and its
container gets what is in it at most.")]
pub(crate) struct UpdateArgs {
    /// Memory the container may use (b, k, m, g)
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) memory: Option<Size>,
    /// Memory and swap together: the machine has no swap, so it is the same as --memory, or -1
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) memory_swap: Option<String>,
    /// CPUs the container may use, as 1.5
    #[arg(long, value_name = "NUMBER")]
    pub(crate) cpus: Option<Cpus>,
    /// Processes and threads it may have; -1 for any number
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pub(crate) pids_limit: Option<i64>,
    /// Start it again when it ends: no, on-failure[:NUMBER], always, unless-stopped
    #[arg(long, value_name = "POLICY")]
    pub(crate) restart: Option<RestartPolicy>,
    #[arg(long, hide = true)]
    cpuset_cpus: Option<String>,
    /// Containers, by name or ID
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RenameArgs {
    /// Container, by name or ID
    pub(crate) container: String,
    /// Its new name
    pub(crate) name: String,
}

pub(crate) async fn update(args: UpdateArgs) -> Result<u8> {
    if let Some(set) = &args.cpuset_cpus {
        bail!(
            "--cpuset-cpus {set}: the machine runs where it was started; make the container anew with it"
        );
    }
    spec::check_swap(args.memory_swap.as_deref(), args.memory)?;
    let resources = spec::resources(args.memory, args.cpus, args.pids_limit);
    let limits = resources.as_object().is_some_and(|r| !r.is_empty());
    if !limits && args.restart.is_none() && args.memory_swap.is_none() {
        bail!("update: say what; give --memory, --cpus, --pids-limit or --restart");
    }
    let layout = Layout::from_env()?;
    each(&args.containers, async |name| {
        let record = find(&layout, name)?;
        if limits {
            limit(&layout, &record, &resources).await?;
        }
        if let Some(policy) = args.restart {
            if record.auto_remove && policy != RestartPolicy::No {
                bail!(
                    "update {}: it goes when it ends (--rm), and cannot be started again",
                    record.name
                );
            }
            if record.terms.joins.is_some() && policy != RestartPolicy::No {
                bail!(
                    "update {}: the machine that it has joined may be gone when it ends; it cannot be started again by itself",
                    record.name
                );
            }
            Record::change(&layout.container(&record.id), |r| r.terms.restart = policy)?;
        }
        Journal::new(&layout.state).container(&record, "update", &[]);
        Ok(())
    })
    .await
}

/// Gives a container other limits: now, if it runs, and whenever it is started again.
async fn limit(layout: &Layout, record: &Record, resources: &Value) -> Result<()> {
    if record.status != Status::Exited && !record.at_rest() {
        let supervisor = Supervisor::connect(layout, record).await?;
        supervisor.limit(serde_json::to_vec(resources)?).await?;
    }
    let path = layout.container(&record.id).join("config.json");
    let bytes = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let mut spec: Value =
        serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))?;
    for (group, values) in resources.as_object().into_iter().flatten() {
        spec["linux"]["resources"][group] = values.clone();
    }
    let new = path.with_extension("json.new");
    std::fs::write(&new, serde_json::to_vec(&spec)?)
        .and_then(|()| std::fs::rename(&new, &path))
        .with_context(|| format!("write {}", path.display()))
}

pub(crate) fn rename(args: &RenameArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    check_name(&args.name)?;
    let record = find(&layout, &args.container)?;
    if record.name == args.name {
        bail!("rename {0}: that is its name already", record.name);
    }
    let dir = layout.container(&record.id);
    let rests = record.status == Status::Exited || record.at_rest();
    if !rests && Attachments::load(&dir)?.is_some() {
        bail!(Error::WrongState(format!(
            "rename {}: others find it by that name on its networks; stop it first",
            record.name
        )));
    }
    let _names = Lock::take(&layout.state.join("names.lock"))?;
    check_free(&layout, &args.name)?;
    Attachments::rename(&dir, &args.name)?;
    let renamed = Record::change(&dir, |r| r.name.clone_from(&args.name))?;
    let more = [("oldName", record.name)];
    Journal::new(&layout.state).container(&renamed, "rename", &more);
    Ok(0)
}
