//! Values on the command line that are more than words.

use std::{path::PathBuf, str::FromStr};

use walnut_sandbox::Bytes;

/// Bytes, written as Docker takes them: `512m`, `1.5g`, `1048576`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) i64);

/// Smallest limit Docker accepts, and less than any program needs.
const MEMORY_MIN: i64 = 6 << 20;

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Bytes(bytes) = text.parse()?;
        match i64::try_from(bytes) {
            Ok(bytes) if bytes >= MEMORY_MIN => Ok(Self(bytes)),
            Ok(_) => Err("at least 6m".into()),
            Err(_) => Err("more than there can be".into()),
        }
    }
}

/// A number of CPUs, in microseconds of each 100 ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cpus(pub(crate) i64);

impl FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<f64>()
            .ok()
            .filter(|n| (0.01..=32.0).contains(n))
            .and_then(|n| format!("{:.0}", n * 100_000.0).parse().ok())
            .map(Self)
            .ok_or_else(|| "a number from 0.01 to 32, as 1.5".into())
    }
}

/// `NAME=VALUE`; a bare `NAME` takes the value from here, if there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EnvVar {
    pub(crate) name: String,
    pub(crate) value: Option<String>,
}

impl FromStr for EnvVar {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text, std::env::var(text).ok()),
        };
        if name.is_empty() || text.contains('\0') {
            return Err("write it as NAME=VALUE".into());
        }
        Ok(Self {
            name: name.into(),
            value,
        })
    }
}

/// `HOST:CONTAINER[:ro|rw]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VolumeArg {
    pub(crate) source: PathBuf,
    pub(crate) target: PathBuf,
    pub(crate) read_only: bool,
}

impl FromStr for VolumeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let (Some(source), Some(target), options, None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err("write it as HOST:CONTAINER or HOST:CONTAINER:ro".into());
        };
        let read_only = match options {
            None | Some("rw") => false,
            Some("ro") => true,
            Some(other) => return Err(format!("unknown option {other:?}; use ro or rw")),
        };
        if !source.starts_with(['/', '.', '~']) {
            return Err(format!(
                "{source:?} is not a path; named volumes are not supported yet, write ./{source} for a directory"
            ));
        }
        let source = std::path::absolute(source).map_err(|e| format!("{source}: {e}"))?;
        let target = PathBuf::from(target);
        if !target.is_absolute() || target.parent().is_none() {
            return Err("the path in the container must be absolute and not /".into());
        }
        Ok(Self {
            source,
            target,
            read_only,
        })
    }
}

/// A signal, by number or by name with or without `SIG`.
pub(crate) fn signal(text: &str) -> Result<u32, String> {
    if let Ok(number) = text.parse::<u32>() {
        return match number {
            1..=64 => Ok(number),
            _ => Err(format!("signal {number}: not from 1 to 64")),
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") {
        upper
    } else {
        format!("SIG{upper}")
    };
    if let Some(number) = real_time(&name) {
        return Ok(number);
    }
    let signal = nix::sys::signal::Signal::from_str(&name)
        .map_err(|_| format!("unknown signal {text:?}"))?;
    Ok((signal as i32).unsigned_abs())
}

/// First and last signal of the real-time ones, as programs in containers count them: glibc
/// and musl keep those before for themselves.
const REAL_TIME: (u32, u32) = (34, 64);

/// The number of `SIGRTMIN+3`, which systemd is halted by, and the like.
fn real_time(name: &str) -> Option<u32> {
    let (first, last) = REAL_TIME;
    let offset = |rest: &str, sign: char| match rest.strip_prefix(sign) {
        Some(digits) => digits.parse::<u32>().ok(),
        None => rest.is_empty().then_some(0),
    };
    let number = match name.strip_prefix("SIGRTMIN") {
        Some(rest) => first.checked_add(offset(rest, '+')?)?,
        None => last.checked_sub(offset(name.strip_prefix("SIGRTMAX")?, '-')?)?,
    };
    (first..=last).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("512m", 512 << 20),
            ("1.5G", 3 << 29),
            ("8388608", 8 << 20),
            ("64MiB", 64 << 20),
        ] {
            assert_eq!(text.parse::<Size>().unwrap().0, bytes, "{text}");
        }
        for text in ["", "1m", "-5g", "1x", "99999999999g", "nang"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn cpus() {
        assert_eq!("1.5".parse::<Cpus>().unwrap().0, 150_000);
        for text in ["0", "-1", "33", "x", "inf"] {
            assert!(text.parse::<Cpus>().is_err(), "{text}");
        }
    }

    #[test]
    fn volumes() {
        let v: VolumeArg = "/srv/a:/data:ro".parse().unwrap();
        assert!(v.read_only && v.source.ends_with("srv/a"));
        for text in ["/a", "a:/b", "/a:b", "/a:/", "/a:/b:z", "/a:/b:ro:x"] {
            assert!(text.parse::<VolumeArg>().is_err(), "{text}");
        }
    }

    #[test]
    fn signals() {
        for (text, number) in [
            ("TERM", 15),
            ("sigkill", 9),
            ("12", 12),
            ("SIGRTMIN+3", 37),
            ("rtmin", 34),
            ("RTMAX-14", 50),
        ] {
            assert_eq!(signal(text), Ok(number));
        }
        for text in [
            "0", "NOPE", "RTMIN+31", "RTMIN-1", "RTMAX-31", "RTMIN+", "RTMAX+0",
        ] {
            assert!(signal(text).is_err(), "{text}");
        }
    }
}
