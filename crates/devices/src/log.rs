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
