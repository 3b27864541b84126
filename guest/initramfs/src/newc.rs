//! The "newc" cpio format: a header of thirteen 8-digit hexadecimal numbers after the
//! magic `070701`, the name, the data, each padded to four bytes.
//!
//! Source: the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`
//! and its reader, `init/initramfs.c`.

use std::io::{self, Read, Write};

/// The longest name that the kernel's reader takes, with the final NUL (`PATH_MAX`).
pub(crate) const MAX_NAME: usize = 4096;
/// The name of the record that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// Why an archive could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// the archive cannot be written
    #[error("the archive cannot be written")]
    Output(#[source] io::Error),
    /// a file of the archive cannot be read
    #[error("`{path}` cannot be read for the archive")]
    Input {
        /// The file's path in the guest.
        path: String,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// a file changed while it was read
    #[error("`{path}` changed while it was read: {expected} bytes became {got}")]
    Changed {
        /// The file's path in the guest.
        path: String,
        /// The size it had at first, in bytes.
        expected: u32,
        /// The bytes that could be read.
        got: u64,
    },
    /// the archive has more entries than its inode numbers can count
    #[error("the archive has too many entries")]
    TooMany,
}

/// One record's fields, apart from the ones that are always zero.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header<'a> {
    /// Path without a leading slash.
    pub(crate) name: &'a str,
    pub(crate) inode: u32,
    /// Type and permission bits, as in `st_mode`.
    pub(crate) mode: u32,
    pub(crate) links: u32,
    /// Bytes of data that follow.
    pub(crate) size: u32,
    /// Device number of a device node: (major, minor).
    pub(crate) device: (u32, u32),
}

/// Bytes of zero padding after `length` bytes.
fn padding(length: u64) -> &'static [u8] {
    match length % 4 {
        1 => &[0; 3],
        2 => &[0; 2],
        3 => &[0; 1],
        _ => &[],
    }
}

/// Writes header and name, up to where the data begins.
pub(crate) fn write_header(output: &mut impl Write, header: &Header<'_>) -> io::Result<()> {
    let name_size = header.name.len() + 1;
    let text = format!(
        "070701{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
        header.inode,
        header.mode,
        0, // uid
        0, // gid
        header.links,
        0, // mtime
        header.size,
        0, // device of the file system: major
        0, // and minor
        header.device.0,
        header.device.1,
        name_size,
        0, // checksum: unused in this variant
    );
    output.write_all(text.as_bytes())?;
    output.write_all(header.name.as_bytes())?;
    output.write_all(&[0])?;
    output.write_all(padding((text.len() + name_size) as u64))
}

/// Copies `size` bytes of `input` as the record's data; `path` is for the message.
///
/// The header has promised the size already, so a file that shrank or grew is an error.
pub(crate) fn write_data(
    output: &mut impl Write,
    input: &mut impl Read,
    size: u32,
    path: &str,
) -> Result<(), WriteError> {
    let mut buffer = vec![0; 1 << 16];
    let mut total = 0_u64;
    loop {
        let count = match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => {
                let path = path.to_owned();
                return Err(WriteError::Input { path, source });
            }
        };
        total += count as u64;
        if total > u64::from(size) {
            break;
        }
        output
            .write_all(&buffer[..count])
            .map_err(WriteError::Output)?;
    }
    if total != u64::from(size) {
        return Err(WriteError::Changed {
            path: path.to_owned(),
            expected: size,
            got: total,
        });
    }
    output
        .write_all(padding(u64::from(size)))
        .map_err(WriteError::Output)
}

/// Writes the record that tells the kernel's reader to stop.
pub fn write_trailer(output: &mut impl Write) -> Result<(), WriteError> {
    let header = Header {
        name: TRAILER,
        inode: 0,
        mode: 0,
        links: 1,
        size: 0,
        device: (0, 0),
    };
    write_header(output, &header).map_err(WriteError::Output)
}

/// Whether `path` is the name that ends an archive, which no entry may have.
pub(crate) fn is_trailer(path: &str) -> bool {
    path == TRAILER
}
