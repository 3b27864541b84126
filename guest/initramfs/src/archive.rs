//! The tree: what is in the archive, and the rules a path must keep.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Cursor, Write};
use std::path::{Path, PathBuf};

use crate::newc::{self, Header, MAX_NAME, WriteError};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;
const MODE_BITS: u32 = 0o7777;

/// Why something could not be added.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// a path that could not be unpacked as meant
    #[error("`{path}` is not a usable path in the guest: {reason}")]
    Path {
        /// The path as given.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// two entries with one path
    #[error("`{path}` is in the archive already")]
    Exists {
        /// The path.
        path: String,
    },
    /// an entry below something that is not a directory
    #[error("`{path}` cannot be added: `{parent}` is not a directory")]
    NotADirectory {
        /// The path.
        path: String,
        /// The part of it that is a file, link or node.
        parent: String,
    },
    /// permission bits beyond 7777
    #[error("mode {mode:o} of `{path}` has bits beyond 7777")]
    Mode {
        /// The path.
        path: String,
        /// The bits as given.
        mode: u32,
    },
    /// a host file that cannot be opened
    #[error("`{host}` cannot be opened")]
    Open {
        /// The file on the host.
        host: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// a host path that is a directory, a device or a socket
    #[error("`{host}` is not a regular file")]
    NotAFile {
        /// The path on the host.
        host: PathBuf,
    },
    /// the format counts sizes in 32 bits
    #[error("`{name}` is {size} bytes; the initramfs format ends below 4 GiB")]
    TooLarge {
        /// The file.
        name: String,
        /// Its size in bytes.
        size: u64,
    },
}

#[derive(Debug)]
enum Content {
    Directory,
    /// An open file: what was checked is what will be written.
    File {
        file: File,
        size: u32,
    },
    Bytes(Vec<u8>),
    Symlink(String),
    CharDevice {
        major: u32,
        minor: u32,
    },
}

#[derive(Debug)]
struct Entry {
    mode: u32,
    content: Content,
}

/// A tree of files, to be written as one archive.
///
/// Paths are absolute guest paths. Directories above an entry appear by themselves
/// (mode 0755) unless they were added with a mode of their own.
#[derive(Debug, Default)]
pub struct Archive {
    /// By the components of the path, so that a directory is followed by what it
    /// holds (as one string, `a-b` would come between `a` and `a/b`).
    entries: BTreeMap<Vec<String>, Entry>,
}

impl Archive {
    /// An archive with nothing in it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An archive with what an init needs before it has mounted anything: `/dev/console`
    /// (the kernel opens it for init's standard streams) and the mount points
    /// `/dev`, `/proc`, `/sys`, `/run` and `/tmp`.
    ///
    /// # Errors
    ///
    /// None in practice; the paths are the ones above.
    pub fn with_init_nodes() -> Result<Self, AddError> {
        let mut archive = Self::new();
        for directory in ["/dev", "/run"] {
            archive.directory(directory, 0o755)?;
        }
        for directory in ["/proc", "/sys"] {
            archive.directory(directory, 0o555)?;
        }
        archive.directory("/tmp", 0o1777)?;
        archive.char_device("/dev/console", 0o600, 5, 1)?;
        Ok(archive)
    }

    /// Adds a directory. A directory that exists already gets the mode.
    ///
    /// # Errors
    ///
    /// If the path is unusable or something else has it.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<(), AddError> {
        let (key, mode) = self.claim(path, mode)?;
        let content = Content::Directory;
        self.entries.insert(key, Entry { mode, content });
        Ok(())
    }

    /// Adds a host file, by an open descriptor: a later rename does not matter.
    ///
    /// # Errors
    ///
    /// If the path is unusable or taken, or the host file is not a regular file below 4 GiB.
    pub fn file(&mut self, path: &str, host: &Path, mode: u32) -> Result<(), AddError> {
        let open = |source| AddError::Open {
            host: host.to_owned(),
            source,
        };
        // Asked first, for opening a FIFO would wait for its other end.
        if !std::fs::metadata(host).map_err(open)?.is_file() {
            let host = host.to_owned();
            return Err(AddError::NotAFile { host });
        }
        let file = File::open(host).map_err(open)?;
        let size = file.metadata().map_err(open)?.len();
        let size = bounded(size, || host.display().to_string())?;
        let (key, mode) = self.claim_new(path, mode)?;
        let content = Content::File { file, size };
        self.entries.insert(key, Entry { mode, content });
        Ok(())
    }

    /// Adds a file with the given bytes.
    ///
    /// # Errors
    ///
    /// If the path is unusable or taken, or the bytes are 4 GiB or more.
    pub fn bytes(&mut self, path: &str, bytes: Vec<u8>, mode: u32) -> Result<(), AddError> {
        bounded(bytes.len() as u64, || path.to_owned())?;
        let (key, mode) = self.claim_new(path, mode)?;
        let content = Content::Bytes(bytes);
        self.entries.insert(key, Entry { mode, content });
        Ok(())
    }

    /// Adds a symbolic link to `target`, which is kept as it is.
    ///
    /// # Errors
    ///
    /// If the path is unusable or taken, or the target is empty or too long.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<(), AddError> {
        if target.is_empty() || target.contains('\0') || target.len() >= MAX_NAME {
            return Err(AddError::Path {
                path: target.to_owned(),
                reason: "a link's target has 1 to 4095 bytes without NUL",
            });
        }
        let (key, mode) = self.claim_new(path, 0o777)?;
        let content = Content::Symlink(target.to_owned());
        self.entries.insert(key, Entry { mode, content });
        Ok(())
    }

    /// Adds a character device node.
    ///
    /// # Errors
    ///
    /// If the path is unusable or taken.
    pub fn char_device(
        &mut self,
        path: &str,
        mode: u32,
        major: u32,
        minor: u32,
    ) -> Result<(), AddError> {
        let (key, mode) = self.claim_new(path, mode)?;
        let content = Content::CharDevice { major, minor };
        self.entries.insert(key, Entry { mode, content });
        Ok(())
    }

    /// Writes the archive and its trailer. Every directory comes before what it holds.
    ///
    /// # Errors
    ///
    /// If the output fails, or a host file cannot be read or has changed its size.
    pub fn write_to(self, output: &mut impl Write) -> Result<(), WriteError> {
        let mut inode = 0_u32;
        for (key, entry) in self.entries {
            inode = inode.checked_add(1).ok_or(WriteError::TooMany)?;
            entry.write(output, &key.join("/"), inode)?;
        }
        newc::write_trailer(output)?;
        output.flush().map_err(WriteError::Output)
    }

    /// As [`Archive::claim`], for what cannot be there twice.
    fn claim_new(&mut self, path: &str, mode: u32) -> Result<(Vec<String>, u32), AddError> {
        let (key, mode) = self.claim(path, mode)?;
        if self.entries.contains_key(&key) {
            let path = path.to_owned();
            return Err(AddError::Exists { path });
        }
        Ok((key, mode))
    }

    /// Checks path and mode, and makes the directories above.
    fn claim(&mut self, path: &str, mode: u32) -> Result<(Vec<String>, u32), AddError> {
        let key = components(path)?;
        if mode & !MODE_BITS != 0 {
            let path = path.to_owned();
            return Err(AddError::Mode { path, mode });
        }
        for depth in 1..=key.len() {
            let parent = &key[..depth];
            match self.entries.get(parent).map(|entry| &entry.content) {
                Some(Content::Directory) => {}
                Some(_) if depth == key.len() => {
                    let path = path.to_owned();
                    return Err(AddError::Exists { path });
                }
                Some(_) => {
                    return Err(AddError::NotADirectory {
                        path: path.to_owned(),
                        parent: format!("/{}", parent.join("/")),
                    });
                }
                None if depth == key.len() => {}
                None => {
                    let (mode, content) = (0o755, Content::Directory);
                    self.entries
                        .insert(parent.to_vec(), Entry { mode, content });
                }
            }
        }
        Ok((key, mode))
    }
}

