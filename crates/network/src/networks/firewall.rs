//! What of a host's packet filter is a network's, and not one container's.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tracing::debug;

use crate::{Cni, ConfList, Error, Result};

/// Both families' programs.
const PROGRAMS: [&str; 2] = ["iptables", "ip6tables"];
/// Beside those of `PATH`, which may be a user's.
const SYSTEM: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What the plugin `firewall` calls its rules for a bridge.
const ISOLATION: &str = "CNI firewall plugin rules (ingressPolicy: same-bridge)";
/// Plugins that execute it.
const FILTERING: [&str; 2] = ["portmap", "firewall"];

/// A program of the host's, of `PATH` and other places.
pub(crate) fn program(name: &str, places: &str) -> Option<PathBuf> {
    let path = env::var("PATH").unwrap_or_default();
    let all = format!("{path}:{places}");
    let mut files = env::split_paths(&all).map(|dir| dir.join(name));
    files.find(|file| file.is_file())
}

/// Whether a network's plugins are there, and what those need.
///
/// # Errors
/// If one is not; the error names the package.
pub fn check_programs(list: &ConfList, path: &[PathBuf]) -> Result<()> {
    let cni = Cni { path, lock: None };
    let programs = list.programs();
    for name in &programs {
        cni.find(name)?;
    }
    let filtered = programs.iter().any(|name| FILTERING.contains(name));
    if filtered && program("iptables", SYSTEM).is_none() {
        return Err(Error::Program("iptables"));
    }
    Ok(())
}

/// A rule, with the table and chain that it is of.
type Rule<'a> = [&'a [&'a str]; 2];

/// Nothing is forwarded to a bridge or from it. The table is asked before the one in which
/// plugins accept.
fn closed(bridge: &str) -> [[Vec<&str>; 2]; 2] {
    let at = || vec!["mangle", "FORWARD"];
    [
        [at(), vec!["-i", bridge, "!", "-o", bridge, "-j", "DROP"]],
        [at(), vec!["!", "-i", bridge, "-o", bridge, "-j", "DROP"]],
    ]
}

/// What the plugin `firewall` leaves for a bridge, for it cannot know which container is
/// the last.
fn isolated(bridge: &str) -> [[Vec<&str>; 2]; 2] {
    const CHAINS: [&str; 2] = ["CNI-ISOLATION-STAGE-1", "CNI-ISOLATION-STAGE-2"];
    // A rule is found by all of its words.
    let comment = ["-m", "comment", "--comment", ISOLATION];
    let from = ["-i", bridge, "!", "-o", bridge];
    let to = ["-o", bridge];
    [
        [
            vec!["filter", CHAINS[0]],
            [&from[..], &comment, &["-j", CHAINS[1]]].concat(),
        ],
        [
            vec!["filter", CHAINS[1]],
            [&to[..], &comment, &["-j", "DROP"]].concat(),
        ],
    ]
}

/// Closes a bridge to everything but who is on it, and the host itself.
pub(super) fn close(bridge: &str) -> Result<()> {
    for name in PROGRAMS {
        let Some(program) = program(name, SYSTEM) else {
            return Err(Error::Program("iptables"));
        };
        for [at, rule] in closed(bridge) {
            let rule = [&at[..], &rule[..]];
            if succeeds(&program, "-C", rule) {
                continue;
            }
            let done = execute(&program, "-A", rule);
            let done = done.map_err(Error::system(format!("execute {name}")))?;
            if !done.status.success() {
                let said = String::from_utf8_lossy(&done.stderr);
                let said = std::io::Error::other(said.trim().to_owned());
                return Err(Error::system(format!("close the bridge {bridge}"))(said));
            }
        }
    }
    Ok(())
}

/// Takes a bridge's rules away.
pub(super) fn forget(bridge: &str) {
    for name in PROGRAMS {
        let Some(program) = program(name, SYSTEM) else {
            continue;
        };
        for [at, rule] in closed(bridge).into_iter().chain(isolated(bridge)) {
            // Each container that was added may have left one.
            while succeeds(&program, "-D", [&at, &rule]) {
                debug!(bridge, ?rule, "rule removed");
            }
        }
    }
}

fn succeeds(program: &Path, command: &str, rule: Rule<'_>) -> bool {
    execute(program, command, rule).is_ok_and(|done| done.status.success())
}

fn execute(program: &Path, command: &str, [at, rule]: Rule<'_>) -> std::io::Result<Output> {
    let [table, chain] = at else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    Command::new(program)
        .args(["-w", "30", "-t", table, command, chain])
        .args(rule)
        .stdin(Stdio::null())
        .output()
}
