//! The rate of the host's time-stamp counter, which is an emulated guest's too.
//!
//! A kernel finds it by watching the PIT. Under emulation that takes tens of
//! milliseconds and fails when the host is busy; then the guest's clock is off
//! or as coarse as its tick. The host knows better.

use std::{
    arch::x86_64::_rdtsc,
    time::{Duration, Instant},
};

/// Shortest span that is measured. Reading clock and counter together is exact
/// to some 50 ns, so this makes 25 parts per million; the kernel's own
/// calibration accepts 500.
const SPAN: Duration = Duration::from_millis(2);

/// Clock and counter at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    clock: Instant,
    counter: u64,
}

impl Moment {
    /// Now: the best of five readings, lest one was interrupted.
    pub(super) fn now() -> Self {
        let read = || {
            // SAFETY: reads a register that every x86_64 lets user space read.
            let before = unsafe { _rdtsc() };
            let clock = Instant::now();
            // SAFETY: as above.
            let counter = unsafe { _rdtsc() };
            (counter.wrapping_sub(before), Self { clock, counter })
        };
        let mut best = read();
        for _ in 0..4 {
            let next = read();
            if next.0 < best.0 {
                best = next;
            }
        }
        best.1
    }

    /// The counter's rate in kHz between this moment and now, which waits until
    /// the span is long enough. `None` where the counter is no clock.
    pub(super) fn rate_khz(self) -> Option<u64> {
        if !steady() {
            return None;
        }
        std::thread::sleep(SPAN.saturating_sub(self.clock.elapsed()));
        let now = Self::now();
        let nanos = now.clock.duration_since(self.clock).as_nanos();
        let ticks = u128::from(now.counter.wrapping_sub(self.counter));
        let khz = u64::try_from((ticks * 1_000_000).checked_div(nanos)?).ok()?;
        // Else the counter was set back, or the host was suspended.
        (100_000..10_000_000).contains(&khz).then_some(khz)
    }
}

/// Whether the counter runs at one rate, always.
fn steady() -> bool {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|flags| {
        let has = |name| flags.split_whitespace().any(|flag| flag == name);
        has("constant_tsc") && has("nonstop_tsc")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let start = Moment::now();
        let (Some(a), Some(b)) = (start.rate_khz(), start.rate_khz()) else {
            assert!(!steady());
            return;
        };
        assert!(a.abs_diff(b) * 1000 < a, "{a} and {b} kHz");
    }
}
