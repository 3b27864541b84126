//! `walnut stats`.

use std::{
    collections::HashMap,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, bail};
use clap::Args;
use futures::future::join_all;
use serde::Serialize;
use serde_json::json;
use walnut_sandbox::{Layout, Record, Status, list};

use crate::{
    args::Format,
    breakdown,
    client::Supervisor,
    create::find_live,
    format::{self, List, ListFormat},
    output,
};

/// Between two readings.
const INTERVAL: Duration = Duration::from_secs(1);
/// Longest a supervisor is waited for: one that hangs must not hold up the others.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut stats
  walnut stats --no-stream --format json web
  walnut stats --no-stream --format '{{.Name}} {{.MemUsage}}'
  walnut stats --memory-breakdown web        # host memory: whose it is, and what for")]
pub(crate) struct StatsArgs {
    /// Read once, and end
    #[arg(long)]
    no_stream: bool,
    /// Account for the host's memory, process by process, once
    #[arg(long)]
    memory_breakdown: bool,
    /// How to show it: table, json, a Go template, or a table of one
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: ListFormat,
    /// Containers, by name or ID [default: all that run]
    containers: Vec<String>,
}

pub(crate) async fn stats(args: StatsArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    if args.memory_breakdown {
        let format = match args.format {
            ListFormat::Table => Format::Table,
            ListFormat::Json => Format::Json,
            ListFormat::Template { .. } => bail!(
                "--format of a template does not go with --memory-breakdown, which has a table and json"
            ),
        };
        return breakdown::show(&layout, &chosen(&layout, &args.containers)?, format).await;
    }
    let mut last = Readings::new();
    // How much of a processor is used takes two readings.
    read(&layout, &args, &mut last).await?;
    loop {
        tokio::time::sleep(INTERVAL).await;
        let rows = read(&layout, &args, &mut last).await?;
        show(&rows, &args)?;
        let over = !args.containers.is_empty() && rows.iter().all(|row| row.figures.is_none());
        if args.no_stream || over {
            return Ok(0);
        }
    }
}

/// The containers that were named, or all that run.
fn chosen(layout: &Layout, names: &[String]) -> Result<Vec<Record>> {
    if names.is_empty() {
        let mut all = list(layout)?;
        all.retain(|r| matches!(r.status, Status::Running | Status::Paused));
        all.reverse();
        return Ok(all);
    }
    names.iter().map(|name| find_live(layout, name)).collect()
}

/// CPU time of a container when it was last read.
type Readings = HashMap<String, (Instant, u64)>;

/// A container, and what it uses; nothing if it has ended or does not answer.
#[derive(Debug, Serialize)]
struct Row {
    id: String,
    name: String,
    #[serde(flatten)]
    figures: Option<Figures>,
}

#[derive(Debug, Serialize)]
struct Figures {
    /// Of one processor: two that are busy are 200. None on the first reading.
    cpu_percent: Option<f64>,
    /// Bytes, without page cache that has not been used lately.
    memory_usage: u64,
    /// Bytes: its limit, or what its machine has.
    memory_limit: u64,
    block_read: u64,
    block_written: u64,
    pids: u64,
}

async fn read(layout: &Layout, args: &StatsArgs, last: &mut Readings) -> Result<Vec<Row>> {
    let records = match (args.containers.is_empty(), last.is_empty()) {
        (false, false) => args
            .containers
            .iter()
            .filter_map(|name| walnut_sandbox::find(layout, name).ok())
            .collect(),
        _ => chosen(layout, &args.containers)?,
    };
    let readings = join_all(records.iter().map(|record| reading(layout, record))).await;
    let mut rows = Vec::new();
    for (record, reading) in records.into_iter().zip(readings) {
        let figures = match reading {
            Ok((mut figures, now, cpu_us)) => {
                if let Some((then, before)) = last.insert(record.id.clone(), (now, cpu_us)) {
                    figures.cpu_percent = Some(percent(cpu_us.saturating_sub(before), now - then));
                }
                Some(figures)
            }
            Err(e) => {
                tracing::debug!(record.name, "read its figures: {e:#}");
                None
            }
        };
        rows.push(Row {
            id: record.id,
            name: record.name,
            figures,
        });
    }
    Ok(rows)
}

async fn reading(layout: &Layout, record: &Record) -> Result<(Figures, Instant, u64)> {
    let reading = async {
        let supervisor = Supervisor::connect(layout, record).await?;
        supervisor.stats().await
    };
    let (metrics, _) = tokio::time::timeout(PATIENCE, reading)
        .await
        .map_err(|_| anyhow!("no answer within {} s", PATIENCE.as_secs()))??;
    let now = Instant::now();
    let memory = &metrics.memory;
    let figures = Figures {
        cpu_percent: None,
        memory_usage: memory.usage.saturating_sub(memory.inactive_file),
        memory_limit: match memory.usage_limit {
            0 | u64::MAX => record.memory.unwrap_or(0),
            limit => limit,
        },
        block_read: metrics.io.usage.iter().map(|u| u.rbytes).sum(),
        block_written: metrics.io.usage.iter().map(|u| u.wbytes).sum(),
        pids: metrics.pids.current,
    };
    Ok((figures, now, metrics.cpu.usage_usec))
}

