//! File data: whole blocks straight into the image, what remains of each file
//! into a spool from which it moves behind its inode.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rustix::fs::{FallocateFlags, fallocate};

use super::format::{BLOCK, BLOCK_USIZE, INODE};
use crate::{Error, error::IoAt, layer::tree::Data};

/// Bytes gathered before they are written.
const BUFFER: usize = 1 << 20;

/// Whether the last, partial block of a file goes behind its inode. It must
/// then fit in one block with it (the kernel refuses tails that cross).
pub(crate) fn tail_is_inline(size: u64, xattrs: usize) -> bool {
    let tail = size % BLOCK;
    let head = INODE + u64::try_from(xattrs).unwrap_or(u64::MAX / 2);
    tail != 0 && head + tail <= BLOCK
}

/// Blocks of `size` bytes outside of the inode.
pub(crate) fn outer_blocks(size: u64, xattrs: usize) -> u64 {
    if tail_is_inline(size, xattrs) {
        size / BLOCK
    } else {
        size.div_ceil(BLOCK)
    }
}

/// The image file while it is written, and the spool of tails.
#[derive(Debug)]
pub(crate) struct DataWriter {
    out: File,
    path: PathBuf,
    /// Not yet written bytes, which belong at `buffer_at`.
    buffer: Vec<u8>,
    buffer_at: u64,
    tails: io::BufWriter<File>,
    tails_len: u64,
    /// Bytes of files so far, holes included, and their bound.
    total: u64,
    limit: u64,
}

impl DataWriter {
    /// Writes to `out`, known in messages as `path`; `tails` is an empty
    /// file without a name. Files may hold `limit` bytes in all.
    pub(crate) fn new(out: File, path: &Path, tails: File, limit: u64) -> Self {
        Self {
            out,
            path: path.to_owned(),
            buffer: Vec::with_capacity(BUFFER),
            buffer_at: BLOCK,
            tails: io::BufWriter::with_capacity(BUFFER, tails),
            tails_len: 0,
            total: 0,
            limit,
        }
    }

    /// Byte position at which the next data goes.
    fn position(&self) -> u64 {
        self.buffer_at + self.buffer.len() as u64
    }

    /// Starts a file of `size` bytes whose inode has `xattrs` bytes of xattrs.
    pub(crate) fn begin(&mut self, size: u64, xattrs: usize) -> Result<FileWriter<'_>, Error> {
        let total = self.total.saturating_add(size);
        if total > self.limit {
            return Err(Error::TooLarge {
                what: "the content of the image's files".to_owned(),
                size: total,
                limit: self.limit,
            });
        }
        self.total = total;
        let block = u32::try_from(self.position() / BLOCK).map_err(|_| self.too_large())?;
        Ok(FileWriter {
            start: self.position(),
            outer: outer_blocks(size, xattrs) * BLOCK,
            data: Data {
                size,
                block,
                tail: self.tails_len,
            },
            written: 0,
            writer: self,
        })
    }

    fn too_large(&self) -> Error {
        Error::TooLarge {
            what: "the root file system".to_owned(),
            size: self.position(),
            limit: u64::from(u32::MAX) * BLOCK,
        }
    }

    fn flush(&mut self) -> Result<(), Error> {
        if self.buffer.iter().any(|b| *b != 0) {
            self.out
                .write_all_at(&self.buffer, self.buffer_at)
                .at("write", &self.path)?;
        }
        self.buffer_at = self.position();
        self.buffer.clear();
        Ok(())
    }

    /// Appends `bytes`.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER {
            self.flush()?;
        }
        Ok(())
    }

    /// Moves on to `position`, leaving zeros.
    pub(crate) fn advance_to(&mut self, position: u64) -> Result<(), Error> {
        let gap = position.saturating_sub(self.position());
        match usize::try_from(gap) {
            Ok(gap) if gap <= BLOCK_USIZE => self.append(&[0; BLOCK_USIZE][..gap]),
            _ => {
                self.flush()?;
                self.buffer_at = position;
                Ok(())
            }
        }
    }

    /// Block at which the next data goes; data ends on block boundaries.
    pub(crate) fn next_block(&self) -> Result<u32, Error> {
        u32::try_from(self.position().div_ceil(BLOCK)).map_err(|_| self.too_large())
    }

    /// Reads the spooled tail of a file.
    pub(crate) fn read_tail(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        self.tails
            .get_ref()
            .read_exact_at(buffer, offset)
            .at("read", &self.path)
    }

    /// Makes every spooled byte readable.
    pub(crate) fn flush_tails(&mut self) -> Result<(), Error> {
        self.tails.flush().at("write", &self.path)
    }

    /// Gives back the blocks of data that no name leads to any more.
    pub(crate) fn punch(&mut self, block: u32, blocks: u64) -> Result<(), Error> {
        if blocks == 0 {
            return Ok(());
        }
        self.flush()?;
        let (offset, length) = (u64::from(block) * BLOCK, blocks * BLOCK);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if fallocate(&self.out, flags, offset, length).is_ok() {
            return Ok(());
        }
        let zeros = [0u8; BLOCK_USIZE];
        for at in 0..blocks {
            self.out
                .write_all_at(&zeros, offset + at * BLOCK)
                .at("write", &self.path)?;
        }
        Ok(())
    }

    /// Completes the image with its first block; `size` is a multiple of a
    /// block. The file is on disk when this returns.
    pub(crate) fn finish(mut self, first_block: &[u8], size: u64) -> Result<File, Error> {
        self.flush()?;
        self.out
            .write_all_at(first_block, 0)
            .at("write", &self.path)?;
        self.out.set_len(size).at("write", &self.path)?;
        self.out.sync_all().at("write", &self.path)?;
        Ok(self.out)
    }
}

/// One file's data on its way.
#[derive(Debug)]
pub(crate) struct FileWriter<'a> {
    writer: &'a mut DataWriter,
    data: Data,
    start: u64,
    /// Bytes that go into blocks; the rest is a tail.
    outer: u64,
    written: u64,
}

impl FileWriter<'_> {
    /// Appends bytes, at most as many as the file has.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let room = usize::try_from(self.outer.saturating_sub(self.written)).unwrap_or(usize::MAX);
        let (blocks, tail) = bytes.split_at(bytes.len().min(room));
        self.writer.append(blocks)?;
        if !tail.is_empty() {
            self.writer
                .tails
                .write_all(tail)
                .at("write", &self.writer.path)?;
            self.writer.tails_len += tail.len() as u64;
        }
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Leaves zeros up to `offset` of the file.
    pub(crate) fn skip_to(&mut self, offset: u64) -> Result<(), Error> {
        if self.written < self.outer {
            let to = offset.min(self.outer);
            self.writer.advance_to(self.start + to)?;
            self.written = to;
        }
        while self.written < offset {
            // A tail is smaller than a block.
            let gap = usize::try_from(offset - self.written).unwrap_or(usize::MAX);
            self.write(&[0; BLOCK_USIZE][..gap.min(BLOCK_USIZE)])?;
        }
        Ok(())
    }

    /// Fills up the file and its last block with zeros.
    pub(crate) fn finish(mut self) -> Result<Data, Error> {
        self.skip_to(self.data.size)?;
        self.writer.advance_to(self.start + self.outer)?;
        Ok(self.data)
    }
}
