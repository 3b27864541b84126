//! From a specification to a machine whose agent has been greeted: a clone of a template
//! where there is one, a machine that boots where there is none.

use std::time::{Duration, Instant};

use tracing::debug;
use walnut_machine::{Disk, Driver, Machine, MachineSpec, Nic, Programs, Share};
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
pub(crate) struct Parts {
    pub(crate) size: Size,
    pub(crate) disks: Vec<Disk>,
    pub(crate) shares: Vec<Share>,
    pub(crate) nics: Vec<Nic>,
}

pub(crate) async fn start(config: &SandboxConfig, parts: Parts, steps: Steps) -> Result<Started> {
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
        // A clone's memory is its own alone, and shares want others to see it.
        config.settings.machine.templates
            && parts.shares.is_empty()
            && parts.nics.is_empty()
            && parts.disks.len() <= spec.spare_disks as usize
    });
    let mut wanted = None;
    if let (Some(templates), Some(_)) = (templates, driver.as_restore()) {
        wanted = Some(template::Wanted {
            driver: config.settings.machine.driver,
            memory: parts.size.memory,
            vcpus: parts.size.vcpus,
        });
        match templates.find(driver.as_ref(), &spec) {
            Ok(Some(found)) => {
                let spec = MachineSpec {
                    disks: parts.disks.clone(),
                    vcpus: parts.size.vcpus,
                    ..spec.clone()
                };
                let files = templates.files(&found.id);
                let grown = Some((span.boot, parts.size)).filter(|(from, to)| from != to);
                match clone(driver.as_ref(), spec, &files, grown, steps).await {
                    Ok((machine, agent)) => {
                        return Ok(Started {
                            driver: driver.name(),
                            machine,
                            agent,
                            template: Some(found.id),
                            wanted: None,
                            max: span.max,
                            shape: Some(found.shape.of_whole()),
                            disks: parts.disks.into_iter().map(Attached::new).collect(),
                        });
                    }
                    Err(e) => templates.discard(&found.id, &e.to_string()),
                }
            }
            Ok(None) => {}
            // A store that cannot be read is no reason not to start.
            Err(e) => debug!("look for a template: {e}"),
        }
    }
    let mut span = Span::open(parts.size, ceiling);
    if !parts.shares.is_empty() {
        // Who serves them would keep the memory that the guest gives up.
        span.max.memory = span.boot.memory;
    }
    spec = MachineSpec {
        id: spec.id,
        spare_disks: 0,
        ..template::machine(&config.run_dir, &config.assets, span)
    };
    let shape = Shape::of(driver.as_ref(), &spec)?;
    spec.disks.clone_from(&parts.disks);
    spec.shares = parts.shares;
    spec.nics = parts.nics;
    let machine = driver.start(spec).await?;
    steps.done("machine started");
    machine.ready(config.settings.boot_timeout()).await?;
    steps.done("agent ready");
    let agent = agent::connect(machine.as_ref()).await?;
    Ok(Started {
        driver: driver.name(),
        machine,
        agent,
        template: None,
        wanted,
        max: span.max,
        shape,
        disks: parts.disks.into_iter().map(Attached::new).collect(),
    })
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
