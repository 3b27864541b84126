//! What a container is made with that its spec does not say, from the command line and the
//! image.

use std::{collections::BTreeMap, io::Read, path::Path, str::FromStr};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use walnut_image::HealthConfig;
use walnut_sandbox::{Bytes, HealthCheck, LogTerms, RestartPolicy, Terms};

use crate::{
    args::ContainerArgs,
    values::{Duration, EnvVar},
};

/// Largest file of variables or labels.
const FILE_MAX: u64 = 1 << 20;

/// `NAME[=VALUE]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LabelArg(pub(crate) String, pub(crate) String);

impl FromStr for LabelArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        match name.is_empty() || text.contains('\0') {
            true => Err("write it as NAME=VALUE".into()),
            false => Ok(Self(name.into(), value.into())),
        }
    }
}

/// An option of the log's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LogOpt {
    /// Bytes at which a file is rotated.
    MaxSize(u64),
    /// Files there are at most.
    MaxFile(u32),
}

impl FromStr for LogOpt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("write it as max-size=16m")?;
        match name {
            "max-size" => match value.parse()? {
                Bytes(bytes) if bytes >= 4 << 10 => Ok(Self::MaxSize(bytes)),
                _ => Err("max-size: at least 4k".into()),
            },
            "max-file" => match value.parse() {
                Ok(files @ 1..=100) => Ok(Self::MaxFile(files)),
                _ => Err(format!("max-file={value}: a number from 1 to 100")),
            },
            _ => Err(format!(
                "unknown option {name:?}; use max-size and max-file"
            )),
        }
    }
}

/// How it is found out whether a container is well.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Health")]
pub(crate) struct HealthArgs {
    /// Command that says whether the container is well, for its shell [default: the image's]
    #[arg(long, value_name = "COMMAND")]
    pub(crate) health_cmd: Option<String>,
    /// Time between two checks [default: 30s]
    #[arg(long, value_name = "TIME")]
    pub(crate) health_interval: Option<Duration>,
    /// Longest one may take [default: 30s]
    #[arg(long, value_name = "TIME")]
    pub(crate) health_timeout: Option<Duration>,
    /// Time after the start in which failures do not count [default: 0s]
    #[arg(long, value_name = "TIME")]
    pub(crate) health_start_period: Option<Duration>,
    /// Time between two checks in that [default: 5s]
    #[arg(long, value_name = "TIME")]
    pub(crate) health_start_interval: Option<Duration>,
    /// Failures in a row that make it unhealthy [default: 3]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) health_retries: Option<u32>,
    /// Do not check, whatever the image says
    #[arg(long, conflicts_with_all = ["health_cmd", "health_interval", "health_timeout", "health_start_period", "health_start_interval", "health_retries"])]
    pub(crate) no_healthcheck: bool,
}

/// The lines of a file that say something.
fn lines(option: &str, path: &Path) -> Result<Vec<String>> {
    let read = || {
        let mut text = String::new();
        let file = std::fs::File::open(path).context("open it")?;
        let read = file.take(FILE_MAX + 1).read_to_string(&mut text);
        if read.context("read it")? as u64 > FILE_MAX {
            bail!("it is larger than {FILE_MAX} bytes");
        }
        let said = |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
        Ok(text
            .lines()
            .filter(said)
            .map(|line| line.trim_start().to_owned())
            .collect())
    };
    read().with_context(|| format!("{option} {}", path.display()))
}

/// Variables of files, then those of the command line.
pub(crate) fn variables(files: &[std::path::PathBuf], given: &[EnvVar]) -> Result<Vec<EnvVar>> {
    let mut all = Vec::new();
    for path in files {
        for line in lines("--env-file", path)? {
            let name = line.split('=').next().unwrap_or_default();
            if name.contains(char::is_whitespace) {
                bail!(
                    "--env-file {}: the name {name:?} has space in it",
                    path.display()
                );
            }
            let var = line.parse::<EnvVar>();
            all.push(var.map_err(|e| anyhow!("--env-file {}: {line:?}: {e}", path.display()))?);
        }
    }
    all.extend(given.iter().cloned());
    Ok(all)
}

/// The image's words, then those of files, then those of the command line.
fn labels(
    args: &ContainerArgs,
    image: Option<&std::collections::HashMap<String, String>>,
) -> Result<BTreeMap<String, String>> {
    let mut all: BTreeMap<_, _> = image
        .into_iter()
        .flatten()
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    for path in &args.label_file {
        for line in lines("--label-file", path)? {
            let label = line.parse::<LabelArg>();
            let LabelArg(name, value) =
                label.map_err(|e| anyhow!("--label-file {}: {e}", path.display()))?;
            all.insert(name, value);
        }
    }
    all.extend(
        args.label
            .iter()
            .map(|LabelArg(name, value)| (name.clone(), value.clone())),
    );
    Ok(all)
}

