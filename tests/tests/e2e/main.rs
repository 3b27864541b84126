//! The product, as its users meet it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod checkpoint;
mod commands;
mod density;
mod failures;
mod image;
mod install;
mod isolation;
mod network;
mod pools;
mod programs;
mod races;
mod streams;
mod templates;
mod upgrade;
mod verbs;
mod volumes;
mod workloads;
