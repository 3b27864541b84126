//! One thing that an installed node has.

use std::{
    fmt, fs,
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use super::amendment::Amendment;

/// Something that is to be there.
#[derive(Debug)]
pub(super) enum Step {
    /// A copy of a file.
    Copy {
        from: PathBuf,
        to: PathBuf,
        mode: u32,
    },
    /// A symbolic link.
    Link { at: PathBuf, to: PathBuf },
    /// A file of our own words.
    Text { to: PathBuf, text: String },
    /// Some of somebody else's file.
    Amend { file: PathBuf, with: Amendment },
}

/// How things are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Done,
    Absent,
    Other,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Copy { to, .. } | Self::Text { to, .. } => write!(f, "{}", to.display()),
            Self::Link { at, to } => write!(f, "{} -> {}", at.display(), to.display()),
            Self::Amend { file, with } => write!(f, "{with} in {}", file.display()),
        }
    }
}

impl Step {
    pub(super) fn state(&self) -> Result<State> {
        match self {
            Self::Copy { from, to, mode } => {
                let Some(meta) = found(fs::metadata(to), to)? else {
                    return Ok(State::Absent);
                };
                let same = meta.permissions().mode() & 0o7777 == *mode && same_bytes(from, to)?;
                Ok(if same { State::Done } else { State::Other })
            }
            Self::Link { at, to } => Ok(match found(fs::symlink_metadata(at), at)? {
                None => State::Absent,
                Some(_) if fs::read_link(at).is_ok_and(|target| target == *to) => State::Done,
                Some(_) => State::Other,
            }),
            Self::Text { to, text } => Ok(match found(fs::read(to), to)? {
                None => State::Absent,
                Some(bytes) if bytes == text.as_bytes() => State::Done,
                Some(_) => State::Other,
            }),
            Self::Amend { file, with } => {
                let text = read(file)?;
                Ok(match with.add(&text).with_context(|| amend(file))? {
                    after if after == text => State::Done,
                    _ if with.is_absent(&text) => State::Absent,
                    _ => State::Other,
                })
            }
        }
    }

    pub(super) fn make(&self) -> Result<()> {
        match self {
            Self::Copy { from, to, mode } => {
                let mut source =
                    fs::File::open(from).with_context(|| format!("open {}", from.display()))?;
                replace(to, *mode, &mut source)
            }
            Self::Link { at, to } => {
                let new = beside(at)?;
                symlink(to, &new)
                    .and_then(|()| fs::rename(&new, at))
                    .with_context(|| format!("link {}", at.display()))
            }
            Self::Text { to, text } => replace(to, 0o644, &mut text.as_bytes()),
            Self::Amend { file, with } => {
                let text = read(file)?;
                let after = with.add(&text).with_context(|| amend(file))?;
                replace(file, mode_of(file), &mut after.as_bytes())
            }
        }
    }

    pub(super) fn is_gone(&self) -> Result<bool> {
        match self {
            Self::Copy { to: at, .. } | Self::Text { to: at, .. } | Self::Link { at, .. } => {
                Ok(found(fs::symlink_metadata(at), at)?.is_none())
            }
            Self::Amend { file, with } => Ok(with.is_absent(&read(file)?)),
        }
    }

    pub(super) fn undo(&self) -> Result<()> {
        match self {
            Self::Copy { to: at, .. } | Self::Text { to: at, .. } | Self::Link { at, .. } => {
                fs::remove_file(at).with_context(|| format!("remove {}", at.display()))
            }
            Self::Amend { file, with } => {
                let after = with.remove(&read(file)?).with_context(|| amend(file))?;
                if after.trim().is_empty() {
                    // It was made for us.
                    return fs::remove_file(file)
                        .with_context(|| format!("remove {}", file.display()));
                }
                replace(file, mode_of(file), &mut after.as_bytes())
            }
        }
    }
}

fn amend(file: &Path) -> String {
    format!("amend {}", file.display())
}

/// `None` for what does not exist.
fn found<T>(result: io::Result<T>, path: &Path) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("examine {}", path.display())),
    }
}

/// A file that is not there says nothing.
fn read(file: &Path) -> Result<String> {
    Ok(found(fs::read_to_string(file), file)?.unwrap_or_default())
}

fn mode_of(file: &Path) -> u32 {
    fs::metadata(file).map_or(0o644, |meta| meta.permissions().mode() & 0o7777)
}

fn same_bytes(a: &Path, b: &Path) -> Result<bool> {
    let open =
        |path: &Path| fs::File::open(path).with_context(|| format!("open {}", path.display()));
    let (mut first, mut second) = (open(a)?, open(b)?);
    let length = |file: &fs::File| file.metadata().map(|meta| meta.len());
    if length(&first)? != length(&second)? {
        return Ok(false);
    }
    let (mut one, mut other) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let n = first.read(&mut one)?;
        if n == 0 {
            return Ok(true);
        }
        let Some(other) = other.get_mut(..n) else {
            return Ok(false);
        };
        second.read_exact(other)?;
        if one.get(..n) != Some(&*other) {
            return Ok(false);
        }
    }
}

/// A name for what shall take the place of `path`; its directory is made.
fn beside(path: &Path) -> Result<PathBuf> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        bail!("install {}: it has no name", path.display());
    };
    fs::create_dir_all(dir).with_context(|| format!("create directory {}", dir.display()))?;
    let new = dir.join(format!(".{}.new", name.to_string_lossy()));
    // Of one that was cut off.
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", new.display()))
        }
        _ => Ok(new),
    }
}

/// Puts a whole file in the place of another: who has that open or runs it keeps it.
fn replace(to: &Path, mode: u32, from: &mut impl Read) -> Result<()> {
    let new = beside(to)?;
    let mut write = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&new)?;
        io::copy(from, &mut file)?;
        file.flush()?;
        // What the umask took away.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&new, to)
    };
    write().with_context(|| format!("write {}", to.display()))
}
