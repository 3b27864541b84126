//! What each of many idle pods costs, by the product's own account, beside crun and runsc.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde_json::Value;
use walnut_observe::{ProcessUsage, Relative};

use crate::{
    Host,
    beside::{self, Bundle, Other},
    memory::{Sandbox, family, program},
    plot,
};

/// What runs in each pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    Sleep,
    Nginx,
    Redis,
}

impl Workload {
    fn command(self) -> &'static [&'static str] {
        match self {
            Self::Sleep => &beside::SLEEP,
            Self::Nginx => &["nginx", "-g", "daemon off;"],
            Self::Redis => &["redis-server", "--save", ""],
        }
    }
}

/// Bytes of all pods of a runtime together.
#[derive(Debug, Default, Clone, Copy)]
struct Sum {
    processes: u64,
    guest_private: u64,
    guest_shared: u64,
    kernel: u64,
    /// Page cache that is not mapped, once.
    page_cache: u64,
}

impl Sum {
    /// A process of another runtime, if it has not ended.
    fn add(&mut self, process: &Path) {
        let number = process
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        let relative = number.map(|pid| Relative {
            role: program(process),
            pid,
        });
        if let Some(Ok(usage)) = relative.map(|relative| ProcessUsage::of(&relative)) {
            self.processes += usage.usage.mapped();
            self.kernel += usage.usage.kernel;
        }
    }

    fn total(&self) -> u64 {
        self.processes + self.guest_private + self.guest_shared + self.kernel
    }
}

/// 1, 10, 100 … and `count` itself.
fn steps(count: usize) -> Vec<usize> {
    let mut steps: Vec<_> = std::iter::successors(Some(1), |n| Some(n * 10))
        .take_while(|n| *n < count)
        .collect();
    steps.push(count);
    steps
}

