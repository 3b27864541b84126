//! A machine that goes from one program to the next.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{SOCKET, Shared, VmmMachine};
use crate::{
    Error, Heritable, Machine, MachineState,
    agent::{Door, host},
    process::{Child, ChildState, Tail, TailState},
    takeover::{Giver, NoState, Taker},
    vmm::control::{Control, ControlState},
};

/// A machine in a state ([`crate::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    vcpus: u32,
    dir: PathBuf,
    vmm: ChildState,
    queues: u16,
    console: TailState,
    control: ControlState,
}

impl Heritable for VmmMachine {
    fn state(&self, giver: &mut Giver) -> Result<MachineState, NoState> {
        let shared = &self.shared;
        if shared.exit.borrow().is_some() || shared.stopping.load(Ordering::Relaxed) {
            return Err(NoState::never("the machine has ended"));
        }
        if !shared.door.has_called() {
            return Err(NoState::busy("the machine is starting"));
        }
        Ok(MachineState::Vmm(Box::new(State {
            vcpus: shared.vcpus,
            dir: shared.dir.clone(),
            vmm: shared.vmm.state(giver)?,
            queues: shared.queues,
            console: shared.console.state(giver),
            control: shared.control.state(giver)?,
        })))
    }
}

impl State {
    pub(crate) fn take_over(self, taker: &mut Taker) -> Result<Box<dyn Machine>, Error> {
        let taken = host("take the machine over");
        let shared = Arc::new(Shared {
            started: Instant::now(),
            door: Door::resume(&self.dir, SOCKET),
            dir: self.dir,
            vmm: Child::take_over("walnut-vmm", self.vmm, taker).map_err(&taken)?,
            queues: self.queues,
            vcpus: self.vcpus,
            console: Tail::take_over(self.console, taker).map_err(&taken)?,
            control: Control::take_over(self.control, taker)?,
            stopping: AtomicBool::new(false),
            cleaned: AtomicBool::new(false),
            exit: watch::Sender::new(None),
        });
        let machine = VmmMachine {
            shared: Arc::clone(&shared),
        };
        tokio::spawn(shared.supervise());
        Ok(Box::new(machine))
    }
}
