//! The same bundle by `crun` and by `walnut-oci`: what comes out must be the same to the
//! byte, standard output, standard error and exit code.
//!
//! Where it cannot be, a case says so and why: by [`Case::differs`], whose words stand in
//! docs/compatibility.md, and then the two must really differ.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod case;
mod confinement;
mod files;
mod process;
mod streams;
