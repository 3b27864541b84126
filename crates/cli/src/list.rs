//! `walnut ps` and `walnut version`.

use anyhow::{Result, anyhow, bail};
use clap::Args;
use serde::Serialize;
use serde_json::json;
use walnut_sandbox::{
    Attachments, HealthStatus, Layout, NetworkLink, PublishedPort, Record, Status, list, now_ns,
};

use crate::{
    args::{Format, FormatArgs},
    filter::Filter,
    format::{List, ListFormat, Row, row},
    network, output,
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut ps -a
  walnut ps --filter status=exited --filter label=tier=db -q
  walnut ps --format '{{.Names}}\\t{{.Status}}'
  walnut ps --format 'table {{.ID}}\\t{{.Image}}'

Filters: id, name, label[=VALUE], status, ancestor, volume, network, publish, exited, health, before,
since. Fields: ID, Names, Image, Command, CreatedAt, RunningFor, Status, State, Ports, Labels, Label NAME
(as {{index .LabelMap \"NAME\"}}), Networks, Mounts, Size.")]
pub(crate) struct PsArgs {
    /// Show ended containers too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Show IDs alone
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Show those alone that fit, as status=exited
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) filter: Vec<Filter>,
    /// Show the last ones that were made, whatever they do
    #[arg(short = 'n', long, value_name = "NUMBER")]
    pub(crate) last: Option<usize>,
    /// Show the last one
    #[arg(short, long, conflicts_with = "last")]
    pub(crate) latest: bool,
    /// Do not shorten IDs and commands
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// How to show them: table, json, a Go template, or a table of one
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    pub(crate) format: ListFormat,
}

const LIST: List<'_> = List {
    fields: &[
        ("ID", "CONTAINER ID"),
        ("Names", "NAME"),
        ("Image", "IMAGE"),
        ("Command", "COMMAND"),
        ("RunningFor", "CREATED"),
        ("CreatedAt", "CREATED AT"),
        ("Status", "STATUS"),
        ("State", "STATE"),
        ("Ports", "PORTS"),
        ("Labels", "LABELS"),
        ("Networks", "NETWORKS"),
        ("Mounts", "MOUNTS"),
    ],
    columns: &[
        "ID",
        "Image",
        "Command",
        "RunningFor",
        "Status",
        "Ports",
        "Names",
    ],
};

/// What filters of containers are called.
const FILTERS: [&str; 12] = [
    "id", "name", "label", "status", "ancestor", "volume", "network", "publish", "exited",
    "health", "before", "since",
];

pub(crate) fn ps(args: &PsArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let all = list(&layout)?;
    let asked = args.filter.iter().any(|f| f.name == "status");
    let last = args.last.or(args.latest.then_some(1));
    let shown = args.all || asked || last.is_some();
    let mut records = chosen(&layout, &all, &args.filter)?;
    records.retain(|r| shown || is_up(r));
    records.reverse();
    records.truncate(last.unwrap_or(usize::MAX));
    let name = |r: &Record| match args.no_trunc {
        true => r.id.clone(),
        false => r.short_id().to_owned(),
    };
    if args.quiet {
        records.iter().for_each(|r| println!("{}", name(r)));
        return Ok(0);
    }
    let networks = |r: &Record| Attachments::load(&layout.container(&r.id)).ok().flatten();
    let now = now_ns();
    let rows: Vec<_> = records
        .iter()
        .map(|r| shown_row(r, name(r), networks(r), args.no_trunc, now))
        .collect();
    let json = || {
        let shown = records.iter().map(|record| Shown {
            record,
            networks: networks(record).iter().flat_map(links).collect(),
            ports: networks(record).map(|n| n.ports).unwrap_or_default(),
        });
        Ok(serde_json::to_value(shown.collect::<Vec<_>>())?)
    };
    LIST.show(&args.format, &rows, json)?;
    Ok(0)
}

