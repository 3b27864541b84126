//! `walnut logs`.

use std::{
    collections::VecDeque,
    io::{self, BufWriter, Write},
    time::Duration,
};

use anyhow::{Result, bail};
use chrono::DateTime;
use clap::Args;
use walnut_sandbox::{Error, Layout, LogLine, LogReader, Status, find};

use crate::values::Moment;

/// How often a followed log is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Most lines that `--tail` keeps at once.
const TAIL_MAX: usize = 10_000_000;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut logs -f --tail 20 web
  walnut logs --since 10m --until 5m -t web
  walnut logs --since 2026-01-31T12:00:00Z web")]
pub(crate) struct LogsArgs {
    /// Go on until the container ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Put the time before each line
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// Lines from then on: RFC 3339, seconds since 1970, or as 10m for ten minutes ago
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<Moment>,
    /// Lines before then
    #[arg(long, value_name = "TIME")]
    pub(crate) until: Option<Moment>,
    /// So many lines of what there is, or "all"
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all")]
    pub(crate) tail: String,
    /// Container, by name or ID
    pub(crate) container: String,
}

impl LogsArgs {
    /// Whether a line is of the time that was asked for; none, if no later one is.
    fn wants(&self, line: &LogLine) -> Option<bool> {
        if self.since.is_none() && self.until.is_none() {
            return Some(true);
        }
        let time = DateTime::parse_from_rfc3339(&line.time).ok();
        let Some(time) = time.and_then(|t| t.timestamp_nanos_opt()) else {
            return Some(true);
        };
        if self.until.is_some_and(|Moment(until)| time >= until) {
            return None;
        }
        Some(self.since.is_none_or(|Moment(since)| time >= since))
    }
}

pub(crate) async fn logs(args: &LogsArgs) -> Result<u8> {
    let tail = match args.tail.as_str() {
        "all" => None,
        text => match text.parse::<usize>() {
            Ok(lines) => Some(lines.min(TAIL_MAX)),
            Err(e) => bail!("--tail {text}: {e}; give a number, or all"),
        },
    };
    let layout = Layout::from_env()?;
    let record = find(&layout, &args.container)?;
    if !record.terms.log.kept {
        bail!(Error::WrongState(format!(
            "container {} keeps no log (--log-driver none); `walnut attach` shows what it prints",
            record.name
        )));
    }
    let path = layout.container(&record.id).join("container.log");
    let mut out = BufWriter::new(io::stdout().lock());
    let mut skip = 0;
    if let Some(tail) = tail {
        let mut last = VecDeque::new();
        let mut reader = LogReader::up_to_now(&path)?;
        while let Some(line) = reader.next_line()? {
            skip += 1;
            match args.wants(&line) {
                None => break,
                Some(false) => continue,
                Some(true) => last.push_back(line),
            }
            if last.len() > tail {
                last.pop_front();
            }
        }
        for line in &last {
            show(&mut out, line, args.timestamps)?;
        }
        out.flush()?;
        if !args.follow {
            return Ok(0);
        }
    }
    let mut reader = match args.follow {
        true => LogReader::new(&path),
        false => LogReader::up_to_now(&path)?,
    };
    loop {
        // Asked before reading: what is written before the end is then shown.
        let ended =
            !args.follow || find(&layout, &record.id).map_or(true, |r| r.status == Status::Exited);
        while let Some(line) = reader.next_line()? {
            if skip > 0 {
                skip -= 1;
                continue;
            }
            match args.wants(&line) {
                None => {
                    out.flush()?;
                    return Ok(0);
                }
                Some(true) => show(&mut out, &line, args.timestamps)?,
                Some(false) => {}
            }
        }
        out.flush()?;
        let over = args
            .until
            .is_some_and(|Moment(until)| walnut_sandbox::now_ns() >= until);
        if ended || over {
            return Ok(0);
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn show(out: &mut BufWriter<io::StdoutLock<'_>>, line: &LogLine, stamped: bool) -> io::Result<()> {
    let time = match stamped {
        true => format!("{} ", line.time),
        false => String::new(),
    };
    let text = format!("{time}{}", line.log);
    if line.stream == "stderr" {
        // In the order in which they came.
        out.flush()?;
        return io::stderr().write_all(text.as_bytes());
    }
    out.write_all(text.as_bytes())
}
