//! A container's log: one JSON object a line, as Docker's `json-file` driver
//! writes them (`{"log":"…\n","stream":"stdout","time":"…"}`).
//!
//! A guest may print for ever, so a log is rotated: at 16 MiB the file becomes
//! `<file>.1`, and the one before it goes. [`LogTerms`] in `<file>.json` say otherwise.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    marker::PhantomData,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use chrono::{SecondsFormat, Utc};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use walnut_machine::takeover::hex;

use crate::{
    Error, LogTerms, Result,
    file::{read_json, write_json},
};

/// Largest file of terms.
const TERMS_MAX: u64 = 4 << 10;
/// Most files of a log that are looked for.
const FILES_MAX: u32 = 100;
/// Longest piece of output in one line; a longer one is split, as Docker does.
const PIECE_MAX: usize = 16 << 10;
/// Longest line that is read back: a piece, every byte of it escaped.
const LINE_MAX: u64 = (PIECE_MAX * 6 + 256) as u64;

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Output, with its newline unless the line was split.
    pub log: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// RFC 3339, UTC, nanoseconds.
    pub time: String,
}

/// Writes both streams of a container.
#[derive(Debug)]
pub(crate) struct LogWriter {
    path: PathBuf,
    file: File,
    size: u64,
    terms: LogTerms,
    partial: [Vec<u8>; 2],
}

/// A log in a state ([`walnut_machine::takeover`]): what is in no file yet.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LogState {
    path: PathBuf,
    stdout: Partial,
    stderr: Partial,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
struct Partial(#[serde(with = "hex")] Vec<u8>);

/// Which stream a piece of output belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Stream {
    Stdout = 0,
    Stderr = 1,
}

