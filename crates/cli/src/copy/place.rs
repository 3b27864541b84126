//! What is copied, and where it is to lie: by the rules of `docker cp`.

use std::path::Path;

use anyhow::{Result, bail};
use walnut_archive::Stat;

/// An end of a copy.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    Stream,
    Host(String),
    Container(String, String),
}

impl End {
    pub(super) fn of(text: &str) -> Self {
        match text.split_once(':') {
            _ if text == "-" => Self::Stream,
            // As in Docker, ./a:b is a file.
            Some((name, path)) if !name.is_empty() && !name.starts_with(['/', '.']) => {
                Self::Container(name.into(), path.into())
            }
            _ => Self::Host(text.into()),
        }
    }
}

/// As in Docker, a path begins at the root.
pub(super) fn absolute(path: &str) -> String {
    match path.starts_with('/') {
        true => path.to_owned(),
        false => format!("/{path}"),
    }
}

/// Where something is to lie, and what it is to be called there.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) dir: String,
    pub(super) name: String,
}

/// What is copied.
pub(super) struct Copied<'a> {
    pub(super) path: &'a str,
    pub(super) dir: bool,
}

impl Copied<'_> {
    /// What it is called; nothing, if what is in it is meant.
    pub(super) fn name(&self) -> Option<&str> {
        match self.path.ends_with("/.") || self.path == "." {
            true => None,
            false => Path::new(self.path).file_name()?.to_str(),
        }
    }
}

/// By the rules of `docker cp`: `there` is what lies at `to`.
pub(super) fn place(from: &Copied<'_>, to: &str, there: &Stat) -> Result<Place> {
    let slash = to.ends_with('/') || to.ends_with("/.");
    let parent = || {
        let trimmed = to.trim_end_matches('/');
        let path = Path::new(trimmed);
        let name = path.file_name().and_then(|name| name.to_str());
        let dir = path.parent().and_then(Path::to_str);
        let (Some(name), Some(dir)) = (name, dir) else {
            bail!("copy to {to}: it is no place for a file");
        };
        let dir = if dir.is_empty() { "." } else { dir };
        Ok(Place {
            dir: dir.to_owned(),
            name: name.to_owned(),
        })
    };
    match (there.exists, there.dir) {
        (true, true) => Ok(Place {
            dir: to.to_owned(),
            name: match from.name() {
                Some(name) => name.to_owned(),
                None => ".".to_owned(),
            },
        }),
        (true, false) if from.dir => bail!(
            "copy {} to {to}: that is a file, and this a directory",
            from.path
        ),
        (true, false) if slash => bail!("copy to {to}: it is not a directory"),
        (false, _) if slash && !from.dir => bail!("copy to {to}: there is no such directory"),
        _ => parent(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends() {
        assert_eq!(End::of("-"), End::Stream);
        assert_eq!(
            End::of("web:/a:b"),
            End::Container("web".into(), "/a:b".into())
        );
        for host in ["./a:b", "/a:b", "a", ":x", "../a:b"] {
            assert_eq!(End::of(host), End::Host(host.into()));
        }
    }

    #[test]
    fn places_are_those_of_docker() {
        let stat = |exists, dir| Stat {
            exists,
            dir,
            link: false,
            size: 0,
        };
        let (dir, file, none) = (stat(true, true), stat(true, false), stat(false, false));
        let got = |path: &str, is_dir, to: &str, there: &Stat| {
            let place = place(&Copied { path, dir: is_dir }, to, there);
            place.map(|p| (p.dir, p.name)).map_err(|e| e.to_string())
        };
        let at = |dir: &str, name: &str| Ok((dir.to_owned(), name.to_owned()));
        assert_eq!(got("/a/f", false, "/d", &dir), at("/d", "f"));
        assert_eq!(got("/a/f", false, "/d/g", &file), at("/d", "g"));
        assert_eq!(got("/a/f", false, "/d/g", &none), at("/d", "g"));
        assert_eq!(got("/a", true, "/d", &dir), at("/d", "a"));
        assert_eq!(got("/a/.", true, "/d", &dir), at("/d", "."));
        assert_eq!(got("/a", true, "/d/n", &none), at("/d", "n"));
        assert_eq!(got("/a", true, "/d/n/", &none), at("/d", "n"));
        assert_eq!(got("f", false, "g", &none), at(".", "g"));
        assert_eq!(got("/", true, "/d", &dir), at("/d", "."));
        for (path, is_dir, to, there) in [
            ("/a", true, "/d/f", &file),
            ("/a/f", false, "/d/f/", &file),
            ("/a/f", false, "/n/", &none),
            ("/a/f", false, "/", &none),
        ] {
            assert!(got(path, is_dir, to, there).is_err(), "{path} {to}");
        }
    }
}
