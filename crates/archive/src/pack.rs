//! From a directory tree to a tar stream (POSIX.1-2017 ustar and pax).

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, openat, readlinkat, statat};

use crate::BLOCK;

/// Deepest tree that is packed: a descriptor is open for each level.
const DEPTH_MAX: usize = 256;
const CHUNK: usize = 64 << 10;
/// Largest numbers that a ustar header's fields hold: 11 and 7 octal digits.
const SIZE_MAX: u64 = 0o77_777_777_777;
const ID_MAX: u64 = 0o7_777_777;

/// Why a tree could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// Something in it could not be read.
    #[error("read {path}: {source}")]
    Read {
        /// What, as the archive has it.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The archive could not be written.
    #[error("write the archive: {0}")]
    Write(io::Error),
    /// It is too deep.
    #[error("pack {0}: it is more than {DEPTH_MAX} directories deep")]
    Deep(String),
}

/// Whose an archive says that files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// Their owners'.
    Kept,
    /// This user's and group's.
    Of(u32, u32),
}

/// Writes an archive of what lies at `path`, under `name`, to its end mark.
pub fn pack(
    path: &Path,
    name: &str,
    follow: bool,
    ownership: Ownership,
    out: &mut dyn Write,
) -> Result<(), PackError> {
    let mut packer = Packer { out, ownership };
    packer.tree(path, name.as_bytes(), follow)?;
    packer.end()
}

/// Writes an archive, entry by entry.
pub struct Packer<'a> {
    out: &'a mut dyn Write,
    ownership: Ownership,
}

impl std::fmt::Debug for Packer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

impl<'a> Packer<'a> {
    /// Begins an archive.
    pub fn new(out: &'a mut dyn Write, ownership: Ownership) -> Self {
        Self { out, ownership }
    }

    /// Adds a file of these bytes.
    pub fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<(), PackError> {
        let size = bytes.len() as u64;
        self.header(b'0', name.as_bytes(), b"", &plain(), size)?;
        self.write(bytes)?;
        self.pad(size)
    }

    /// Adds a file of so many bytes.
    pub fn file(&mut self, name: &str, from: &mut dyn Read, size: u64) -> Result<(), PackError> {
        self.header(b'0', name.as_bytes(), b"", &plain(), size)?;
        self.data(name.as_bytes(), from, size)
    }

    /// The end mark.
    pub fn end(&mut self) -> Result<(), PackError> {
        self.write(&[0; 2 * BLOCK])?;
        self.out.flush().map_err(PackError::Write)
    }

    /// Adds a tree.
    fn tree(&mut self, path: &Path, name: &[u8], follow: bool) -> Result<(), PackError> {
        let flags = match follow {
            true => AtFlags::empty(),
            false => AtFlags::SYMLINK_NOFOLLOW,
        };
        let stat = statat(CWD, path, flags).map_err(|e| unread(name, e.into()))?;
        self.one(CWD, path.as_os_str().as_bytes(), name, &stat, follow, 0)
    }

