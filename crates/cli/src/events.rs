//! `walnut events`.

use std::{
    io::{self, Write},
    time::Duration,
};

use anyhow::Result;
use clap::Args;
use serde_json::json;
use walnut_sandbox::{Happening, Journal, Layout, now_ns};

use crate::{filter::Filter, format::ListFormat, output, values::Moment};

/// How often it is looked for more.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut events --since 10m --until 0s       # what happened in the last ten minutes
  walnut events --filter container=web --filter event=die
  walnut events --format '{{.Action}} {{index .Actor.Attributes \"name\"}}'

Filters: type, event, container, image, volume, network, label[=VALUE].")]
pub(crate) struct EventsArgs {
    /// What happened from then on too: RFC 3339, seconds since 1970, or as 10m for ten minutes ago
    #[arg(long, value_name = "TIME")]
    since: Option<Moment>,
    /// Until then, and no longer
    #[arg(long, value_name = "TIME")]
    until: Option<Moment>,
    /// Show those alone that fit, as event=die
    #[arg(short, long, value_name = "NAME=VALUE")]
    filter: Vec<Filter>,
    /// How to show them: table (a line each), json (an object a line), a Go template
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: ListFormat,
}

pub(crate) async fn events(args: EventsArgs) -> Result<u8> {
    for filter in &args.filter {
        filter.check(&[
            "type",
            "event",
            "container",
            "image",
            "volume",
            "network",
            "label",
        ])?;
    }
    let layout = Layout::from_env()?;
    let Moment(since) = args.since.unwrap_or(Moment(now_ns()));
    let mut reader = Journal::new(&layout.state).read();
    let mut out = io::stdout().lock();
    loop {
        // Asked before reading: what is written before then is shown.
        let over = args.until.is_some_and(|Moment(until)| now_ns() >= until);
        while let Some(happening) = reader.next_line()? {
            let late = args
                .until
                .is_some_and(|Moment(until)| happening.time >= until);
            if happening.time < since || late || !args.filter.iter().all(|f| fits(&happening, f)) {
                continue;
            }
            writeln!(out, "{}", shown(&happening, &args.format)?)?;
        }
        out.flush()?;
        if over {
            return Ok(0);
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn fits(happening: &Happening, filter: &Filter) -> bool {
    let actor = &happening.actor;
    let name = actor.attributes.get("name").map_or("", String::as_str);
    let of = |kind: &str| {
        happening.kind == kind
            && filter.any(|value| name == value || !value.is_empty() && actor.id.starts_with(value))
    };
    match filter.name.as_str() {
        "type" => filter.any(|value| happening.kind == value),
        "event" => filter.any(|value| {
            let action = happening.action.split(':').next().unwrap_or_default();
            happening.action == value || action == value
        }),
        "image" => {
            let made = actor.attributes.get("image").map_or("", String::as_str);
            of("image") || happening.kind == "container" && filter.any(|value| made == value)
        }
        "label" => filter.fits_labels(&actor.attributes),
        kind => of(kind),
    }
}

fn shown(happening: &Happening, format: &ListFormat) -> Result<String> {
    let mut value = serde_json::to_value(happening)?;
    value["time"] = json!(happening.time / 1_000_000_000);
    value["scope"] = json!("local");
    value["status"] = json!(happening.action);
    value["id"] = json!(happening.actor.id);
    // As templates for Docker have them.
    value["Time"] = value["time"].clone();
    value["TimeNano"] = value["timeNano"].clone();
    value["Status"] = value["status"].clone();
    value["ID"] = value["id"].clone();
    value["Scope"] = value["scope"].clone();
    match format {
        ListFormat::Json => {
            for name in ["Time", "TimeNano", "Status", "ID", "Scope"] {
                value.as_object_mut().map(|map| map.remove(name));
            }
            Ok(value.to_string())
        }
        ListFormat::Template { template, .. } => template.of(&value),
        ListFormat::Table => {
            let attributes: Vec<_> = happening
                .actor
                .attributes
                .iter()
                .map(|(name, value)| format!("{name}={}", one_line(value)))
                .collect();
            Ok(format!(
                "{} {} {} {} ({})",
                output::time(happening.time),
                happening.kind,
                happening.action,
                one_line(&happening.actor.id),
                attributes.join(", ")
            ))
        }
    }
}

/// A terminal must not be told anything by a label.
fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn events_are_found_and_shown() {
        let text = r#"{"Type":"container","Action":"die","Actor":{"ID":"0123","Attributes":
            {"name":"web","image":"nginx","tier":"front","exitCode":"3"}},"timeNano":1000000000}"#;
        let happening: Happening = serde_json::from_str(text).unwrap();
        let fits = |text: &str| fits(&happening, &text.parse().unwrap());
        for yes in [
            "type=container",
            "event=die|start",
            "container=web",
            "container=012",
            "image=nginx",
            "label=tier=front",
        ] {
            assert!(fits(yes), "{yes}");
        }
        for no in [
            "type=image",
            "event=start",
            "container=db",
            "volume=web",
            "label=none",
        ] {
            assert!(!fits(no), "{no}");
        }
        let shown = |format: &str| shown(&happening, &format.parse().unwrap()).unwrap();
        assert_eq!(
            shown("{{.Action}} {{.Actor.Attributes.exitCode}} {{.ID}} {{.Time}}"),
            "die 3 0123 1"
        );
        let json: Value = serde_json::from_str(&shown("json")).unwrap();
        assert_eq!((&json["Action"], &json["time"]), (&json!("die"), &json!(1)));
        assert!(shown("table").starts_with("1970-01-01T00:00:01Z container die 0123 ("));
    }
}
