//! `walnut load` and `walnut save`.

use std::{
    fs::{self, File},
    io::{self, BufWriter, IsTerminal, Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use walnut_archive::{Ownership, pack};
use walnut_image::{PullOptions, Reference, Store};
use walnut_sandbox::{Journal, Layout};

use crate::{
    images,
    pull::{Bars, Show},
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut load -i image.tar
  docker save debian | walnut load
  walnut load -i ./layout --name mine:1      # a directory; an image that it does not name

Archives of `docker save`, `podman save` and OCI layouts, plain or compressed with gzip or zstd.")]
pub(crate) struct LoadArgs {
    /// Archive, or directory of an OCI layout [default: standard input]
    #[arg(short, long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Name for an image that has none in the archive
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Show nothing but the images
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut save -o image.tar debian
  walnut save debian redis | gzip > images.tar.gz
  walnut save debian | docker load

The archive is an OCI layout, and what `docker load` reads as well.")]
pub(crate) struct SaveArgs {
    /// File to write [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Images, by name or ID
    #[arg(required = true)]
    images: Vec<String>,
}

pub(crate) async fn load(args: LoadArgs) -> Result<u8> {
    let name = args
        .name
        .as_deref()
        .map(str::parse::<Reference>)
        .transpose()?;
    let from: Box<dyn Read + Send> = match &args.input {
        None if io::stdin().is_terminal() => {
            bail!("load: the input is a terminal; give an archive with -i FILE, or by a pipe")
        }
        None => Box::new(io::stdin()),
        Some(path) if path.is_dir() => Box::new(directory(path)?),
        Some(path) => {
            let file = File::open(path);
            Box::new(file.with_context(|| format!("load {}", path.display()))?)
        }
    };
    let layout = Layout::from_env()?;
    let store = Store::open(layout.images())?;
    let bars = Bars::new(match args.quiet {
        true => Show::Nothing,
        false => Show::Stderr,
    });
    let options = PullOptions::default();
    let loaded = store.load(from, name.as_ref(), &options, &bars).await;
    bars.clear();
    for image in loaded? {
        for name in &image.names {
            Journal::new(&layout.state).other("image", &name.familiar(), "load");
            println!("Loaded image: {}", name.familiar());
        }
    }
    Ok(0)
}

/// A layout's directory as an archive of it.
fn directory(path: &Path) -> Result<io::PipeReader> {
    let (reader, writer) = io::pipe().context("make a pipe")?;
    let path = path.to_owned();
    if !path.join("index.json").exists() {
        bail!(
            "load {}: it has no index.json, and is no OCI layout",
            path.display()
        );
    }
    // What goes wrong there cuts the archive short, which is said where it is read.
    std::thread::spawn(move || {
        let mut writer = BufWriter::new(writer);
        let packed = pack(&path, ".", true, Ownership::Of(0, 0), &mut writer);
        if let Err(e) = packed {
            tracing::error!("load {}: {e}", path.display());
        }
    });
    Ok(reader)
}

pub(crate) fn save(args: &SaveArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let store = Store::open(layout.images())?;
    for name in &args.images {
        images::find(&store, name)?;
    }
    let Some(path) = &args.output else {
        if io::stdout().is_terminal() {
            bail!(
                "save: an archive is nothing for a terminal; write it with -o FILE, or to a pipe"
            );
        }
        let mut out = BufWriter::new(io::stdout().lock());
        store.save(&args.images, &mut out)?;
        out.flush()?;
        return Ok(0);
    };
    // Beside it first: an archive is there whole or not at all.
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let write = || {
        let file = File::create(&new).with_context(|| format!("create {}", new.display()))?;
        let mut out = BufWriter::new(file);
        store.save(&args.images, &mut out)?;
        out.flush()?;
        fs::rename(&new, path).with_context(|| format!("write {}", path.display()))
    };
    write().inspect_err(|_| drop(fs::remove_file(&new)))?;
    Ok(0)
}