/// What is shown where nobody asks for all.
fn is_up(record: &Record) -> bool {
    record.status != Status::Exited && !record.at_rest()
}

/// The containers of a list that fit all filters.
pub(crate) fn chosen(layout: &Layout, all: &[Record], filters: &[Filter]) -> Result<Vec<Record>> {
    filters.iter().try_for_each(|f| f.check(&FILTERS))?;
    let mut chosen = Vec::new();
    for record in all {
        let mut all_fit = true;
        for filter in filters {
            // Filters of one name are alternatives, but for labels, which are had together.
            let same = |other: &&Filter| match filter.name.as_str() {
                "label" => *other == filter,
                name => other.name == name,
            };
            let mut one = false;
            for alternative in filters.iter().filter(same) {
                one |= fits(layout, all, record, alternative)?;
            }
            all_fit &= one;
        }
        if all_fit {
            chosen.push(record.clone());
        }
    }
    Ok(chosen)
}

fn fits(layout: &Layout, all: &[Record], record: &Record, filter: &Filter) -> Result<bool> {
    let value = filter.value.as_str();
    let made = |name: &str| {
        let other = all
            .iter()
            .find(|r| r.name == name || r.id.starts_with(name));
        other
            .map(|r| r.created_at)
            .ok_or_else(|| anyhow!("--filter {}={name}: no such container", filter.name))
    };
    let attachments = || {
        Attachments::load(&layout.container(&record.id))
            .ok()
            .flatten()
    };
    Ok(match filter.name.as_str() {
        "id" => filter.any(|value| record.id.starts_with(value)),
        "name" => filter.any(|value| record.name.contains(value.trim_start_matches('/'))),
        "label" => filter.fits_labels(&record.terms.labels),
        "status" => {
            let known = [
                "creating",
                "created",
                "running",
                "paused",
                "restarting",
                "exited",
                "removing",
                "dead",
            ];
            if let Some(odd) = filter.values().find(|v| !known.contains(v)) {
                bail!("--filter status={odd}: use one of {}", known.join(", "));
            }
            filter.any(|value| record.status.as_str() == value)
        }
        "ancestor" => filter.any(|value| {
            let hex = record.image.id.trim_start_matches("sha256:");
            let tagged = format!("{value}:latest");
            record.image.name == value || record.image.name == tagged || hex.starts_with(value)
        }),
        "volume" => filter.any(|value| {
            let volumes = record.terms.volumes.iter();
            volumes.clone().any(|v| v.name == value) || {
                let target = std::path::Path::new(value);
                volumes.clone().any(|v| v.target == target)
            }
        }),
        "network" => {
            let links = attachments().map(|a| a.links).unwrap_or_default();
            filter.any(|value| links.iter().any(|link| link.network() == value))
        }
        "publish" => {
            let ports = attachments().map(|a| a.ports).unwrap_or_default();
            filter.any(|value| {
                let port = value.split('/').next().unwrap_or_default();
                ports.iter().any(|p| p.host_port.to_string() == port)
            })
        }
        "exited" => filter.any(|value| {
            record.status == Status::Exited
                && record
                    .exit_code
                    .is_some_and(|code| code.to_string() == value)
        }),
        "health" => filter.any(|value| {
            let health = record.health.as_ref().map_or("none", |h| h.status.as_str());
            health == value
        }),
        "before" => record.created_at < made(value)?,
        "since" => record.created_at > made(value)?,
        _ => true,
    })
}

