//! What the end-to-end tests stand on: the built programs, the real image from
//! a real registry, and the rule that nothing stays.
//!
//! [`run`] runs a container in front, [`Detached`] one behind; both check, when
//! they are done, that no process, mount, socket or file of the container is
//! left on the host ([`assert_nothing_left`]).

// A test fails by panicking; this crate is nothing but tests.
#![allow(clippy::panic, clippy::expect_used)]

pub mod client;
mod host;
mod left;
mod netns;
mod terminal;
pub mod upgrade;

pub use host::{
    Detached, Done, Host, Running, command, driver, host, machine, programs_image, run, run_with,
    spawn_run, spawn_walnut, unique, walnut,
};
pub use left::{assert_gone, assert_nothing_left, cgroups, kill_process, processes};
pub use netns::Namespace;
pub use terminal::Terminal;

use std::time::{Duration, Instant};

/// Longest anything in a test may take; only a hang reaches it.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// Asks until the answer is yes; panics with `what` at the deadline.
pub fn until(what: &str, mut yes: impl FnMut() -> bool) {
    let start = Instant::now();
    while !yes() {
        assert!(
            start.elapsed() < DEADLINE,
            "{what}: not within {DEADLINE:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
