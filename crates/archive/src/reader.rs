//! Reads tar streams: ustar, PAX and GNU (POSIX.1-2017 pax, GNU tar manual).
//!
//! Own reader, as a layer needs what general ones do not promise: bounds on
//! every header a stranger can make large, xattrs and times of nanosecond
//! precision from PAX records, and sparse files of all dialects. Reads forward
//! only; nothing of an entry's data is buffered.

use std::{
    collections::BTreeMap,
    io::{self, Read},
};

use crate::sparse::{self, Segment};

/// Longest path, bytes.
pub const MAX_PATH: usize = 4095;
/// Extended attributes, by name.
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// Bytes of a tar block.
pub const BLOCK: usize = 512;
/// Most bytes of one entry's PAX records: room for 64 KiB xattrs.
const MAX_PAX: u64 = 1 << 20;
/// Most bytes of a value of an xattr (XATTR_SIZE_MAX, less what EROFS's
/// 16-bit length cannot say).
const MAX_XATTR_VALUE: usize = 65_535;
/// Longest xattr name (XATTR_NAME_MAX).
const MAX_XATTR_NAME: usize = 255;

/// Why a stream is no usable tar.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Invalid(String),
}

/// For `return Err(invalid("…"))`.
pub(crate) fn invalid(what: impl Into<String>) -> TarError {
    TarError::Invalid(what.into())
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    File,
    HardLink,
    Symlink,
    Char,
    Block,
    Dir,
    Fifo,
}

/// An entry's header, all extensions applied.
#[derive(Debug, Clone)]
pub struct Entry {
    pub path: Vec<u8>,
    pub kind: EntryKind,
    /// Target of a link of either kind.
    pub link: Vec<u8>,
    /// The low twelve bits of `st_mode`.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    pub xattrs: Option<Box<Xattrs>>,
    /// Bytes of the file once it is extracted.
    pub size: u64,
    /// Device number: major, minor.
    pub device: (u32, u32),
    /// Where the stored bytes belong, if not simply one after the other.
    pub sparse: Option<Vec<Segment>>,
}

type Records = BTreeMap<Vec<u8>, Vec<u8>>;
/// Segments, the size once extracted, and the true name if it has another.
type Sparse = (Vec<Segment>, u64, Option<Vec<u8>>);

/// Reads entries from `inner`.
#[derive(Debug)]
pub struct TarReader<R> {
    inner: R,
    /// Stored bytes of the current entry not yet read.
    remaining: u64,
    /// Padding after them.
    padding: u64,
    globals: Records,
    ended: bool,
}