fn shown_row(
    r: &Record,
    id: String,
    attachments: Option<Attachments>,
    whole: bool,
    now: i64,
) -> Row {
    let command = r.command.join(" ");
    let labels: Vec<_> = r
        .terms
        .labels
        .iter()
        .map(|(k, v)| format!("{k}={v}"))
        .collect();
    let networks: Vec<_> = attachments
        .iter()
        .flat_map(|a| a.links.iter().map(|l| l.network().to_owned()))
        .collect();
    let mounts: Vec<_> = r.terms.volumes.iter().map(|v| v.name.as_str()).collect();
    row(json!({
        "ID": id,
        "Names": r.name,
        "Image": r.image.name,
        "Command": cut(&command, if whole { usize::MAX } else { 30 }),
        "CreatedAt": output::time(r.created_at),
        "RunningFor": format!("{} ago", output::ago(r.created_at, now)),
        "Status": status(r, now),
        "State": r.status.as_str(),
        "Ports": ports(attachments),
        "Labels": labels.join(","),
        "LabelMap": r.terms.labels,
        "Networks": networks.join(","),
        "Mounts": mounts.join(","),
    }))
}

/// A container as programs see it.
#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    record: &'a Record,
    networks: Vec<Link>,
    ports: Vec<PublishedPort>,
}

/// A link of its to a network.
#[derive(Serialize)]
struct Link {
    network: String,
    interface: String,
    addresses: Vec<String>,
}

fn links(attachments: &Attachments) -> Vec<Link> {
    let shown = |link: &NetworkLink| Link {
        network: link.network().to_owned(),
        interface: link.interface.clone(),
        addresses: link.made().ips.into_iter().map(|ip| ip.address).collect(),
    };
    attachments.links.iter().map(shown).collect()
}

fn ports(attachments: Option<Attachments>) -> String {
    let ports = attachments.map(|a| a.ports).unwrap_or_default();
    let shown: Vec<_> = ports.iter().map(network::shown).collect();
    shown.join(", ")
}

fn status(record: &Record, now: i64) -> String {
    let health = match record.health.as_ref().map(|h| h.status) {
        Some(HealthStatus::Starting) => " (health: starting)",
        Some(HealthStatus::Healthy) => " (healthy)",
        Some(HealthStatus::Unhealthy) => " (unhealthy)",
        None => "",
    };
    match (record.status, record.started_at, record.finished_at) {
        (Status::Running, Some(then), _) => format!("up {}{health}", output::ago(then, now)),
        (Status::Paused, Some(then), _) => format!("up {} (paused)", output::ago(then, now)),
        (Status::Restarting, ..) => {
            format!("restarting ({})", record.exit_code.unwrap_or_default())
        }
        (Status::Exited, _, then) => {
            let code = record.exit_code.unwrap_or_default();
            let ago = output::ago(then.unwrap_or(record.created_at), now);
            let why = match &record.error {
                Some(error) => format!(": {error}"),
                None if record.oom_killed => ": out of memory".into(),
                None => String::new(),
            };
            format!("exited ({code}) {ago} ago{why}")
        }
        (status, ..) => status.as_str().into(),
    }
}

/// One line of at most `max` characters: a table has no room for more, and a
/// terminal must not be told anything by a container's command.
pub(crate) fn cut(text: &str, max: usize) -> String {
    let mut shown = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    if text.chars().count() <= max {
        return shown.collect();
    }
    shown.by_ref().take(max - 1).chain(['…']).collect()
}

pub(crate) fn version(args: &FormatArgs) -> Result<u8> {
    let version = env!("CARGO_PKG_VERSION");
    let lib = walnut_sandbox::Assets::find().ok().map(|a| a.dir);
    match args.format {
        Format::Json => output::json(&json!({
            "version": version,
            "agentProtocol": walnut_sandbox::PROTOCOL,
            "lib": lib,
        }))?,
        Format::Table => {
            println!("walnut          {version}");
            println!("agent protocol  {}", walnut_sandbox::PROTOCOL);
            match lib {
                Some(dir) => println!("kernel, agent   {}", dir.display()),
                None => println!("kernel, agent   not found; run `make` or set WALNUT_LIB"),
            }
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn commands_fit_a_cell() {
        assert_eq!(cut("sh -c a", 30), "sh -c a");
        assert_eq!(cut("a\nb\u{1b}[2J", 30), "a b [2J");
        assert_eq!(cut("abcdef", 4), "abc…");
    }
}
