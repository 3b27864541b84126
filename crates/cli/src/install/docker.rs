//! The runtime in docker's configuration.
//!
//! dockerd does not start when a setting is both in its file and among its options, or when
//! the file is not whole: what is not understood is left alone, with the reason.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{OCI, amendment::Amendment, json::Object, step::Step};

const RUNTIMES: &str = "runtimes";
/// Options of dockerd's that say what the file does.
const OPTION: &str = "--add-runtime";
/// Where a host has them.
const OPTIONS: [&str; 5] = [
    "/etc/default/docker",
    "/etc/sysconfig/docker",
    "/etc/systemd/system/docker.service",
    "/lib/systemd/system/docker.service",
    "/usr/lib/systemd/system/docker.service",
];
const DROP_INS: &str = "/etc/systemd/system/docker.service.d";

/// The version of the host's dockerd, if it has one.
pub(super) fn installed() -> Option<String> {
    let output = Command::new("dockerd").arg("--version").output().ok()?;
    // Docker version 20.10.24+dfsg1, build 5d6db84
    let said = String::from_utf8_lossy(&output.stdout);
    let version = said.split_whitespace().nth(2)?;
    Some(version.trim_end_matches(',').to_owned())
}

/// What tells docker, whose configuration is `config`; `at` is where a path lies in the file
/// system that is set up.
pub(super) fn step(
    config: &Path,
    program: PathBuf,
    at: impl Fn(&Path) -> PathBuf,
) -> Result<Step, String> {
    match told_by_options(at) {
        Some(file) => Err(format!(
            "docker has its runtimes from {}: not set up; add {OPTION} {OCI}={} there",
            file.display(),
            program.display()
        )),
        None => Ok(Step::Amend {
            file: config.to_owned(),
            with: Amendment::Docker(program),
        }),
    }
}

/// The file that gives dockerd options for what its configuration would say.
fn told_by_options(at: impl Fn(&Path) -> PathBuf) -> Option<PathBuf> {
    let drop_ins = fs::read_dir(at(Path::new(DROP_INS))).into_iter().flatten();
    let drop_ins = drop_ins.flatten().map(|entry| entry.path());
    let files = OPTIONS.iter().map(|file| at(Path::new(file)));
    files.chain(drop_ins).find(|file| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let said = text
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'));
        said.into_iter().any(|line| line.contains(OPTION))
    })
}

fn entry(program: &Path) -> Value {
    json!({ "path": program })
}

/// A configuration that has the runtime.
pub(super) fn add(text: &str, program: &Path) -> Result<String> {
    if text.trim().is_empty() {
        return Ok(made(program));
    }
    let file = Object::parse(text)?;
    let Some(runtimes) = file.object(RUNTIMES)? else {
        return Ok(file.set(RUNTIMES, &json!({ OCI: entry(program) })));
    };
    match runtimes.object(OCI)? {
        None => Ok(runtimes.set(OCI, &entry(program))),
        // More than the path is the administrator's.
        Some(ours) if ours.value("path") == Some(json!(program)) => Ok(text.to_owned()),
        Some(ours) => Ok(ours.set("path", &json!(program))),
    }
}

/// One that says nothing else.
fn made(program: &Path) -> String {
    let new = "{\n}\n";
    match Object::parse(new) {
        Ok(file) => file.set(RUNTIMES, &json!({ OCI: entry(program) })),
        Err(_) => new.to_owned(),
    }
}

/// The configuration without it; nothing, if it was made for it.
pub(super) fn remove(text: &str) -> Result<String> {
    let file = Object::parse(text)?;
    let Some(runtimes) = file.object(RUNTIMES)? else {
        return Ok(text.to_owned());
    };
    let program = runtimes
        .object(OCI)?
        .and_then(|ours| ours.value("path"))
        .and_then(|path| path.as_str().map(PathBuf::from));
    if program.is_some_and(|program| text == made(&program)) {
        return Ok(String::new());
    }
    let without = runtimes.without(OCI);
    let file = Object::parse(&without).context("remove the runtime")?;
    let hollow = file.object(RUNTIMES)?.is_some_and(|left| left.is_empty());
    Ok(match hollow && runtimes.has(OCI) {
        true => file.without(RUNTIMES),
        false => without,
    })
}

pub(super) fn has(text: &str) -> bool {
    let value: Value = serde_json::from_str(text).unwrap_or_default();
    value[RUNTIMES].get(OCI).is_some()
}

/// The program that the configuration names, if it has the runtime.
pub(super) fn program(config: &Path) -> Result<Option<PathBuf>> {
    let text = match fs::read_to_string(config) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.with_context(|| format!("read {}", config.display()))?,
    };
    let value: Value =
        serde_json::from_str(&text).with_context(|| format!("{} is not JSON", config.display()))?;
    let path = value[RUNTIMES][OCI]["path"].as_str();
    Ok(path.map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRAM: &str = "/usr/local/bin/walnut-oci";

    fn with(text: &str) -> String {
        let with = add(text, Path::new(PROGRAM)).unwrap();
        let value: Value = serde_json::from_str(&with).unwrap();
        assert_eq!(value["runtimes"]["walnut-oci"]["path"], PROGRAM, "{with}");
        assert_eq!(
            add(&with, Path::new(PROGRAM)).unwrap(),
            with,
            "once is enough"
        );
        assert!(has(&with));
        with
    }

    #[test]
    fn a_file_keeps_all_it_says() {
        for text in [
            "{\n  \"debug\": true\n}\n",
            "{\"log-driver\":\"journald\"}",
            "{\n    \"runtimes\": {\n        \"crun\": {\"path\": \"/usr/bin/crun\"}\n    },\n    \"debug\": true\n}",
        ] {
            let with = with(text);
            let without = remove(&with).unwrap();
            assert_eq!(without, text);
            assert!(!has(&without));
            assert_eq!(remove(&without).unwrap(), text, "nothing of ours is there");
        }
    }

    #[test]
    fn a_file_of_ours_alone_goes() {
        let made = with("");
        assert_eq!(
            made,
            "{\n    \"runtimes\": {\n        \"walnut-oci\": {\n            \"path\": \"/usr/local/bin/walnut-oci\"\n        }\n    }\n}\n"
        );
        assert_eq!(remove(&made).unwrap(), "");
        // Somebody's, though it says nothing.
        assert_eq!(remove(&with("{}")).unwrap(), "{}");
    }

    #[test]
    fn another_path_is_mended_and_the_rest_stays() {
        let old = r#"{"runtimes": {"walnut-oci": {"path": "/old", "runtimeArgs": ["--debug"]}}}"#;
        let with = with(old);
        assert!(with.contains(r#""runtimeArgs": ["--debug"]"#), "{with}");
    }

    #[test]
    fn odd_files_are_refused() {
        for (text, says) in [
            ("{", "not JSON"),
            ("[]", "no JSON object"),
            (r#"{"runtimes": 3}"#, "by hand"),
            (r#"{"runtimes": {"walnut-oci": []}}"#, "by hand"),
        ] {
            let error = format!("{:#}", add(text, Path::new(PROGRAM)).unwrap_err());
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
