//! From a specification to a machine whose agent has been greeted: a clone of a template
//! where there is one, a machine that boots where there is none.

use std::time::{Duration, Instant};

use tracing::debug;
use walnut_machine::{Disk, Driver, Machine, MachineSpec, Programs, Share};
use walnut_protocol::agent_ttrpc::AgentClient;

use crate::{Error, Result, SandboxConfig, agent, sizing::Size, template};

/// Longest a clone may take until its agent answers: it has booted already, so one that
/// takes longer does not work.
const CLONE_DEADLINE: Duration = Duration::from_secs(20);

/// Longest a guest may take until its agent answers, unless the environment says otherwise.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);

/// `WALNUT_BOOT_TIMEOUT` in seconds, else what a slow and loaded emulated machine
/// needs.
pub fn boot_deadline() -> Result<Duration> {
    let Ok(text) = std::env::var("WALNUT_BOOT_TIMEOUT") else {
        return Ok(BOOT_DEADLINE);
    };
    match text.parse() {
        Ok(seconds @ 1..=3600) => Ok(Duration::from_secs(seconds)),
        _ => Err(Error::Invalid(format!(
            "WALNUT_BOOT_TIMEOUT={text}: must be a number of seconds from 1 to 3600"
        ))),
    }
}

/// A machine that is up.
pub(crate) struct Started {
    pub(crate) driver: &'static str,
    pub(crate) machine: Box<dyn Machine>,
    pub(crate) agent: AgentClient,
    /// The template that it began from.
    pub(crate) template: Option<String>,
    /// The template that it could have begun from.
    pub(crate) wanted: Option<template::Wanted>,
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
    /// A template may be used.
    pub(crate) template: bool,
}

pub(crate) async fn start(config: &SandboxConfig, parts: Parts, steps: Steps) -> Result<Started> {
    let programs = Programs {
        cache: config.cache.clone(),
        ..Programs::new(&config.assets.dir)
    };
    let driver = walnut_machine::driver(config.driver, &programs)?;
    let Size { memory, vcpus } = parts.size;
    let mut spec = template::machine(&config.run_dir, &config.assets, memory, vcpus);
    spec.id.clone_from(&config.id);
    steps.done("driver chosen");
    let templates = config.templates.as_ref().filter(|_| {
        // A clone's memory is its own alone, and shares want others to see it.
        parts.template && parts.shares.is_empty() && parts.disks.len() <= spec.spare_disks as usize
    });
    let mut wanted = None;
    if let (Some(templates), Some(_)) = (templates, driver.as_restore()) {
        wanted = Some(template::Wanted {
            driver: config.driver,
            memory,
            vcpus,
        });
        match templates.find(driver.as_ref(), &spec) {
            Ok(Some(found)) => {
                let spec = MachineSpec {
                    disks: parts.disks.clone(),
                    ..spec.clone()
                };
                let files = templates.files(&found.id);
                match clone(driver.as_ref(), spec, &files, steps).await {
                    Ok((machine, agent)) => {
                        return Ok(Started {
                            driver: driver.name(),
                            machine,
                            agent,
                            template: Some(found.id),
                            wanted: None,
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
    spec.spare_disks = 0;
    spec.disks = parts.disks;
    spec.shares = parts.shares;
    let machine = driver.start(spec).await?;
    steps.done("machine started");
    machine.ready(config.boot_deadline).await?;
    steps.done("agent ready");
    let agent = agent::connect(machine.as_ref()).await?;
    Ok(Started {
        driver: driver.name(),
        machine,
        agent,
        template: None,
        wanted,
    })
}

/// A clone whose agent has answered.
async fn clone(
    driver: &dyn Driver,
    spec: MachineSpec,
    files: &walnut_machine::SnapshotFiles,
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
        agent::connect(machine.as_ref()).await
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
