//! From a tar stream into a directory, and never out of it.
//!
//! Every name is taken apart, and walked from the directory's descriptor on, component by
//! component: none of them is `..`, and none that is a symbolic link is followed, unless
//! the rules say that links lead nowhere else (in a container's own root, they do not).

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, chmodat, chownat, fchmod,
        linkat, mkdirat, mknodat, openat, statat, symlinkat, unlinkat, utimensat,
    },
    io::Errno,
};

use crate::{Entry, EntryKind, Ownership, TarError, TarReader};

/// Most entries of an archive.
const ENTRIES_MAX: u64 = 4_000_000;
/// Most directories whose modes and times wait for what is in them.
const WAITING_MAX: usize = 100_000;
/// Deepest name.
const DEPTH_MAX: usize = 512;
const CHUNK: usize = 64 << 10;

/// Why an archive could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// It is no archive, or its end is missing.
    #[error("read the archive: {0}")]
    Archive(#[from] TarError),
    /// An entry must not be unpacked.
    #[error("unpack {name:?}: {why}")]
    Refused {
        /// Its name, shortened.
        name: String,
        /// Why.
        why: String,
    },
    /// An entry could not be.
    #[error("unpack {name:?}: {source}")]
    Io {
        /// Its name, shortened.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// What an archive may do.
#[derive(Debug, Clone)]
pub struct Rules {
    /// All names begin with it.
    pub within: Option<String>,
    /// Whose files are; they are the caller's, if it does not say.
    pub ownership: Option<Ownership>,
    /// Device files are made, and set-user-ID programs stay what they are: the archive is
    /// the caller's own, or the directory is none of the caller's.
    pub trusted: bool,
    /// Directories on the way may be symbolic links.
    pub follow: bool,
}

/// What was unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Unpacked {
    /// Entries.
    pub entries: u64,
    /// Device files that were left out.
    pub left_out: u64,
    /// Bytes of files.
    pub bytes: u64,
}

/// Unpacks an archive into a directory.
pub fn unpack(
    from: impl Read,
    dir: BorrowedFd<'_>,
    rules: &Rules,
) -> Result<Unpacked, UnpackError> {
    let mut reader = TarReader::new(from);
    let mut all = Unpacking {
        dir,
        rules,
        waiting: Vec::new(),
        done: Unpacked::default(),
    };
    while let Some(entry) = reader.next_entry()? {
        all.done.entries += 1;
        if all.done.entries > ENTRIES_MAX {
            return Err(refused(
                &entry.path,
                format!("it is one of more than {ENTRIES_MAX}"),
            ));
        }
        all.entry(&mut reader, &entry)?;
    }
    all.finish()?;
    Ok(all.done)
}

struct Unpacking<'a> {
    dir: BorrowedFd<'a>,
    rules: &'a Rules,
    /// Directories that get their modes and times when all is in them.
    waiting: Vec<(Vec<Vec<u8>>, Entry)>,
    done: Unpacked,
}

fn short(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().take(300).collect()
}

fn refused(name: &[u8], why: impl Into<String>) -> UnpackError {
    UnpackError::Refused {
        name: short(name),
        why: why.into(),
    }
}

fn failed(name: &[u8]) -> impl Fn(Errno) -> UnpackError {
    let name = short(name);
    move |errno| UnpackError::Io {
        name: name.clone(),
        source: errno.into(),
    }
}

