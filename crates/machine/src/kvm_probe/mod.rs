//! Does KVM work here? Not whether `/dev/kvm` opens, but whether a guest runs.
//!
//! Nested, paravirtual and emulated KVMs open and then hang, crash a stock
//! kernel, or interpret every instruction. [`probe`] forks a child that runs a
//! tiny guest (`guest`) which does what a kernel's first milliseconds do, checks
//! its results, and compares its speed with the host's. The child may hang or
//! die: a deadline and its exit are all the caller sees.

mod cache;
mod guest;
mod vm;

use std::{
    fmt, io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use kvm_ioctls::Kvm;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, Signal, WaitOptions, kill_process, waitpid},
};
use serde::{Deserialize, Serialize};

pub use cache::probe_cached;

/// How long the guest may take, in each try; usual is below 30 ms. A failure that
/// may be the host's load is tried again, at last with patience.
const DEADLINES: [Duration; 3] = [
    Duration::from_millis(500),
    Duration::from_millis(500),
    Duration::from_millis(2000),
];
/// How many times slower than the host ring-0 code may run.
const SLOWDOWN_MAX: f64 = 20.0;
/// Loops faster than this are not called slow: below it the exits around the
/// loop weigh more than the loop.
const SLOW_NS: u64 = 1_000_000;
/// Bytes of a verdict on the child's pipe.
const VERDICT_MAX: usize = 512;

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum KvmStatus {
    /// There is no `/dev/kvm`.
    Absent,
    /// `/dev/kvm` may not be opened by this user.
    NoPermission,
    /// It opens, but a guest does not run properly.
    Unusable {
        /// Why, as the rest of a sentence.
        reason: String,
    },
    /// A guest ran and everything it did was right.
    Usable {
        /// How many times as long as on the host a loop took in the guest.
        slowdown: f64,
        /// How long the probe took, in microseconds.
        micros: u64,
    },
}

impl fmt::Display for KvmStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str(
                "there is no /dev/kvm (no hardware virtualization, or its module is not loaded)",
            ),
            Self::NoPermission => f.write_str(
                "/dev/kvm may not be opened by this user (is the user in the group kvm?)",
            ),
            Self::Unusable { reason } => write!(f, "KVM opens but does not work: {reason}"),
            Self::Usable { slowdown, micros } => write!(
                f,
                "KVM works (a test guest passed in {:.1} ms; its code took {slowdown:.1} times as long as the host's)",
                *micros as f64 / 1000.0
            ),
        }
    }
}

/// Words of the two reasons that are matters of time.
const EMULATED: &str = "so it is emulated";
const HUNG: &str = "hung";

/// Tries KVM, which takes a few milliseconds where it works and at most half a
/// second where it does not; three seconds where all that is wrong is time.
/// Blocks the caller's thread.
pub fn probe() -> KvmStatus {
    let mut status = KvmStatus::Absent;
    for deadline in DEADLINES {
        status = try_once(deadline);
        // A busy host takes the processor away for longer than a test guest runs,
        // and that looks like emulation.
        let by_time = matches!(&status, KvmStatus::Unusable { reason }
            if reason.contains(EMULATED) || reason.contains(HUNG));
        if !by_time {
            break;
        }
    }
    status
}

fn try_once(deadline: Duration) -> KvmStatus {
    let start = Instant::now();
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(e) => {
            return match e.errno() {
                libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmStatus::Absent,
                libc::EACCES | libc::EPERM => KvmStatus::NoPermission,
                errno => unusable(format!("opening it fails: {}", words(errno))),
            };
        }
    };
    if kvm.get_api_version() != 12 {
        return unusable("it does not speak the stable API, version 12".to_owned());
    }
    let (read, write) = match rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC) {
        Ok(pipe) => pipe,
        Err(e) => return unusable(format!("the probe could not make a pipe: {e}")),
    };
    // SAFETY: the child runs `child` alone, which never returns. Its
    // allocations are safe after fork: libc's fork re-initialises the
    // allocator; any lock it might still meet ends in the deadline.
    match unsafe { libc::fork() } {
        0 => child(&kvm, &write),
        pid => {
            drop(write);
            match Pid::from_raw(pid) {
                Some(pid) if pid.as_raw_nonzero().get() > 0 => parent(pid, &read, start, deadline),
                _ => unusable(format!(
                    "the probe could not fork: {}",
                    io::Error::last_os_error()
                )),
            }
        }
    }
}

fn unusable(reason: String) -> KvmStatus {
    KvmStatus::Unusable { reason }
}

fn words(errno: i32) -> String {
    io::Error::from_raw_os_error(errno).to_string()
}

