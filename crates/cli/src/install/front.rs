//! What a node's front ends, those that people run containers with, know of Walnut.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;
use walnut_sandbox::{
    Settings,
    machine::{HostItem, Level},
};

use super::{
    DOCKER_CONFIG, OCI, PODMAN_DIR, SHIM, containerd, docker,
    step::{State, Step},
};

/// What none of them can be told without.
const INSTALL: &str = "run `walnut install`, then restart containerd";
/// Where the services of a host look for programs, whatever the one who asks does.
const SERVICES: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The node's settings, containerd, podman, docker. None of them is needed to run a container with
/// `walnut`, so none is missing.
pub(crate) fn front_ends() -> Vec<HostItem> {
    vec![
        settings(),
        containerd(Path::new("/etc/containerd/config.toml")),
        podman(Path::new(PODMAN_DIR)),
        docker(Path::new(DOCKER_CONFIG)),
    ]
}

fn item(name: &str, status: Level, detail: String, advice: &str) -> HostItem {
    HostItem {
        name: name.into(),
        status,
        detail,
        advice: advice.into(),
    }
}

fn settings() -> HostItem {
    const NAME: &str = "settings";
    match Settings::with_sources() {
        Ok((_, files)) if files.is_empty() => item(NAME, Level::Ok, "built in".into(), ""),
        Ok((_, files)) => {
            let files: Vec<_> = files.iter().map(|f| f.display().to_string()).collect();
            item(NAME, Level::Ok, files.join(", "), "")
        }
        // No sandbox starts with them.
        Err(e) => item(NAME, Level::Missing, e.to_string(), "mend the file"),
    }
}

fn containerd(config: &Path) -> HostItem {
    const NAME: &str = "containerd";
    let version = match containerd::installed() {
        Ok(Some(version)) => version,
        Ok(None) => {
            let advice = "needed by Kubernetes, ctr and nerdctl only";
            return item(NAME, Level::Warn, "not installed".into(), advice);
        }
        Err(e) => return item(NAME, Level::Warn, format!("{e:#}"), ""),
    };
    if find(SHIM, SERVICES).is_none() {
        let detail = format!("{version}; {SHIM} is not where it looks for runtimes");
        return item(NAME, Level::Warn, detail, INSTALL);
    }
    match containerd::steps(version, config, Path::to_path_buf).and_then(|s| are_done(&s)) {
        Ok(true) => item(NAME, Level::Ok, format!("{version}, knows the runtime"), ""),
        Ok(false) => {
            let detail = format!(
                "{version}; {} does not tell Kubernetes of the runtime",
                config.display()
            );
            item(NAME, Level::Warn, detail, INSTALL)
        }
        Err(e) => item(NAME, Level::Warn, format!("{version}; {e:#}"), ""),
    }
}

fn podman(settings: &Path) -> HostItem {
    const NAME: &str = "podman";
    let said = Command::new("podman").arg("--version").output();
    let version = match said {
        Ok(output) if output.status.success() => {
            let said = String::from_utf8_lossy(&output.stdout);
            said.split_whitespace()
                .last()
                .unwrap_or_default()
                .to_owned()
        }
        _ => {
            let detail = "not installed".into();
            return item(NAME, Level::Warn, detail, "needed for podman run only");
        }
    };
    let known = settings.join("walnut.conf").exists() || find(OCI, SERVICES).is_some();
    if known {
        let detail = format!("{version}, knows --runtime {OCI}");
        return item(NAME, Level::Ok, detail, "");
    }
    let detail = format!("{version}; has not been told of {OCI}");
    item(NAME, Level::Warn, detail, "run `walnut install`")
}

fn docker(config: &Path) -> HostItem {
    const NAME: &str = "docker";
    let Some(version) = docker::installed() else {
        let detail = "not installed".into();
        return item(NAME, Level::Warn, detail, "needed for docker run only");
    };
    match docker::program(config) {
        Ok(Some(program)) if program.exists() => {
            let detail = format!("{version}, knows --runtime {OCI}");
            item(NAME, Level::Ok, detail, "")
        }
        Ok(Some(program)) => {
            let detail = format!("{version}; its {OCI} is not there: {}", program.display());
            item(NAME, Level::Warn, detail, "run `walnut install`")
        }
        Ok(None) => {
            let detail = format!("{version}; {} has no runtime {OCI}", config.display());
            let advice = "run `walnut install`, then reload docker";
            item(NAME, Level::Warn, detail, advice)
        }
        // dockerd does not start with it either.
        Err(e) => item(
            NAME,
            Level::Warn,
            format!("{version}; {e:#}"),
            "mend the file",
        ),
    }
}

fn are_done(steps: &[Step]) -> Result<bool> {
    for step in steps {
        if !matches!(step.state()?, State::Done) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A program by its name.
fn find(name: &str, path: &str) -> Option<PathBuf> {
    env::split_paths(path)
        .map(|dir| dir.join(name))
        .find(|file| file.exists())
}
