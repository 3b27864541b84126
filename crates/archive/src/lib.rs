//! Tar archives: read with bounds, made of a directory tree, and unpacked into one without
//! ever leaving it.
//!
//! [`TarReader`] reads what strangers made. [`pack`] writes what lies at a path; [`unpack`]
//! puts entries into a directory, through descriptors alone, so that no name and no link in
//! an archive leads elsewhere. [`Operation`] is what the host asks a guest to do of these.
//!
//! Both the host and the guest use it; it knows neither, nor images nor containers.

mod operation;
mod pack;
mod reader;
mod sparse;
mod unpack;

pub use operation::{FIELD, Kind, Operation, Stat};
pub use pack::{Ownership, PackError, Packer, pack};
pub use reader::{BLOCK, Entry, EntryKind, MAX_PATH, TarError, TarReader, Xattrs};
pub use sparse::Segment;
pub use unpack::{Rules, UnpackError, Unpacked, unpack};
