//! Walnut under a real containerd, driven with `ctr`.
//!
//! Each test has a containerd of its own ([`daemon::Daemon`]), and nothing may be
//! left when it is done: no process, mount, directory or cgroup.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod bootstrap;
mod cri;
mod daemon;
mod events;
mod kill;
mod kubelet;
mod lifecycle;
mod options;
mod pods;
mod recovery;
mod streams;
mod volumes;
