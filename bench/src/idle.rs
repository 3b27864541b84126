//! What a sandbox costs a processor while it has nothing to do: how often each of its
//! processes wakes, beside what crun and runsc keep for the same container.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context, Result};

use crate::{
    Host,
    beside::{self, Bundle, Other},
    memory::{family, program},
};

/// After the start, until what it set going has come to rest.
const SETTLE: Duration = Duration::from_secs(10);

/// Of one thread so far.
#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    /// Times that it waited, and so was woken.
    waited: u64,
    /// Times that another had its turn.
    preempted: u64,
    /// Nanoseconds on a processor.
    ran: u64,
}

/// Threads by process, name and number.
type Threads = BTreeMap<(String, String), Counts>;

/// Starts an idle container with each runtime, and counts for so many seconds.
pub(crate) fn measure(host: &Host, seconds: u32, alone: bool) -> Result<()> {
    host.walnut(&["template", "create"])?;
    let name = format!("walnut-bench-{}", std::process::id());
    let sandbox = crate::memory::Sandbox::start(host, &name, &beside::SLEEP)?;
    let mut others = Vec::new();
    if !alone {
        let bundle = Bundle::make(host, &beside::SLEEP)?;
        for (runtime, words) in beside::runtimes() {
            others.push((runtime, Other::start_in(&bundle, runtime, words)?));
        }
    }
    std::thread::sleep(SETTLE);
    let read = || -> Result<Vec<(&str, Threads)>> {
        let mut all = vec![("walnut", threads(sandbox.id(), None)?)];
        for (runtime, other) in &others {
            all.push((runtime, threads(other.id(), Some(other.pid))?));
        }
        Ok(all)
    };
    let before = read()?;
    std::thread::sleep(Duration::from_secs(seconds.into()));
    let after = read()?;
    println!("\n## One idle container, each second ({seconds} s)\n");
    println!("| runtime | process | thread | woken | preempted | processor, % |");
    println!("|---|---|---|---|---|---|");
    let span = f64::from(seconds);
    for ((runtime, before), (_, after)) in before.iter().zip(&after) {
        let mut sum = [0.0; 3];
        for ((process, thread), now) in after {
            let key = (process.clone(), thread.clone());
            let then = before.get(&key).copied().unwrap_or_default();
            let rate = |now: u64, then: u64| {
                let count = u32::try_from(now.saturating_sub(then)).unwrap_or(u32::MAX);
                f64::from(count) / span
            };
            let figures = [
                rate(now.waited, then.waited),
                rate(now.preempted, then.preempted),
                // Nanoseconds of a second, of a hundred.
                rate(now.ran / 1000, then.ran / 1000) / 1e4,
            ];
            for (sum, figure) in sum.iter_mut().zip(figures) {
                *sum += figure;
            }
            // Those that slept all the time are many.
            if figures.iter().any(|figure| *figure > 0.0) {
                let [woken, preempted, ran] = figures;
                println!(
                    "| {runtime} | {process} | {thread} | {woken:.1} | {preempted:.1} | {ran:.2} |"
                );
            }
        }
        let [woken, preempted, ran] = sum;
        println!("| {runtime} | all | all | {woken:.1} | {preempted:.1} | {ran:.2} |");
    }
    guest(host, &name, seconds)
}

/// The timer interrupts that the guest itself counts.
fn guest(host: &Host, name: &str, seconds: u32) -> Result<()> {
    let look = "cat /proc/interrupts";
    // What it prints wakes it, so it prints when all is over.
    let script = format!(
        "sleep 3; a=$({look}); sleep {seconds}; b=$({look}); echo \"$a\"; echo --; echo \"$b\""
    );
    let text = host.walnut(&["exec", name, "sh", "-c", &script])?;
    let (before, after) = text.split_once("--").context("two readings")?;
    let rate = timers(after).saturating_sub(timers(before));
    let rate = f64::from(u32::try_from(rate).unwrap_or(u32::MAX)) / f64::from(seconds);
    println!("\ntimer interrupts in the guest, each second: {rate:.1}");
    Ok(())
}

/// `LOC:  955  Local timer interrupts`, `0:  183  IO-APIC  2-edge  timer`
fn timers(interrupts: &str) -> u64 {
    interrupts
        .lines()
        .filter(|line| line.contains("timer"))
        .flat_map(str::split_whitespace)
        .filter_map(|word| word.parse::<u64>().ok())
        .sum()
}

fn threads(id: &str, first: Option<u32>) -> Result<Threads> {
    let mut all = Threads::new();
    for process in family(id, first)? {
        let name = program(&process);
        let Ok(tasks) = fs::read_dir(process.join("task")) else {
            continue;
        };
        for task in tasks.flatten() {
            let number = task.file_name().to_string_lossy().into_owned();
            if let Some((comm, counts)) = counts(&task.path()) {
                all.insert((name.clone(), format!("{comm} {number}")), counts);
            }
        }
    }
    Ok(all)
}

fn counts(task: &Path) -> Option<(String, Counts)> {
    let status = fs::read_to_string(task.join("status")).ok()?;
    let field = |key: &str| Some(status.lines().find_map(|l| l.strip_prefix(key))?.trim());
    let schedstat = fs::read_to_string(task.join("schedstat")).ok();
    let ran = schedstat
        .as_deref()
        .and_then(|s| s.split(' ').next()?.parse().ok());
    let counts = Counts {
        waited: field("voluntary_ctxt_switches:")?.parse().ok()?,
        preempted: field("nonvoluntary_ctxt_switches:")?.parse().ok()?,
        ran: ran.unwrap_or(0),
    };
    Some((field("Name:")?.to_owned(), counts))
}
