//! `walnut config`.

use anyhow::Result;
use serde::Serialize;
use walnut_sandbox::Settings;

use crate::{args::ConfigArgs, args::Format, output};

#[derive(Serialize)]
struct Shown {
    /// The files that were read, in this order.
    files: Vec<String>,
    settings: Settings,
}

/// What sandboxes are made by, and where that was said.
pub(crate) fn config(args: &ConfigArgs) -> Result<u8> {
    let (settings, files) = match &args.file {
        Some(file) => (Settings::load_from(file)?, vec![file.clone()]),
        None => Settings::with_sources()?,
    };
    let files: Vec<_> = files.iter().map(|f| f.display().to_string()).collect();
    match args.format {
        Format::Json => output::json(&Shown { files, settings })?,
        Format::Table => {
            for file in &files {
                println!("# {file}");
            }
            print!("{}", settings.to_toml()?);
        }
    }
    Ok(0)
}
