//! Messages that a guest can provoke, so many and no more.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// Messages let through per [`PERIOD`].
const BURST: u32 = 10;
const PERIOD: Duration = Duration::from_secs(5);

/// Writes at most ten messages in five seconds and counts what it holds back.
#[derive(Debug)]
pub struct Log {
    sink: fn(fmt::Arguments<'_>),
    since: Instant,
    written: u32,
    dropped: u64,
}

impl Log {
    /// A log that hands what it lets through to `sink`.
    pub fn new(sink: fn(fmt::Arguments<'_>)) -> Log {
        Log {
            sink,
            since: Instant::now(),
            written: 0,
            dropped: 0,
        }
    }

    /// Writes the message unless too many came before it.
    pub fn say(&mut self, message: fmt::Arguments<'_>) {
        let now = Instant::now();
        if now.duration_since(self.since) >= PERIOD {
            if self.dropped > 0 {
                (self.sink)(format_args!("{} messages were held back", self.dropped));
            }
            self.since = now;
            self.written = 0;
            self.dropped = 0;
        }
        if self.written < BURST {
            self.written += 1;
            (self.sink)(message);
        } else {
            self.dropped += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    static WRITTEN: AtomicU32 = AtomicU32::new(0);

    #[test]
    fn a_flood_is_held_back_and_counted() {
        let mut log = Log::new(|_| {
            WRITTEN.fetch_add(1, Ordering::SeqCst);
        });
        // A sentence of a guest's making is not even put together.
        struct Costly;
        impl fmt::Display for Costly {
            fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
                unreachable!("a message that nobody reads")
            }
        }
        for _ in 0..100_000 {
            log.say(format_args!("{Costly}"));
        }
        assert_eq!(WRITTEN.swap(0, Ordering::SeqCst), BURST);
        assert_eq!(log.dropped, 100_000 - u64::from(BURST));
        // When the time is over, one sentence says how many there were.
        log.since = log.since.checked_sub(PERIOD).unwrap();
        log.say(format_args!("and"));
        assert_eq!(WRITTEN.swap(0, Ordering::SeqCst), 2);
        assert_eq!(log.dropped, 0);
    }
}
