//! From a layer's blob to its tar stream, on a thread of its own.
//!
//! Decompressing and hashing take about as long as parsing and writing, so
//! they overlap. What compression it is, the first bytes say: media types in
//! the wild lie, and the diff ID settles what the content must be.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use sha2::{Digest as _, Sha256};

use crate::Digest;

/// Bytes of a buffer between the threads.
const CHUNK: usize = 256 << 10;
/// Buffers in flight.
const DEPTH: usize = 8;
/// Largest window a zstd frame may ask for, log2: what `zstd` itself takes
/// without `--long`.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Counts compressed bytes as they are read.
struct Counted<'a> {
    inner: File,
    count: &'a AtomicU64,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.count
            .fetch_add(u64::try_from(got).unwrap_or(0), Ordering::Relaxed);
        Ok(got)
    }
}

fn decompressor<'a>(file: File, count: &'a AtomicU64) -> io::Result<Box<dyn Read + Send + 'a>> {
    decompressed(Counted { inner: file, count })
}

/// What is in a stream, whatever it is compressed with.
pub(crate) fn decompressed<'a>(
    from: impl Read + Send + 'a,
) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut reader = BufReader::with_capacity(128 << 10, from);
    let head = reader.fill_buf()?;
    if head.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(reader)));
    }
    if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || is_skippable_frame(head) {
        let mut decoder = zstd::Decoder::with_buffer(reader)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG)?;
        return Ok(Box::new(decoder));
    }
    Ok(Box::new(reader))
}

/// RFC 8878 §3.1.2: eStargz-like zstd layers may begin with one.
fn is_skippable_frame(head: &[u8]) -> bool {
    matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

/// The tar stream of a layer. Reads fail once more than the bound has come out.
#[derive(Debug)]
pub(crate) struct Decoded {
    chunks: Receiver<io::Result<Vec<u8>>>,
    current: Vec<u8>,
    at: usize,
    /// Bytes this and later layers may still give.
    budget: u64,
    exceeded: bool,
}

impl Decoded {
    /// Bytes left of the budget.
    pub(crate) fn budget(&self) -> u64 {
        self.budget
    }

    /// Whether a read failed for the bound.
    pub(crate) fn exceeded(&self) -> bool {
        self.exceeded
    }

    /// Reads on to the end: the diff ID covers what follows the archive too.
    pub(crate) fn drain(&mut self) -> io::Result<()> {
        io::copy(self, &mut io::sink()).map(|_| ())
    }
}

impl Read for Decoded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.current.len() {
            match self.chunks.recv() {
                Ok(Ok(chunk)) => {
                    let length = u64::try_from(chunk.len()).unwrap_or(u64::MAX);
                    let Some(budget) = self.budget.checked_sub(length) else {
                        self.exceeded = true;
                        return Err(io::Error::other("it decompresses to more than the limit"));
                    };
                    self.budget = budget;
                    (self.current, self.at) = (chunk, 0);
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => return Ok(0),
            }
        }
        let got = buffer.len().min(self.current.len() - self.at);
        buffer[..got].copy_from_slice(&self.current[self.at..self.at + got]);
        self.at += got;
        Ok(got)
    }
}

/// Decompresses `file` beside `consume`, and gives the digest of everything
/// that came out if it was all read. `count` grows with the compressed bytes.
pub(crate) fn with_layer<T>(
    file: File,
    count: &AtomicU64,
    budget: u64,
    consume: impl FnOnce(&mut Decoded) -> T,
) -> (T, Option<Digest>) {
    let (sender, chunks) = sync_channel(DEPTH);
    let mut decoded = Decoded {
        chunks,
        current: Vec::new(),
        at: 0,
        budget,
        exceeded: false,
    };
    std::thread::scope(|scope| {
        let producer = scope.spawn(move || produce(file, count, &sender));
        let result = consume(&mut decoded);
        // Whoever stopped early must not leave the producer waiting.
        drop(decoded);
        (result, producer.join().unwrap_or(None))
    })
}

fn produce(
    file: File,
    count: &AtomicU64,
    sender: &SyncSender<io::Result<Vec<u8>>>,
) -> Option<Digest> {
    let mut hasher = Sha256::new();
    let mut reader = match decompressor(file, count) {
        Ok(reader) => reader,
        Err(error) => {
            let _ = sender.send(Err(error));
            return None;
        }
    };
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        match (&mut reader).take(CHUNK as u64).read_to_end(&mut chunk) {
            Ok(0) => return Some(Digest::from_hasher(hasher)),
            Ok(_) => {
                hasher.update(&chunk);
                sender.send(Ok(chunk)).ok()?;
            }
            Err(error) => {
                let _ = sender.send(Err(error));
                return None;
            }
        }
    }
}