/// How a container is checked, by the command line and the image.
fn health(args: &HealthArgs, image: Option<&HealthConfig>) -> Result<Option<HealthCheck>> {
    if args.no_healthcheck {
        return Ok(None);
    }
    let shell = |line: &str| vec!["/bin/sh".to_owned(), "-c".into(), line.to_owned()];
    let command = match (&args.health_cmd, image.map(|i| i.test.as_slice())) {
        (Some(line), _) => shell(line),
        (None, Some([kind, line])) if kind == "CMD-SHELL" => shell(line),
        (None, Some([kind, command @ ..])) if kind == "CMD" && !command.is_empty() => {
            command.to_vec()
        }
        _ => {
            let given = args.health_interval.is_some()
                || args.health_timeout.is_some()
                || args.health_retries.is_some();
            if given {
                bail!(
                    "--health-interval and the like: the image has no check; give one with --health-cmd"
                );
            }
            return Ok(None);
        }
    };
    let of = |given: Option<Duration>, image: Option<u64>, default: u64| {
        given
            .map(|d| d.0)
            .or(image.map(|ns| ns / 1_000_000).filter(|ms| *ms > 0))
            .unwrap_or(default)
    };
    let check = HealthCheck {
        command,
        interval_ms: of(args.health_interval, image.map(|i| i.interval), 30_000),
        timeout_ms: of(args.health_timeout, image.map(|i| i.timeout), 30_000),
        start_period_ms: of(args.health_start_period, image.map(|i| i.start_period), 0),
        start_interval_ms: of(
            args.health_start_interval,
            image.map(|i| i.start_interval),
            5_000,
        ),
        retries: args
            .health_retries
            .or(image.map(|i| i.retries).filter(|r| *r > 0))
            .unwrap_or(3),
    };
    if check.interval_ms < 10 || check.timeout_ms < 10 || check.start_interval_ms < 10 {
        bail!("--health-interval, --health-timeout and --health-start-interval: at least 10ms");
    }
    Ok(Some(check))
}

/// The terms of a new container; its volumes and the image's file are yet to come.
pub(crate) fn terms(
    args: &ContainerArgs,
    image_labels: Option<&std::collections::HashMap<String, String>>,
    image_health: Option<&HealthConfig>,
) -> Result<Terms> {
    if args.rm && args.restart != RestartPolicy::No {
        bail!(
            "--rm and --restart {}: what is removed when it ends cannot be started again; leave one out",
            args.restart
        );
    }
    if args.log_driver == "none" && !args.log_opt.is_empty() {
        bail!("--log-opt: nothing is kept with --log-driver none; leave one out");
    }
    let mut log = LogTerms {
        kept: args.log_driver != "none",
        ..LogTerms::default()
    };
    for option in &args.log_opt {
        match *option {
            LogOpt::MaxSize(bytes) => log.max_size = bytes,
            LogOpt::MaxFile(files) => log.max_file = files,
        }
    }
    Ok(Terms {
        labels: labels(args, image_labels)?,
        restart: args.restart,
        stop_timeout: args.stop_timeout,
        stdin: args.interactive,
        driver: args.driver.clone(),
        cpuset: args.limits.cpuset_cpus.as_ref().map(ToString::to_string),
        log,
        health: health(&args.health, image_health)?,
        ..Terms::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_line_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("env");
        std::fs::write(&path, "# words\n\nA=1\n  B=x y \nC=\n").unwrap();
        let given = ["A=2".parse().unwrap()];
        let all = variables(std::slice::from_ref(&path), &given).unwrap();
        let shown: Vec<_> = all
            .iter()
            .map(|v| format!("{}={}", v.name, v.value.as_deref().unwrap_or("-")))
            .collect();
        assert_eq!(shown, ["A=1", "B=x y ", "C=", "A=2"]);
        for bad in ["a b=1", "=1"] {
            std::fs::write(&path, bad).unwrap();
            assert!(
                variables(std::slice::from_ref(&path), &[]).is_err(),
                "{bad}"
            );
        }
        let none = variables(&[dir.path().join("none")], &[]).unwrap_err();
        assert!(format!("{none:#}").contains("--env-file"), "{none:#}");
    }

    #[test]
    fn checks_are_the_command_lines_or_the_images() {
        let image = HealthConfig {
            test: ["CMD-SHELL", "curl -f localhost"].map(str::to_owned).into(),
            interval: 5_000_000_000,
            retries: 7,
            ..HealthConfig::default()
        };
        let check = health(&HealthArgs::default(), Some(&image))
            .unwrap()
            .unwrap();
        assert_eq!(
            (check.interval_ms, check.timeout_ms, check.retries),
            (5000, 30_000, 7)
        );
        assert_eq!(check.command[2], "curl -f localhost");
        let own = HealthArgs {
            health_cmd: Some("true".into()),
            health_interval: "1s".parse().ok(),
            ..HealthArgs::default()
        };
        let check = health(&own, Some(&image)).unwrap().unwrap();
        assert_eq!(
            (check.command[2].as_str(), check.interval_ms),
            ("true", 1000)
        );
        let none = HealthArgs {
            no_healthcheck: true,
            ..HealthArgs::default()
        };
        assert_eq!(health(&none, Some(&image)).unwrap(), None);
        let disabled = HealthConfig {
            test: vec!["NONE".into()],
            ..HealthConfig::default()
        };
        assert_eq!(
            health(&HealthArgs::default(), Some(&disabled)).unwrap(),
            None
        );
        let lone = HealthArgs {
            health_interval: "1s".parse().ok(),
            ..HealthArgs::default()
        };
        assert!(health(&lone, None).is_err());
    }

    #[test]
    fn log_options() {
        assert_eq!("max-size=1m".parse(), Ok(LogOpt::MaxSize(1 << 20)));
        assert_eq!("max-file=3".parse(), Ok(LogOpt::MaxFile(3)));
        for text in ["max-size=1", "max-file=0", "max-file=101", "tag=x", "x"] {
            assert!(text.parse::<LogOpt>().is_err(), "{text}");
        }
    }
}
