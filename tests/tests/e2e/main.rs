//! The product, as its users meet it.

mod commands;
mod failures;
mod image;
mod isolation;
mod programs;
mod streams;
mod volumes;
