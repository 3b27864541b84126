//! Values on the command line that are more than words.

use std::str::FromStr;

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

impl Cpus {
    /// So many whole ones.
    pub(crate) fn whole(count: usize) -> Self {
        Self(i64::try_from(count).unwrap_or(32).clamp(1, 32) * 100_000)
    }
}

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

/// Processors of the host, as `0-3,6`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cpuset(Vec<u16>);

/// Most processors that a set may name.
const CPUS_MAX: u16 = 1024;

impl Cpuset {
    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Which.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = usize> {
        self.0.iter().map(|number| usize::from(*number))
    }
}

impl FromStr for Cpuset {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?}: write it as 0-3,6, with numbers below {CPUS_MAX}");
        let number = |text: &str| text.parse().ok().filter(|n| *n < CPUS_MAX).ok_or_else(bad);
        let mut all = std::collections::BTreeSet::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u16, u16) = (number(first)?, number(last)?);
            if first > last {
                return Err(bad());
            }
            all.extend(first..=last);
        }
        Ok(Self(all.into_iter().collect()))
    }
}

impl std::fmt::Display for Cpuset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all: Vec<_> = self.0.iter().map(u16::to_string).collect();
        f.write_str(&all.join(","))
    }
}

/// A span of time in milliseconds, as Go writes it: `1m30s`, `500ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Duration(pub(crate) u64);

/// Longest span: a year.
const SPAN_MAX: f64 = 365.0 * 86_400_000.0;

impl FromStr for Duration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is no time; write it as 30s, 1m30s or 500ms");
        let mut total = 0.0;
        let mut rest = text;
        while !rest.is_empty() {
            let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'));
            let (number, tail) = rest.split_at(end.ok_or_else(bad)?);
            let end = tail.find(|c: char| !c.is_ascii_alphabetic());
            let (unit, tail) = tail.split_at(end.unwrap_or(tail.len()));
            let number: f64 = number.parse().map_err(|_| bad())?;
            total += number
                * match unit {
                    "ms" => 1.0,
                    "s" => 1000.0,
                    "m" => 60_000.0,
                    "h" => 3_600_000.0,
                    "d" => 86_400_000.0,
                    _ => return Err(bad()),
                };
            rest = tail;
        }
        match text.is_empty() || !(0.0..=SPAN_MAX).contains(&total) {
            true => Err(bad()),
            false => format!("{total:.0}").parse().map(Self).map_err(|_| bad()),
        }
    }
}

/// A moment in nanoseconds since the epoch: RFC 3339 or a part of it, seconds since the
/// epoch, or how long ago, as `10m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moment(pub(crate) i64);

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!(
                "{text:?} is no time; write it as 2026-01-31T12:00:00Z, as seconds since 1970, or as 10m for ten minutes ago"
            )
        };
        if let Ok(Duration(ms)) = text.parse() {
            let ago = i64::try_from(ms)
                .map_err(|_| bad())?
                .saturating_mul(1_000_000);
            return Ok(Self(walnut_sandbox::now_ns().saturating_sub(ago)));
        }
        if let Some((seconds, fraction)) = text.split_once('.').or(Some((text, "0")))
            && let Ok(seconds) = seconds.parse::<i64>()
            && fraction.len() <= 9
            && let Ok(nanos) = format!("{fraction:0<9}").parse::<i64>()
        {
            return Ok(Self(
                seconds.saturating_mul(1_000_000_000).saturating_add(nanos),
            ));
        }
        // What is left out is the beginning of it, in UTC.
        let whole = match text.len() {
            10 => format!("{text}T00:00:00Z"),
            16 => format!("{text}:00Z"),
            19 => format!("{text}Z"),
            _ => text.to_owned(),
        };
        chrono::DateTime::parse_from_rfc3339(&whole)
            .ok()
            .and_then(|time| time.timestamp_nanos_opt())
            .map(Self)
            .ok_or_else(bad)
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
    fn processors() {
        let set: Cpuset = "0-2,6,1".parse().unwrap();
        assert_eq!((set.to_string().as_str(), set.len()), ("0,1,2,6", 4));
        for text in ["", "x", "3-1", "0-9999", "-1"] {
            assert!(text.parse::<Cpuset>().is_err(), "{text}");
        }
    }

    #[test]
    fn times() {
        for (text, ms) in [
            ("30s", 30_000),
            ("1m30s", 90_000),
            ("500ms", 500),
            ("1.5h", 5_400_000),
            ("2d", 172_800_000),
        ] {
            assert_eq!(text.parse(), Ok(Duration(ms)), "{text}");
        }
        for text in ["", "5", "s", "5x", "-1s", "9999999999h"] {
            assert!(text.parse::<Duration>().is_err(), "{text}");
        }
        for (text, seconds) in [
            ("1970-01-02T00:00:00Z", 86_400),
            ("1970-01-02T01:00:00+01:00", 86_400),
            ("1970-01-02", 86_400),
            ("1970-01-02T00:01", 86_460),
            ("1970-01-02T00:01:02", 86_462),
            ("86400", 86_400),
        ] {
            assert_eq!(text.parse(), Ok(Moment(seconds * 1_000_000_000)), "{text}");
        }
        assert_eq!("1.5".parse(), Ok(Moment(1_500_000_000)));
        let Moment(ago) = "10m".parse().unwrap();
        assert!(walnut_sandbox::now_ns() - ago >= 600_000_000_000);
        for text in ["", "yesterday", "2026-13-01"] {
            assert!(text.parse::<Moment>().is_err(), "{text}");
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
