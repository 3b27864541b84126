//! Where each millisecond of a start goes, from the supervisor's own log.

use std::{collections::BTreeMap, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::Host;

/// Reads the steps' times out of the log of some runs and prints their medians.
pub(crate) fn measure(host: &Host, runs: usize) -> Result<()> {
    table(host, runs, "from a template", &[])?;
    table(host, runs, "booted", &["--no-template"])
}

fn table(host: &Host, runs: usize, how: &str, options: &[&str]) -> Result<()> {
    let mut all: BTreeMap<u64, (String, Vec<f64>)> = BTreeMap::new();
    for _ in 0..runs {
        for (order, (step, ms)) in (0..).zip(steps(host, options)?) {
            all.entry(order).or_insert((step, Vec::new())).1.push(ms);
        }
    }
    println!("\n## Where the time goes, {how}, ms since the supervisor was asked (medians)\n");
    println!("| step | at | took |\n|---|---|---|");
    let mut last = 0.0;
    for (step, times) in all.values_mut() {
        times.sort_by(f64::total_cmp);
        let at = times[times.len() / 2];
        println!("| {step} | {at:.0} | {:.0} |", at - last);
        last = at;
    }
    Ok(())
}

/// The steps of one run with the milliseconds at which each was done.
pub(crate) fn steps(host: &Host, options: &[&str]) -> Result<Vec<(String, f64)>> {
    let name = format!("walnut-bench-{}", std::process::id());
    let out = Command::new(&host.walnut)
        .env("WALNUT_NETWORK", "none")
        .args(["run", "--name", &name])
        .args(options)
        .args([&host.image, "true"])
        .env("WALNUT_LOG", "walnut_sandbox=debug,walnut_machine=debug")
        .output()
        .context("run walnut")?;
    ensure!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let all: Vec<Value> = serde_json::from_str(&host.walnut(&["ps", "-a", "--format", "json"])?)?;
    let id = all
        .iter()
        .find(|r| r["name"] == name.as_str())
        .and_then(|r| r["id"].as_str())
        .context("the container is not listed")?;
    let root = std::env::var("WALNUT_ROOT").unwrap_or_else(|_| "/var/lib/walnut".into());
    let path = format!("{root}/containers/{id}/shim.log");
    let log = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    host.walnut(&["rm", &name])?;
    Ok(log.lines().filter_map(step).collect())
}

/// `… sandbox start step="agent ready" ms=812.3`
fn step(line: &str) -> Option<(String, f64)> {
    let rest = line.split_once("sandbox start step=\"")?.1;
    let (step, rest) = rest.split_once('"')?;
    let ms = rest.split_once("ms=")?.1.split_whitespace().next()?;
    Some((step.to_owned(), ms.parse().ok()?))
}
