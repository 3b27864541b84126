//! A container in another one's machine, with that one's network (`--network
//! container:NAME`).

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::symlink,
    },
};

use anyhow::{Context, Result, bail};
use oci_spec::runtime::Spec;
use walnut_image::Lease;
use walnut_sandbox::{Error, Handover, Layout, Lock, Record, RestartPolicy, Status, find};

use super::names::find_live;
use crate::args::ContainerArgs;

/// Whose machine a container is to join.
#[derive(Debug)]
pub(crate) struct Host {
    /// The container that the machine was made for.
    pub(crate) id: String,
    /// What it calls itself, and so what who joins it is called.
    pub(crate) hostname: String,
}

impl Host {
    /// The one called `name`, for a container with these options. It need not run yet.
    pub(crate) fn of(layout: &Layout, args: &ContainerArgs, name: &str) -> Result<Self> {
        check(args, name)?;
        let record = find(layout, name)?;
        if record.terms.restart != RestartPolicy::No {
            bail!(
                "--network container:{name}: it is started again when it ends (--restart {}), in another machine; take that away (walnut update --restart no {name}), or put both on one network",
                record.terms.restart
            );
        }
        // Who has joined has no machine of its own.
        let id = record.terms.joins.clone().unwrap_or(record.id);
        let path = layout.container(&id).join("config.json");
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let spec: Spec =
            serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))?;
        let hostname = spec.hostname().clone().unwrap_or_default();
        Ok(Self { id, hostname })
    }
}

/// Refuses what is the other container's to say.
fn check(args: &ContainerArgs, name: &str) -> Result<()> {
    let network = args.net.needs_network().map(|option| (option, "network"));
    let machine = [
        ("--memory", args.limits.memory.is_some()),
        ("--cpus", args.limits.cpus.is_some()),
        ("--cpuset-cpus", args.limits.cpuset_cpus.is_some()),
        ("--driver", args.driver.is_some()),
        ("--no-template", args.no_template),
    ];
    let given = |all: &[(&'static str, bool)]| all.iter().find(|(_, given)| *given).map(|it| it.0);
    let hostname = args
        .hostname
        .is_some()
        .then_some(("--hostname", "host name"));
    let machine = given(&machine).map(|option| (option, "machine"));
    if let Some((option, what)) = network.or(hostname).or(machine) {
        bail!(
            "{option}: the {what} of a container with --network container:{name} is {name}'s; give it to {name}, or leave it out"
        );
    }
    if args.restart != RestartPolicy::No {
        bail!(
            "--restart {}: the machine of a container with --network container:{name} may be gone when it ends; leave it out",
            args.restart
        );
    }
    Ok(())
}

/// Hands a container to the supervisor of the machine that it joins. What is returned ends
/// it when it is dropped.
pub(super) fn join(
    layout: &Layout,
    record: &Record,
    host: &str,
    lock: &Lock,
    image: &Lease,
) -> Result<OwnedFd> {
    let host = find(layout, host).map_err(|e| match e {
        Error::NotFound(_) => Error::NotFound(format!(
            "start {}: the container whose machine it joins is gone ({host}); make it anew with --network container:NAME of one that runs",
            record.name
        )),
        other => other,
    })?;
    if !host.outlived {
        find_live(layout, &host.id)
            .with_context(|| format!("join the machine of {0}; start {0} first", host.name))?;
    }
    let run_dir = layout.sandbox(&record.id);
    // It is answered for by the same supervisor.
    let socket = layout.task_socket(&record.id);
    symlink(layout.task_socket(&host.id), &socket)
        .with_context(|| format!("create {}", socket.display()))?;
    let (lease, holder) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("make the supervisor's lease")?;
    let container_dir = layout.container(&record.id);
    // What the supervisor has to say is in the other one's.
    File::create(container_dir.join("shim.log")).context("create the supervisor's log")?;
    let handover = Handover {
        id: record.id.clone(),
        container_dir,
        run_dir,
    };
    let fds = [lock.as_fd(), lease.as_fd(), image.file().as_fd()];
    walnut_sandbox::join(&layout.sandbox(&host.id), &handover, &fds)
        .with_context(|| format!("put the container into the machine of {}", host.name))?;
    Ok(holder)
}

/// Why a container that has ended cannot go, or be started again, yet: its machine goes on.
pub(crate) fn check_outlived(layout: &Layout, record: &Record) -> Result<()> {
    let others = match record.status {
        Status::Exited => walnut_sandbox::joined(layout, &record.id)?,
        _ => Vec::new(),
    };
    if !others.is_empty() {
        let (name, others) = (&record.name, others.join(", "));
        bail!(Error::WrongState(format!(
            "container {name} has ended, and its machine goes on for {others} (--network container:{name}); stop that first"
        )));
    }
    Ok(())
}
