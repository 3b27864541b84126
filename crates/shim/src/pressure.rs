//! Giving memory back when the host is short of it.
//!
//! There is no daemon that could choose whose: each supervisor hears of the pressure
//! from the kernel (PSI, accounting/psi.rst) and asks its own guest, an idle one for all
//! the page cache that it has, a busy one for some of what it has not used lately. They
//! spread out, so that the first ones may be enough. While nothing is short, nothing runs:
//! the kernel wakes who waits.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use tokio::io::{Interest, unix::AsyncFd};
use tracing::{debug, info};
use walnut_sandbox::{Sandbox, Settings};

/// Reported when some task waited for memory for 0.15 s of 2 s. Windows of other lengths
/// than two seconds need a privilege; before Linux 6.5 any window did.
const TRIGGER: &str = "some 150000 2000000";
/// The same share of the last ten seconds, in percent.
const HIGH: f64 = 7.5;
/// Less of a processor than this, in thousands, is idle.
const IDLE: u128 = 20;
/// Less is not worth asking for, in bytes.
const LEAST: u64 = 1 << 20;

/// How often a guest is asked.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// Sandboxes spread over so long.
    spread: Duration,
    /// Machines that stand by wait so long for it to pass, at most.
    patience: Duration,
    /// It has not, if the kernel tells of it again within this.
    again: Duration,
    /// Between two requests, at least.
    gap: Duration,
    /// The same for a guest that had nothing to give, again and again.
    longest: Duration,
}

const PACE: Pace = Pace {
    spread: Duration::from_secs(1),
    patience: Duration::from_secs(10),
    again: Duration::from_secs(3),
    gap: Duration::from_secs(20),
    longest: Duration::from_secs(600),
};

/// What a guest is like when the host is short of memory.
#[derive(Debug, Clone, Copy)]
struct Activity {
    /// Processor time of its container so far, in microseconds.
    cpu_us: u64,
    /// Page cache that it has not used lately, in bytes.
    inactive: u64,
}

/// The part of a sandbox that is needed here.
trait Guest: Sync {
    /// None once it is gone.
    fn activity(&self) -> impl Future<Output = Option<Activity>> + Send;
    /// Bytes that came free; `wanted` is 0 for all.
    fn reclaim(&self, wanted: u64) -> impl Future<Output = Option<u64>> + Send;
}

/// What tells of the pressure.
trait Stalls: Send {
    /// Returns when there is some.
    fn next(&mut self) -> impl Future<Output = io::Result<()>> + Send;
}

/// The kernel's trigger.
struct Trigger(AsyncFd<File>);

impl Stalls for Trigger {
    async fn next(&mut self) -> io::Result<()> {
        let mut report = self.0.ready(Interest::PRIORITY).await?;
        report.clear_ready();
        Ok(())
    }
}

/// A sandbox that may have gone meanwhile, and the name of its container.
struct Supervised {
    sandbox: Weak<Sandbox>,
    container: String,
}

impl Guest for Supervised {
    async fn activity(&self) -> Option<Activity> {
        let stats = self.sandbox.upgrade()?.stats(&self.container).await.ok()?;
        Some(Activity {
            cpu_us: stats.cpu_usage_us,
            inactive: stats.memory_inactive_file,
        })
    }

    async fn reclaim(&self, wanted: u64) -> Option<u64> {
        let sandbox = self.sandbox.upgrade()?;
        match sandbox.reclaim(wanted).await {
            Ok(freed) => Some(freed),
            Err(e) => {
                debug!("reclaim memory: {e}");
                Some(0)
            }
        }
    }
}

/// The trigger, if the host can be watched.
fn trigger(settings: &Settings) -> Option<Trigger> {
    let path = settings.pressure()?;
    match arm(path) {
        Ok(trigger) => Some(trigger),
        Err(e) => {
            info!(
                "no memory is reclaimed by itself when the host is short of it: watch {}: {e}",
                path.display()
            );
            None
        }
    }
}

/// Returns when the host is short of memory and stays so for a while, which is another one
/// in each process: the first who go may be enough. Never where it cannot be watched.
pub(crate) async fn lasting(settings: &Settings) {
    match trigger(settings) {
        Some(trigger) => last_of(trigger, PACE).await,
        None => std::future::pending().await,
    }
}

/// Returns at the second report that comes soon after a first.
async fn last_of(mut stalls: impl Stalls, pace: Pace) {
    while stalls.next().await.is_ok() {
        tokio::time::sleep(pace.patience.mul_f64(fraction())).await;
        let again = tokio::time::timeout(pace.again, stalls.next()).await;
        if matches!(again, Ok(Ok(()))) {
            return;
        }
    }
    std::future::pending().await
}

/// Whether the host was short of memory in the last ten seconds.
pub(crate) fn is_high(settings: &Settings) -> bool {
    let text = settings
        .pressure()
        .and_then(|path| std::fs::read_to_string(path).ok());
    text.is_some_and(|text| stalled(&text) >= HIGH)
}

/// Percent of the last ten seconds in which some task waited.
fn stalled(report: &str) -> f64 {
    report
        .lines()
        .find_map(|line| line.strip_prefix("some avg10="))
        .and_then(|rest| rest.split(' ').next()?.parse().ok())
        .unwrap_or(0.0)
}

/// Watches the host's memory for as long as the sandbox is there.
pub(crate) fn watch(sandbox: &Arc<Sandbox>, container: &str) {
    let Some(trigger) = trigger(sandbox.settings()) else {
        return;
    };
    let guest = Supervised {
        sandbox: Arc::downgrade(sandbox),
        container: container.to_owned(),
    };
    tokio::spawn(async move {
        if let Err(e) = follow(trigger, &guest, PACE).await {
            info!("the host's memory is not watched any more: {e}");
        }
    });
}

