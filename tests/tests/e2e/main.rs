//! The product, as its users meet it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod commands;
mod failures;
mod image;
mod isolation;
mod programs;
mod races;
mod streams;
mod templates;
mod volumes;