impl<R: Read> TarReader<R> {
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            remaining: 0,
            padding: 0,
            globals: Records::new(),
            ended: false,
        }
    }

    /// The stream, for what follows the archive's end.
    pub fn into_inner(self) -> R {
        self.inner
    }

    /// The next entry; what was left of the last one's data is skipped.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut locals = Records::new();
        let mut long_name = None;
        let mut long_link = None;
        loop {
            self.skip_data()?;
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let size = header.size()?;
            match header.kind() {
                b'x' | b'X' => locals = parse_records(&self.extension(size, MAX_PAX)?)?,
                b'g' => {
                    let records = parse_records(&self.extension(size, MAX_PAX)?)?;
                    self.globals.extend(records);
                    if self.globals.len() > 1000 {
                        return Err(invalid("too many global headers"));
                    }
                }
                b'L' => long_name = Some(self.extension(size, 1 << 16)?),
                b'K' => long_link = Some(self.extension(size, 1 << 16)?),
                _ => {
                    let mut records = self.globals.clone();
                    records.extend(locals);
                    let parts = (records, long_name, long_link);
                    return self.entry(&header, parts).map(Some);
                }
            }
        }
    }

    /// Reads of the current entry's stored data; 0 at its end.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let got = self.inner.read(&mut buffer[..most])?;
        if got == 0 {
            return Err(truncated());
        }
        self.remaining -= u64::try_from(got).unwrap_or(self.remaining);
        Ok(got)
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        let data = self.remaining;
        let skip = data.saturating_add(self.padding);
        (self.remaining, self.padding) = (0, 0);
        let skipped = io::copy(&mut (&mut self.inner).take(skip), &mut io::sink())?;
        // umoci ends layers without padding or end mark. As with Go's
        // reader, only the data must be there: the diff ID tells if anything
        // else was cut off.
        if skipped < data {
            return Err(truncated().into());
        }
        Ok(())
    }

    /// Takes `size` bytes as the data that follows a header.
    fn begin_data(&mut self, size: u64) -> Result<(), TarError> {
        let padded = size
            .checked_next_multiple_of(BLOCK as u64)
            .ok_or_else(|| invalid("a size overflows"))?;
        self.remaining = size;
        self.padding = padded - size;
        Ok(())
    }

    /// The data of an extension header, as a whole.
    fn extension(&mut self, size: u64, limit: u64) -> Result<Vec<u8>, TarError> {
        if size > limit {
            return Err(invalid(format!(
                "an extended header has {size} bytes, the limit is {limit}"
            )));
        }
        self.begin_data(size)?;
        let mut data = Vec::new();
        (&mut self.inner).take(size).read_to_end(&mut data)?;
        if data.len() as u64 != size {
            return Err(truncated().into());
        }
        self.remaining = 0;
        Ok(data)
    }

    /// The next header block; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        if self.ended {
            return Ok(None);
        }
        let mut block = [0u8; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.inner.read(&mut block[filled..])? {
                0 if filled == 0 => {
                    self.ended = true;
                    return Ok(None);
                }
                0 => return Err(truncated().into()),
                got => filled += got,
            }
        }
        if block.iter().all(|b| *b == 0) {
            self.ended = true;
            return Ok(None);
        }
        let header = Header(block);
        header.verify()?;
        Ok(Some(header))
    }

    fn entry(
        &mut self,
        header: &Header,
        (mut records, long_name, long_link): (Records, Option<Vec<u8>>, Option<Vec<u8>>),
    ) -> Result<Entry, TarError> {
        let mut path = match records.remove(&b"path"[..]) {
            Some(path) => path,
            None => long_name.map_or_else(|| header.path(), until_nul),
        };
        let link = match records.remove(&b"linkpath"[..]) {
            Some(link) => link,
            None => long_link.map_or_else(|| until_nul(header.0[157..257].to_vec()), until_nul),
        };
        let kind = header.entry_kind(&path)?;
        let number =
            |key: &[u8], fallback: &dyn Fn() -> Result<i128, TarError>| match records.get(key) {
                Some(text) => decimal(text),
                None => fallback(),
            };
        let mut stored = match records.get(&b"size"[..]) {
            Some(text) => unsigned(decimal(text)?, "size")?,
            None => header.size()?,
        };
        if kind != EntryKind::File {
            stored = 0; // As Go's archive/tar: these have headers only.
        }
        self.begin_data(stored)?;
        let mut size = stored;
        let mut segments = None;
        if kind == EntryKind::File
            && let Some(map) = sparse::detect(&header.0, &records)?
        {
            let (list, real, name) = self.sparse_map(map)?;
            sparse::check(&list, real, self.remaining)?;
            (segments, size) = (Some(list), real);
            path = name.unwrap_or(path);
        }
        let mtime = match records.get(&b"mtime"[..]) {
            Some(text) => pax_time(text)?,
            None => (to_i64(header.number(136..148)?, "mtime")?, 0),
        };
        for (text, what) in [(&path, "path"), (&link, "link target")] {
            if text.contains(&0) || text.len() > MAX_PATH {
                return Err(invalid(format!("a {what} is too long or holds a NUL")));
            }
        }
        let uid = number(b"uid", &|| header.number(108..116))?;
        let gid = number(b"gid", &|| header.number(116..124))?;
        Ok(Entry {
            xattrs: xattrs(&records)?,
            uid: owner(uid)?,
            gid: owner(gid)?,
            mode: u16::try_from(header.number(100..108)? & 0o7777).unwrap_or(0),
            device: match kind {
                EntryKind::Char | EntryKind::Block => (
                    owner(header.number(329..337)?)?,
                    owner(header.number(337..345)?)?,
                ),
                _ => (0, 0),
            },
            path,
            kind,
            link,
            mtime,
            size,
            sparse: segments,
        })
    }

    /// Reads the parts of a sparse map that lie in the stream.
    fn sparse_map(&mut self, map: sparse::Map) -> Result<Sparse, TarError> {
        match map {
            sparse::Map::Known {
                segments,
                real,
                name,
            } => Ok((segments, real, name)),
            sparse::Map::OldGnu {
                mut segments,
                mut more,
                real,
            } => {
                // Its continuation blocks precede the data and are not part
                // of the entry's size.
                while more {
                    let mut block = [0u8; BLOCK];
                    self.inner.read_exact(&mut block)?;
                    more = sparse::old_gnu_more(&block, &mut segments)?;
                }
                Ok((segments, real, None))
            }
            sparse::Map::InData { real, name } => {
                let mut parser = sparse::DataMap::default();
                loop {
                    let mut block = [0u8; BLOCK];
                    if self.remaining < BLOCK as u64 {
                        return Err(invalid("a sparse map is cut short"));
                    }
                    self.inner.read_exact(&mut block)?;
                    self.remaining -= BLOCK as u64;
                    if let Some(segments) = parser.block(&block)? {
                        return Ok((segments, real, name));
                    }
                }
            }
        }
    }
}

