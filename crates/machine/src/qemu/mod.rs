//! The QEMU driver: a `microvm` machine, on KVM or in software, whose devices
//! are virtio over MMIO.
//!
//! Two processes per machine: QEMU and `walnut-vsock`, which serves the vsock
//! device through vhost-user, so that no vhost-vsock module is needed.
//! `machine` owns their life, `command` writes the command line, `files` opens
//! what QEMU may touch, `qmp` talks to its monitor, `console` reads a guest's
//! last words.
//!
//! QEMU gets descriptors, not paths: kernel, initramfs, disks, sockets and the
//! monitor are opened here and inherited. Where this process is root, QEMU runs
//! as a user of its own (`files::identity`), in an empty network namespace,
//! under its own seccomp filter.

mod command;
mod console;
mod files;
mod machine;
mod qmp;
mod tsc;

use std::path::PathBuf;

use async_trait::async_trait;

use crate::{Driver, Error, Machine, MachineSpec};

/// How QEMU runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// Hardware virtualization.
    Kvm,
    /// Software emulation, one thread per vCPU.
    Tcg,
}

/// The driver.
#[derive(Debug, Clone)]
pub struct Qemu {
    accel: Accel,
    qemu: PathBuf,
    vsock: PathBuf,
    /// When the driver was made; see [`tsc`].
    made: tsc::Moment,
}

impl Qemu {
    /// A driver that runs the program `qemu` (7.2 or newer) and Walnut's
    /// `walnut-vsock`.
    pub fn new(accel: Accel, qemu: PathBuf, vsock: PathBuf) -> Self {
        Self {
            accel,
            qemu,
            vsock,
            made: tsc::Moment::now(),
        }
    }
}

#[async_trait]
impl Driver for Qemu {
    fn name(&self) -> &'static str {
        match self.accel {
            Accel::Kvm => "qemu-kvm",
            Accel::Tcg => "qemu-tcg",
        }
    }

    async fn start(&self, spec: MachineSpec) -> Result<Box<dyn Machine>, Error> {
        Ok(Box::new(machine::QemuMachine::start(self, spec).await?))
    }
}
