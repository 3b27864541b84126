//! `walnut checkpoint` and `walnut fork`.

use std::path::Path;

use anyhow::{Context, Result};
use chrono::{DateTime, SecondsFormat};
use walnut_image::{Reference, Store};
use walnut_sandbox::{Checkpoint, CheckpointOptions, Drafts, Layout, Record};

use crate::{
    args::{CheckpointArgs, ContainerArgs, ForkArgs},
    client::{self, Supervisor},
    create::{NewContainer, find_live},
    detach::DetachKeys,
    run::{self, Front, Source},
    saved,
};

pub(crate) async fn checkpoint(args: CheckpointArgs) -> Result<u8> {
    let name: Reference = args.image.parse()?;
    let layout = Layout::from_env()?;
    let store = Store::open(layout.images())?;
    let record = find_live(&layout, &args.container)?;
    let draft = Drafts::new(&layout.state).begin()?;
    let options = CheckpointOptions {
        exit: args.stop,
        lasting: true,
    };
    save(&layout, &record, draft.path(), options).await?;
    let saved = Checkpoint::load(draft.path())?;
    let created = DateTime::from_timestamp_nanos(saved.created_at);
    let created = created.to_rfc3339_opts(SecondsFormat::Secs, true);
    let image = store
        .add_checkpoint(&name, draft.path(), saved.rootfs(), created)
        .await
        .context("keep the checkpoint")?;
    if args.stop {
        client::gone(&layout, &record.id).await?;
    }
    println!("{}", image.id);
    Ok(0)
}

pub(crate) async fn fork(args: ForkArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let store = Store::open(layout.images())?;
    let record = find_live(&layout, &args.container)?;
    let draft = Drafts::new(&layout.state).begin()?;
    save(&layout, &record, draft.path(), CheckpointOptions::default()).await?;
    let saved = Checkpoint::load(draft.path())?;
    let run = ContainerArgs {
        interactive: args.interactive,
        tty: saved.container.terminal,
        rm: args.rm,
        name: args.name,
        hostname: args.hostname,
        cidfile: args.cidfile,
        ..ContainerArgs::default()
    };
    saved::check(&run, &saved)?;
    let lease = store.lease(saved.rootfs()).context("use the image")?;
    let source = Source {
        rootfs: saved.rootfs().to_owned(),
        checkpoint: Some(draft.path().to_owned()),
        draft: Some(draft),
    };
    let container = NewContainer::go_on(&layout, &run, &saved, lease, record.image)?;
    let front = Front {
        detach: args.detach,
        output: true,
        stdin: run.interactive,
        keys: DetachKeys::default(),
        stays: false,
    };
    front.check(run.tty)?;
    run::write_cidfile(&run, &container.record.id)?;
    run::start(&layout, front, container, source).await
}

/// Has the supervisor save its container.
async fn save(
    layout: &Layout,
    record: &Record,
    to: &Path,
    options: CheckpointOptions,
) -> Result<()> {
    let supervisor = Supervisor::connect(layout, record).await?;
    supervisor.checkpoint(to, options).await
}
