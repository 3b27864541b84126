//! What /proc says of a container's processes, which may end while it is read.

use std::{fs, io::Read, os::unix::fs::MetadataExt};

use walnut_protocol::agent::Process;

/// Processes of which more than their numbers is told.
const PROCESSES_MAX: usize = 1024;
/// Most that is told of a command line, bytes.
const COMMAND_MAX: u64 = 256;
/// Clock ticks of /proc a second, on every architecture.
const TICKS: u64 = 100;
const PAGE: u64 = 4096;

/// What is known of those that are still there.
pub(crate) fn known(pids: &[u32]) -> Vec<Process> {
    let pids = pids.iter().take(PROCESSES_MAX);
    pids.filter_map(|pid| one(*pid)).collect()
}

fn one(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let uid = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
    let mut process = of_stat(&stat)?;
    (process.pid, process.uid) = (pid, uid);
    let mut line = Vec::new();
    let file = fs::File::open(format!("/proc/{pid}/cmdline")).ok()?;
    file.take(COMMAND_MAX).read_to_end(&mut line).ok()?;
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    // A kernel thread or a zombie has none.
    if !line.trim().is_empty() {
        line.trim().clone_into(&mut process.command);
    }
    Some(process)
}

/// proc(5): the name, in parentheses, may have anything in it.
fn of_stat(stat: &str) -> Option<Process> {
    let (before, after) = stat.rsplit_once(')')?;
    let name = before.split_once('(')?.1;
    let fields: Vec<_> = after.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    let ticks = number(11)?.saturating_add(number(12)?);
    Some(Process {
        state: (*fields.first()?).to_owned(),
        ppid: fields.get(1)?.parse().ok()?,
        cpu_ms: ticks.saturating_mul(1000 / TICKS),
        resident: number(21)?.saturating_mul(PAGE),
        command: format!("[{name}]"),
        ..Process::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_are_read() {
        let stat = "7 (a) b (c) S 3 7 7 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 1 0 9 100 25 1 1";
        let process = of_stat(stat).unwrap();
        assert_eq!(process.command, "[a) b (c]");
        assert_eq!((process.ppid, process.cpu_ms), (3, 2000));
        assert_eq!((process.resident, process.state.as_str()), (25 * PAGE, "S"));
        for bad in ["", "7", "7 (a", "7 (a) S", ") ("] {
            assert!(of_stat(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn this_one_is_known() {
        let own = std::process::id();
        let known = known(&[own, u32::MAX]);
        assert_eq!(known.len(), 1);
        assert!(known[0].pid == own && known[0].resident > 0 && !known[0].command.is_empty());
    }
}
