//! Where a monitor's time before the guest's first instruction goes: its main
//! thread's system calls, as the kernel traces them.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result};

use crate::{
    exits,
    machine::{Guest, Monitor},
};

const TRACEFS: &str = "/sys/kernel/tracing";
const KVM_RUN: &str = "ae80";
const EXECVE: u32 = 59;

/// Microseconds by kind, from exec to the first `KVM_RUN`.
#[derive(Debug, Default)]
pub(crate) struct Spent(BTreeMap<&'static str, u64>);

pub(crate) const KINDS: [&str; 8] = [
    "fork and exec",
    "calls that read files",
    "calls that map memory",
    "ioctl (KVM, taps)",
    "calls that wait",
    "other calls",
    "own code and page faults",
    "together, to the first KVM_RUN",
];

impl Spent {
    pub(crate) fn of(&self, kind: &str) -> u64 {
        self.0.get(kind).copied().unwrap_or(0)
    }
}

fn kind(call: u32) -> &'static str {
    match call {
        // read, pread64, readv, preadv
        0 | 17 | 19 | 295 => "calls that read files",
        // mmap, mprotect, munmap, brk, madvise
        9 | 10 | 11 | 12 | 28 => "calls that map memory",
        16 => "ioctl (KVM, taps)",
        // poll, select, nanosleep, recvmsg, wait4, futex, epoll_wait, ppoll
        7 | 23 | 35 | 47 | 61 | 202 | 230 | 232 | 271 | 281 => "calls that wait",
        _ => "other calls",
    }
}

fn set(file: &str, value: &str) -> Result<()> {
    fs::write(format!("{TRACEFS}/{file}"), value)
        .with_context(|| format!("write {file} of tracefs"))
}

/// A line of the trace.
struct Record<'a> {
    thread: u32,
    /// Microseconds.
    at: u64,
    event: &'a str,
    call: u32,
    arguments: &'a str,
}

/// `walnut-vmm-123  [000] .....  12.345678: sys_enter: NR 16 (9, ae80, 0, …)`
fn record(line: &str) -> Option<Record<'_>> {
    let (task, rest) = line.split_once(" [")?;
    let (_, thread) = task.trim_end().rsplit_once('-')?;
    let mut words = rest
        .split_whitespace()
        .skip_while(|word| !word.ends_with(':'));
    let (seconds, micros) = words.next()?.trim_end_matches(':').split_once('.')?;
    let event = words.next()?.trim_end_matches(':');
    if words.next()? != "NR" {
        return None;
    }
    Some(Record {
        thread: thread.parse().ok()?,
        at: seconds.parse::<u64>().ok()? * 1_000_000 + micros.parse::<u64>().ok()?,
        event,
        call: words.next()?.parse().ok()?,
        arguments: rest.split_once('(').map_or("", |(_, a)| a),
    })
}

/// Starts a guest under the trace.
pub(crate) fn measure(guest: &Guest<'_>, monitor: Monitor) -> Result<Spent> {
    exits::mount("tracefs", TRACEFS, &format!("{TRACEFS}/trace"))?;
    set("trace_clock", "mono")?;
    set("buffer_size_kb", "16384")?;
    set("options/event-fork", "1")?;
    set("set_event_pid", &std::process::id().to_string())?;
    set("events/raw_syscalls/enable", "1")?;
    set("trace", "")?;
    set("tracing_on", "1")?;
    let mut running = guest.start(monitor)?;
    let first = running.lines()?.next();
    set("tracing_on", "0")?;
    set("events/raw_syscalls/enable", "0")?;
    set("set_event_pid", "")?;
    first.context("the guest said nothing")?;
    let trace = fs::read_to_string(format!("{TRACEFS}/trace"))?;
    split(&trace, running.pid(), running.spawned / 1000)
}

fn split(trace: &str, main: u32, spawned: u64) -> Result<Spent> {
    let mut spent = Spent::default();
    let mut entered: Option<(u32, u64)> = None;
    let (mut executed, mut calls) = (None, 0);
    for record in trace.lines().filter_map(record) {
        let enters = record.event == "sys_enter";
        let runs = record.arguments.split(", ").nth(1) == Some(KVM_RUN);
        if enters && record.call == 16 && runs {
            let total = record.at.saturating_sub(spawned);
            let start = executed.context("the trace has no exec")?;
            let start: u64 = start;
            let own = (record.at - start).saturating_sub(calls);
            spent
                .0
                .insert("fork and exec", start.saturating_sub(spawned));
            spent.0.insert("own code and page faults", own);
            spent.0.insert("together, to the first KVM_RUN", total);
            return Ok(spent);
        }
        if record.thread != main {
            continue;
        }
        if enters {
            entered = Some((record.call, record.at));
        } else if let Some((call, since)) = entered.take().filter(|e| e.0 == record.call) {
            if call == EXECVE && executed.is_none() {
                executed = Some(record.at);
            } else if executed.is_some() {
                calls += record.at - since;
                *spent.0.entry(kind(call)).or_default() += record.at - since;
            }
        }
    }
    anyhow::bail!("the trace has no KVM_RUN")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_split_by_kind() {
        let trace = "\
# tracer: nop
 walnut-bench-la-7   [000] .....  1.000010: sys_enter: NR 59 (1, 2, 3, 4, 5, 6)
 walnut-vmm-7        [000] .....  1.000110: sys_exit: NR 59 = 0
 walnut-vmm-7        [000] .....  1.000120: sys_enter: NR 0 (3, 4, 5, 6, 7, 8)
 walnut-vmm-7        [000] .....  1.000150: sys_exit: NR 0 = 5
 other thread-8      [000] .....  1.000155: sys_enter: NR 1 (3, 4, 5, 6, 7, 8)
 vcpu 0-9            [000] .....  1.000200: sys_enter: NR 16 (9, ae80, 0, 1, 2, 3)
";
        let spent = split(trace, 7, 1_000_000).unwrap_or_default();
        assert_eq!(spent.of("fork and exec"), 110);
        assert_eq!(spent.of("calls that read files"), 30);
        assert_eq!(spent.of("own code and page faults"), 60);
        assert_eq!(spent.of("together, to the first KVM_RUN"), 200);
        assert!(split("", 7, 0).is_err());
    }
}