/// One header block.
struct Header([u8; BLOCK]);

impl Header {
    fn verify(&self) -> Result<(), TarError> {
        let told = self.number(148..156)?;
        let bytes = || {
            self.0
                .iter()
                .enumerate()
                .map(|(at, b)| if (148..156).contains(&at) { b' ' } else { *b })
        };
        let unsigned: i128 = bytes().map(i128::from).sum();
        // Ancient tars summed signed chars.
        let signed: i128 = bytes().map(|b| i128::from(b.cast_signed())).sum();
        if told != unsigned && told != signed {
            return Err(invalid(
                "a header's checksum is wrong: this is no tar, or a damaged one",
            ));
        }
        Ok(())
    }

    fn kind(&self) -> u8 {
        self.0[156]
    }

    fn entry_kind(&self, path: &[u8]) -> Result<EntryKind, TarError> {
        Ok(match self.kind() {
            // Before ustar, a directory was a file with a slash at its end.
            b'0' | 0 if path.ends_with(b"/") => EntryKind::Dir,
            b'0' | b'7' | 0 | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::Char,
            b'4' => EntryKind::Block,
            b'5' => EntryKind::Dir,
            b'6' => EntryKind::Fifo,
            other => {
                return Err(invalid(format!(
                    "entries of type {:?} are not supported",
                    char::from(other)
                )));
            }
        })
    }

    fn size(&self) -> Result<u64, TarError> {
        unsigned(self.number(124..136)?, "size")
    }

    fn path(&self) -> Vec<u8> {
        let name = until_nul(self.0[..100].to_vec());
        // GNU's magic has spaces here, and other things where the prefix is.
        let prefix = if &self.0[257..263] == b"ustar\0" {
            until_nul(self.0[345..500].to_vec())
        } else {
            Vec::new()
        };
        if prefix.is_empty() {
            return name;
        }
        [&prefix[..], b"/", &name[..]].concat()
    }

    fn number(&self, range: std::ops::Range<usize>) -> Result<i128, TarError> {
        number(&self.0[range])
    }
}

/// A numeric field: octal text, or base 256 if its top bit is set.
pub(crate) fn number(field: &[u8]) -> Result<i128, TarError> {
    if field.first().is_some_and(|b| b & 0x80 != 0) {
        let start = if field[0] & 0x40 != 0 { -1i128 } else { 0 };
        let mut value = start << 6 | i128::from(field[0] & 0x3f);
        for byte in &field[1..] {
            // At most 12 bytes, 94 bits.
            value = value << 8 | i128::from(*byte);
        }
        return Ok(value);
    }
    let is_blank = |b: &u8| *b == b' ' || *b == 0;
    let start = field
        .iter()
        .position(|b| !is_blank(b))
        .unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(is_blank).unwrap_or(digits.len());
    digits[..end].iter().try_fold(0i128, |value, b| match b {
        b'0'..=b'7' => Ok(value << 3 | i128::from(b - b'0')),
        _ => Err(invalid(
            "a header has a number that is not octal: this is no tar, or a damaged one",
        )),
    })
}