/// The child: a byte per passed check, then 0 and the verdict as JSON.
fn child(kvm: &Kvm, pipe: &OwnedFd) -> ! {
    let send = |bytes: &[u8]| {
        // A parent that has gone needs no verdict.
        let _ = rustix::io::write(pipe, bytes);
    };
    let ran = std::panic::catch_unwind(|| {
        // Should the parent die first, the guest must not outlive it.
        let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
        let verdict = match vm::run(kvm, |step| send(&[step])) {
            Ok(speed) => judge(speed),
            Err(failure) => unusable(describe(&failure)),
        };
        let json = serde_json::to_vec(&verdict).unwrap_or_default();
        send(&[0]);
        send(&json);
    });
    // SAFETY: ends the child without running what belongs to the parent:
    // destructors, exit handlers, the panic that was caught.
    unsafe { libc::_exit(i32::from(ran.is_err())) }
}

fn judge(speed: vm::Speed) -> KvmStatus {
    let slowdown = speed.guest_ns as f64 / speed.native_ns.max(1) as f64;
    if slowdown > SLOWDOWN_MAX && speed.guest_ns > SLOW_NS {
        return unusable(format!(
            "kernel code runs at 1/{slowdown:.0} of native speed, {EMULATED}"
        ));
    }
    KvmStatus::Usable {
        slowdown,
        micros: 0,
    }
}

fn describe(failure: &vm::Failure) -> String {
    match failure {
        vm::Failure::Call(what, errno) => format!("{what} fails: {}", words(*errno)),
        vm::Failure::Exit(how) => (*how).to_owned(),
        vm::Failure::Wrong(what) => format!("{what} gave a wrong result"),
    }
}

/// The parent: reads until the verdict, the child's end, or the deadline.
fn parent(child: Pid, pipe: &OwnedFd, start: Instant, deadline: Duration) -> KvmStatus {
    let mut heard = Vec::with_capacity(VERDICT_MAX);
    let in_time = listen(pipe, start + deadline, &mut heard);
    let _ = kill_process(child, Signal::KILL);
    let ended = loop {
        match waitpid(Some(child), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other.ok().flatten(),
        }
    };
    let micros = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
    let steps = heard.iter().take_while(|&&b| b != 0).count();
    let verdict = heard
        .get(steps + 1..)
        .and_then(|json| serde_json::from_slice(json).ok());
    let next = guest::STEPS.get(steps).copied().unwrap_or("halting");
    match verdict {
        Some(KvmStatus::Usable { slowdown, .. }) => KvmStatus::Usable { slowdown, micros },
        Some(KvmStatus::Unusable { reason }) if steps < guest::STEPS.len() => {
            unusable(format!("a test guest failed at {next}: {reason}"))
        }
        Some(other) => other,
        None if !in_time => unusable(format!(
            "a test guest {HUNG} at {next} (no progress within {} ms)",
            deadline.as_millis()
        )),
        None => match ended.and_then(|(_, status)| status.terminating_signal()) {
            Some(signal) => unusable(format!(
                "a test guest's process died at {next} (signal {signal})"
            )),
            None => unusable(format!("a test guest's process died at {next}")),
        },
    }
}

/// Fills `heard` until end of file; false if `deadline` comes first.
fn listen(pipe: &OwnedFd, deadline: Instant, heard: &mut Vec<u8>) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(pipe, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return false,
        }
        let mut chunk = [0; VERDICT_MAX];
        match rustix::io::read(pipe, &mut chunk) {
            Ok(0) => return true,
            // The child is ours, yet its guest may have corrupted it.
            Ok(n) if heard.len() + n <= VERDICT_MAX => heard.extend_from_slice(&chunk[..n]),
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_ends_in_time_and_gives_a_reason() {
        let start = Instant::now();
        let status = probe();
        let took = start.elapsed();
        println!("{status} [{took:?}]");
        let most: Duration = DEADLINES.into_iter().sum();
        assert!(took < most * 2, "took {took:?}");
        assert!(!status.to_string().is_empty());
    }

    #[test]
    fn speed_is_judged_by_ratio_and_by_time() {
        let judged = |guest_ns, native_ns| {
            judge(vm::Speed {
                guest_ns,
                native_ns,
            })
        };
        assert!(matches!(judged(25_000, 20_000), KvmStatus::Usable { .. }));
        assert!(matches!(
            judged(80_000_000, 20_000),
            KvmStatus::Unusable { .. }
        ));
        // A slow exit around a fast loop is not emulation.
        assert!(matches!(judged(600_000, 20_000), KvmStatus::Usable { .. }));
    }
}
