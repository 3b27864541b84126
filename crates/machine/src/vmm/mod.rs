//! The driver for Walnut's own virtual machine monitor, `walnut-vmm`, on KVM.
//!
//! One process per machine. It gets descriptors over its control socket
//! (`walnut_vmm_api`), never paths, and locks itself in before the guest runs.
//! `machine` owns its life, `control` speaks with it, `plug` lets devices come and go.

mod control;
mod machine;
mod plug;

use std::path::PathBuf;

pub use machine::State;

use async_trait::async_trait;

use crate::{Driver, Error, Machine, MachineSpec, Restore, SnapshotFiles};

/// The driver.
#[derive(Debug, Clone)]
pub struct Vmm {
    program: PathBuf,
}

impl Vmm {
    /// A driver that runs the program `walnut-vmm`.
    pub fn new(program: PathBuf) -> Self {
        Self { program }
    }
}

#[async_trait]
impl Driver for Vmm {
    fn name(&self) -> &'static str {
        "vmm"
    }

    async fn start(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, Error> {
        Ok(Box::new(machine::VmmMachine::start(self, spec).await?))
    }

    fn grows(&self) -> bool {
        true
    }

    fn plugs(&self) -> bool {
        true
    }

    fn as_restore(&self) -> Option<&dyn Restore> {
        Some(self)
    }
}

#[async_trait]
impl Restore for Vmm {
    fn programs(&self) -> Vec<PathBuf> {
        vec![self.program.clone()]
    }

    fn has_room(&self, spec: &MachineSpec) -> bool {
        machine::has_slots(spec)
    }

    async fn restore(
        &self,
        spec: MachineSpec,
        from: &SnapshotFiles,
    ) -> Result<Box<dyn Machine>, Error> {
        let machine = machine::VmmMachine::restore(self, spec, from).await?;
        Ok(Box::new(machine))
    }
}
