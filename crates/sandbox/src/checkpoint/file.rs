//! A file that a checkpoint consists of, and whether it still is what it was.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use rustix::fs::{SeekFrom, seek};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, Result, template::Stamp};

const PAGE: usize = 4096;
/// Read at once, in bytes.
const CHUNK: usize = 64 * PAGE;

/// How a file is digested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// All of it: SHA-256.
    Plain,
    /// Its length, then each page that is not zero behind its number: holes are not read.
    Pages,
}

/// A file as it was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedFile {
    stamp: Stamp,
    /// 64 hexadecimal digits; none for a file that goes no further than this host's next
    /// command.
    digest: Option<String>,
}

impl SavedFile {
    pub(super) fn of(path: &Path, content: Content, digested: bool) -> Result<Self> {
        let digest = digested.then(|| digest(path, content)).transpose()?;
        Ok(Self {
            stamp: Stamp::of(path)?,
            digest,
        })
    }

    /// What no checkpoint can say.
    pub(super) fn problem(&self) -> Option<String> {
        let digest = self.digest.as_deref()?;
        let fine = digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit());
        (!fine).then(|| "a digest is not 64 hexadecimal digits".into())
    }

    /// Refuses a file that is not the one that was saved. Pages are not read as long as
    /// the file shows no change.
    pub(super) fn verify(&self, path: &Path, content: Content) -> Result<()> {
        let now = Stamp::of(path)?;
        let refuse = |why: String| Err(Error::Invalid(format!("use {}: {why}", path.display())));
        if now.size != self.stamp.size {
            return refuse(format!(
                "it is damaged: it has {} bytes and had {}",
                now.size, self.stamp.size
            ));
        }
        if content == Content::Pages && now.same_content(&self.stamp) {
            return Ok(());
        }
        match &self.digest {
            Some(then) if digest(path, content)? == *then => Ok(()),
            Some(_) => refuse("it is damaged: its content is not what was saved".into()),
            None if now.same_content(&self.stamp) => Ok(()),
            None => refuse("it was changed after it was made".into()),
        }
    }
}

/// Opens a regular file of a checkpoint.
pub(super) fn open(path: &Path) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(Error::io("open", path))?;
    match file
        .metadata()
        .map_err(Error::io("examine", path))?
        .is_file()
    {
        true => Ok(file),
        false => Err(Error::Invalid(format!(
            "open {}: it is no regular file",
            path.display()
        ))),
    }
}

fn digest(path: &Path, content: Content) -> Result<String> {
    let file = open(path)?;
    let digest = match content {
        Content::Plain => plain(&file),
        Content::Pages => pages(&file),
    };
    digest.map_err(Error::io("read", path))
}

fn hex(digest: Sha256) -> String {
    let digest = digest.finalize();
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

fn plain(mut file: &File) -> io::Result<String> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(digest)),
            read => digest.update(buffer.get(..read).unwrap_or_default()),
        }
    }
}

fn pages(file: &File) -> io::Result<String> {
    let length = file.metadata()?.len();
    let mut digest = Sha256::new();
    digest.update(length.to_le_bytes());
    let page = PAGE as u64;
    let mut buffer = vec![0; CHUNK];
    let mut end = 0;
    while end < length {
        let start = match seek(file, SeekFrom::Data(end)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        // Whole pages, whatever the file system's blocks are.
        let mut at = start - start % page;
        end = seek(file, SeekFrom::Hole(start))?
            .div_ceil(page)
            .saturating_mul(page)
            .min(length);
        while at < end {
            let count = CHUNK.min(usize::try_from(end - at).unwrap_or(CHUNK));
            let chunk = buffer.get_mut(..count).unwrap_or_default();
            file.read_exact_at(chunk, at)?;
            for (n, bytes) in (0u64..).zip(chunk.chunks(PAGE)) {
                if bytes != [0; PAGE].get(..bytes.len()).unwrap_or_default() {
                    digest.update((at / page + n).to_le_bytes());
                    digest.update(bytes);
                }
            }
            at += count as u64;
        }
    }
    Ok(hex(digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_zeroes_are_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        let file = File::create(&path).unwrap();
        file.set_len((4 << 20) + 7).unwrap();
        file.write_all_at(b"x", 3 << 20).unwrap();
        file.write_all_at(b"end", 4 << 20).unwrap();
        let sparse = digest(&path, Content::Pages).unwrap();
        file.write_all_at(&[0; 1 << 20], 1 << 20).unwrap();
        assert_eq!(digest(&path, Content::Pages).unwrap(), sparse);
        for (at, what) in [(0, "moved"), (3 << 20, "changed")] {
            file.write_all_at(b"y", at).unwrap();
            assert_ne!(digest(&path, Content::Pages).unwrap(), sparse, "{what}");
        }
        file.write_all_at(b"\0", 0).unwrap();
        file.write_all_at(b"x", 3 << 20).unwrap();
        assert_eq!(digest(&path, Content::Pages).unwrap(), sparse);
        file.set_len((4 << 20) + 8).unwrap();
        assert_ne!(digest(&path, Content::Pages).unwrap(), sparse, "longer");
    }

    #[test]
    fn what_was_changed_cut_or_replaced_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        std::fs::write(&path, vec![1; 9000]).unwrap();
        let saved = SavedFile::of(&path, Content::Pages, true).unwrap();
        let undigested = SavedFile::of(&path, Content::Pages, false).unwrap();
        saved.verify(&path, Content::Pages).unwrap();
        undigested.verify(&path, Content::Pages).unwrap();
        // A copy is as good, for one that is digested.
        let copy = dir.path().join("copy");
        std::fs::copy(&path, &copy).unwrap();
        saved.verify(&copy, Content::Pages).unwrap();
        assert!(undigested.verify(&copy, Content::Pages).is_err());

        let refused = |path: &Path| saved.verify(path, Content::Pages).unwrap_err().to_string();
        std::fs::write(&copy, vec![2; 9000]).unwrap();
        assert!(refused(&copy).contains("not what was saved"));
        std::fs::write(&path, vec![1; 8999]).unwrap();
        assert!(refused(&path).contains("8999 bytes and had 9000"));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("copy", &path).unwrap();
        assert!(refused(&path).contains("open"), "{}", refused(&path));
    }
}
