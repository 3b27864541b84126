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
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::cgroup::{Cgroup, keyed};
use crate::process::Process;

/// Reported when some task was stalled for so much of a window, microseconds: a reason to
/// look, for others stall as much. Not more, and not "all tasks": the faster the disk, the
/// more of its time the grinding task is on its processor, faulting.
const TRIGGER: &str = "some 150000 1000000";
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

/// Fewest page faults that are many.
const FAULTS: u64 = 256;
const PAGE: u64 = 4096;

/// Counters that tell a program which reads its own code over and over from one
/// that waits for other memory.
#[derive(Debug, Clone, Copy)]
struct Grind {
    at: Instant,
    at_limit: u64,
    /// Pages of files that were read again.
    refaults: u64,
    /// Page faults that read.
    faults: u64,
    /// For how long some task was stalled.
    stalled: Duration,
    /// Pages of files that are there.
    cached: u64,
    /// Nearly all memory is the programs' own, which cannot be given back: what is
    /// read again is the little that is left for code. (A program that reads large
    /// files again and again at its limit has most of its memory in files.)
    squeezed: bool,
}

impl Grind {
    fn of(cgroup: &Cgroup) -> Self {
        let stat = cgroup.read("memory.stat");
        let (file, shared) = (keyed(&stat, "file"), keyed(&stat, "shmem"));
        Self {
            at: Instant::now(),
            // The limit may be that of all containers together.
            at_limit: keyed(&cgroup.read("memory.events"), "max")
                + keyed(&cgroup.read("../memory.events"), "max"),
            refaults: keyed(&stat, "workingset_refault_file"),
            faults: keyed(&stat, "pgmajfault"),
            stalled: stalled(&cgroup.read("memory.pressure")),
            // Those of a tmpfs stay.
            cached: file.saturating_sub(shared) / PAGE,
            squeezed: squeezed(cgroup, "") || squeezed(cgroup, "../"),
        }
    }

    fn since(self, before: &Self) -> bool {
        let more = |of: fn(&Self) -> u64| of(&self).saturating_sub(of(before));
        let (refaults, faults) = (more(|it| it.refaults), more(|it| it.faults));
        // A slow disk: it is waited for most of the time.
        let waits = self.stalled.saturating_sub(before.stalled) >= (self.at - before.at) / 2;
        // A fast one: all that is there was read anew, page by page as it is executed.
        let turns = faults >= self.cached.max(FAULTS) && refaults >= faults;
        self.squeezed && more(|it| it.at_limit) > 0 && refaults > 0 && (waits || turns)
    }
}

/// The time that "some" task was stalled, of what a `*.pressure` says.
fn stalled(pressure: &str) -> Duration {
    let some = pressure.lines().find(|line| line.starts_with("some "));
    let total = some.and_then(|line| line.split_once("total=")?.1.trim().parse().ok());
    Duration::from_micros(total.unwrap_or(0))
}

/// Whether seven eighths of a limit are memory that cannot be given back, as there is no
/// swap: anonymous, or a tmpfs's; `at` is the way from the cgroup to the one that has the
/// limit.
fn squeezed(cgroup: &Cgroup, at: &str) -> bool {
    let Ok(max) = cgroup
        .read(&format!("{at}memory.max"))
        .trim()
        .parse::<u64>()
    else {
        // "max": no limit.
        return false;
    };
    let stat = cgroup.read(&format!("{at}memory.stat"));
    keyed(&stat, "anon").saturating_add(keyed(&stat, "shmem")) >= max / 8 * 7
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

    /// What a cgroup says, and the one above it.
    #[derive(Clone, Copy)]
    struct Says {
        at_limit: u64,
        refaults: u64,
        faults: u64,
        stalled: u64,
        anon: u64,
        shmem: u64,
        file: u64,
    }

    const FIRST: Says = Says {
        at_limit: 5,
        refaults: 100,
        faults: 40,
        stalled: 7_000_000,
        anon: 900 * PAGE,
        shmem: 0,
        file: 80 * PAGE,
    };

    impl Says {
        /// As it would be read `seconds` after a moment.
        fn read(self, moment: Instant, seconds: u64) -> Grind {
            let dir = tempfile::tempdir().unwrap();
            let own = dir.path().join("c");
            fs::create_dir_all(&own).unwrap();
            let put = |name: &str, text: String| fs::write(own.join(name), text).unwrap();
            put("memory.events", "low 0\nmax 0\n".to_owned());
            put("memory.max", format!("{}\n", 1000 * PAGE));
            put(
                "memory.stat",
                format!(
                    "anon {}\nfile {}\nshmem {}\npgmajfault {}\nworkingset_refault_file {}\n",
                    self.anon, self.file, self.shmem, self.faults, self.refaults
                ),
            );
            put(
                "memory.pressure",
                format!(
                    "some avg10=1.00 avg60=0.00 avg300=0.00 total={}\n\
                     full avg10=0.00 avg60=0.00 avg300=0.00 total=99999999999\n",
                    self.stalled
                ),
            );
            let above = format!("max {}\noom 0\n", self.at_limit);
            fs::write(dir.path().join("memory.events"), above).unwrap();
            Grind {
                at: moment + Duration::from_secs(seconds),
                ..Grind::of(&Cgroup::new(own))
            }
        }
    }

    #[test]
    fn grinding_is_rereading_at_a_limit() {
        let began = Instant::now();
        let before = FIRST.read(began, 0);
        let grinds = |says: Says| says.read(began, 4).since(&before);
        // As it was seen where a disk is slow, and where it is fast.
        let slow = Says {
            at_limit: 6,
            refaults: 101,
            stalled: FIRST.stalled + 2_000_000,
            ..FIRST
        };
        let fast = Says {
            at_limit: 2700,
            refaults: 56_000,
            faults: 1800,
            stalled: FIRST.stalled + 1_000_000,
            file: 190 * PAGE,
            ..FIRST
        };
        for grinding in [slow, fast] {
            assert!(grinds(grinding));
            let no_limit_met = Says {
                at_limit: FIRST.at_limit,
                ..grinding
            };
            assert!(!grinds(no_limit_met));
            let nothing_reread = Says {
                refaults: FIRST.refaults,
                ..grinding
            };
            assert!(!grinds(nothing_reread));
            let large_files_read_again = Says {
                anon: 500 * PAGE,
                ..grinding
            };
            assert!(!grinds(large_files_read_again));
            let written_to_a_tmpfs = Says {
                anon: 500 * PAGE,
                shmem: 400 * PAGE,
                file: grinding.file + 400 * PAGE,
                ..grinding
            };
            assert!(grinds(written_to_a_tmpfs));
        }
        let little_waiting = Says {
            stalled: FIRST.stalled + 1_900_000,
            ..slow
        };
        assert!(!grinds(little_waiting));
        let few_faults = Says {
            faults: FIRST.faults + FAULTS - 1,
            ..fast
        };
        assert!(!grinds(few_faults));
        let more_is_there_than_was_read = Says {
            file: 1900 * PAGE,
            ..fast
        };
        assert!(!grinds(more_is_there_than_was_read));
        let read_for_the_first_time = Says {
            refaults: FIRST.refaults + 900,
            ..fast
        };
        assert!(!grinds(read_for_the_first_time));
    }
}
