//! From the exec of a monitor to the agent, and what lies between.

use std::{
    io::Read,
    os::unix::{fs::PermissionsExt, net::UnixListener},
};

use anyhow::{Context, Result, ensure};

use crate::{
    Files, clock, exits, float, head,
    machine::{Guest, Monitor},
    median,
    memory::Memory,
    ms, row, trace,
};

/// The agent's first message goes to this port of vsock.
const READY_PORT: u32 = 1024;
/// Initcalls, and gaps between messages, that are printed.
const TOP: usize = 10;

/// A start, up to the agent.
#[derive(Debug)]
struct Start {
    /// Nanoseconds from exec to the agent's first byte.
    agent: u64,
    exits: Vec<u64>,
    /// Exits to the monitor, which walnut-vmm counts itself.
    to_monitor: Option<u64>,
    memory: Memory,
}

fn start(files: &Files, monitor: Monitor) -> Result<Start> {
    let dir = tempfile::tempdir()?;
    // walnut-vmm becomes another user.
    let ready = dir.path().join(format!("sock_{READY_PORT}"));
    let listener = UnixListener::bind(&ready)?;
    for path in [dir.path(), &ready] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777))?;
    }
    let guest = Guest {
        initramfs: &files.product,
        vsock: Some(dir.path()),
        ..files.guest("")
    };
    let running = guest.start(monitor)?;
    let (mut agent, _) = listener.accept()?;
    let mut first = [0];
    agent.read_exact(&mut first)?;
    let took = clock() - running.spawned;
    let to_monitor = match monitor {
        Monitor::Walnut => Some(running.stats()?.exits),
        Monitor::Qemu => None,
    };
    Ok(Start {
        agent: took,
        exits: exits::of_the_machine()?,
        to_monitor,
        memory: Memory::of(&running.process())?,
    })
}

/// Time, memory, threads and exits up to the agent's first message.
pub(crate) fn measure(files: &Files, runs: usize) -> Result<()> {
    exits::prepare()?;
    let mut all: [Vec<Start>; 2] = [Vec::new(), Vec::new()];
    for round in 0..=runs {
        eprintln!("start {round} of {runs}");
        for (monitor, starts) in Monitor::BOTH.into_iter().zip(&mut all) {
            let start = start(files, monitor)
                .with_context(|| format!("start the agent on {}", monitor.name()))?;
            // The first warms caches.
            if round > 0 {
                starts.push(start);
            }
        }
    }
    head("From exec of the monitor to the agent's first message (medians)");
    let both = |pick: &dyn Fn(&Start) -> u64| -> Result<(u64, u64)> {
        let of = |starts: &[Start]| median(&mut starts.iter().map(pick).collect::<Vec<_>>());
        Ok((of(&all[0])?, of(&all[1])?))
    };
    let print = |what: &str, unit: &str, pick: &dyn Fn(&Start) -> u64| -> Result<()> {
        let (walnut, qemu) = both(pick)?;
        row(what, unit, float(walnut), float(qemu));
        Ok(())
    };
    let (walnut, qemu) = both(&|start| start.agent)?;
    row("time to the agent", "ms", ms(walnut), ms(qemu));
    print("PSS beyond the guest's memory", "kB", &|s| s.memory.own)?;
    print("of it, no file's", "kB", &|s| s.memory.anonymous)?;
    print("PSS of the guest's memory", "kB", &|s| s.memory.guest)?;
    print("threads", "", &|s| s.memory.threads)?;
    for (index, name) in exits::COUNTERS.iter().enumerate() {
        print(&format!("KVM's {name}"), "", &|s| {
            s.exits.get(index).copied().unwrap_or(0)
        })?;
    }
    let to_monitor = all[0].iter().filter_map(|s| s.to_monitor).max();
    println!(
        "\nOf walnut-vmm's exits {} went to the monitor, the others end in KVM.",
        to_monitor.unwrap_or(0)
    );
    let program = std::fs::metadata("out/lib/walnut/walnut-vmm")?.len();
    println!("walnut-vmm's program: {program} bytes.");

    head("Before the guest's first instruction: the monitor's main thread, traced");
    let guest = files.guest("bench=none");
    let walnut = trace::measure(&guest, Monitor::Walnut)?;
    eprintln!("walnut-vmm is traced");
    let qemu = trace::measure(&guest, Monitor::Qemu)?;
    for kind in trace::KINDS {
        let ms = |us: u64| float(us) / 1000.0;
        row(kind, "ms", ms(walnut.of(kind)), ms(qemu.of(kind)));
    }
    Ok(())
}