impl Unpacking<'_> {
    /// The components of a name.
    fn components(&self, name: &[u8]) -> Result<Vec<Vec<u8>>, UnpackError> {
        let parts = name.split(|byte| *byte == b'/');
        let parts: Vec<_> = parts.filter(|p| !matches!(*p, b"" | b".")).collect();
        if parts.contains(&b"..".as_slice()) {
            return Err(refused(name, "its name leads out of the directory"));
        }
        if parts.len() > DEPTH_MAX {
            return Err(refused(name, format!("it is more than {DEPTH_MAX} deep")));
        }
        if let Some(within) = &self.rules.within
            && parts.first() != Some(&within.as_bytes())
        {
            return Err(refused(
                name,
                format!("its name does not begin with {within:?}"),
            ));
        }
        Ok(parts.into_iter().map(<[u8]>::to_vec).collect())
    }

    /// The directory that the last component is in; those on the way are made.
    fn parent(&self, name: &[u8], parts: &[Vec<u8>], make: bool) -> Result<OwnedFd, UnpackError> {
        let nofollow = match self.rules.follow {
            true => OFlags::empty(),
            false => OFlags::NOFOLLOW,
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | nofollow;
        let mut at = self
            .dir
            .try_clone_to_owned()
            .map_err(|source| UnpackError::Io {
                name: short(name),
                source,
            })?;
        for part in parts {
            let next = match openat(&at, part.as_slice(), flags, Mode::empty()) {
                Err(Errno::NOENT) if make => {
                    mkdirat(&at, part.as_slice(), Mode::from(0o755)).map_err(failed(name))?;
                    openat(&at, part.as_slice(), flags, Mode::empty())
                }
                other => other,
            };
            at = match next {
                Err(Errno::LOOP | Errno::NOTDIR) => {
                    return Err(refused(
                        name,
                        format!("{:?} on its way is no directory", short(part)),
                    ));
                }
                other => other.map_err(failed(name))?,
            };
        }
        Ok(at)
    }

    fn entry<R: Read>(
        &mut self,
        reader: &mut TarReader<R>,
        entry: &Entry,
    ) -> Result<(), UnpackError> {
        let name = entry.path.as_slice();
        let parts = self.components(name)?;
        let Some((last, before)) = parts.split_last() else {
            // The directory itself.
            return Ok(());
        };
        let device = matches!(entry.kind, EntryKind::Char | EntryKind::Block);
        if device && !self.rules.trusted {
            self.done.left_out += 1;
            return Ok(());
        }
        let parent = self.parent(name, before, true)?;
        let last = last.as_slice();
        let there = match statat(&parent, last, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Some(FileType::from_raw_mode(stat.st_mode)),
            Err(Errno::NOENT) => None,
            Err(e) => return Err(failed(name)(e)),
        };
        let fail = failed(name);
        if entry.kind == EntryKind::Dir {
            match there {
                Some(FileType::Directory) => {}
                Some(FileType::Symlink) if self.rules.follow => return Ok(()),
                Some(_) => return Err(refused(name, "what is there is no directory")),
                None => mkdirat(&parent, last, Mode::from(0o700)).map_err(&fail)?,
            }
            self.own(&parent, last, entry, name)?;
            if self.waiting.len() < WAITING_MAX {
                self.waiting.push((parts.clone(), entry.clone()));
                return Ok(());
            }
            return self.dress(&parent, last, entry, name);
        }
        match there {
            Some(FileType::Directory) => {
                return Err(refused(name, "what is there is a directory"));
            }
            Some(_) => unlinkat(&parent, last, AtFlags::empty()).map_err(&fail)?,
            None => {}
        }
        match entry.kind {
            EntryKind::File => return self.file(reader, &parent, last, entry),
            EntryKind::HardLink => {
                let target = self.components(&entry.link)?;
                let Some((file, before)) = target.split_last() else {
                    return Err(refused(name, "it is a link to nothing"));
                };
                let from = self.parent(&entry.link, before, false)?;
                let linked = linkat(&from, file.as_slice(), &parent, last, AtFlags::empty());
                return linked.map_err(&fail);
            }
            EntryKind::Symlink => {
                symlinkat(entry.link.as_slice(), &parent, last).map_err(&fail)?;
                return self.own(&parent, last, entry, name);
            }
            EntryKind::Fifo => {
                mknodat(&parent, last, FileType::Fifo, Mode::from(0o600), 0).map_err(&fail)?;
            }
            EntryKind::Char | EntryKind::Block => {
                let kind = match entry.kind {
                    EntryKind::Char => FileType::CharacterDevice,
                    _ => FileType::BlockDevice,
                };
                let device = rustix::fs::makedev(entry.device.0, entry.device.1);
                mknodat(&parent, last, kind, Mode::from(0o600), device).map_err(&fail)?;
            }
            EntryKind::Dir => {}
        }
        self.own(&parent, last, entry, name)?;
        self.dress(&parent, last, entry, name)
    }

    fn file<R: Read>(
        &mut self,
        reader: &mut TarReader<R>,
        parent: &OwnedFd,
        last: &[u8],
        entry: &Entry,
    ) -> Result<(), UnpackError> {
        let name = entry.path.as_slice();
        let io = |source| UnpackError::Io {
            name: short(name),
            source,
        };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let fd = openat(parent, last, flags | OFlags::CLOEXEC, Mode::from(0o600));
        let file = File::from(fd.map_err(failed(name))?);
        let whole = [crate::Segment {
            offset: 0,
            length: entry.size,
        }];
        let segments = entry.sparse.as_deref().unwrap_or(&whole);
        let mut buffer = vec![0; CHUNK];
        for segment in segments {
            let (mut at, mut left) = (segment.offset, segment.length);
            while left > 0 {
                let most = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
                let part = buffer.get_mut(..most).unwrap_or_default();
                let read = reader.read_data(part).map_err(TarError::from)?;
                if read == 0 {
                    return Err(TarError::Io(io::ErrorKind::UnexpectedEof.into()).into());
                }
                let part = part.get(..read).unwrap_or_default();
                file.write_all_at(part, at).map_err(io)?;
                (at, left) = (at + read as u64, left - read as u64);
                self.done.bytes += read as u64;
            }
        }
        file.set_len(entry.size).map_err(io)?;
        self.own(parent, last, entry, name)?;
        fchmod(&file, self.mode(entry)).map_err(failed(name))?;
        let _ = utimensat(parent, last, &times(entry), AtFlags::SYMLINK_NOFOLLOW);
        Ok(())
    }

    fn mode(&self, entry: &Entry) -> Mode {
        let bits = match self.rules.trusted {
            true => 0o7777,
            // Nobody's program becomes root's here.
            false => 0o1777,
        };
        Mode::from(u32::from(entry.mode) & bits)
    }

    fn own(
        &self,
        parent: impl AsFd,
        last: &[u8],
        entry: &Entry,
        name: &[u8],
    ) -> Result<(), UnpackError> {
        let (uid, gid) = match self.rules.ownership {
            None => return Ok(()),
            Some(Ownership::Kept) => (entry.uid, entry.gid),
            Some(Ownership::Of(uid, gid)) => (uid, gid),
        };
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        chownat(
            parent,
            last,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(failed(name))
    }

    /// Gives something that is no link its mode and its time.
    fn dress(
        &self,
        parent: &OwnedFd,
        last: &[u8],
        entry: &Entry,
        name: &[u8],
    ) -> Result<(), UnpackError> {
        // Through a descriptor where it could have become a link meanwhile.
        if entry.kind == EntryKind::Dir {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            match openat(parent, last, flags, Mode::empty()) {
                Ok(dir) => fchmod(&dir, self.mode(entry)).map_err(failed(name))?,
                Err(Errno::LOOP | Errno::NOTDIR | Errno::NOENT) => return Ok(()),
                Err(e) => return Err(failed(name)(e)),
            }
        } else {
            chmodat(parent, last, self.mode(entry), AtFlags::empty()).map_err(failed(name))?;
        }
        let _ = utimensat(parent, last, &times(entry), AtFlags::SYMLINK_NOFOLLOW);
        Ok(())
    }

    /// The last first: a directory may forbid to look into it.
    fn finish(&mut self) -> Result<(), UnpackError> {
        while let Some((parts, entry)) = self.waiting.pop() {
            let Some((last, before)) = parts.split_last() else {
                continue;
            };
            match self.parent(&entry.path, before, false) {
                Ok(parent) => self.dress(&parent, last, &entry, &entry.path)?,
                // A later entry has taken its place.
                Err(_) => continue,
            }
        }
        Ok(())
    }
}

fn times(entry: &Entry) -> Timestamps {
    let (tv_sec, nanos) = entry.mtime;
    let time = Timespec {
        tv_sec,
        tv_nsec: nanos.into(),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

#[cfg(test)]
mod tests;
