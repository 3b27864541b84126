//! Rate limits: token buckets for bytes and for operations.
//!
//! A bucket holds `size` tokens and fills up in `refill`; `burst` tokens more are
//! there once, for the start. What is larger than the bucket may pass when it is
//! full and leaves a debt, so that nothing waits for ever and the rate still holds.
//! Time is always passed in, never read here.

use std::time::{Duration, Instant};

/// What a [`Bucket`] is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketConfig {
    /// Tokens when full: bytes, or operations.
    pub size: u64,
    /// Tokens that can be spent once, beyond the rate.
    pub burst: u64,
    /// How long an empty bucket takes to be full.
    pub refill: Duration,
}

/// One token bucket.
#[derive(Debug, Clone)]
pub struct Bucket {
    size: u64,
    /// Nanoseconds.
    refill: u128,
    burst: u64,
    /// Tokens there were at `since`; negative for a debt.
    level: i128,
    since: Instant,
}

impl Bucket {
    /// A full bucket; `None` if the configuration says nothing (no size, or no
    /// time): then there is no limit.
    pub fn new(config: BucketConfig, now: Instant) -> Option<Self> {
        let refill = config.refill.as_nanos();
        (config.size > 0 && refill > 0).then_some(Self {
            size: config.size,
            refill,
            burst: config.burst,
            level: i128::from(config.size),
            since: now,
        })
    }

    /// Brings `level` to `now`. Whole tokens only, and their time alone is used up:
    /// nothing is lost or won by asking often.
    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.since).as_nanos();
        let size = u128::from(self.size);
        let full = i128::from(self.size);
        let fresh = elapsed.saturating_mul(size) / self.refill;
        let level = i128::try_from(fresh)
            .ok()
            .and_then(|fresh| self.level.checked_add(fresh))
            .unwrap_or(full);
        if level >= full {
            self.level = full;
            self.since = self.since.max(now);
        } else {
            self.level = level;
            self.since = later(self.since, (fresh * self.refill).div_ceil(size));
        }
    }

    /// When `tokens` may be taken: now, or the moment to ask again.
    fn ready_at(&mut self, tokens: u64, now: Instant) -> Result<(), Instant> {
        self.fill(now);
        let tokens = tokens.saturating_sub(self.burst);
        // More than the bucket holds passes when it is full.
        let missing = i128::from(tokens.min(self.size)) - self.level;
        match u128::try_from(missing) {
            Ok(missing) if missing > 0 => {
                let wait = missing
                    .saturating_mul(self.refill)
                    .div_ceil(u128::from(self.size));
                Err(later(self.since, wait))
            }
            _ => Ok(()),
        }
    }

    fn take(&mut self, tokens: u64) {
        let once = tokens.min(self.burst);
        self.burst -= once;
        self.level -= i128::from(tokens - once);
    }
}

fn later(at: Instant, nanos: u128) -> Instant {
    // 584 years: as good as never.
    let wait = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
    at.checked_add(wait).unwrap_or(at)
}

/// What a [`Limit`] is made of; without any, there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitConfig {
    /// Bytes moved.
    pub bytes: Option<BucketConfig>,
    /// Operations done.
    pub operations: Option<BucketConfig>,
}

/// A limit on bytes and on operations.
#[derive(Debug, Clone, Default)]
pub struct Limit {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Limit {
    /// A limit with full buckets.
    pub fn new(config: LimitConfig, now: Instant) -> Self {
        let bucket = |config: Option<BucketConfig>| Bucket::new(config?, now);
        Self {
            bytes: bucket(config.bytes),
            operations: bucket(config.operations),
        }
    }

    /// Whether nothing is limited: then no time need be asked for.
    pub fn is_none(&self) -> bool {
        self.bytes.is_none() && self.operations.is_none()
    }

