//! `walnut-oci`, by hand with bundles and under a real podman.
//!
//! Each test has directories of its own ([`place::Place`]), and nothing may be left in
//! them or of them when it is done.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod bundle;
mod docker;
mod dockerd;
mod engine;
mod killed;
mod network;
mod place;
mod podman;
mod refused;
mod systemd;
mod terminals;
mod upgrade;
