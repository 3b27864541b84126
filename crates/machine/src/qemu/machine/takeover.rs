//! A machine that goes from one program to the next.

use std::{
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{QemuMachine, SOCKET, Shared, lock, watched};
use crate::{
    Disk, DriverKind, Error, Heritable, Machine, MachineSpec, MachineState,
    agent::{Door, host},
    process::{Child, ChildState},
    qemu::{
        memory::Memory,
        qmp::{Qmp, QmpState},
        registers::Registers,
    },
    takeover::{Fd, Giver, NoState, Taker},
};

/// A machine in a state ([`crate::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    driver: DriverKind,
    spec: MachineSpec,
    qemu: ChildState,
    vsock: ChildState,
    qmp: QmpState,
    registers: Fd,
    memory: Fd,
    plugged: Vec<Disk>,
}

impl Heritable for QemuMachine {
    fn state(&self, giver: &mut Giver) -> Result<MachineState, NoState> {
        let shared = &self.shared;
        let ended = || NoState::never("the machine has ended");
        if shared.exit.borrow().is_some() || shared.stopping.load(Ordering::Relaxed) {
            return Err(ended());
        }
        if !shared.door.has_called() {
            return Err(NoState::busy("the machine is starting"));
        }
        let registers = shared.registers.try_lock();
        let registers = registers.map_err(|_| NoState::busy("the machine is being changed"))?;
        let driver = match shared.driver {
            "qemu-kvm" => DriverKind::QemuKvm,
            _ => DriverKind::QemuTcg,
        };
        Ok(MachineState::Qemu(Box::new(State {
            driver,
            spec: shared.spec.clone(),
            qemu: shared.qemu.state(giver)?,
            vsock: shared.vsock.state(giver)?,
            qmp: shared.qmp.get().ok_or_else(ended)?.state(giver)?,
            registers: registers.give(giver),
            memory: shared.memory().ok_or_else(ended)?.give(giver),
            plugged: lock(&shared.plugged).clone(),
        })))
    }
}

impl State {
    pub(crate) fn take_over(self, taker: &mut Taker) -> Result<Box<dyn Machine>, Error> {
        let taken = host("take the machine over");
        let qmp = Qmp::take_over(self.qmp, taker).map_err(&taken)?;
        let registers = taker.take(self.registers).map_err(&taken)?;
        let memory = Memory::take_over(self.memory, taker).map_err(&taken)?;
        let shared = Arc::new(Shared {
            driver: self.driver.name(),
            door: Door::resume(&self.spec.run_dir, SOCKET),
            spec: self.spec,
            started: Instant::now(),
            qemu: Child::take_over("qemu", self.qemu, taker).map_err(&taken)?,
            vsock: Child::take_over("walnut-vsock", self.vsock, taker).map_err(&taken)?,
            qmp: OnceLock::from(qmp),
            registers: tokio::sync::Mutex::new(Registers::new(watched(registers.into())?)),
            memory: Mutex::new(Some(Arc::new(memory))),
            plugged: Mutex::new(self.plugged),
            resumed: Mutex::default(),
            stopping: AtomicBool::new(false),
            exit: watch::Sender::new(None),
        });
        let machine = QemuMachine {
            shared: Arc::clone(&shared),
        };
        tokio::spawn(shared.supervise());
        Ok(Box::new(machine))
    }
}