impl LogWriter {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = append(path).map_err(Error::io("open log", path))?;
        let size = file
            .metadata()
            .map_err(Error::io("examine log", path))?
            .len();
        Ok(Self {
            path: path.to_path_buf(),
            file,
            size,
            terms: read_json(&terms(path), TERMS_MAX).unwrap_or_default(),
            partial: [Vec::new(), Vec::new()],
        })
    }

    /// For the next program.
    pub(crate) fn state(&self) -> LogState {
        let [stdout, stderr] = self.partial.clone().map(Partial);
        LogState {
            path: self.path.clone(),
            stdout,
            stderr,
        }
    }

    /// Goes on with the log of the program before.
    pub(crate) fn take_over(state: LogState) -> Result<Self> {
        let mut log = Self::open(&state.path)?;
        log.partial = [state.stdout.0, state.stderr.0];
        if log.partial.iter().any(|partial| partial.len() >= PIECE_MAX) {
            return Err(Error::Invalid(
                "go on with a log: a line is too long".into(),
            ));
        }
        Ok(log)
    }

    /// Adds output; whole lines are written at once.
    pub(crate) fn write(&mut self, stream: Stream, mut bytes: &[u8]) -> io::Result<()> {
        let mut out = Vec::new();
        let line = Line::new(stream);
        while !bytes.is_empty() {
            let partial = &mut self.partial[stream as usize];
            let room = PIECE_MAX - partial.len();
            let (take, whole) = match bytes.iter().take(room).position(|&b| b == b'\n') {
                Some(at) => (at + 1, true),
                None => (bytes.len().min(room), bytes.len() >= room),
            };
            let (piece, rest) = bytes.split_at(take);
            partial.extend_from_slice(piece);
            bytes = rest;
            if whole {
                let before = out.len();
                line.encode(&mut out, partial)?;
                partial.clear();
                // What is too much for this file is for the next one.
                if before > 0 && self.size + out.len() as u64 > self.terms.max_size {
                    let last = out.split_off(before);
                    self.append(&out)?;
                    out = last;
                }
            }
        }
        self.append(&out)
    }

    /// Writes what has no newline yet. Called at the end of a stream.
    pub(crate) fn flush(&mut self, stream: Stream) -> io::Result<()> {
        let partial = std::mem::take(&mut self.partial[stream as usize]);
        if partial.is_empty() {
            return Ok(());
        }
        let mut out = Vec::new();
        Line::new(stream).encode(&mut out, &partial)?;
        self.append(&out)
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let len = bytes.len() as u64;
        if self.size + len > self.terms.max_size && self.size > 0 {
            self.rotate()?;
        }
        self.size += len;
        self.file.write_all(bytes)
    }

    fn rotate(&mut self) -> io::Result<()> {
        let files = self.terms.max_file.clamp(1, FILES_MAX);
        for number in (1..files).rev() {
            match fs::rename(rotated(&self.path, number - 1), rotated(&self.path, number)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        if files == 1 {
            fs::remove_file(&self.path)?;
        }
        self.file = append(&self.path)?;
        self.size = 0;
        Ok(())
    }
}

impl LogTerms {
    /// Has them hold for the log at `path`, from when it is opened.
    pub fn store(&self, path: &Path) -> Result<()> {
        write_json(&terms(path), self)
    }
}

fn terms(path: &Path) -> PathBuf {
    suffixed(path, ".json")
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

/// The file that was written so many rotations ago.
pub(crate) fn rotated(path: &Path, number: u32) -> PathBuf {
    match number {
        0 => path.to_owned(),
        _ => suffixed(path, &format!(".{number}")),
    }
}

/// What a [`LogLine`] has beside its output. Short lines come in great numbers: what they
/// have in common is written once.
struct Line(String);

impl Line {
    /// Of output that comes now.
    fn new(stream: Stream) -> Self {
        let stream = match stream {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        };
        let time = Utc::now().to_rfc3339_opts(SecondsFormat::Nanos, true);
        Self(format!(",\"stream\":\"{stream}\",\"time\":\"{time}\"}}\n"))
    }

    fn encode(&self, out: &mut Vec<u8>, piece: &[u8]) -> io::Result<()> {
        out.extend_from_slice(b"{\"log\":");
        serde_json::to_writer(&mut *out, &String::from_utf8_lossy(piece))?;
        out.extend_from_slice(self.0.as_bytes());
        Ok(())
    }
}

/// Reads a log.
pub type LogReader = LineReader<LogLine>;

/// Reads a file of JSON lines from the oldest line on, across its rotations, and goes on
/// when asked again after more was written.
#[derive(Debug)]
pub struct LineReader<T> {
    path: PathBuf,
    file: Option<BufReader<File>>,
    /// What else there was when it was looked for, oldest first, with the bytes that are
    /// to be read of each.
    rest: Option<VecDeque<(File, u64)>>,
    /// What comes later is read as well.
    live: bool,
    /// Bytes of the file that are still to be read.
    left: u64,
    lines: PhantomData<T>,
}

impl<T: DeserializeOwned> LineReader<T> {
    /// A reader at the start; the file need not exist yet.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            file: None,
            rest: None,
            live: true,
            left: u64::MAX,
            lines: PhantomData,
        }
    }

    /// A reader of what has been written by now: it comes to an end, however fast more is
    /// written.
    pub fn up_to_now(path: &Path) -> Result<Self> {
        Ok(Self {
            rest: Some(files(path)?),
            live: false,
            ..Self::new(path)
        })
    }

    /// The next line, or `None` if there is none for now. A line that is still
    /// being written, or is damaged, is not returned.
    pub fn next_line(&mut self) -> Result<Option<T>> {
        loop {
            if self.file.is_none() && !self.open_next()? {
                return Ok(None);
            }
            let Some(file) = &mut self.file else {
                return Ok(None);
            };
            let mut line = Vec::new();
            let read = file
                .by_ref()
                .take(LINE_MAX.min(self.left))
                .read_until(b'\n', &mut line)
                .map_err(Error::io("read log", &self.path))?;
            if !self.live {
                self.left = self.left.saturating_sub(read as u64);
            }
            if line.ends_with(b"\n") {
                if let Ok(line) = serde_json::from_slice(&line) {
                    return Ok(Some(line));
                }
                continue;
            }
            if !self.live {
                self.file = None;
                continue;
            }
            let back = i64::try_from(read).unwrap_or(0);
            file.seek_relative(-back)
                .map_err(Error::io("read log", &self.path))?;
            if !self.rotated_away() {
                return Ok(None);
            }
            self.file = None;
        }
    }

    fn open_next(&mut self) -> Result<bool> {
        let rest = match &mut self.rest {
            Some(rest) => rest,
            None => self.rest.insert(files(&self.path)?),
        };
        let (file, len) = match rest.pop_front() {
            Some(next) => next,
            None if !self.live => return Ok(false),
            None => match File::open(&self.path) {
                Ok(file) => (file, u64::MAX),
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
                Err(e) => return Err(Error::io("open log", &self.path)(e)),
            },
        };
        self.file = Some(BufReader::new(file));
        self.left = if self.live { u64::MAX } else { len };
        Ok(true)
    }

    /// The file being read is no longer the one that is written.
    fn rotated_away(&self) -> bool {
        let (Some(file), Ok(now)) = (&self.file, fs::metadata(&self.path)) else {
            return false;
        };
        file.get_ref()
            .metadata()
            .is_ok_and(|then| (then.dev(), then.ino()) != (now.dev(), now.ino()))
    }
}

