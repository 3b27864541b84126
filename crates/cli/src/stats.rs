//! `walnut stats`.

use std::{
    collections::HashMap,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use clap::Args;
use futures::future::join_all;
use serde::Serialize;
use walnut_sandbox::{Layout, Record, Status, list};

use crate::{args::Format, breakdown, client::Supervisor, create::find_live, output};

/// Between two readings.
const INTERVAL: Duration = Duration::from_secs(1);
/// Longest a supervisor is waited for: one that hangs must not hold up the others.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut stats
  walnut stats --no-stream --format json web
  walnut stats --memory-breakdown web        # host memory: whose it is, and what for")]
pub(crate) struct StatsArgs {
    /// Read once, and end
    #[arg(long)]
    no_stream: bool,
    /// Account for the host's memory, process by process, once
    #[arg(long)]
    memory_breakdown: bool,
    /// How to show it
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Containers, by name or ID [default: all that run]
    containers: Vec<String>,
}

pub(crate) async fn stats(args: StatsArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    if args.memory_breakdown {
        return breakdown::show(&layout, &chosen(&layout, &args.containers)?, args.format).await;
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
    match (args.format, args.no_stream) {
        (Format::Json, true) => {
            output::json(&rows)?;
            return Ok(());
        }
        // A line for each reading.
        (Format::Json, false) => {
            serde_json::to_writer(&mut out, rows)?;
            out.push(b'\n');
        }
        (Format::Table, no_stream) => {
            write_table(&mut out, rows)?;
            if !no_stream && io::stdout().is_terminal() {
                out = redrawn(&out);
            }
        }
    }
    let mut stdout = io::stdout().lock();
    stdout.write_all(&out)?;
    Ok(stdout.flush()?)
}

fn write_table(out: &mut Vec<u8>, rows: &[Row]) -> io::Result<()> {
    let cells: Vec<_> = rows
        .iter()
        .map(|row| {
            let id = row.id.chars().take(12).collect();
            let Some(f) = &row.figures else {
                let none = || "--".to_owned();
                let both = || "-- / --".to_owned();
                return [id, row.name.clone(), none(), both(), none(), both(), none()];
            };
            [
                id,
                row.name.clone(),
                f.cpu_percent.map_or("--".into(), |p| format!("{p:.2}%")),
                format!(
                    "{} / {}",
                    output::binary(f.memory_usage),
                    output::binary(f.memory_limit)
                ),
                share(f.memory_usage, f.memory_limit),
                format!(
                    "{} / {}",
                    output::bytes(f.block_read),
                    output::bytes(f.block_written)
                ),
                f.pids.to_string(),
            ]
        })
        .collect();
    let head = [
        "CONTAINER ID",
        "NAME",
        "CPU %",
        "MEM USAGE / LIMIT",
        "MEM %",
        "BLOCK I/O",
        "PIDS",
    ];
    output::write_table(out, head, &cells)
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
        let mut out = Vec::new();
        write_table(&mut out, &[row]).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("0123456789ab   gone   --"), "{text}");
    }

    #[test]
    fn a_screen_is_drawn_over() {
        assert_eq!(redrawn(b"a\nb\n"), b"\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
    }
}
