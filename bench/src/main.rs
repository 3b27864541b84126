//! Walnut's own figures, beside `crun` and `runsc` on the same host and image.
//!
//! `start`: from exec to the container's first byte of output. `memory`: what a
//! sandbox costs the host. `footprint`: what is Walnut's own of that, held against what
//! is recorded. `idle`: how often it wakes. `density`: what each of many
//! costs. `network`: how quick what goes between pods is. `all`: all of them. Machines are noisy, so what counts is
//! the ratio of runs that took turns.

mod beside;
mod bundle;
mod density;
mod footprint;
mod guest;
mod idle;
mod memory;
mod network;
mod plot;
mod start;
mod steps;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

/// Measure Walnut beside crun and runsc
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
    /// Containers started at once, as 1,8,50
    #[arg(long, default_value = "1", value_delimiter = ',', global = true)]
    at_once: Vec<usize>,
    /// Runs of each
    #[arg(long, default_value_t = 10, global = true)]
    runs: usize,
    /// Leave crun and runsc out (idle, density)
    #[arg(long, global = true)]
    alone: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Time to the first byte of output
    Start,
    /// Host memory of a sandbox
    Memory,
    /// What the agent, the supervisor and each exec take
    Footprint {
        /// Fail where one has grown by a fifth since it was recorded
        #[arg(long, conflicts_with = "record")]
        check: bool,
        /// Record them
        #[arg(long)]
        record: bool,
    },
    /// How often an idle sandbox wakes
    Idle {
        /// How long to count
        #[arg(long, default_value_t = 20)]
        seconds: u32,
    },
    /// Host memory of each of many idle pods
    Density {
        /// How many
        #[arg(long, default_value_t = 10)]
        count: usize,
        /// What runs in them
        #[arg(long, value_enum, default_value = "sleep")]
        image_command: density::Workload,
    },
    /// What a pod's network costs: latencies and throughput
    Network {
        /// How long to measure each figure
        #[arg(long, default_value_t = 2)]
        seconds: u32,
    },
    /// Start, memory, idle, density and network, as long as they take by default
    All,
}

/// What is measured, and with what.
#[derive(Debug)]
struct Host {
    walnut: PathBuf,
    image: String,
    layout: PathBuf,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    ensure!(cli.runs > 0, "--runs 0: at least one");
    let host = Host::find()?;
    if matches!(cli.what, What::Start | What::All) {
        for &at_once in &cli.at_once {
            ensure!(at_once > 0, "--at-once 0: at least one");
            start::measure(&host, cli.runs, at_once)?;
        }
        steps::measure(&host, cli.runs)?;
    }
    if matches!(cli.what, What::Memory | What::All) {
        memory::measure(&host)?;
    }
    match cli.what {
        What::Footprint { check, record } => {
            let then = match (check, record) {
                (true, _) => footprint::Then::Check,
                (_, true) => footprint::Then::Record,
                _ => footprint::Then::Show,
            };
            footprint::measure(&host, then)?;
        }
        What::Idle { seconds } => idle::measure(&host, seconds, cli.alone)?,
        What::Density {
            count,
            image_command,
        } => density::measure(&host, count, image_command, cli.alone)?,
        What::Network { seconds } => {
            ensure!(seconds > 0, "--seconds 0: at least one");
            network::measure(&host, cli.runs, seconds)?;
        }
        What::All => {
            network::measure(&host, cli.runs.min(5), 2)?;
            idle::measure(&host, 20, cli.alone)?;
            density::measure(&host, 10, density::Workload::Sleep, cli.alone)?;
        }
        What::Start | What::Memory => {}
    }
    Ok(())
}

impl Host {
    fn find() -> Result<Self> {
        let repository = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("find the repository")?;
        let walnut = repository.join("out/bin/walnut");
        ensure!(
            walnut.exists(),
            "{} is missing; run `make build` first",
            walnut.display()
        );
        let layout = last_line(&repository.join("tests/image/build.sh"), &[])?;
        let image = last_line(&repository.join("tests/image/registry.sh"), &["start"])?;
        run(&[
            walnut.as_os_str().to_str().context("path")?,
            "pull",
            "-q",
            &image,
        ])?;
        Ok(Self {
            walnut,
            image,
            layout: layout.into(),
        })
    }

    fn walnut(&self, args: &[&str]) -> Result<String> {
        let walnut = self.walnut.to_str().context("path")?;
        run(&[&[walnut], args].concat())
    }
}

/// Runs a command; its output.
fn run(args: &[&str]) -> Result<String> {
    let out = std::process::Command::new(args[0])
        .env("WALNUT_NETWORK", "none")
        .args(&args[1..])
        .output()
        .with_context(|| format!("run {}", args[0]))?;
    ensure!(
        out.status.success(),
        "{}: {}",
        args.join(" "),
        String::from_utf8_lossy(&out.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

fn last_line(script: &std::path::Path, args: &[&str]) -> Result<String> {
    let out = run(&[&[script.to_str().context("path")?], args].concat())?;
    let line = out.lines().last().map(str::to_owned);
    line.with_context(|| format!("{} printed nothing", script.display()))
}

/// Says whether a figure meets its aim.
fn verdict(figure: f64, aim: f64) -> &'static str {
    if figure <= aim { "OK" } else { "MISS" }
}
