//! The sandbox's cgroup on the host.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tracing::{debug, warn};
use walnut_machine::process::{self, Cgroup, Limits};

use crate::SandboxConfig;

/// Where a run directory says which cgroups its sandbox has, a line each.
const FILE: &str = "cgroups";
/// What the sandbox's processes may use beyond the guest's memory. A bound for what goes
/// wrong, and no measure of what they need: an emulator's translated code takes the most.
const OVERHEAD: u64 = 2 << 30;
/// Processes and threads: 32 vCPUs, a thread for each device, virtiofsd's pool.
const PIDS: u64 = 1024;

/// Makes the cgroup that every process of the sandbox is born into. Without the
/// privilege to, there is none.
pub(crate) fn enter(config: &SandboxConfig, guest_memory: u64) -> Option<Cgroup> {
    let limits = Limits {
        memory: guest_memory.saturating_add(OVERHEAD),
        pids: PIDS,
    };
    let file = config.run_dir.join(FILE);
    let known = |dirs: &[PathBuf]| {
        let lines: Vec<_> = dirs.iter().map(|dir| dir.to_string_lossy()).collect();
        fs::write(&file, lines.join("\n"))
    };
    let made = Cgroup::create(&config.id, limits, known);
    let made = made.and_then(|cgroup| process::confine(&cgroup).map(|()| cgroup));
    match made {
        Ok(cgroup) => Some(cgroup),
        Err(e) if !nix::unistd::geteuid().is_root() => {
            debug!("no cgroup for the sandbox: {e}");
            None
        }
        Err(e) => {
            warn!("no cgroup for the sandbox, so the host does not limit its processes: {e}");
            None
        }
    }
}

/// Lets the processes of a sandbox that grows have more.
pub(crate) fn resize(cgroup: &Cgroup, guest_memory: u64) {
    // Where it cannot be set, growing fails in the cgroup and nowhere else.
    if let Err(e) = cgroup.limit_memory(guest_memory.saturating_add(OVERHEAD)) {
        warn!("let the sandbox's cgroup have more memory: {e}");
    }
}

/// Removes the cgroups of a sandbox whose supervisor was killed.
pub(crate) fn sweep(run_dir: &Path) {
    let Ok(lines) = fs::read_to_string(run_dir.join(FILE)) else {
        return;
    };
    let dirs: Vec<_> = lines.lines().map(PathBuf::from).collect();
    Cgroup::remove(&dirs);
}