/// A message of the kernel's log.
#[derive(Debug)]
struct Line {
    /// Microseconds of the guest's clock.
    at: u64,
    text: String,
}

/// `log [    0.123456] text`
fn line(line: &str) -> Option<Line> {
    let (at, text) = line.strip_prefix("log [")?.split_once("] ")?;
    let (seconds, micros) = at.trim().split_once('.')?;
    Some(Line {
        at: seconds.parse::<u64>().ok()? * 1_000_000 + micros.parse::<u64>().ok()?,
        text: text.to_owned(),
    })
}

/// `initcall NAME+0x0/0x10 returned 0 after 1234 usecs`
fn initcall(text: &str) -> Option<(&str, u64)> {
    let rest = text.strip_prefix("initcall ")?;
    let name = rest.split(['+', ' ']).next()?;
    let usecs = rest.rsplit_once(" after ")?.1.strip_suffix(" usecs")?;
    Some((name, usecs.trim().parse().ok()?))
}

/// Where the guest kernel's time goes, on its own clock.
pub(crate) fn kernel(files: &Files) -> Result<()> {
    for monitor in Monitor::BOTH {
        eprintln!("the kernel's log on {}", monitor.name());
        let guest = files.guest("initcall_debug log_buf_len=1M bench=log");
        let mut running = guest.start(monitor)?;
        let log: Vec<Line> = running.lines()?.filter_map(|l| line(&l)).collect();
        ensure!(!log.is_empty(), "the guest's log is empty");
        let end = log.last().map_or(0, |line| line.at);
        let mut calls: Vec<_> = log.iter().filter_map(|l| initcall(&l.text)).collect();
        calls.sort_by_key(|call| std::cmp::Reverse(call.1));
        let sum: u64 = calls.iter().map(|call| call.1).sum();
        let mut gaps: Vec<_> = log
            .windows(2)
            .filter_map(|pair| match pair {
                [a, b] if initcall(&b.text).is_none() => Some((b.at - a.at, &a.text, &b.text)),
                _ => None,
            })
            .collect();
        gaps.sort_by_key(|gap| std::cmp::Reverse(gap.0));
        println!("\n## The guest kernel on {}\n", monitor.name());
        println!(
            "{:.1} ms of the guest's clock to init; {:.1} ms of them in initcalls of 0.1 ms and more.\n",
            ms(end * 1000),
            ms(sum * 1000)
        );
        println!("| initcall | ms |\n|---|---|");
        for (name, usecs) in calls.iter().take(TOP) {
            println!("| {name} | {:.1} |", ms(usecs * 1000));
        }
        println!("\n| from this message | to this | ms |\n|---|---|---|");
        for (usecs, from, to) in gaps.iter().take(TOP) {
            println!(
                "| {} | {} | {:.1} |",
                cell(from),
                cell(to),
                ms(usecs * 1000)
            );
        }
    }
    Ok(())
}

/// A message's beginning, as it fits a table.
fn cell(text: &str) -> String {
    text.chars().filter(|c| *c != '|').take(48).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_log_are_read() {
        let line = line("log [    1.000250] initcall pci_init+0x0/0x20 returned 0 after 250 usecs");
        let line = line.unwrap_or(Line {
            at: 0,
            text: String::new(),
        });
        assert_eq!(line.at, 1_000_250);
        assert_eq!(initcall(&line.text), Some(("pci_init", 250)));
        assert_eq!(initcall("Memory: 1K"), None);
    }
}
