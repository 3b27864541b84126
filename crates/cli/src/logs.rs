//! `walnut logs`.

use std::{
    io::{self, BufWriter, Write},
    time::Duration,
};

use anyhow::Result;
use walnut_sandbox::{Layout, LogReader, Status, find};

use crate::args::LogsArgs;

/// How often a followed log is looked at.
const LOOK: Duration = Duration::from_millis(100);

pub(crate) async fn logs(args: &LogsArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let record = find(&layout, &args.container)?;
    let path = layout.container(&record.id).join("container.log");
    let mut reader = match args.follow {
        true => LogReader::new(&path),
        false => LogReader::up_to_now(&path)?,
    };
    let mut out = BufWriter::new(io::stdout().lock());
    loop {
        // Asked before reading: what is written before the end is then shown.
        let ended =
            !args.follow || find(&layout, &record.id).map_or(true, |r| r.status == Status::Exited);
        while let Some(line) = reader.next_line()? {
            let time = if args.timestamps {
                format!("{} ", line.time)
            } else {
                String::new()
            };
            let text = format!("{time}{}", line.log);
            if line.stream == "stderr" {
                // In the order in which they came.
                out.flush()?;
                io::stderr().write_all(text.as_bytes())?;
            } else {
                out.write_all(text.as_bytes())?;
            }
        }
        out.flush()?;
        if ended {
            return Ok(0);
        }
        tokio::time::sleep(LOOK).await;
    }
}
