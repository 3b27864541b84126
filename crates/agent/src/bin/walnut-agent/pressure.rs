//! The end of a container that grinds at its memory limit.
//!
//! Without swap, a cgroup at its limit can give back file pages alone: the code
//! that runs in it. When the few pages a program needs push one another out, each
//! reclaim succeeds, so the kernel never comes to its OOM killer, and the program
//! reads the same pages for ever. The kernel reports such stalls (PSI, the
//! kernel's accounting/psi.rst); what stalls for seconds is killed here, by the
//! choice the kernel would have made.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::cgroup::{Cgroup, keyed};
use crate::process::Process;

/// Reported when some task was stalled for so much of a window, microseconds. Not
/// "all tasks": with a fast disk the grinding task itself is half of the time on its
/// processor, faulting.
const TRIGGER: &str = "some 500000 1000000";
/// Reports come once a window; with longer between them the stall is over.
const GAP: Duration = Duration::from_millis(2500);
/// Reports in a row that make a stall one that does not pass.
const REPORTS: u32 = 4;

/// Watches a container until its `first` process, and so all of it, has ended. A
/// kernel without PSI watches nothing.
pub(crate) async fn watch(cgroup: Cgroup, first: Arc<Process>) {
    tokio::select! {
        () = end_grinding(&cgroup) => {}
        _ = first.wait() => {}
    }
}

async fn end_grinding(cgroup: &Cgroup) {
    let Ok(trigger) = arm(cgroup) else {
        return;
    };
    // SAFETY: a `File` is one descriptor, which it keeps.
    let trigger = unsafe { AsyncFd::register_with_interest(trigger, Interest::PRIORITY) };
    let Ok(trigger) = trigger else {
        return;
    };
    loop {
        match trigger.ready(Interest::PRIORITY).await {
            Ok(mut report) => report.clear_ready(),
            Err(_) => return,
        }
        let before = Grind::of(cgroup);
        if lasts(&trigger).await && Grind::of(cgroup).since(&before) {
            end_largest(cgroup);
        }
    }
}

fn arm(cgroup: &Cgroup) -> io::Result<File> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(cgroup.file("memory.pressure"))?;
    // The kernel wants the closing NUL as well.
    file.write_all(format!("{TRIGGER}\0").as_bytes())?;
    Ok(file)
}

/// The stall that was just reported goes on.
async fn lasts(trigger: &AsyncFd<File>) -> bool {
    for _ in 1..REPORTS {
        match timeout(GAP, trigger.ready(Interest::PRIORITY)).await {
            Ok(Ok(mut report)) => report.clear_ready(),
            _ => return false,
        }
    }
    true
}

/// Counters that tell a program which reads its own code over and over from one
/// that waits for other memory.
#[derive(Debug, Clone, Copy)]
struct Grind {
    at_limit: u64,
    refaults: u64,
    /// Nearly all memory is the programs' own, which cannot be given back: what is
    /// read again is the little that is left for code. (A program that reads large
    /// files again and again at its limit has most of its memory in files.)
    squeezed: bool,
}

impl Grind {
    fn of(cgroup: &Cgroup) -> Self {
        Self {
            // The limit may be that of all containers together.
            at_limit: keyed(&cgroup.read("memory.events"), "max")
                + keyed(&cgroup.read("../memory.events"), "max"),
            refaults: keyed(&cgroup.read("memory.stat"), "workingset_refault_file"),
            squeezed: squeezed(cgroup, "") || squeezed(cgroup, "../"),
        }
    }

    fn since(self, before: &Self) -> bool {
        self.squeezed && self.at_limit > before.at_limit && self.refaults > before.refaults
    }
}

/// Whether seven eighths of a limit are anonymous memory; `at` is the way from the
/// cgroup to the one that has the limit.
fn squeezed(cgroup: &Cgroup, at: &str) -> bool {
    let Ok(max) = cgroup
        .read(&format!("{at}memory.max"))
        .trim()
        .parse::<u64>()
    else {
        // "max": no limit.
        return false;
    };
    keyed(&cgroup.read(&format!("{at}memory.stat")), "anon") >= max / 8 * 7
}

/// Kills the process the kernel's OOM killer would choose.
fn end_largest(cgroup: &Cgroup) {
    let score = |pid: u32| -> Option<(i64, u32)> {
        let text = fs::read_to_string(format!("/proc/{pid}/oom_score")).ok()?;
        let adjusted = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).ok()?;
        // Exempt from being killed.
        (adjusted.trim() != "-1000").then_some(())?;
        Some((text.trim().parse().ok()?, pid))
    };
    let Some((_, victim)) = cgroup.pids().into_iter().filter_map(score).max() else {
        return;
    };
    let Ok(pid) = i32::try_from(victim) else {
        return;
    };
    cgroup.count_kill();
    // It may have ended this moment.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroup(dir: &std::path::Path, max: u64, refaults: u64) -> Grind {
        with_anonymous(dir, max, refaults, 900)
    }

    fn with_anonymous(dir: &std::path::Path, max: u64, refaults: u64, anon: u64) -> Grind {
        let own = dir.join("c");
        fs::create_dir_all(&own).unwrap();
        fs::write(own.join("memory.events"), "low 0\nmax 0\n").unwrap();
        fs::write(dir.join("memory.events"), format!("max {max}\noom 0\n")).unwrap();
        fs::write(own.join("memory.max"), "1000\n").unwrap();
        let stat = format!("anon {anon}\nworkingset_refault_file {refaults}\n");
        fs::write(own.join("memory.stat"), stat).unwrap();
        Grind::of(&Cgroup::new(own))
    }

    #[test]
    fn grinding_is_rereading_at_a_limit() {
        let dir = tempfile::tempdir().unwrap();
        let before = cgroup(dir.path(), 5, 100);
        assert!(cgroup(dir.path(), 6, 101).since(&before));
        assert!(!cgroup(dir.path(), 5, 900).since(&before), "no limit met");
        assert!(!cgroup(dir.path(), 9, 100).since(&before), "nothing reread");
        let reader = with_anonymous(dir.path(), 6, 101, 500);
        assert!(!reader.since(&before), "large files, read again");
    }
}
