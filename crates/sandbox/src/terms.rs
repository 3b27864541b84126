//! What a container was made with that its bundle does not say: what it is asked to do when
//! it ends, what becomes of its output, and the words that people have put on it.

use std::{collections::BTreeMap, fmt, path::PathBuf, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// Bytes of a log at which it is rotated, and how many files of it there are, where nobody
/// has said.
pub(crate) const LOG_SIZE: u64 = 16 << 20;
pub(crate) const LOG_FILES: u32 = 2;

/// Terms of a container. All that is new here has a default, so that records of older
/// versions are read.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Terms {
    /// Names and values for people and their programs.
    pub labels: BTreeMap<String, String>,
    /// Whether it is started again when it ends.
    pub restart: RestartPolicy,
    /// Seconds between the stop signal and SIGKILL, if it has its own.
    pub stop_timeout: Option<u64>,
    /// Its standard input is kept open.
    pub stdin: bool,
    /// The image's file.
    pub rootfs: Option<PathBuf>,
    /// Machine driver that was asked for.
    pub driver: Option<String>,
    /// Processors of the host that its machine runs on, with commas between them.
    pub cpuset: Option<String>,
    /// Its volumes, by name.
    pub volumes: Vec<NamedVolume>,
    /// What becomes of its output.
    pub log: LogTerms,
    /// How it is found out whether it is well.
    pub health: Option<HealthCheck>,
    /// It may be started again: a start that fails leaves it.
    pub kept: bool,
    /// The container, by its ID, whose machine and network it shares.
    pub joins: Option<String>,
}

/// A volume of a container's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedVolume {
    /// Its name.
    pub name: String,
    /// Where the container has it.
    pub target: PathBuf,
    /// Nobody has named it: it goes with a container that is removed with its volumes.
    #[serde(default)]
    pub anonymous: bool,
}

/// What becomes of a container's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogTerms {
    /// Whether it is kept at all.
    pub kept: bool,
    /// Bytes at which a file is rotated.
    pub max_size: u64,
    /// Files that there are at most.
    pub max_file: u32,
}

impl Default for LogTerms {
    fn default() -> Self {
        Self {
            kept: true,
            max_size: LOG_SIZE,
            max_file: LOG_FILES,
        }
    }
}

/// When a container is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum RestartPolicy {
    /// Never.
    #[default]
    No,
    /// When it has failed; so many times, if that is said.
    OnFailure(Option<u32>),
    /// Whenever it ends, unless it was stopped; and when the node begins.
    Always,
    /// The same, but for one that was stopped before the node ended.
    UnlessStopped,
}

impl RestartPolicy {
    /// The word alone.
    pub fn name(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::OnFailure(_) => "on-failure",
            Self::Always => "always",
            Self::UnlessStopped => "unless-stopped",
        }
    }

    /// Whether a container that has ended so is started again. `restarts` says how often
    /// it has been, in a row.
    pub fn wants(self, failed: bool, restarts: u32) -> bool {
        match self {
            Self::No => false,
            Self::OnFailure(most) => failed && most.is_none_or(|most| restarts < most),
            Self::Always | Self::UnlessStopped => true,
        }
    }
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OnFailure(Some(most)) => write!(f, "on-failure:{most}"),
            other => f.write_str(other.name()),
        }
    }
}

impl FromStr for RestartPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (word, most) = match text.split_once(':') {
            Some((word, most)) => (word, Some(most)),
            None => (text, None),
        };
        let plain = |policy| match most {
            Some(_) => Err(format!("{word} takes no number; only on-failure does")),
            None => Ok(policy),
        };
        match word {
            "no" => plain(Self::No),
            "always" => plain(Self::Always),
            "unless-stopped" => plain(Self::UnlessStopped),
            "on-failure" => match most.map(str::parse).transpose() {
                // As in Docker, none is no bound.
                Ok(most) => Ok(Self::OnFailure(most.filter(|most| *most > 0))),
                Err(e) => Err(format!("{text:?}: {e}; write it as on-failure:3")),
            },
            _ => Err(format!(
                "{text:?} is no restart policy; use no, on-failure[:NUMBER], always or unless-stopped"
            )),
        }
    }
}

impl TryFrom<String> for RestartPolicy {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<RestartPolicy> for String {
    fn from(policy: RestartPolicy) -> Self {
        policy.to_string()
    }
}

/// How it is found out whether a container is well (Docker's `HEALTHCHECK`). Times are
/// milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// Program and arguments, run in the container.
    pub command: Vec<String>,
    /// Between two.
    pub interval_ms: u64,
    /// Longest one may take.
    pub timeout_ms: u64,
    /// In which failures do not count, from the start on.
    pub start_period_ms: u64,
    /// Between two in that time.
    pub start_interval_ms: u64,
    /// Failures in a row that make it unhealthy.
    pub retries: u32,
}

impl HealthCheck {
    /// Until the next one.
    pub fn pause(&self, starting: bool) -> Duration {
        Duration::from_millis(match starting {
            true => self.start_interval_ms.min(self.interval_ms),
            false => self.interval_ms,
        })
    }
}

/// How a container is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// The last word.
    pub status: HealthStatus,
    /// Failures in a row.
    pub failing: u32,
    /// The last checks, oldest first; five at most.
    #[serde(default)]
    pub checks: Vec<HealthResult>,
}

/// The last word on a container's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthStatus {
    /// Nobody knows yet.
    Starting,
    /// The last check went well.
    Healthy,
    /// The last ones did not.
    Unhealthy,
}

impl HealthStatus {
    /// The word people see.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// A check, and how it went. Times are nanoseconds since the epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthResult {
    /// When it began.
    pub start: i64,
    /// When it ended.
    pub end: i64,
    /// Its exit code; -1 if it took too long or could not be run.
    pub code: i32,
    /// The beginning of what it said.
    pub output: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_read_and_written() {
        for text in [
            "no",
            "on-failure",
            "on-failure:3",
            "always",
            "unless-stopped",
        ] {
            let policy: RestartPolicy = text.parse().unwrap();
            assert_eq!(policy.to_string(), text);
            let json = serde_json::to_string(&policy).unwrap();
            assert_eq!(
                serde_json::from_str::<RestartPolicy>(&json).unwrap(),
                policy
            );
        }
        assert_eq!("on-failure:0".parse(), Ok(RestartPolicy::OnFailure(None)));
        for (text, why) in [
            ("", "is no restart policy"),
            ("always:3", "takes no number"),
            ("on-failure:x", "on-failure:3"),
            ("on-failure:-1", "on-failure:3"),
        ] {
            let said = text.parse::<RestartPolicy>().unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
    }

    #[test]
    fn who_is_started_again() {
        let three = RestartPolicy::OnFailure(Some(3));
        assert!(three.wants(true, 2) && !three.wants(true, 3) && !three.wants(false, 0));
        assert!(RestartPolicy::OnFailure(None).wants(true, 99));
        assert!(RestartPolicy::Always.wants(false, 99));
        assert!(!RestartPolicy::No.wants(true, 0));
    }

    #[test]
    fn terms_of_older_records_are_read() {
        let terms: Terms = serde_json::from_str("{}").unwrap();
        assert_eq!(terms, Terms::default());
        assert!(terms.log.kept && !terms.kept);
    }
}