fn arm(path: &Path) -> io::Result<Trigger> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    // The kernel wants the closing NUL as well.
    file.write_all(format!("{TRIGGER}\0").as_bytes())?;
    // SAFETY: a `File` is one descriptor, which it keeps.
    let trigger = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) };
    Ok(Trigger(trigger?))
}

/// Asks the guest for memory each time that `stalls` tells; ends with the sandbox.
async fn follow(mut stalls: impl Stalls, guest: &impl Guest, pace: Pace) -> io::Result<()> {
    let mut gap = pace.gap;
    let mut last = (Instant::now(), 0);
    loop {
        stalls.next().await?;
        tokio::time::sleep(pace.spread.mul_f64(fraction())).await;
        let Some(activity) = guest.activity().await else {
            return Ok(());
        };
        let now = Instant::now();
        let wanted = wanted(activity, last.1, now - last.0);
        last = (now, activity.cpu_us);
        let freed = match wanted {
            None => 0,
            Some(wanted) => match guest.reclaim(wanted).await {
                Some(freed) => {
                    info!(
                        wanted,
                        freed, "the host is short of memory: some was reclaimed"
                    );
                    freed
                }
                None => return Ok(()),
            },
        };
        gap = match freed {
            LEAST.. => pace.gap,
            _ => (gap * 2).min(pace.longest),
        };
        tokio::time::sleep(gap).await;
    }
}

/// How much to ask for, 0 being all; nothing, if there is too little. `before` is the
/// processor time, in microseconds, `span` ago.
fn wanted(activity: Activity, before: u64, span: Duration) -> Option<u64> {
    let used = u128::from(activity.cpu_us.saturating_sub(before));
    if used * 1000 < span.as_micros() * IDLE {
        return Some(0);
    }
    let half = activity.inactive / 2;
    (half >= LEAST).then_some(half)
}

/// From 0 to 1, another one each time and in each process.
fn fraction() -> f64 {
    let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0_u8);
    let byte = random.to_le_bytes()[0];
    f64::from(byte) / 255.0
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    const NOW: Pace = Pace {
        spread: Duration::ZERO,
        patience: Duration::ZERO,
        again: Duration::from_secs(60),
        gap: Duration::ZERO,
        longest: Duration::ZERO,
    };

    /// A guest that is there for some readings, and remembers what was asked of it.
    struct Fake {
        readings: Mutex<Vec<Activity>>,
        asked: Mutex<Vec<u64>>,
    }

    /// Tells so many times, then breaks.
    struct Told(u32);

    impl Stalls for Told {
        async fn next(&mut self) -> io::Result<()> {
            self.0 = self.0.checked_sub(1).ok_or(io::ErrorKind::BrokenPipe)?;
            Ok(())
        }
    }

    impl Guest for Fake {
        async fn activity(&self) -> Option<Activity> {
            self.readings.lock().unwrap().pop()
        }

        async fn reclaim(&self, wanted: u64) -> Option<u64> {
            self.asked.lock().unwrap().push(wanted);
            Some(0)
        }
    }

    #[tokio::test]
    async fn pressure_asks_the_guest_until_it_is_gone() {
        let idle = Activity {
            cpu_us: 0,
            inactive: 64 << 20,
        };
        let busy = Activity {
            cpu_us: u64::MAX / 2,
            ..idle
        };
        // The last one is read first.
        let guest = Fake {
            readings: Mutex::new(vec![busy, idle]),
            asked: Mutex::default(),
        };
        follow(Told(3), &guest, NOW).await.unwrap();
        assert_eq!(*guest.asked.lock().unwrap(), [0, 32 << 20]);
    }

    #[tokio::test]
    async fn without_pressure_nobody_is_asked() {
        let guest = Fake {
            readings: Mutex::default(),
            asked: Mutex::default(),
        };
        assert!(follow(Told(0), &guest, NOW).await.is_err());
        assert!(guest.asked.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn who_stands_by_goes_when_it_does_not_pass() {
        last_of(Told(2), NOW).await;
        // It broke before it was told twice.
        let never = last_of(Told(1), NOW);
        assert!(
            tokio::time::timeout(Duration::from_millis(50), never)
                .await
                .is_err()
        );
    }

    #[test]
    fn reports_are_read() {
        let report = "some avg10=12.50 avg60=1.00 avg300=0.00 total=1\nfull avg10=3.00 avg60=0.00";
        assert!((stalled(report) - 12.5).abs() < f64::EPSILON);
        for odd in ["", "some", "some avg10=x", "full avg10=99.00"] {
            assert!(stalled(odd) < f64::EPSILON, "{odd}");
        }
    }

    #[test]
    fn idle_ones_give_all_and_busy_ones_what_they_do_not_use() {
        let activity = |cpu_us, inactive| Activity { cpu_us, inactive };
        let second = Duration::from_secs(1);
        assert_eq!(wanted(activity(1_019_999, 0), 1_000_000, second), Some(0));
        assert_eq!(wanted(activity(1_020_000, 0), 1_000_000, second), None);
        assert_eq!(wanted(activity(1 << 40, 9 << 20), 0, second), Some(9 << 19));
        // A counter that went backwards is no activity.
        assert_eq!(wanted(activity(5, 0), 10, second), Some(0));
    }

    #[tokio::test]
    async fn the_kernel_takes_the_trigger() {
        match arm(Path::new("/proc/pressure/memory")) {
            Ok(_) => {}
            // Not built in, switched off, or older than 6.5 and without privilege.
            Err(e) => println!("this host's memory cannot be watched: {e}"),
        }
        let none = tempfile::NamedTempFile::new().unwrap();
        assert!(arm(none.path()).is_err(), "no file of the kernel's");
    }
}