    fn one(
        &mut self,
        dir: impl AsFd,
        file: &[u8],
        name: &[u8],
        stat: &Stat,
        follow: bool,
        depth: usize,
    ) -> Result<(), PackError> {
        let meta = Meta::of(stat);
        let open = |flags: OFlags| {
            let nofollow = if follow {
                OFlags::empty()
            } else {
                OFlags::NOFOLLOW
            };
            let flags = flags | nofollow | OFlags::CLOEXEC | OFlags::NONBLOCK;
            openat(&dir, file, flags, Mode::empty()).map_err(|e| unread(name, e.into()))
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                if depth >= DEPTH_MAX {
                    return Err(PackError::Deep(shown(name)));
                }
                let fd = open(OFlags::RDONLY | OFlags::DIRECTORY)?;
                let with_slash = [name, b"/"].concat();
                self.header(b'5', &with_slash, b"", &meta, 0)?;
                self.entries(&fd, name, depth)
            }
            FileType::RegularFile => {
                let mut from = File::from(open(OFlags::RDONLY)?);
                // What it has now; what comes later is not this archive's.
                let size = from.metadata().map_err(|e| unread(name, e))?.len();
                self.header(b'0', name, b"", &meta, size)?;
                self.data(name, &mut from, size)
            }
            FileType::Symlink => {
                let link = readlinkat(&dir, file, Vec::new());
                let link = link.map_err(|e| unread(name, e.into()))?;
                self.header(b'2', name, link.as_bytes(), &meta, 0)
            }
            FileType::Fifo => self.header(b'6', name, b"", &meta, 0),
            FileType::CharacterDevice => self.header(b'3', name, b"", &meta, 0),
            FileType::BlockDevice => self.header(b'4', name, b"", &meta, 0),
            // Nobody could open it where it is unpacked.
            _ => Ok(()),
        }
    }

    fn entries(&mut self, dir: &OwnedFd, name: &[u8], depth: usize) -> Result<(), PackError> {
        let entries = Dir::read_from(dir).map_err(|e| unread(name, e.into()))?;
        for entry in entries {
            let entry = entry.map_err(|e| unread(name, e.into()))?;
            let file = entry.file_name().to_bytes();
            if matches!(file, b"." | b"..") {
                continue;
            }
            let path = [name, b"/", file].concat();
            let stat = match statat(dir, file, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                // It went meanwhile.
                Err(rustix::io::Errno::NOENT) => continue,
                Err(e) => return Err(unread(&path, e.into())),
            };
            match self.one(dir, file, &path, &stat, false, depth + 1) {
                Err(PackError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                }
                other => other?,
            }
        }
        Ok(())
    }

    /// `size` bytes, with zeros for those that went meanwhile.
    fn data(&mut self, name: &[u8], from: &mut dyn Read, size: u64) -> Result<(), PackError> {
        let mut chunk = vec![0; CHUNK];
        let mut left = size;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            let part = chunk.get_mut(..most).unwrap_or_default();
            let read = match from.read(part) {
                Ok(0) => {
                    part.fill(0);
                    most
                }
                Ok(read) => read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(unread(name, e)),
            };
            let part = part.get(..read).unwrap_or_default();
            self.out.write_all(part).map_err(PackError::Write)?;
            left -= read as u64;
        }
        self.pad(size)
    }

    fn pad(&mut self, size: u64) -> Result<(), PackError> {
        let over = usize::try_from(size % BLOCK as u64).unwrap_or(0);
        match over {
            0 => Ok(()),
            over => self.write(&[0; BLOCK][over..]),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), PackError> {
        self.out.write_all(bytes).map_err(PackError::Write)
    }

    /// A header, after one with what does not fit into it.
    fn header(
        &mut self,
        kind: u8,
        name: &[u8],
        link: &[u8],
        meta: &Meta,
        size: u64,
    ) -> Result<(), PackError> {
        let (uid, gid) = match self.ownership {
            Ownership::Kept => (meta.uid, meta.gid),
            Ownership::Of(uid, gid) => (uid, gid),
        };
        let mut records = Vec::new();
        if name.len() > 100 {
            record(&mut records, b"path", name);
        }
        if link.len() > 100 {
            record(&mut records, b"linkpath", link);
        }
        for (key, value, most) in [
            (b"size".as_slice(), size, SIZE_MAX),
            (b"uid", uid.into(), ID_MAX),
            (b"gid", gid.into(), ID_MAX),
        ] {
            if value > most {
                record(&mut records, key, value.to_string().as_bytes());
            }
        }
        if !records.is_empty() {
            let size = records.len() as u64;
            self.write(&block(b'x', b"pax", b"", &plain(), (0, 0), size))?;
            self.write(&records)?;
            self.pad(size)?;
        }
        self.write(&block(kind, name, link, meta, (uid, gid), size))
    }
}

/// What a header says of a file beside its name.
struct Meta {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: u64,
    device: (u32, u32),
}

fn plain() -> Meta {
    Meta {
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: 0,
        device: (0, 0),
    }
}

impl Meta {
    fn of(stat: &Stat) -> Self {
        let device = stat.st_rdev;
        Self {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: u64::try_from(stat.st_mtime).unwrap_or(0),
            device: (rustix::fs::major(device), rustix::fs::minor(device)),
        }
    }
}

