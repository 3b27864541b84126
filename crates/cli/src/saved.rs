//! What of a command line can be had of a container that runs already.

use anyhow::{Result, bail};
use oci_spec::runtime::Spec;
use walnut_sandbox::{Checkpoint, RestartPolicy};

use crate::{
    args::{ContainerArgs, Systemd},
    values::Cpus,
};

/// Refuses what a saved container's processes cannot be given any more.
pub(crate) fn check(args: &ContainerArgs, saved: &Checkpoint) -> Result<()> {
    let late = [
        ("a command", !args.command.is_empty()),
        ("--entrypoint", args.entrypoint.is_some()),
        ("--env", !args.env.is_empty()),
        ("--workdir", args.workdir.is_some()),
        ("--user", args.user.is_some()),
        ("--env-file", !args.env_file.is_empty()),
        ("--group-add", !args.group_add.is_empty()),
        ("--volume", !args.volume.is_empty()),
        ("--mount", !args.mount.is_empty()),
        ("--tmpfs", !args.tmpfs.is_empty()),
        ("--init", args.init),
        ("--pids-limit", args.limits.pids_limit.is_some()),
        ("--ulimit", !args.limits.ulimit.is_empty()),
        ("--shm-size", args.limits.shm_size.is_some()),
        ("--sysctl", !args.limits.sysctl.is_empty()),
        ("--memory-swap", args.limits.memory_swap.is_some()),
        ("--cap-add", !args.security.cap_add.is_empty()),
        ("--cap-drop", !args.security.cap_drop.is_empty()),
        ("--security-opt", !args.security.security_opt.is_empty()),
        ("--device", !args.security.device.is_empty()),
        ("--restart", args.restart != RestartPolicy::No),
        ("--read-only", args.read_only),
        ("--no-template", args.no_template),
        ("--network", args.net.network.iter().any(|n| n != "none")),
        ("--systemd", args.systemd != Systemd::default()),
    ];
    if let Some((what, _)) = late.iter().find(|(_, given)| *given) {
        bail!(
            "{} is a checkpoint: its processes run already, so {what} cannot be applied",
            args.image
        );
    }
    if let Some((option, why)) = args.refused.given() {
        bail!("{option}: {why}");
    }
    if args.net.joins()?.is_some() {
        bail!(
            "{} is a checkpoint, of a machine of its own: leave --network container: out",
            args.image
        );
    }
    if let Some(option) = args.net.needs_network() {
        bail!(
            "{} is a checkpoint, of a container that was on no network: leave {option} out",
            args.image
        );
    }
    let container = &saved.container;
    match (args.tty, container.terminal) {
        (true, false) => bail!("its processes have no terminal; leave -t out"),
        (false, true) => bail!("its processes have a terminal; add -t"),
        _ => {}
    }
    if args.interactive && !container.stdin {
        bail!("its standard input was not open when it was saved; leave -i out");
    }
    let (memory, cpus) = limits(&container.spec);
    if let Some(wanted) = args.limits.memory
        && Some(wanted.0) != memory
    {
        let has = memory.map_or("no limit".into(), |bytes| format!("{bytes} bytes"));
        bail!("-m: it was saved with {has} of memory, and goes on with that");
    }
    if let Some(wanted) = args.limits.cpus
        && Some(wanted) != cpus
    {
        bail!(
            "--cpus: it was saved with {}, and goes on with that",
            match cpus {
                Some(Cpus(quota)) => format!("{}.{:05}", quota / 100_000, quota % 100_000),
                None => "no limit".into(),
            }
        );
    }
    Ok(())
}

/// Memory in bytes and CPUs that a container was limited to.
fn limits(spec: &Spec) -> (Option<i64>, Option<Cpus>) {
    let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
    let memory = resources.and_then(|r| r.memory().as_ref());
    let cpu = resources.and_then(|r| r.cpu().as_ref());
    (
        memory.and_then(|m| m.limit()),
        cpu.and_then(|c| c.quota()).map(Cpus),
    )
}

/// The host name in the container `id`: the one that was asked for, now or then.
pub(crate) fn hostname(args: &ContainerArgs, saved: &Checkpoint, id: &str) -> String {
    let short = |id: &str| id.get(..12).unwrap_or(id).to_owned();
    let then = saved.container.spec.hostname().clone();
    match (&args.hostname, then) {
        (Some(name), _) => name.clone(),
        (None, Some(then)) if then != short(&saved.container.id) => then,
        _ => short(id),
    }
}