/// PAX records: `<length> <key>=<value>\n`.
fn parse_records(mut data: &[u8]) -> Result<Records, TarError> {
    let bad = || invalid("a PAX header is malformed");
    let mut records = Records::new();
    while !data.is_empty() && data[0] != 0 {
        let space = data
            .iter()
            .take(20)
            .position(|b| *b == b' ')
            .ok_or_else(bad)?;
        let length = usize::try_from(decimal(&data[..space])?).map_err(|_| bad())?;
        if length > data.len() || length < space + 2 || data[length - 1] != b'\n' {
            return Err(bad());
        }
        let record = &data[space + 1..length - 1];
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(bad)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        if key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes" {
            return Err(invalid("sparse files in PAX format 0.0 are not supported"));
        }
        if value.is_empty() {
            records.remove(key); // "Delete": falls back to the header's own field.
        } else {
            records.insert(key.to_vec(), value.to_vec());
        }
        data = &data[length..];
    }
    Ok(records)
}

fn xattrs(records: &Records) -> Result<Option<Box<Xattrs>>, TarError> {
    let mut found = Xattrs::new();
    for (key, value) in records {
        // The other dialect of the same, base64 and percent-encoded.
        if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
            let name = percent_decode(name);
            let value = base64_decode(value).ok_or_else(|| invalid("an xattr is not base64"))?;
            found.entry(name).or_insert(value);
        } else if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            found.insert(name.to_vec(), value.clone());
        }
    }
    for (name, value) in &found {
        if name.len() > MAX_XATTR_NAME || value.len() > MAX_XATTR_VALUE || name.contains(&0) {
            return Err(invalid("an xattr's name or value is too long"));
        }
    }
    Ok((!found.is_empty()).then(|| Box::new(found)))
}

fn percent_decode(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..2).and_then(|d| std::str::from_utf8(d).ok());
        match (*first, digits.and_then(|d| u8::from_str_radix(d, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                rest = &after[2..];
            }
            (byte, _) => {
                out.push(byte);
                rest = after;
            }
        }
    }
    out
}

fn base64_decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut have) = (0u32, 0);
    for byte in text.iter().filter(|b| !matches!(**b, b'=' | b'\n')) {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        have += 6;
        if have >= 8 {
            have -= 8;
            out.push(u8::try_from(bits >> have & 0xff).ok()?);
        }
    }
    Some(out)
}

/// `[-]seconds[.fraction]`, floored to whole seconds plus nanoseconds.
fn pax_time(text: &[u8]) -> Result<(i64, u32), TarError> {
    let bad = || invalid("a PAX time is malformed");
    let text = std::str::from_utf8(text).map_err(|_| bad())?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().map_err(|_| bad())?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let nine: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanos: u32 = nine.parse().map_err(|_| bad())?;
    if whole.starts_with('-') && nanos > 0 {
        let seconds = seconds.checked_sub(1).ok_or_else(bad)?;
        return Ok((seconds, 1_000_000_000 - nanos));
    }
    Ok((seconds, nanos))
}

/// A decimal number of a PAX record.
pub(crate) fn decimal(text: &[u8]) -> Result<i128, TarError> {
    std::str::from_utf8(text)
        .ok()
        .filter(|text| text.len() <= 20)
        .and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| invalid("a number in a PAX header is malformed"))
}

pub(crate) fn unsigned(value: i128, what: &str) -> Result<u64, TarError> {
    u64::try_from(value).map_err(|_| invalid(format!("a {what} is out of range: {value}")))
}

fn to_i64(value: i128, what: &str) -> Result<i64, TarError> {
    i64::try_from(value).map_err(|_| invalid(format!("a {what} is out of range: {value}")))
}

fn owner(value: i128) -> Result<u32, TarError> {
    u32::try_from(value).map_err(|_| {
        invalid(format!(
            "an owner or device number is out of range: {value}"
        ))
    })
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|b| *b == 0) {
        bytes.truncate(end);
    }
    bytes
}

fn truncated() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "it ends in the middle of an entry",
    )
}