/// `used` microseconds of a span, of a hundred.
fn percent(used: u64, span: Duration) -> f64 {
    let used = Duration::from_micros(used).as_secs_f64();
    let percent = 100.0 * used / span.as_secs_f64().max(1e-6);
    (percent * 100.0).round() / 100.0
}

fn show(rows: &[Row], args: &StatsArgs) -> Result<()> {
    let mut out = Vec::new();
    match &args.format {
        // A line for each reading.
        ListFormat::Json if !args.no_stream => {
            serde_json::to_writer(&mut out, rows)?;
            out.push(b'\n');
        }
        format => write_as(&mut out, format, rows)?,
    }
    let on_a_screen = matches!(
        args.format,
        ListFormat::Table | ListFormat::Template { table: true, .. }
    );
    if on_a_screen && !args.no_stream && io::stdout().is_terminal() {
        out = redrawn(&out);
    }
    let mut stdout = io::stdout().lock();
    stdout.write_all(&out)?;
    Ok(stdout.flush()?)
}

/// What is shown, by Docker's names.
const LIST: List<'_> = List {
    fields: &[
        ("ID", "CONTAINER ID"),
        ("Container", "CONTAINER"),
        ("Name", "NAME"),
        ("CPUPerc", "CPU %"),
        ("MemUsage", "MEM USAGE / LIMIT"),
        ("MemPerc", "MEM %"),
        ("BlockIO", "BLOCK I/O"),
        ("PIDs", "PIDS"),
    ],
    columns: &[
        "ID", "Name", "CPUPerc", "MemUsage", "MemPerc", "BlockIO", "PIDs",
    ],
};

fn write_as(out: &mut Vec<u8>, format: &ListFormat, rows: &[Row]) -> Result<()> {
    let shown: Vec<_> = rows.iter().map(cells).collect();
    LIST.write(out, format, &shown, || Ok(serde_json::to_value(rows)?))
}

fn cells(row: &Row) -> format::Row {
    let id: String = row.id.chars().take(12).collect();
    let cells = match &row.figures {
        None => {
            let (none, both) = ("--", "-- / --");
            json!({
                "CPUPerc": none, "MemUsage": both, "MemPerc": none, "BlockIO": both, "PIDs": none,
            })
        }
        Some(f) => {
            let (used, limit) = (
                output::binary(f.memory_usage),
                output::binary(f.memory_limit),
            );
            let (read, written) = (output::bytes(f.block_read), output::bytes(f.block_written));
            json!({
                "CPUPerc": f.cpu_percent.map_or("--".into(), |p| format!("{p:.2}%")),
                "MemUsage": format!("{used} / {limit}"),
                "MemPerc": share(f.memory_usage, f.memory_limit),
                "BlockIO": format!("{read} / {written}"),
                "PIDs": f.pids,
            })
        }
    };
    let mut cells = format::row(cells);
    cells.insert("ID".into(), id.clone().into());
    cells.insert("Container".into(), id.into());
    cells.insert("Name".into(), row.name.clone().into());
    cells
}

fn share(part: u64, whole: u64) -> String {
    let hundredths = u128::from(part) * 10_000 / u128::from(whole.max(1));
    format!("{}.{:02}%", hundredths / 100, hundredths % 100)
}

/// Over what was there: from the top, each line to its end, and nothing below. The
/// screen does not flicker, as it would if it were cleared first.
fn redrawn(text: &[u8]) -> Vec<u8> {
    let mut out = b"\x1b[H".to_vec();
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        out.extend_from_slice(line.strip_suffix(b"\n").unwrap_or(line));
        out.extend_from_slice(b"\x1b[K\n");
    }
    out.extend_from_slice(b"\x1b[J");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages() {
        assert_eq!(percent(500_000, Duration::from_secs(1)), 50.0);
        assert_eq!(percent(2_000_000, Duration::from_secs(1)), 200.0);
        assert_eq!(percent(1, Duration::ZERO), 100.0);
        assert_eq!(share(1, 3), "33.33%");
        assert_eq!(share(5, 0), "500.00%");
        assert_eq!(share(u64::MAX, u64::MAX), "100.00%");
    }

    #[test]
    fn one_that_ended_keeps_its_line() {
        let row = Row {
            id: "0123456789abcdef".into(),
            name: "gone".into(),
            figures: None,
        };
        let said = |format: &str| {
            let mut out = Vec::new();
            let rows = std::slice::from_ref(&row);
            write_as(&mut out, &format.parse().unwrap(), rows).unwrap();
            String::from_utf8(out).unwrap()
        };
        let text = said("table");
        assert!(text.contains("0123456789ab   gone   --"), "{text}");
        assert_eq!(said("{{.Name}} {{.CPUPerc}} {{.PIDs}}"), "gone -- --\n");
        assert!(said("json").contains("\"name\": \"gone\""));
    }

    #[test]
    fn a_screen_is_drawn_over() {
        assert_eq!(redrawn(b"a\nb\n"), b"\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
    }
}
