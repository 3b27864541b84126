//! Walnut under a real containerd, driven with `ctr`.
//!
//! The containerd is the host's, or another one that [`programs`] is told of.
//! Each test has a containerd of its own ([`daemon::Daemon`]), and nothing may be
//! left when it is done: no process, mount, directory or cgroup.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod bootstrap;
mod conformance;
mod cri;
mod daemon;
mod disks;
mod events;
mod kill;
mod kubelet;
mod lifecycle;
mod network;
mod options;
mod pods;
mod programs;
mod recovery;
mod sandboxes;
mod seeds;
mod streams;
mod systemd;
mod upgrade;
mod volumes;
mod workloads;
