//! `walnut volume`.

use std::collections::BTreeMap;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use walnut_sandbox::{Error, Journal, Layout, NamedVolumes, VolumeRecord, list};

use crate::{
    create::new_id,
    filter::Filter,
    format::{List, ListFormat, Template, row},
    inspect,
    prune::{self, PruneArgs},
    spec::LabelArg,
};

/// Volumes are directories of this host's, that containers see by virtio-fs (`-v NAME:/path`),
/// and that outlive them.
#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// List volumes
    #[command(visible_alias = "list")]
    Ls(VolumeLsArgs),
    /// Make a volume, and print its name
    Create(VolumeCreateArgs),
    /// Show all that is known of volumes, as JSON
    Inspect(VolumeInspectArgs),
    /// Remove volumes that no container has
    #[command(visible_alias = "remove")]
    Rm(VolumeRmArgs),
    /// Remove volumes without names that no container has
    Prune(VolumePruneArgs),
}

#[derive(Debug, Args)]
pub(crate) struct VolumeLsArgs {
    /// Show names alone
    #[arg(short, long)]
    quiet: bool,
    /// Show those alone that fit: name, label[=VALUE], dangling=true|false
    #[arg(short, long, value_name = "NAME=VALUE")]
    filter: Vec<Filter>,
    /// How to show them: table, json, a Go template, or a table of one
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: ListFormat,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut volume create db
  walnut run -d -v db:/var/lib/data redis

A new volume is empty: what an image has at its place is not copied into it.")]
pub(crate) struct VolumeCreateArgs {
    /// Driver: local is the only one
    #[arg(short, long, value_parser = ["local"], default_value = "local")]
    driver: String,
    /// Put a word on it
    #[arg(long, value_name = "NAME[=VALUE]")]
    label: Vec<LabelArg>,
    /// Its name [default: a random one]
    name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct VolumeInspectArgs {
    /// Show it by a Go template
    #[arg(short, long, value_name = "TEMPLATE")]
    format: Option<Template>,
    /// Volumes, by name
    #[arg(required = true)]
    volumes: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct VolumeRmArgs {
    /// Say nothing of those that are not there
    #[arg(short, long)]
    force: bool,
    /// Volumes, by name
    #[arg(required = true)]
    volumes: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct VolumePruneArgs {
    /// Those with names too
    #[arg(short, long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) prune: PruneArgs,
}

pub(crate) fn volume(command: VolumeCommand) -> Result<u8> {
    let layout = Layout::from_env()?;
    let volumes = NamedVolumes::new(&layout);
    match command {
        VolumeCommand::Ls(args) => ls(&layout, &volumes, &args),
        VolumeCommand::Create(args) => create(&layout, &volumes, args),
        VolumeCommand::Inspect(args) => {
            let of = |name: &String| Ok(inspect::volume(&volumes, &volumes.find(name)?));
            inspect::show(args.volumes.iter().map(of), args.format.as_ref())
        }
        VolumeCommand::Rm(args) => rm(&layout, &volumes, &args),
        VolumeCommand::Prune(args) => prune::volumes(&layout, &args),
    }
}

fn create(layout: &Layout, volumes: &NamedVolumes, args: VolumeCreateArgs) -> Result<u8> {
    let anonymous = args.name.is_none();
    let name = args.name.map_or_else(new_id, Ok)?;
    let labels = args
        .label
        .into_iter()
        .map(|LabelArg(name, value)| (name, value));
    let (record, new) = volumes.ensure(&name, labels.collect::<BTreeMap<_, _>>(), anonymous)?;
    if new {
        Journal::new(&layout.state).other("volume", &name, "create");
    }
    println!("{}", record.name);
    Ok(0)
}

/// Names of volumes that containers have.
pub(crate) fn used(layout: &Layout) -> Result<Vec<String>> {
    let containers = list(layout)?;
    let of = |r: walnut_sandbox::Record| r.terms.volumes.into_iter().map(|v| v.name);
    Ok(containers.into_iter().flat_map(of).collect())
}

fn ls(layout: &Layout, volumes: &NamedVolumes, args: &VolumeLsArgs) -> Result<u8> {
    let mut all = volumes.list()?;
    let used = used(layout)?;
    for filter in &args.filter {
        filter.check(&["name", "label", "dangling", "driver"])?;
        all.retain(|v| fits(v, &used, filter));
    }
    if args.quiet {
        all.iter().for_each(|v| println!("{}", v.name));
        return Ok(0);
    }
    let shown = |v: &VolumeRecord| inspect::volume(volumes, v);
    let rows: Vec<_> = all
        .iter()
        .map(|v| {
            let mut shown = shown(v);
            let labels: Vec<_> = v.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
            shown["Labels"] = json!(labels.join(","));
            shown["Links"] = json!(used.iter().filter(|name| **name == v.name).count());
            row(shown)
        })
        .collect();
    let list = List {
        fields: &[
            ("Driver", "DRIVER"),
            ("Name", "VOLUME NAME"),
            ("Scope", "SCOPE"),
            ("Mountpoint", "MOUNTPOINT"),
            ("Labels", "LABELS"),
            ("Links", "LINKS"),
            ("CreatedAt", "CREATED"),
        ],
        columns: &["Driver", "Name"],
    };
    let json = || Ok(all.iter().map(shown).collect::<Vec<Value>>().into());
    list.show(&args.format, &rows, json)?;
    Ok(0)
}

fn fits(volume: &VolumeRecord, used: &[String], filter: &Filter) -> bool {
    match filter.name.as_str() {
        "name" => filter.any(|value| volume.name.contains(value)),
        "label" => filter.fits_labels(&volume.labels),
        "driver" => filter.value == "local",
        _ => (filter.value == "true") != used.contains(&volume.name),
    }
}

fn rm(layout: &Layout, volumes: &NamedVolumes, args: &VolumeRmArgs) -> Result<u8> {
    let mut code = 0;
    for name in &args.volumes {
        let removed = volumes
            .find(name)
            .and_then(|_| volumes.remove(layout, name));
        match removed {
            Ok(_) => {
                Journal::new(&layout.state).other("volume", name, "destroy");
                println!("{name}");
            }
            Err(Error::NotFound(_)) if args.force => {}
            Err(e) => {
                eprintln!("walnut: {e}");
                code = 1;
            }
        }
    }
    Ok(code)
}
