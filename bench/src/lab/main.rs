//! `walnut-vmm` beside QEMU on the same KVM: same kernel, guest, memory and files,
//! without the rest of the product. Runs in the lab (`bench/lab.sh`), whose clock
//! counts instructions of the emulated host: what it prints is for comparison.

mod boot;
mod exits;
mod io;
mod local;
mod machine;
mod memory;
mod trace;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};

use machine::Guest;

/// Measure walnut-vmm beside QEMU on the KVM of this host
#[derive(Debug, Parser)]
struct Cli {
    /// Initramfs whose init is bench/guest/init.c
    #[arg(long)]
    initramfs: PathBuf,
    /// Counted runs of each monitor
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Only this
    #[arg(long)]
    only: Option<Part>,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Start,
    Kernel,
    Disk,
    Net,
}

/// The files of a run, in memory, so that no monitor waits for a disk.
#[derive(Debug)]
struct Files {
    _dir: tempfile::TempDir,
    kernel: PathBuf,
    /// With the agent.
    product: PathBuf,
    /// With `bench/guest/init.c`.
    bench: PathBuf,
}

impl Files {
    fn copy(bench: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let copy = |from: PathBuf, name: &str| -> Result<PathBuf> {
            let to = dir.path().join(name);
            std::fs::copy(&from, &to).with_context(|| format!("copy {}", from.display()))?;
            Ok(to)
        };
        Ok(Self {
            kernel: copy("out/lib/walnut/vmlinux".into(), "vmlinux")?,
            product: copy("out/lib/walnut/initramfs.cpio".into(), "product")?,
            bench: copy(bench.to_owned(), "bench")?,
            _dir: dir,
        })
    }

    fn guest(&self, words: &str) -> Guest<'_> {
        Guest {
            kernel: &self.kernel,
            initramfs: &self.bench,
            words: words.to_owned(),
            disk: None,
            tap: None,
            vsock: None,
        }
    }
}

/// Nanoseconds of the host's clock.
fn clock() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(Duration::from)
        .unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// For ratios.
fn float(n: u64) -> f64 {
    f64::from(u32::try_from(n).unwrap_or(u32::MAX))
}

/// Nanoseconds as milliseconds.
fn ms(ns: u64) -> f64 {
    float(ns / 1000) / 1000.0
}

fn median(values: &mut [u64]) -> Result<u64> {
    values.sort_unstable();
    values
        .get(values.len() / 2)
        .copied()
        .context("nothing was measured")
}

/// A row of a table: what, then both monitors' figures and their ratio.
fn row(what: &str, unit: &str, walnut: f64, qemu: f64) {
    println!(
        "| {what} | {unit} | {walnut:.2} | {qemu:.2} | {:.2} |",
        walnut / qemu
    );
}

fn head(title: &str) {
    println!("\n## {title}\n");
    println!("| | unit | walnut-vmm | qemu | walnut-vmm / qemu |\n|---|---|---|---|---|");
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    ensure!(cli.runs > 0, "--runs 0: at least one");
    local::bring()?;
    local::never_idle()?;
    let files = Files::copy(&cli.initramfs)?;
    let wanted = |part| cli.only.is_none_or(|only| only == part);
    if wanted(Part::Start) {
        boot::measure(&files, cli.runs)?;
    }
    if wanted(Part::Kernel) {
        boot::kernel(&files)?;
    }
    if wanted(Part::Disk) {
        io::disk(&files)?;
    }
    if wanted(Part::Net) {
        io::net(&files)?;
    }
    Ok(())
}
