//! `walnut ps` and `walnut version`.

use anyhow::Result;
use serde::Serialize;
use serde_json::json;
use walnut_sandbox::{
    Attachments, Layout, NetworkLink, PublishedPort, Record, Status, list, now_ns,
};

use crate::{
    args::{Format, FormatArgs, PsArgs},
    network, output,
};

pub(crate) fn ps(args: &PsArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let mut records = list(&layout)?;
    records.retain(|r| args.all || r.status != Status::Exited);
    records.reverse();
    if args.quiet {
        for record in &records {
            println!("{}", record.short_id());
        }
        return Ok(0);
    }
    let networks = |r: &Record| Attachments::load(&layout.container(&r.id)).ok().flatten();
    if args.format == Format::Json {
        let shown = records.iter().map(|record| Shown {
            record,
            networks: networks(record).iter().flat_map(links).collect(),
            ports: networks(record).map(|n| n.ports).unwrap_or_default(),
        });
        output::json(&shown.collect::<Vec<_>>())?;
        return Ok(0);
    }
    let now = now_ns();
    let rows: Vec<_> = records
        .iter()
        .map(|r| {
            [
                r.short_id().to_owned(),
                r.image.name.clone(),
                cut(&r.command.join(" "), 30),
                format!("{} ago", output::ago(r.created_at, now)),
                status(r, now),
                ports(networks(r)),
                r.name.clone(),
            ]
        })
        .collect();
    output::table(
        [
            "CONTAINER ID",
            "IMAGE",
            "COMMAND",
            "CREATED",
            "STATUS",
            "PORTS",
            "NAME",
        ],
        &rows,
    )?;
    Ok(0)
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
    match (record.status, record.started_at, record.finished_at) {
        (Status::Running, Some(then), _) => format!("up {}", output::ago(then, now)),
        (Status::Paused, Some(then), _) => format!("up {} (paused)", output::ago(then, now)),
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
fn cut(text: &str, max: usize) -> String {
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
