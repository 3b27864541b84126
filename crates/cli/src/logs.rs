//! `walnut logs`.

use std::{
    io::{self, Write},
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
    let mut reader = LogReader::new(&layout.container(&record.id).join("container.log"));
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
                io::stderr().write_all(text.as_bytes())?;
            } else {
                io::stdout().write_all(text.as_bytes())?;
            }
        }
        io::stdout().flush()?;
        if ended {
            return Ok(0);
        }
        tokio::time::sleep(LOOK).await;
    }
}
