//! Root file systems and volumes as what a machine attaches and what the agent
//! mounts.
//!
//! [`Rootfs`] turns an image file into a disk and the storages of its overlay;
//! [`VirtioFs`] serves a sandbox's [`Volume`]s from a jailed virtiofsd. Nobody
//! above needs to know where a file system came from, and nothing here knows
//! containers, images or front ends.

mod error;
mod flavor;
mod rootfs;
mod staging;
mod tree;
mod virtiofs;

pub use error::Error;
pub use flavor::find_virtiofsd;
pub use rootfs::Rootfs;
pub use virtiofs::{VirtioFs, VirtioFsState, Volume};
