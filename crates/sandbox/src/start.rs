//! From a specification to a machine whose agent has been greeted: a clone of a template
//! where there is one, a machine that boots where there is none.

use std::time::{Duration, Instant};

use tracing::debug;
use walnut_machine::{Disk, Driver, Machine, MachineSpec, Nic, Programs, Restore, Share};
use walnut_protocol::agent_ttrpc::AgentClient;

use crate::{
    Error, Result, SandboxConfig, Shape, agent,
    checkpoint::Attached,
    growth,
    sizing::{Size, Span},
    template,
};

/// Longest a clone may take until its agent answers: it has booted already, so one that
/// takes longer does not work.
const CLONE_DEADLINE: Duration = Duration::from_secs(20);

/// Containers that a machine can take in later, of a driver whose machines have all their
/// disks from the start.
const JOINS: u32 = 1;

/// A machine that is up.
pub(crate) struct Started {
    pub(crate) driver: &'static str,
    pub(crate) machine: Box<dyn Machine>,
    pub(crate) agent: AgentClient,
    /// The template that it began from.
    pub(crate) template: Option<String>,
    /// The template that it could have begun from.
    pub(crate) wanted: Option<template::Wanted>,
    /// What its machine can grow to.
    pub(crate) max: Size,
    /// What a checkpoint of it is good for; `None` if nothing can restore it.
    pub(crate) shape: Option<Shape>,
    /// What it began with.
    pub(crate) disks: Vec<Attached>,
}

/// Where a start's milliseconds go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Steps(Instant);

impl Steps {
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn done(self, step: &str) {
        let ms = self.0.elapsed().as_secs_f64() * 1000.0;
        debug!(step, ms, "sandbox start");
    }
}

/// What the machine is to have.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    pub(crate) size: Size,
    pub(crate) disks: Vec<Disk>,
    pub(crate) shares: Vec<Share>,
    pub(crate) nics: Vec<Nic>,
}

impl Parts {
    /// The machine `spec` with all of them.
    fn onto(&self, spec: &MachineSpec) -> MachineSpec {
        MachineSpec {
            disks: self.disks.clone(),
            shares: self.shares.clone(),
            nics: self.nics.clone(),
            ..spec.clone()
        }
    }
}

/// A machine with these parts. `None` if a clone failed that had shares: who served them
/// has ended with it, and others must be started.
pub(crate) async fn start(
    config: &SandboxConfig,
    parts: Parts,
    steps: Steps,
) -> Result<Option<Started>> {
    let programs = Programs {
        cache: config.cache.clone(),
        ..Programs::new(&config.assets.dir)
    };
    let driver = walnut_machine::driver(config.settings.machine.driver, &programs)?;
    let ceiling = growth::ceiling(driver.as_ref());
    let span = Span::template(parts.size, ceiling);
    let mut spec = template::machine(&config.run_dir, &config.assets, span);
    spec.id.clone_from(&config.id);
    steps.done("driver chosen");
    let templates = config.templates.as_ref().filter(|_| {
        config.settings.machine.templates && parts.disks.len() <= spec.spare_disks as usize
    });
    let mut wanted = None;
    if let (Some(templates), Some(restore)) = (templates, driver.as_restore())
        && restore.has_room(&parts.onto(&spec))
    {
        wanted = Some(template::Wanted {
            driver: config.settings.machine.driver,
            memory: parts.size.memory,
            vcpus: parts.size.vcpus,
        });
        match templates.find(driver.as_ref(), &spec) {
            Ok(Some(found)) => {
                let spec = MachineSpec {
                    vcpus: parts.size.vcpus,
                    ..parts.onto(&spec)
                };
                let files = templates.files(&found.id);
                let grown = Some((span.boot, parts.size)).filter(|(from, to)| from != to);
                match clone(driver.as_ref(), spec, &files, grown, steps).await {
                    Ok((machine, agent)) => {
                        return Ok(Some(Started {
                            driver: driver.name(),
                            machine,
                            agent,
                            template: Some(found.id),
                            wanted: None,
                            max: span.max,
                            shape: Some(found.shape.of_whole()),
                            disks: parts.disks.into_iter().map(Attached::new).collect(),
                        }));
                    }
                    Err(e) => {
                        templates.discard(&found.id, &e.to_string());
                        if !parts.shares.is_empty() {
                            return Ok(None);
                        }
                    }
                }
            }
            Ok(None) => {}
            // A store that cannot be read is no reason not to start.
            Err(e) => debug!("look for a template: {e}"),
        }
    }
    let span = Span::open(parts.size, ceiling);
    spec = MachineSpec {
        id: spec.id,
        spare_disks: 0,
        ..template::machine(&config.run_dir, &config.assets, span)
    };
    let shape = Shape::of(driver.as_ref(), &spec)?;
    if !driver.plugs() && !parts.disks.is_empty() {
        // For a container that joins it. A clone has as many.
        spec.spare_disks = JOINS;
        let room = |restore: &dyn Restore| restore.has_room(&parts.onto(&spec));
        if !driver.as_restore().is_none_or(room) {
            spec.spare_disks = 0;
        }
    }
    spec.disks.clone_from(&parts.disks);
    spec.shares = parts.shares;
    spec.nics = parts.nics;
    let machine = driver.start(spec).await?;
    steps.done("machine started");
    machine.ready(config.settings.boot_timeout()).await?;
    steps.done("agent ready");
    let agent = agent::connect(machine.as_ref()).await?;
    Ok(Some(Started {
        driver: driver.name(),
        machine,
        agent,
        template: None,
        wanted,
        max: span.max,
        shape,
        disks: parts.disks.into_iter().map(Attached::new).collect(),
    }))
}

/// A clone whose agent has answered, and that has grown from one size to another.
pub(crate) async fn clone(
    driver: &dyn Driver,
    spec: MachineSpec,
    files: &walnut_machine::SnapshotFiles,
    grown: Option<(Size, Size)>,
    steps: Steps,
) -> Result<(Box<dyn Machine>, AgentClient)> {
    let restore = driver
        .as_restore()
        .ok_or_else(|| Error::Invalid(format!("the driver {} cannot restore", driver.name())))?;
    let machine = restore.restore(spec, files).await?;
    steps.done("machine started");
    let answers = async {
        machine.ready(CLONE_DEADLINE).await?;
        steps.done("agent ready");
        let agent = agent::connect(machine.as_ref()).await?;
        if let Some((from, to)) = grown {
            growth::grow(machine.as_ref(), &agent, from, to).await?;
            steps.done("machine grown");
        }
        Ok(agent)
    };
    match tokio::time::timeout(CLONE_DEADLINE, answers).await {
        Ok(Ok(agent)) => Ok((machine, agent)),
        Ok(Err(e)) => {
            machine.stop().await;
            Err(e)
        }
        Err(_) => {
            machine.stop().await;
            Err(Error::Agent(format!(
                "greet the agent of a clone: no answer within {} s",
                CLONE_DEADLINE.as_secs()
            )))
        }
    }
}
