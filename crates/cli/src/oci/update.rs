//! `walnut-oci update`.

use std::{
    io::{self, Read},
    path::Path,
};

use anyhow::{Context as _, Result};
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use super::{args::Update, bundle, context::Context};

/// Most that is read of the standard input.
const INPUT_MAX: u64 = 1 << 20;

pub(super) async fn update(context: &Context, args: &Update) -> Result<()> {
    let state = context.bundles.find(&args.id)?;
    let resources = match &args.resources {
        Some(file) if file == Path::new("-") => {
            let mut bytes = Vec::new();
            let input = io::stdin().take(INPUT_MAX).read_to_end(&mut bytes);
            input.context("read the standard input")?;
            bytes
        }
        Some(file) => bundle::read(file)?,
        None => serde_json::to_vec(&resources(args))?,
    };
    // In the caller's words if it is none.
    let _: LinuxResources = serde_json::from_slice(&resources).context("read the resources")?;
    let supervisor = context.supervisor(&state).await?;
    supervisor.limit(resources).await
}

/// OCI runtime-spec "linux.resources", of what was given.
fn resources(args: &Update) -> Value {
    let mut resources = Map::new();
    let mut set = |group: &str, name: &str, value: Option<Value>| {
        if let Some(value) = value {
            let group = resources.entry(group).or_insert_with(|| json!({}));
            group[name] = value;
        }
    };
    set("blockIO", "weight", args.blkio_weight.map(Value::from));
    set("cpu", "period", args.cpu_period.map(Value::from));
    set("cpu", "quota", args.cpu_quota.map(Value::from));
    set("cpu", "shares", args.cpu_share.map(Value::from));
    set("memory", "limit", args.memory.map(Value::from));
    set(
        "memory",
        "reservation",
        args.memory_reservation.map(Value::from),
    );
    set("memory", "swap", args.memory_swap.map(Value::from));
    set("pids", "limit", args.pids_limit.map(Value::from));
    Value::Object(resources)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::args::{Command, Oci};
    use clap::Parser;

    #[test]
    fn only_what_was_given_is_changed() {
        let line = "walnut-oci update --memory 1048576 --memory-swap -1 --cpu-quota 5 c";
        let Command::Update(args) = Oci::parse_from(line.split(' ')).command else {
            unreachable!("update is a command");
        };
        assert_eq!(
            resources(&args),
            json!({"memory": {"limit": 1_048_576, "swap": -1}, "cpu": {"quota": 5}})
        );
    }
}
