//! `walnut kill`, `stop` and `rm`.

use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use tokio::time::timeout;
use walnut_sandbox::{Error, Layout, Lock, Record, Status, find, remove};

use crate::{
    args::{KillArgs, RmArgs, StopArgs},
    client::{Supervisor, gone},
    create::find_live,
    values,
};

const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;
/// Longest a guest may take to die of SIGKILL before its machine is stopped.
const KILL_GRACE: Duration = Duration::from_secs(10);

pub(crate) async fn kill(args: KillArgs) -> Result<u8> {
    let signal = values::signal(&args.signal).map_err(|e| anyhow!("{e}"))?;
    let layout = Layout::from_env()?;
    each(&args.containers, async |name| {
        let record = find_live(&layout, name)?;
        let supervisor = Supervisor::connect(&layout, &record).await?;
        supervisor.kill("", signal).await
    })
    .await
}

pub(crate) async fn stop(args: StopArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    each(&args.containers, async |name| {
        let record = find(&layout, name)?;
        if record.status == Status::Exited {
            return Ok(());
        }
        end(&layout, &record, Duration::from_secs(args.time)).await
    })
    .await
}

pub(crate) async fn rm(args: RmArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    each(&args.containers, async |name| {
        let record = find(&layout, name)?;
        if record.status != Status::Exited {
            if !args.force {
                bail!(Error::WrongState(format!(
                    "container {} is {}; stop it first, or use -f",
                    record.name,
                    record.status.as_str()
                )));
            }
            end(&layout, &record, Duration::ZERO).await?;
        }
        let lock = layout.container(&record.id).join("lock");
        if !lock.exists() {
            // `--rm` was quicker.
            return Ok(());
        }
        // Its supervisor may be at its last steps.
        gone(&layout, &record.id).await?;
        let Some(lock) = Lock::try_take(&lock)? else {
            bail!("container {} is being looked at; try again", record.name);
        };
        Ok(remove(&layout, &record.id, &lock)?)
    })
    .await
}

/// Asks, then kills, then pulls the plug; returns when nothing is left.
async fn end(layout: &Layout, record: &Record, grace: Duration) -> Result<()> {
    let Ok(supervisor) = Supervisor::connect(layout, record).await else {
        return gone(layout, &record.id).await;
    };
    let asks = record.stop_signal.unwrap_or(SIGTERM);
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