    /// Takes `operations` and `bytes` if both are there. Else takes none, and says
    /// when to ask again.
    pub fn take(&mut self, operations: u64, bytes: u64, now: Instant) -> Result<(), Instant> {
        self.ready_at(operations, bytes, now)?;
        if let Some(bucket) = &mut self.operations {
            bucket.take(operations);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        Ok(())
    }

    /// When `operations` and `bytes` can be taken: now, or the moment that this may
    /// be so, if nobody takes from it until then.
    pub fn ready_at(&mut self, operations: u64, bytes: u64, now: Instant) -> Result<(), Instant> {
        let ready = |bucket: &mut Option<Bucket>, tokens| {
            bucket
                .as_mut()
                .map_or(Ok(()), |bucket| bucket.ready_at(tokens, now))
        };
        match (
            ready(&mut self.operations, operations),
            ready(&mut self.bytes, bytes),
        ) {
            (Ok(()), Ok(())) => Ok(()),
            (Err(a), Err(b)) => Err(a.max(b)),
            (Err(at), Ok(())) | (Ok(()), Err(at)) => Err(at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn limit(size: u64, burst: u64, refill: Duration, now: Instant) -> Limit {
        let bytes = Some(BucketConfig {
            size,
            burst,
            refill,
        });
        let config = LimitConfig {
            bytes,
            operations: None,
        };
        Limit::new(config, now)
    }

    #[test]
    fn a_bucket_gives_what_it_holds_then_its_rate() {
        let start = Instant::now();
        let mut limit = limit(1000, 500, MS * 100, start);
        assert_eq!(limit.take(1, 1500, start), Ok(()));
        assert_eq!(limit.take(1, 1, start), Err(start + MS / 10));
        assert_eq!(limit.take(1, 10, start + MS / 2), Err(start + MS));
        assert_eq!(limit.take(1, 10, start + MS), Ok(()));
        // The burst does not come back, the bucket does.
        let later = start + MS * 10_000;
        assert_eq!(limit.take(1, 1000, later), Ok(()));
        assert!(limit.take(1, 1, later).is_err());
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_when_full_and_is_paid_for() {
        let start = Instant::now();
        let mut limit = limit(100, 0, MS * 100, start);
        assert_eq!(limit.take(1, 1, start), Ok(()));
        assert_eq!(limit.take(1, 250, start), Err(start + MS));
        let full = start + MS;
        assert_eq!(limit.take(1, 250, full), Ok(()));
        assert_eq!(limit.take(1, 1, full), Err(full + MS * 151));
        assert_eq!(limit.take(1, 1, full + MS * 151), Ok(()));
    }

    #[test]
    fn both_buckets_or_none() {
        let start = Instant::now();
        let bucket = |size| {
            Some(BucketConfig {
                size,
                burst: 0,
                refill: MS * 10,
            })
        };
        let config = LimitConfig {
            bytes: bucket(10),
            operations: bucket(2),
        };
        let mut limit = Limit::new(config, start);
        assert_eq!(limit.take(1, 10, start), Ok(()));
        // No bytes: the operation is not taken either.
        assert_eq!(limit.take(1, 5, start), Err(start + MS * 5));
        assert_eq!(limit.take(1, 0, start), Ok(()));
        assert_eq!(limit.take(1, 0, start), Err(start + MS * 5));
        assert!(!limit.is_none() && Limit::default().is_none());
    }

    #[test]
    fn extremes_do_not_panic_and_time_may_stand_or_run_back() {
        let start = Instant::now();
        for size in [0, 1, u64::MAX] {
            for refill in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
                let mut limit = limit(size, u64::MAX, refill, start);
                for tokens in [0, 1, u64::MAX, u64::MAX, u64::MAX] {
                    let _ = limit.take(1, tokens, start + MS);
                    let _ = limit.take(1, tokens, start);
                    let _ = limit.take(1, tokens, start + Duration::from_secs(1 << 33));
                }
            }
        }
    }

    #[test]
    fn asking_often_changes_nothing() {
        let start = Instant::now();
        let mut limit = limit(7, 0, Duration::from_nanos(1_000_003), start);
        let mut taken = 0;
        for step in 0..300_000u64 {
            let now = start + Duration::from_nanos(step * 331);
            if limit.take(1, 3, now).is_ok() {
                taken += 3;
            }
        }
        // 99.3 ms at 7 tokens per 1.000003 ms, and the bucket to begin with.
        let most: u64 = 300_000 * 331 * 7 / 1_000_003 + 7;
        assert!(taken <= most && taken + 6 >= most, "{taken} of {most}");
    }

    /// Every small bucket, every sequence of three requests at every distance: what
    /// was promised for a moment can be had then, and no more than the rate, the
    /// bucket and the burst allow is ever given, beyond what passed when it was full.
    #[test]
    fn every_small_bucket_keeps_its_rate_and_its_promises() {
        let start = Instant::now();
        let nanos = Duration::from_nanos;
        for (size, refill, burst) in
            (1..=4).flat_map(|s| (1..=4).flat_map(move |r| (0..=1).map(move |b| (s, r, b))))
        {
            for plan in 0..(6u64 * 4).pow(3) {
                let (mut plan, mut at, mut given, mut excess) = (plan, 0, 0, 0);
                let mut limit = limit(size, burst, nanos(refill), start);
                for _ in 0..3 {
                    let (tokens, wait) = (plan % 6, plan / 6 % 4);
                    plan /= 24;
                    at += wait;
                    let now = start + nanos(at);
                    match limit.take(1, tokens, now) {
                        Ok(()) => {
                            given += tokens;
                            excess = excess.max(tokens.saturating_sub(size));
                        }
                        Err(then) => {
                            assert!(then > now);
                            assert_eq!(limit.clone().take(1, tokens, then), Ok(()));
                        }
                    }
                    let most = size + burst + at * size / refill + excess;
                    assert!(given <= most, "{given} of {most}");
                }
            }
        }
    }
}
