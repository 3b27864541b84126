//! The header of a state file.
//!
//! ```text
//! 0   8   magic "WALNUTSS"
//! 8   4   format, little-endian, as all numbers
//! 12  4   length of the body
//! 16  8   guest memory, bytes
//! 24  16  identity, which the memory file carries too
//! 40  32  SHA-256 of bytes 0..40 and the body
//! 72      the body
//! ```
//!
//! The digest finds damage, not forgery: who can write the file can digest it.

use std::{fs::File, io, os::unix::fs::FileExt};

use sha2::{Digest, Sha256};

use super::Error;

/// The format written and read.
pub(super) const FORMAT: u32 = 2;
/// Bytes of a body at most: some ten times what 32 vCPUs have.
pub(super) const BODY_MAX: u32 = 4 << 20;
const MAGIC: [u8; 8] = *b"WALNUTSS";
const HEADER: usize = 72;
const HEADER_LEN: u64 = 72;

/// Which snapshot a file belongs to: random.
pub(crate) type Identity = [u8; 16];

/// A state file's contents.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Envelope {
    /// Which snapshot.
    pub(crate) identity: Identity,
    /// Guest memory, bytes.
    pub(crate) memory: u64,
    /// What the machine was, encoded.
    pub(crate) body: Vec<u8>,
}

fn digest(head: &[&[u8]], body: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in head {
        hash.update(part);
    }
    hash.update(body);
    hash.finalize().into()
}

impl Envelope {
    /// Writes it to an empty file.
    pub(crate) fn write(&self, file: &File) -> Result<(), Error> {
        let len = u32::try_from(self.body.len()).unwrap_or(u32::MAX);
        if len > BODY_MAX {
            return Err(Error::TooLong {
                found: u64::from(len),
            });
        }
        let (format, len) = (FORMAT.to_le_bytes(), len.to_le_bytes());
        let memory = self.memory.to_le_bytes();
        let head: [&[u8]; 5] = [&MAGIC, &format, &len, &memory, &self.identity];
        let digest = digest(&head, &self.body);
        let mut bytes = head.concat();
        bytes.extend_from_slice(&digest);
        bytes.extend_from_slice(&self.body);
        file.write_all_at(&bytes, 0)
            .map_err(|e| Error::Io("write the state file", e))
    }

    /// Reads and checks a file. Allocates [`BODY_MAX`] bytes at most.
    pub(crate) fn read(file: &File) -> Result<Self, Error> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)
            .map_err(|e| match e.kind() {
                io::ErrorKind::UnexpectedEof => Error::Foreign("state"),
                _ => Error::Io("read the state file", e),
            })?;
        let mut rest: &[u8] = &header;
        let magic: [u8; 8] = take(&mut rest)?;
        let format: [u8; 4] = take(&mut rest)?;
        let len: [u8; 4] = take(&mut rest)?;
        let memory: [u8; 8] = take(&mut rest)?;
        let identity: Identity = take(&mut rest)?;
        let wanted: [u8; 32] = take(&mut rest)?;
        if magic != MAGIC {
            return Err(Error::Foreign("state"));
        }
        let found = u32::from_le_bytes(format);
        if found != FORMAT {
            return Err(Error::Format { found });
        }
        let body_len = u32::from_le_bytes(len);
        if body_len > BODY_MAX {
            return Err(Error::TooLong {
                found: u64::from(body_len),
            });
        }
        let found = file
            .metadata()
            .map_err(|e| Error::Io("examine the state file", e))?
            .len();
        let expected = HEADER_LEN + u64::from(body_len);
        if found != expected {
            return Err(Error::Length {
                what: "state",
                found,
                expected,
            });
        }
        let size = usize::try_from(body_len).map_err(|_| Error::TooLong { found })?;
        let mut body = vec![0; size];
        file.read_exact_at(&mut body, HEADER_LEN)
            .map_err(|e| Error::Io("read the state file", e))?;
        if digest(&[&magic, &format, &len, &memory, &identity], &body) != wanted {
            return Err(Error::Damaged);
        }
        Ok(Self {
            identity,
            memory: u64::from_le_bytes(memory),
            body,
        })
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], Error> {
    let (first, rest) = bytes.split_first_chunk().ok_or(Error::Foreign("state"))?;
    *bytes = rest;
    Ok(*first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (Envelope, Vec<u8>) {
        let envelope = Envelope {
            identity: [7; 16],
            memory: 64 << 20,
            body: (0..=255).collect(),
        };
        let file = tempfile::tempfile().unwrap();
        envelope.write(&file).unwrap();
        let mut bytes = vec![0; HEADER + 256];
        file.read_exact_at(&mut bytes, 0).unwrap();
        (envelope, bytes)
    }

    fn read(bytes: &[u8]) -> Result<Envelope, Error> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        Envelope::read(&file)
    }

    #[test]
    fn what_was_written_is_read() {
        let (envelope, bytes) = sample();
        assert_eq!(read(&bytes).unwrap(), envelope);
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let (_, bytes) = sample();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_other_length_is_refused() {
        let (_, mut bytes) = sample();
        for len in 0..bytes.len() {
            assert!(read(&bytes[..len]).is_err(), "{len} bytes");
        }
        bytes.push(0);
        assert!(matches!(read(&bytes), Err(Error::Length { .. })));
    }

    #[test]
    fn a_length_beyond_the_bound_is_refused_before_it_is_allocated() {
        let (_, mut bytes) = sample();
        bytes[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(read(&bytes), Err(Error::TooLong { .. })));
        let (_, mut bytes) = sample();
        bytes[8] = 1;
        assert!(matches!(read(&bytes), Err(Error::Format { found: 1 })));
    }
}
