//! Images: from a name in a registry to one read-only block device.
//!
//! [`Reference`] is a parsed image name. [`Store`] keeps what was fetched:
//! blobs by digest, and for each image one EROFS file that any number of
//! sandboxes attach. [`Store::pull`] fetches, verifies and converts;
//! [`Store::resolve`] and [`Store::list`] answer with [`Image`]s;
//! [`Image::lease`] keeps a root file system from being removed while it is used.
//!
//! Converting is this crate's own work (`layer`, `erofs`) and needs no
//! privilege: nothing is unpacked on the host, a layer's owners, devices and
//! capabilities go from its tar into the image. This crate prints nothing, and
//! knows nothing of sandboxes, machines, containers or front ends.

mod convert;
mod digest;
mod erofs;
mod error;
mod layer;
mod manifest;
mod progress;
mod reference;
mod registry;
mod store;

pub use digest::Digest;
pub use error::Error;
pub use progress::{Event, NoProgress, Progress};
pub use reference::Reference;
pub use store::{HealthConfig, Image, Lease, Platform, PullOptions, PullPolicy, Removed, Store};