/// The files of a log, oldest first, with their sizes.
fn files(path: &Path) -> Result<VecDeque<(File, u64)>> {
    let mut files: VecDeque<(File, u64)> = VecDeque::new();
    let mut known = None;
    // The newest first: what is rotated meanwhile is met a second time, and not missed.
    for number in 0..FILES_MAX {
        let path = rotated(path, number);
        let file = match File::open(&path) {
            Ok(file) => file,
            // The newest may be on its way.
            Err(e) if e.kind() == io::ErrorKind::NotFound && number == 0 => continue,
            Err(e) if e.kind() == io::ErrorKind::NotFound => break,
            Err(e) => return Err(Error::io("open log", path)(e)),
        };
        let meta = file.metadata().map_err(Error::io("examine log", &path))?;
        let is = (meta.dev(), meta.ino());
        if known.replace(is) != Some(is) {
            files.push_front((file, meta.len()));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(reader: &mut LogReader) -> Vec<LogLine> {
        std::iter::from_fn(|| reader.next_line().unwrap()).collect()
    }

    #[test]
    fn lines_are_whole_and_streams_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = LogWriter::open(&path).unwrap();
        let mut reader = LogReader::new(&path);
        log.write(Stream::Stdout, b"on").unwrap();
        log.write(Stream::Stderr, b"bad\n").unwrap();
        log.write(Stream::Stdout, b"e\ntwo\nthr").unwrap();
        let got: Vec<_> = all(&mut reader)
            .into_iter()
            .map(|l| (l.stream, l.log))
            .collect();
        let want = [
            ("stderr", "bad\n"),
            ("stdout", "one\n"),
            ("stdout", "two\n"),
        ];
        assert_eq!(got, want.map(|(a, b)| (a.to_string(), b.to_string())));
        log.flush(Stream::Stdout).unwrap();
        assert_eq!(all(&mut reader)[0].log, "thr");
    }

    #[test]
    fn long_lines_are_split_without_loss() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = LogWriter::open(&path).unwrap();
        let text = "\u{1}".repeat(PIECE_MAX * 2 + 7);
        log.write(Stream::Stdout, text.as_bytes()).unwrap();
        log.flush(Stream::Stdout).unwrap();
        let back: String = all(&mut LogReader::new(&path))
            .into_iter()
            .map(|l| l.log)
            .collect();
        assert_eq!(back, text);
    }

    #[test]
    fn an_endless_writer_fills_two_files_at_most() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = LogWriter::open(&path).unwrap();
        let mut reader = LogReader::new(&path);
        let line = [b"x".repeat(16 << 10).as_slice(), b"\n"].concat();
        for _ in 0..3000 {
            log.write(Stream::Stdout, &line).unwrap();
        }
        let total: u64 = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().metadata().unwrap().len())
            .sum();
        assert!(total <= 2 * crate::terms::LOG_SIZE, "{total}");
        assert!(!all(&mut reader).is_empty());
    }

    #[test]
    fn up_to_now_is_what_there_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = LogWriter::open(&path).unwrap();
        let line = [b"x".repeat(8 << 10).as_slice(), b"\n"].concat();
        while !rotated(&path, 1).exists() {
            log.write(Stream::Stdout, &line).unwrap();
        }
        let before = all(&mut LogReader::new(&path));
        let mut reader = LogReader::up_to_now(&path).unwrap();
        let mut found = vec![reader.next_line().unwrap().unwrap()];
        // Enough for both files to be others by the end.
        for _ in 0..5000 {
            log.write(Stream::Stdout, b"more\n").unwrap();
            log.write(Stream::Stdout, &line).unwrap();
        }
        found.extend(all(&mut reader));
        assert!(found == before);
        assert!(
            LogReader::up_to_now(&dir.path().join("none"))
                .unwrap()
                .next_line()
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn terms_bound_a_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for max_file in [1, 3] {
            let terms = LogTerms {
                max_size: 4 << 10,
                max_file,
                ..LogTerms::default()
            };
            terms.store(&path).unwrap();
            let mut log = LogWriter::open(&path).unwrap();
            // However much comes at once.
            let number = |number: u32| format!("{number}\n");
            log.write(
                Stream::Stdout,
                (0..500).map(number).collect::<String>().as_bytes(),
            )
            .unwrap();
            for number in (500..1000).map(number) {
                log.write(Stream::Stdout, number.as_bytes()).unwrap();
            }
            let count = u32::try_from(files(&path).unwrap().len()).unwrap();
            assert_eq!(count, max_file);
            let largest = files(&path).unwrap().iter().map(|(_, len)| *len).max();
            assert!(largest <= Some(4 << 10), "{largest:?}");
            let lines = all(&mut LogReader::new(&path));
            let first: usize = lines[0].log.trim().parse().unwrap();
            let whole = lines
                .iter()
                .enumerate()
                .all(|(at, line)| line.log == format!("{}\n", first + at));
            assert!(whole && first + lines.len() == 1000 && first > 0);
        }
    }

    #[test]
    fn damaged_lines_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, b"garbage\n{\"log\":1}\n").unwrap();
        let mut log = LogWriter::open(&path).unwrap();
        log.write(Stream::Stdout, b"ok\n").unwrap();
        assert_eq!(all(&mut LogReader::new(&path)).len(), 1);
    }
}