/// A header block of ustar.
fn block(
    kind: u8,
    name: &[u8],
    link: &[u8],
    meta: &Meta,
    (uid, gid): (u32, u32),
    size: u64,
) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let mut put = |at: usize, bytes: &[u8], most: usize| {
        let len = bytes.len().min(most);
        block[at..at + len].copy_from_slice(&bytes[..len]);
    };
    let octal = |value: u64, digits: usize| {
        let most = (1 << (3 * digits)) - 1;
        format!("{:0digits$o}\0", value.min(most)).into_bytes()
    };
    put(0, name, 100);
    put(100, &octal(meta.mode.into(), 7), 8);
    put(108, &octal(uid.into(), 7), 8);
    put(116, &octal(gid.into(), 7), 8);
    put(124, &octal(size, 11), 12);
    put(136, &octal(meta.mtime, 11), 12);
    put(148, b"        ", 8);
    put(156, &[kind], 1);
    put(157, link, 100);
    put(257, b"ustar\x0000", 8);
    put(329, &octal(meta.device.0.into(), 7), 8);
    put(337, &octal(meta.device.1.into(), 7), 8);
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    let sum = format!("{sum:06o}\0 ");
    block[148..156].copy_from_slice(&sum.as_bytes()[..8]);
    block
}

/// A pax record, which has its own length before it.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    // A space, `=` and a newline.
    let rest = key.len() + value.len() + 3;
    let mut len = rest;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    records.extend_from_slice(format!("{len} ").as_bytes());
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

fn unread(name: &[u8], source: io::Error) -> PackError {
    PackError::Read {
        path: shown(name),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;
    use crate::{EntryKind, TarReader};

    #[test]
    fn a_tree_is_packed_and_read() {
        let dir = tempfile::tempdir().unwrap();
        let long = "x".repeat(120);
        let deep = dir.path().join("a").join(&long);
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("file"), "hello").unwrap();
        symlink(format!("/{}", "y".repeat(150)), dir.path().join("link")).unwrap();
        let mut out = Vec::new();
        pack(dir.path(), "top", false, Ownership::Of(7, 8), &mut out).unwrap();
        let mut reader = TarReader::new(&out[..]);
        let mut names = Vec::new();
        while let Some(entry) = reader.next_entry().unwrap() {
            assert_eq!((entry.uid, entry.gid), (7, 8));
            if entry.kind == EntryKind::Symlink {
                assert_eq!(entry.link.len(), 151);
            }
            if entry.kind == EntryKind::File {
                let mut text = [0; 9];
                let read = reader.read_data(&mut text).unwrap();
                assert_eq!(&text[..read], b"hello");
            }
            names.push(String::from_utf8(entry.path).unwrap());
        }
        names.sort();
        let want = [
            "top/".to_owned(),
            "top/a/".into(),
            format!("top/a/{long}/"),
            format!("top/a/{long}/file"),
            "top/link".into(),
        ];
        assert_eq!(names, want);
        // Others read it as well.
        assert_eq!(tar::Archive::new(&out[..]).entries().unwrap().count(), 5);
    }

    #[test]
    fn a_link_is_itself_or_what_it_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "data").unwrap();
        symlink("file", dir.path().join("link")).unwrap();
        let kind = |follow| {
            let mut out = Vec::new();
            let link = dir.path().join("link");
            pack(&link, "l", follow, Ownership::Kept, &mut out).unwrap();
            TarReader::new(&out[..]).next_entry().unwrap().unwrap().kind
        };
        assert_eq!(kind(false), EntryKind::Symlink);
        assert_eq!(kind(true), EntryKind::File);
    }

    #[test]
    fn records_know_their_length() {
        for len in [1, 88, 89, 90, 91, 985, 986, 987, 988, 5000] {
            let mut records = Vec::new();
            record(&mut records, b"path", &vec![b'x'; len]);
            let text = String::from_utf8(records.clone()).unwrap();
            let said: usize = text.split(' ').next().unwrap().parse().unwrap();
            assert_eq!(said, records.len());
        }
    }
}
