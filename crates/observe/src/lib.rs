//! What sandboxes use of their host, read from outside: no process of theirs is
//! asked, so it works on one that hangs.
//!
//! [`Breakdown::read`] accounts for the host memory of one sandbox, page by page:
//! every page of its processes is in exactly one [`Part`], and the parts add up to
//! the total. [`guest_parts`] says what the guest does with its share.
//!
//! It knows `/proc` and the names of the product's own programs; it knows no
//! sandbox's life, no machine's driver and no command line.

mod breakdown;
mod cached;
mod family;
mod guest;
mod smaps;

use std::{io, path::PathBuf};

pub use breakdown::{Breakdown, CachedFile, Part, ProcessUsage, Subject};
pub use family::{Processes, Relative};
pub use guest::{GuestPart, guest_parts};

/// Result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a figure could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel does not show a process's memory to this user.
    #[error(
        "read the memory of {role} (PID {pid}): permission denied; the kernel shows it to root and to the user whose process it is"
    )]
    Denied {
        /// What the process is to the sandbox.
        role: String,
        /// Its PID.
        pid: u32,
    },
    /// The sandbox has no supervisor (any more).
    #[error("read the sandbox's memory: its supervisor (PID {0}) has ended")]
    Gone(u32),
    /// A file of `/proc` is not what it must be, or cannot be read.
    #[error("read {}: {source}", path.display())]
    Proc {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
}