/// Starts as many pods as asked with each runtime, and reads on the way.
pub(crate) fn measure(host: &Host, count: usize, workload: Workload, alone: bool) -> Result<()> {
    ensure!(count > 0, "--count 0: at least one");
    host.walnut(&["template", "create"])?;
    println!("\n## Idle pods ({workload:?}), kB each\n");
    println!(
        "| runtime | pods | processes | guest private | guest shared | kernel | each | \
         page cache beside, once |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let mut sums = walnut(host, count, workload)?;
    if !alone {
        sums.extend(others(host, count, workload)?);
    }
    summary(workload, &sums);
    Ok(())
}

/// Of how many pods of a runtime, and what they cost.
type Reading = (&'static str, usize, Sum);

fn others(host: &Host, count: usize, workload: Workload) -> Result<Vec<Reading>> {
    let mut sums = Vec::new();
    let bundle = Bundle::make(host, workload.command())?;
    for (name, words) in beside::runtimes() {
        let mut pods = Vec::new();
        for step in steps(count) {
            while pods.len() < step {
                pods.push(Other::start_in(&bundle, name, words.clone())?);
            }
            let sum = settled(|| {
                let mut sum = Sum::default();
                // runsc's gofer knows the bundle, which all of them share.
                let firsts: Vec<u32> = pods.iter().map(|pod| pod.pid).collect();
                for process in family_of(bundle.path()?, &firsts)? {
                    sum.add(&process);
                }
                Ok(sum)
            })?;
            print(name, step, sum);
            sums.push((name, step, sum));
        }
    }
    Ok(sums)
}

fn family_of(bundle: &str, firsts: &[u32]) -> Result<Vec<std::path::PathBuf>> {
    let mut all = Vec::new();
    for first in firsts {
        all.extend(family(bundle, Some(*first))?);
    }
    all.sort();
    all.dedup();
    Ok(all)
}

fn walnut(host: &Host, count: usize, workload: Workload) -> Result<Vec<Reading>> {
    let mut sums = Vec::new();
    let mut pods = Vec::new();
    for step in steps(count) {
        while pods.len() < step {
            let name = format!("walnut-bench-{}-{}", std::process::id(), pods.len());
            pods.push(Sandbox::start(host, &name, workload.command())?);
        }
        let names: Vec<&str> = pods.iter().map(Sandbox::name).collect();
        let sum = settled(|| account(host, &names))?;
        print("walnut", step, sum);
        sums.push(("walnut", step, sum));
    }
    Ok(sums)
}

/// The parts of all these pods together.
fn account(host: &Host, names: &[&str]) -> Result<Sum> {
    let words = ["stats", "--memory-breakdown", "--format", "json"];
    let all: Vec<Value> = serde_json::from_str(&host.walnut(&[&words, names].concat())?)?;
    ensure!(
        all.len() == names.len(),
        "{} of {} answered",
        all.len(),
        names.len()
    );
    let mut sum = Sum::default();
    for pod in &all {
        let get = |value: &Value| value.as_u64().context("a number of bytes");
        let part = |key: &str| get(&pod["host"]["together"][key]);
        sum.processes += part("anonymous")? + part("file_private")? + part("file_shared")?;
        sum.guest_private += part("guest_private")? + get(&pod["host"]["guest_unmapped"])?;
        sum.guest_shared += part("guest_shared")?;
        sum.kernel += part("kernel")?;
        // The same files for all: what one does not map another may.
        let rest = get(&pod["host"]["page_cache"])?;
        sum.page_cache = match sum.page_cache {
            0 => rest,
            least => least.min(rest),
        };
    }
    Ok(sum)
}

/// A reading that differs by under 1 % from the one before.
fn settled(read: impl Fn() -> Result<Sum>) -> Result<Sum> {
    let mut last = read()?;
    for _ in 0..40 {
        std::thread::sleep(Duration::from_millis(1000));
        let now = read()?;
        if now.total().abs_diff(last.total()) * 100 < now.total() {
            return Ok(now);
        }
        last = now;
    }
    Ok(last)
}

fn print(runtime: &str, pods: usize, sum: Sum) {
    let each = |bytes: u64| bytes / 1024 / u64::try_from(pods).unwrap_or(1);
    println!(
        "| {runtime} | {pods} | {} | {} | {} | {} | {} | {} |",
        each(sum.processes),
        each(sum.guest_private),
        each(sum.guest_shared),
        each(sum.kernel),
        each(sum.total()),
        sum.page_cache / 1024
    );
}

/// The memory of the aim's host.
const HOST: u64 = 24 << 30;

/// A plot, and how many of the last count's pods the aim's host would hold.
fn summary(workload: Workload, sums: &[Reading]) {
    let bars: Vec<_> = sums
        .iter()
        .map(|(name, pods, sum)| {
            let each = sum.total() as f64 / *pods as f64 / 1e6;
            (format!("{name}, {pods}"), each)
        })
        .collect();
    let title = format!("Idle pods ({workload:?}): memory of each");
    println!("\n{}", plot::bars(&title, "MB", &bars));
    let walnut = sums.iter().rev().find(|(name, ..)| *name == "walnut");
    if let Some((_, pods, sum)) = walnut {
        println!("\n{}", room(*pods, sum));
    }
}

/// What such pods take when there are more of them, for all but the page cache.
fn room(pods: usize, sum: &Sum) -> String {
    let each = sum.total() / u64::try_from(pods).unwrap_or(1).max(1);
    format!(
        "{} MiB for {pods} pods, {} MiB each: 24 GiB would hold {} (aim, for nginx: 1000)",
        sum.total() >> 20,
        each >> 20,
        HOST.saturating_sub(sum.page_cache) / each.max(1)
    )
}

#[cfg(test)]
mod tests {
    use super::{Sum, room, steps};

    #[test]
    fn what_a_host_holds_leaves_room_for_the_page_cache() {
        let sum = Sum {
            processes: 400 << 20,
            guest_private: 1600 << 20,
            page_cache: 4 << 30,
            ..Sum::default()
        };
        let said = room(100, &sum);
        assert_eq!(
            said,
            "2000 MiB for 100 pods, 20 MiB each: 24 GiB would hold 1024 (aim, for nginx: 1000)"
        );
    }

    #[test]
    fn powers_of_ten_and_the_last() {
        assert_eq!(steps(1), [1]);
        assert_eq!(steps(10), [1, 10]);
        assert_eq!(steps(250), [1, 10, 100, 250]);
    }
}
