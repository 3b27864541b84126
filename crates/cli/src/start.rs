//! `walnut start`.

use anyhow::{Result, bail};
use clap::Args;
use walnut_image::Store;
use walnut_sandbox::{Error, Layout, Record, RestartPolicy, Status, find, list};

use crate::{
    args::KeysArgs,
    client,
    create::{NewContainer, check_outlived},
    detach::DetachKeys,
    run::{self, Front, Source},
    signal::each,
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut start web
  walnut start -a -i shell                   # its input, output and exit code are here
  walnut start --boot                        # what its restart policies want when the node begins

A container begins anew: what it wrote to its root file system has gone with its machine, what it
wrote to its volumes is there.")]
pub(crate) struct StartArgs {
    /// Show its output, pass signals on, and end as it ends
    #[arg(short, long)]
    pub(crate) attach: bool,
    /// Connect standard input, if the container was made with -i
    #[arg(short, long)]
    pub(crate) interactive: bool,
    #[command(flatten)]
    pub(crate) keys: KeysArgs,
    /// Start all whose restart policy wants it; for a unit of systemd's
    #[arg(long, conflicts_with_all = ["attach", "interactive", "containers"])]
    pub(crate) boot: bool,
    /// Containers, by name or ID
    #[arg(required_unless_present = "boot")]
    pub(crate) containers: Vec<String>,
}

pub(crate) async fn start(args: StartArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let store = Store::open(layout.images())?;
    let front = args.attach || args.interactive;
    if let (true, [name]) = (front, args.containers.as_slice()) {
        let record = find(&layout, name)?;
        check(&record)?;
        let front = Front {
            detach: false,
            output: true,
            stdin: args.interactive && record.terms.stdin,
            keys: args.keys.detach_keys,
            stays: true,
        };
        front.check(record.terminal)?;
        return again(&layout, &store, &record, front).await;
    }
    if front {
        bail!("start -a and -i: one container at a time");
    }
    let names: Vec<String> = match args.boot {
        true => {
            let all = list(&layout)?;
            all.iter()
                .filter(|r| wants(r))
                .map(|r| r.name.clone())
                .collect()
        }
        false => args.containers,
    };
    each(&names, async |name| {
        let record = find(&layout, name)?;
        if matches!(record.status, Status::Running | Status::Restarting) {
            // It is what was wanted.
            return Ok(());
        }
        behind(&layout, &store, &record).await
    })
    .await
}

/// Whether a container is started when its node begins.
fn wants(record: &Record) -> bool {
    let failed = record.exit_code != Some(0);
    record.status == Status::Exited
        && match record.terms.restart {
            RestartPolicy::No => false,
            RestartPolicy::OnFailure(_) => failed && !record.stopped,
            RestartPolicy::UnlessStopped => !record.stopped,
            RestartPolicy::Always => true,
        }
}

/// Starts a container behind.
pub(crate) async fn behind(layout: &Layout, store: &Store, record: &Record) -> Result<()> {
    check(record)?;
    let front = Front {
        detach: false,
        output: false,
        stdin: false,
        keys: DetachKeys::default(),
        stays: true,
    };
    again(layout, store, record, front).await.map(drop)
}

fn check(record: &Record) -> Result<()> {
    if record.status == Status::Exited || record.at_rest() {
        return Ok(());
    }
    let state = record.status.as_str();
    let hint = match record.status {
        Status::Paused => "; `walnut unpause` lets it go on",
        Status::Running => "; `walnut attach` connects to it",
        _ => "",
    };
    bail!(Error::WrongState(format!(
        "container {} is {state}{hint}",
        record.name
    )))
}

async fn again(layout: &Layout, store: &Store, record: &Record, front: Front) -> Result<u8> {
    // Its last supervisor may be at its last steps.
    client::gone(layout, &record.id).await?;
    check_outlived(layout, record)?;
    let made = NewContainer::again(layout, store, record)?;
    let Some(rootfs) = made.record.terms.rootfs.clone() else {
        bail!("start {}: it has no image", record.name);
    };
    let source = Source {
        rootfs,
        checkpoint: None,
        draft: None,
    };
    run::start(layout, front, made, source).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_started_when_a_node_begins() {
        let record = |policy: RestartPolicy, code: u32, stopped: bool| {
            let text = format!(
                r#"{{"version":1,"id":"a","name":"n","image":{{"name":"i","id":"d"}},"command":[],
                "status":"exited","created_at":0,"auto_remove":false,"terminal":false,
                "exit_code":{code},"stopped":{stopped},"terms":{{"restart":"{policy}"}}}}"#
            );
            wants(&serde_json::from_str(&text).unwrap())
        };
        assert!(!record(RestartPolicy::No, 1, false));
        assert!(record(RestartPolicy::Always, 0, true));
        assert!(record(RestartPolicy::UnlessStopped, 0, false));
        assert!(!record(RestartPolicy::UnlessStopped, 0, true));
        assert!(record(RestartPolicy::OnFailure(None), 1, false));
        assert!(!record(RestartPolicy::OnFailure(None), 0, false));
    }
}
