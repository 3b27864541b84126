//! Writes the archive that the sandbox kernel unpacks as its first root file system.
//!
//! An [`Archive`] is a tree of directories, regular files, symbolic links and device
//! nodes; [`Archive::write_to`] turns it into the kernel's "newc" format. The same tree
//! gives the same bytes: entries are sorted, times are zero, everything belongs to root.
//!
//! It knows the format and nothing else: not what the files are for, nor which
//! machine will boot from them.

mod archive;
mod newc;

pub use archive::{AddError, Archive};
pub use newc::{WriteError, write_trailer};

#[cfg(test)]
mod tests;