impl Entry {
    fn write(self, output: &mut impl Write, name: &str, inode: u32) -> Result<(), WriteError> {
        let header = |kind: u32, size: u32, device: (u32, u32)| Header {
            name,
            inode,
            mode: kind | self.mode,
            links: if kind == S_IFDIR { 2 } else { 1 },
            size,
            device,
        };
        let (header, mut data): (_, Box<dyn io::Read>) = match self.content {
            Content::Directory => (header(S_IFDIR, 0, (0, 0)), Box::new(io::empty())),
            Content::CharDevice { major, minor } => {
                (header(S_IFCHR, 0, (major, minor)), Box::new(io::empty()))
            }
            Content::File { file, size } => (header(S_IFREG, size, (0, 0)), Box::new(file)),
            Content::Bytes(bytes) => {
                let size = length(&bytes, name)?;
                (header(S_IFREG, size, (0, 0)), Box::new(Cursor::new(bytes)))
            }
            Content::Symlink(target) => {
                let bytes = target.into_bytes();
                let size = length(&bytes, name)?;
                (header(S_IFLNK, size, (0, 0)), Box::new(Cursor::new(bytes)))
            }
        };
        newc::write_header(output, &header).map_err(WriteError::Output)?;
        newc::write_data(output, &mut data, header.size, name)
    }
}

/// The length of bytes that were checked when they were added.
fn length(bytes: &[u8], name: &str) -> Result<u32, WriteError> {
    u32::try_from(bytes.len()).map_err(|_| WriteError::Changed {
        path: name.to_owned(),
        expected: u32::MAX,
        got: bytes.len() as u64,
    })
}

/// A size that the format can carry.
fn bounded(size: u64, name: impl FnOnce() -> String) -> Result<u32, AddError> {
    u32::try_from(size).map_err(|_| AddError::TooLarge { name: name(), size })
}

/// The components of an absolute guest path.
fn components(path: &str) -> Result<Vec<String>, AddError> {
    let refuse = |reason| {
        let path = path.to_owned();
        Err(AddError::Path { path, reason })
    };
    let Some(relative) = path.strip_prefix('/') else {
        return refuse("it must begin with `/`");
    };
    if relative.contains('\0') {
        return refuse("it contains NUL");
    }
    // The name ends with NUL, which counts.
    if relative.len() >= MAX_NAME {
        return refuse("it is longer than 4095 bytes");
    }
    if newc::is_trailer(relative) {
        return refuse("the format uses this name to end the archive");
    }
    let mut key = Vec::new();
    for component in relative.split('/') {
        match component {
            "" => return refuse("it has an empty component"),
            "." | ".." => return refuse("it has a `.` or `..` component"),
            _ if component.len() > 255 => return refuse("a component is longer than 255 bytes"),
            _ => key.push(component.to_owned()),
        }
    }
    Ok(key)
}
