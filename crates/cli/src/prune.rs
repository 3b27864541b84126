//! What is no longer needed: `walnut container|image|volume|system prune`, and what all of
//! it takes: `walnut system df`.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    os::unix::fs::MetadataExt,
    path::Path,
};

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use walnut_image::Store;
use walnut_sandbox::{Journal, Layout, NamedVolumes, Record, Status, list};

use crate::{
    filter::Filter,
    format::{List, ListFormat, row},
    images, output,
    signal::remove_ended,
    values::Moment,
    volume::{self, VolumePruneArgs},
};

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Do not ask
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Those alone that fit: label[=VALUE], until=24h (made before)
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) filter: Vec<Filter>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ContainerCommand {
    /// Remove containers that have ended
    Prune(PruneArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Remove images
    Prune(ImagePruneArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ImagePruneArgs {
    /// All that no container is made of, and not only what has no name
    #[arg(short, long)]
    all: bool,
    #[command(flatten)]
    prune: PruneArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SystemCommand {
    /// Show what the disk is used for
    Df(DfArgs),
    /// Remove containers that have ended, and images without names
    Prune(SystemPruneArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DfArgs {
    /// How to show it: table, json, a Go template, or a table of one
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: ListFormat,
}

#[derive(Debug, Args)]
pub(crate) struct SystemPruneArgs {
    /// Images that no container is made of too
    #[arg(short, long)]
    all: bool,
    /// Volumes without names too
    #[arg(long)]
    volumes: bool,
    #[command(flatten)]
    prune: PruneArgs,
}

impl PruneArgs {
    /// Asks whether it is meant.
    fn agreed(&self, what: &str) -> Result<bool> {
        if self.force {
            return Ok(true);
        }
        if !io::stdin().is_terminal() {
            bail!("this removes {what}; add -f to say that it is meant");
        }
        eprint!("This removes {what}. Go on? [y/N] ");
        io::stderr().flush()?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
    }

    fn check(&self) -> Result<()> {
        self.filter
            .iter()
            .try_for_each(|f| f.check(&["label", "until"]))
    }

    /// Whether something with these labels, made then, is meant.
    fn fits(&self, labels: &std::collections::BTreeMap<String, String>, made: i64) -> Result<bool> {
        for filter in &self.filter {
            let fits = match filter.name.as_str() {
                "label" => filter.fits_labels(labels),
                _ => match filter.value.parse::<Moment>() {
                    Ok(Moment(until)) => made < until,
                    Err(e) => bail!("--filter until={}: {e}", filter.value),
                },
            };
            if !fits {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Says how much was given back.
fn total(freed: u64) {
    println!("Total reclaimed space: {}", output::bytes(freed));
}

pub(crate) async fn container(command: ContainerCommand) -> Result<u8> {
    let ContainerCommand::Prune(args) = command;
    args.check()?;
    if !args.agreed("all containers that have ended")? {
        return Ok(1);
    }
    let layout = Layout::from_env()?;
    total(containers(&layout, &args).await?);
    Ok(0)
}

async fn containers(layout: &Layout, args: &PruneArgs) -> Result<u64> {
    let mut freed = 0;
    for record in list(layout)? {
        let rests = record.status == Status::Exited || record.at_rest();
        if !rests || !args.fits(&record.terms.labels, record.created_at)? {
            continue;
        }
        let size = disk_use(&layout.container(&record.id));
        // One that somebody starts this moment stays.
        match remove_ended(layout, &record, false).await {
            Ok(()) => {
                println!("{}", record.id);
                freed += size;
            }
            Err(e) => tracing::debug!("{e:#}"),
        }
    }
    Ok(freed)
}

pub(crate) fn image(command: ImageCommand) -> Result<u8> {
    let ImageCommand::Prune(args) = command;
    args.prune.check()?;
    let what = match args.all {
        true => "all images that no container is made of",
        false => "all images without a name",
    };
    if !args.prune.agreed(what)? {
        return Ok(1);
    }
    let layout = Layout::from_env()?;
    total(prune_images(&layout, args.all, &args.prune)?);
    Ok(0)
}

fn prune_images(layout: &Layout, all: bool, args: &PruneArgs) -> Result<u64> {
    let store = Store::open(layout.images())?;
    let containers = list(layout)?;
    let mut freed = store.sweep()?;
    for image in store.list()? {
        let labels = image
            .config
            .config()
            .as_ref()
            .and_then(|c| c.labels().clone());
        let created = image.created.as_deref();
        let created = created
            .and_then(|text| text.parse().ok())
            .unwrap_or(Moment(0));
        let meant = args.fits(&labels.unwrap_or_default().into_iter().collect(), created.0)?;
        // Saved containers are somebody's work, and are removed by name alone.
        if !all || !meant || image.checkpoint.is_some() || !images::is_unused(&containers, &image) {
            continue;
        }
        let removed = store.remove(&image.id.to_string())?;
        for name in &removed.names {
            Journal::new(&layout.state).other("image", name, "delete");
            println!("{name}");
        }
        freed += removed.freed;
    }
    Ok(freed)
}

/// `walnut volume prune`.
pub(crate) fn volumes(layout: &Layout, args: &VolumePruneArgs) -> Result<u8> {
    args.prune.check()?;
    let what = match args.all {
        true => "all volumes that no container has, with what is in them",
        false => "all volumes without a name that no container has",
    };
    if !args.prune.agreed(what)? {
        return Ok(1);
    }
    total(prune_volumes(layout, args.all, &args.prune)?);
    Ok(0)
}

fn prune_volumes(layout: &Layout, all: bool, args: &PruneArgs) -> Result<u64> {
    let volumes = NamedVolumes::new(layout);
    let used = volume::used(layout)?;
    let mut freed = 0;
    for record in volumes.list()? {
        let meant = args.fits(&record.labels, record.created_at)?;
        if !meant || used.contains(&record.name) || !(all || record.anonymous) {
            continue;
        }
        let size = volumes.size(&record.name);
        match volumes.remove(layout, &record.name) {
            Ok(_) => {
                Journal::new(&layout.state).other("volume", &record.name, "destroy");
                println!("{}", record.name);
                freed += size;
            }
            Err(e) => tracing::debug!("{e}"),
        }
    }
    Ok(freed)
}

pub(crate) async fn system(command: SystemCommand) -> Result<u8> {
    let layout = Layout::from_env()?;
    let args = match command {
        SystemCommand::Df(args) => return df(&layout, &args),
        SystemCommand::Prune(args) => args,
    };
    args.prune.check()?;
    let images = match args.all {
        true => "all images that no container is made of",
        false => "all images without a name",
    };
    let mut what = format!("all containers that have ended, {images}");
    if args.volumes {
        what += ", all volumes without a name that no container has";
    }
    if !args.prune.agreed(&what)? {
        return Ok(1);
    }
    let mut freed = containers(&layout, &args.prune).await?;
    freed += prune_images(&layout, args.all, &args.prune)?;
    if args.volumes {
        freed += prune_volumes(&layout, false, &args.prune)?;
    }
    total(freed);
    Ok(0)
}

/// Bytes of the blocks that a directory takes, with all that is in it.
fn disk_use(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let of = |entry: fs::DirEntry| {
        let Ok(meta) = entry.metadata() else { return 0 };
        let below = if meta.is_dir() {
            disk_use(&entry.path())
        } else {
            0
        };
        meta.blocks() * 512 + below
    };
    entries.map(of).sum()
}

/// A kind of things, and what it takes.
struct Usage {
    kind: &'static str,
    count: usize,
    active: usize,
    size: u64,
    free: u64,
}

fn df(layout: &Layout, args: &DfArgs) -> Result<u8> {
    let containers = list(layout)?;
    let usages = [
        images_use(layout, &containers)?,
        containers_use(layout, &containers),
        volumes_use(layout)?,
        Usage {
            kind: "Templates",
            count: fs::read_dir(layout.state.join("templates")).map_or(0, Iterator::count),
            active: 0,
            size: disk_use(&layout.state.join("templates")),
            free: 0,
        },
    ];
    let rows: Vec<_> = usages
        .iter()
        .map(|u| {
            let percent = (u.free * 100).checked_div(u.size).unwrap_or(0);
            row(json!({
                "Type": u.kind,
                "TotalCount": u.count.to_string(),
                "Active": u.active.to_string(),
                "Size": output::bytes(u.size),
                "Reclaimable": format!("{} ({percent}%)", output::bytes(u.free)),
            }))
        })
        .collect();
    let list = List {
        fields: &[
            ("Type", "TYPE"),
            ("TotalCount", "TOTAL"),
            ("Active", "ACTIVE"),
            ("Size", "SIZE"),
            ("Reclaimable", "RECLAIMABLE"),
        ],
        columns: &["Type", "TotalCount", "Active", "Size", "Reclaimable"],
    };
    let json = || {
        let of = |u: &Usage| json!({ "type": u.kind, "count": u.count, "active": u.active, "size": u.size, "reclaimable": u.free });
        Ok(usages.iter().map(of).collect::<Vec<Value>>().into())
    };
    list.show(&args.format, &rows, json)?;
    Ok(0)
}

fn images_use(layout: &Layout, containers: &[Record]) -> Result<Usage> {
    let images = Store::open(layout.images())?.list()?;
    let (mut active, mut free) = (0, 0);
    for image in &images {
        match images::is_unused(containers, image) {
            // Two may share one file: what one gives back, it gives back with the other.
            true => free += image.size,
            false => active += 1,
        }
    }
    let size = disk_use(&layout.images());
    Ok(Usage {
        kind: "Images",
        count: images.len(),
        active,
        size,
        free: free.min(size),
    })
}

fn containers_use(layout: &Layout, containers: &[Record]) -> Usage {
    let (mut active, mut size, mut free) = (0, 0, 0);
    for record in containers {
        let used = disk_use(&layout.container(&record.id));
        size += used;
        match record.status == Status::Exited || record.at_rest() {
            true => free += used,
            false => active += 1,
        }
    }
    Usage {
        kind: "Containers",
        count: containers.len(),
        active,
        size,
        free,
    }
}

fn volumes_use(layout: &Layout) -> Result<Usage> {
    let volumes = NamedVolumes::new(layout);
    let used = volume::used(layout)?;
    let all = volumes.list()?;
    let (mut active, mut size, mut free) = (0, 0, 0);
    for volume in &all {
        let bytes = volumes.size(&volume.name);
        size += bytes;
        match used.contains(&volume.name) {
            true => active += 1,
            false => free += bytes,
        }
    }
    Ok(Usage {
        kind: "Volumes",
        count: all.len(),
        active,
        size,
        free,
    })
}
