//! Writes read-only EROFS images without privilege.
//!
//! Block 0 is the superblock. File data follows in the order it arrives from
//! the layers, so that it is read and written once ([`data`]); then the
//! blocks of directories, then the inodes with all small data behind them
//! ([`image`]). Data of files that an upper layer removed is punched out: it
//! takes no disk, and no secret a later layer deleted reaches a guest.
//! Reading layers once and punching holes costs less than reading them twice
//! (decompression dominates) or spooling every file.

pub(crate) mod alloc;
pub(crate) mod data;
pub(crate) mod dir;
pub(crate) mod format;
pub(crate) mod image;
