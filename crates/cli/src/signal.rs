//! `walnut kill`, `stop`, `restart`, `rm`, `pause`, `unpause` and `wait`.

use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use clap::Args;
use tokio::time::{sleep, timeout};
use walnut_image::Store;
use walnut_sandbox::{Error, Journal, Layout, Lock, NamedVolumes, Record, Status, find, remove};

use crate::{
    args::Containers,
    client::{Supervisor, gone},
    create::{check_outlived, find_live},
    start, values,
};

const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;
/// Longest a guest may take to die of SIGKILL before its machine is stopped.
const KILL_GRACE: Duration = Duration::from_secs(10);
/// Seconds between the stop signal and SIGKILL, where nobody has said.
const STOP_TIMEOUT: u64 = 10;
/// How often it is looked for who is not there yet.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Signal, by name or number
    #[arg(short, long, default_value = "KILL")]
    pub(crate) signal: String,
    /// Containers, by name or ID
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Seconds between the container's stop signal and SIGKILL; -1 for no end [default: the
    /// container's --stop-timeout, or 10]
    #[arg(short, long, visible_alias = "timeout", allow_hyphen_values = true)]
    pub(crate) time: Option<i64>,
    /// Signal to ask with, instead of the container's
    #[arg(short, long, value_name = "SIGNAL", value_parser = values::signal)]
    pub(crate) signal: Option<u32>,
    /// Containers, by name or ID
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "A container begins anew: what it wrote to its root file system is gone, what it
wrote to its volumes is there."
)]
pub(crate) struct RestartArgs {
    #[command(flatten)]
    pub(crate) stop: StopArgs,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Kill running ones first
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Remove their volumes too that have no name
    #[arg(short, long)]
    pub(crate) volumes: bool,
    /// Containers, by name or ID
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

pub(crate) async fn kill(args: KillArgs) -> Result<u8> {
    let signal = values::signal(&args.signal).map_err(|e| anyhow!("{e}"))?;
    let layout = Layout::from_env()?;
    each(&args.containers, async |name| {
        let record = find_live(&layout, name)?;
        if [SIGKILL, asks(&record)].contains(&signal) {
            // It is not to be started again.
            Record::change(&layout.container(&record.id), |r| r.stopped = true)?;
        }
        if record.status == Status::Restarting {
            return end(&layout, &record, None, None).await;
        }
        let supervisor = Supervisor::connect(&layout, &record).await?;
        supervisor.kill("", signal).await?;
        let more = [("signal", signal.to_string())];
        Journal::new(&layout.state).container(&record, "kill", &more);
        Ok(())
    })
    .await
}

/// How long a container is given.
fn grace(record: &Record, args: &StopArgs) -> Option<Duration> {
    let own = record.terms.stop_timeout.unwrap_or(STOP_TIMEOUT);
    match args.time {
        None => Some(Duration::from_secs(own)),
        Some(seconds) => u64::try_from(seconds).ok().map(Duration::from_secs),
    }
}

async fn stop_one(layout: &Layout, record: &Record, args: &StopArgs) -> Result<()> {
    if record.status == Status::Exited || record.at_rest() {
        return Ok(());
    }
    end(layout, record, grace(record, args), args.signal).await?;
    Journal::new(&layout.state).container(record, "stop", &[]);
    Ok(())
}

pub(crate) async fn stop(args: StopArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    each(&args.containers, async |name| {
        stop_one(&layout, &find(&layout, name)?, &args).await
    })
    .await
}

pub(crate) async fn restart(args: RestartArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let store = Store::open(layout.images())?;
    each(&args.stop.containers, async |name| {
        let record = find(&layout, name)?;
        if record.auto_remove {
            bail!(
                "restart {}: it goes when it ends (--rm); run its image again",
                record.name
            );
        }
        stop_one(&layout, &record, &args.stop).await?;
        start::behind(&layout, &store, &find(&layout, &record.id)?).await?;
        Journal::new(&layout.state).container(&record, "restart", &[]);
        Ok(())
    })
    .await
}

pub(crate) async fn pause(args: Containers) -> Result<u8> {
    freeze(&args.containers, true).await
}

pub(crate) async fn unpause(args: Containers) -> Result<u8> {
    freeze(&args.containers, false).await
}

async fn freeze(names: &[String], on: bool) -> Result<u8> {
    let layout = Layout::from_env()?;
    each(names, async |name| {
        let record = find_live(&layout, name)?;
        if (record.status == Status::Paused) == on {
            let is = if on { "paused already" } else { "not paused" };
            bail!(Error::WrongState(format!(
                "container {} is {is}",
                record.name
            )));
        }
        let supervisor = Supervisor::connect(&layout, &record).await?;
        supervisor.freeze(on).await
    })
    .await
}

/// `walnut wait`: prints exit codes, in the order of the names.
pub(crate) async fn wait(args: Containers) -> Result<u8> {
    let layout = Layout::from_env()?;
    let records: Result<Vec<_>, _> = args.containers.iter().map(|n| find(&layout, n)).collect();
    let records = records?;
    let codes = records.iter().map(|record| ended(&layout, &record.id));
    for code in futures::future::join_all(codes).await {
        println!("{}", code?);
    }
    Ok(0)
}

/// The exit code of a container, once it has ended and is not started again.
async fn ended(layout: &Layout, id: &str) -> Result<u32> {
    let mut last = None;
    loop {
        let record = match find(layout, id) {
            Ok(record) => record,
            // It went when it ended.
            Err(Error::NotFound(_)) if last.is_some() => return Ok(last.unwrap_or_default()),
            Err(e) => return Err(e.into()),
        };
        if record.status == Status::Exited {
            return Ok(record.exit_code.unwrap_or_default());
        }
        if let Ok(supervisor) = Supervisor::connect(layout, &record).await
            && let Ok(code) = supervisor.wait("").await
        {
            last = Some(u32::from(code));
        }
        sleep(LOOK).await;
    }
}

pub(crate) async fn rm(args: RmArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    each(&args.containers, async |name| {
        let record = match find(&layout, name) {
            // As in Docker, `-f` wants it gone, and it is.
            Err(e @ Error::NotFound(_)) if args.force => {
                eprintln!("walnut: {e}");
                return Ok(());
            }
            other => other?,
        };
        if record.status != Status::Exited && !record.at_rest() {
            if !args.force {
                bail!(Error::WrongState(format!(
                    "container {} is {}; stop it first, or use -f",
                    record.name,
                    record.status.as_str()
                )));
            }
            end(&layout, &record, Some(Duration::ZERO), None).await?;
        }
        remove_ended(&layout, &record, args.volumes).await
    })
    .await
}

/// Removes a container that has ended, and what is its alone.
pub(crate) async fn remove_ended(layout: &Layout, record: &Record, volumes: bool) -> Result<()> {
    let lock = layout.container(&record.id).join("lock");
    if !lock.exists() {
        // `--rm` was quicker.
        return Ok(());
    }
    // Its supervisor may be at its last steps.
    gone(layout, &record.id).await?;
    let Some(lock) = Lock::try_take(&lock)? else {
        check_outlived(layout, record)?;
        bail!("container {} is being looked at; try again", record.name);
    };
    remove(layout, &record.id, &lock)?;
    Journal::new(&layout.state).container(record, "destroy", &[]);
    if volumes {
        NamedVolumes::new(layout).remove_anonymous(layout, &record.terms.volumes);
    }
    Ok(())
}

/// The signal that it wants to be asked with.
fn asks(record: &Record) -> u32 {
    record.stop_signal.unwrap_or(SIGTERM)
}

/// Asks, then kills, then pulls the plug; returns when nothing is left. Without a `grace`
/// nobody is killed.
async fn end(
    layout: &Layout,
    record: &Record,
    grace: Option<Duration>,
    signal: Option<u32>,
) -> Result<()> {
    // Before anything is sent: what ends is not started again.
    let told = Record::change(&layout.container(&record.id), |r| r.stopped = true);
    let now = told.map_or(record.status, |record| record.status);
    let Ok(supervisor) = Supervisor::connect(layout, record).await else {
        return gone(layout, &record.id).await;
    };
    if now == Status::Restarting {
        // There is nothing that could be asked.
        let _ = supervisor.shutdown().await;
        return gone(layout, &record.id).await;
    }
    let asks = signal.unwrap_or_else(|| asks(record));
    let Some(grace) = grace else {
        supervisor.kill("", asks).await?;
        return gone(layout, &record.id).await;
    };
    for (signal, grace) in [(asks, grace), (SIGKILL, KILL_GRACE)] {
        if grace.is_zero() {
            continue;
        }
        // A frozen or broken guest answers late or never.
        let killed = timeout(grace, async {
            match supervisor.kill("", signal).await {
                Ok(()) => gone(layout, &record.id).await,
                Err(_) => std::future::pending().await,
            }
        });
        if let Ok(ended) = killed.await {
            return ended;
        }
    }
    let _ = supervisor.shutdown().await;
    gone(layout, &record.id).await
}

/// Does it for each container, prints the names of those done and the reasons of
/// those not.
pub(crate) async fn each(names: &[String], act: impl AsyncFn(&str) -> Result<()>) -> Result<u8> {
    let mut code = 0;
    for name in names {
        match act(name).await {
            Ok(()) => println!("{name}"),
            Err(e) => {
                eprintln!("walnut: {e:#}");
                code = 1;
            }
        }
    }
    Ok(code)
}
