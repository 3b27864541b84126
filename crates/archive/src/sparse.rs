//! Maps of sparse files: old GNU headers, and PAX formats 0.1 and 1.0.

use std::collections::BTreeMap;

use crate::reader::{BLOCK, TarError, decimal, invalid, number, unsigned};

/// Most segments of one file.
const MAX_SEGMENTS: usize = 1 << 20;

/// `length` stored bytes that belong at `offset` of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub offset: u64,
    pub length: u64,
}

/// Where the map of a sparse file is.
#[derive(Debug)]
pub(crate) enum Map {
    /// All in the headers.
    Known {
        segments: Vec<Segment>,
        real: u64,
        name: Option<Vec<u8>>,
    },
    /// In the header, continued in the blocks that follow it.
    OldGnu {
        segments: Vec<Segment>,
        more: bool,
        real: u64,
    },
    /// At the start of the data.
    InData { real: u64, name: Option<Vec<u8>> },
}

/// What kind of sparse file a header and its PAX records describe, if any.
pub(crate) fn detect(
    header: &[u8; BLOCK],
    records: &BTreeMap<Vec<u8>, Vec<u8>>,
) -> Result<Option<Map>, TarError> {
    let record = |key: &str| records.get(key.as_bytes());
    if header[156] == b'S' {
        let mut segments = Vec::new();
        add_fields(&header[386..482], &mut segments)?;
        return Ok(Some(Map::OldGnu {
            segments,
            more: header[482] != 0,
            real: unsigned(number(&header[483..495])?, "size")?,
        }));
    }
    let name = record("GNU.sparse.name").cloned();
    if let Some(major) = record("GNU.sparse.major") {
        if major != b"1" || record("GNU.sparse.minor").is_none_or(|minor| minor != b"0") {
            return Err(invalid("a sparse file is of an unknown format"));
        }
        let real = record("GNU.sparse.realsize")
            .ok_or_else(|| invalid("a sparse file does not tell its size"))?;
        return Ok(Some(Map::InData {
            real: unsigned(decimal(real)?, "size")?,
            name,
        }));
    }
    let Some(map) = record("GNU.sparse.map") else {
        return Ok(None);
    };
    let real =
        record("GNU.sparse.size").ok_or_else(|| invalid("a sparse file does not tell its size"))?;
    let numbers = map
        .split(|b| *b == b',')
        .map(|text| unsigned(decimal(text)?, "sparse map"))
        .collect::<Result<Vec<u64>, _>>()?;
    Ok(Some(Map::Known {
        segments: pair_up(&numbers)?,
        real: unsigned(decimal(real)?, "size")?,
        name,
    }))
}

/// Reads a continuation block of an old GNU map; true if another follows.
pub(crate) fn old_gnu_more(
    block: &[u8; BLOCK],
    segments: &mut Vec<Segment>,
) -> Result<bool, TarError> {
    add_fields(&block[..504], segments)?;
    Ok(block[504] != 0)
}

fn add_fields(fields: &[u8], segments: &mut Vec<Segment>) -> Result<(), TarError> {
    for pair in fields.chunks_exact(24) {
        if pair[0] == 0 {
            break;
        }
        segments.push(Segment {
            offset: unsigned(number(&pair[..12])?, "sparse map")?,
            length: unsigned(number(&pair[12..])?, "sparse map")?,
        });
        if segments.len() > MAX_SEGMENTS {
            return Err(invalid("a sparse file has too many segments"));
        }
    }
    Ok(())
}

fn pair_up(numbers: &[u64]) -> Result<Vec<Segment>, TarError> {
    if !numbers.len().is_multiple_of(2) || numbers.len() / 2 > MAX_SEGMENTS {
        return Err(invalid("a sparse map is malformed"));
    }
    Ok(numbers
        .chunks_exact(2)
        .map(|pair| Segment {
            offset: pair[0],
            length: pair[1],
        })
        .collect())
}

/// Parses a PAX 1.0 map: decimal lines, first their count, filling blocks.
#[derive(Debug, Default)]
pub(crate) struct DataMap {
    line: Vec<u8>,
    wanted: Option<usize>,
    numbers: Vec<u64>,
}

impl DataMap {
    /// Takes the next block; the segments once they are complete.
    pub(crate) fn block(&mut self, block: &[u8; BLOCK]) -> Result<Option<Vec<Segment>>, TarError> {
        for byte in block {
            if *byte != b'\n' {
                self.line.push(*byte);
                if self.line.len() > 20 {
                    return Err(invalid("a sparse map is malformed"));
                }
                continue;
            }
            let value = unsigned(decimal(&self.line)?, "sparse map")?;
            self.line.clear();
            match self.wanted {
                None => {
                    let count = usize::try_from(value)
                        .ok()
                        .filter(|count| *count <= MAX_SEGMENTS)
                        .ok_or_else(|| invalid("a sparse file has too many segments"))?;
                    self.wanted = Some(count * 2);
                }
                Some(_) => self.numbers.push(value),
            }
            if self.wanted == Some(self.numbers.len()) {
                return pair_up(&self.numbers).map(Some);
            }
        }
        Ok(None)
    }
}

/// Checks that segments are in order, within the file, and as many bytes as
/// are stored.
pub(crate) fn check(segments: &[Segment], real: u64, stored: u64) -> Result<(), TarError> {
    let bad = || invalid("a sparse map does not fit its file");
    let (mut end, mut total) = (0u64, 0u64);
    for segment in segments {
        if segment.offset < end {
            return Err(bad());
        }
        end = segment.offset.checked_add(segment.length).ok_or_else(bad)?;
        total = total.checked_add(segment.length).ok_or_else(bad)?;
    }
    if end > real || total != stored {
        return Err(bad());
    }
    Ok(())
}
