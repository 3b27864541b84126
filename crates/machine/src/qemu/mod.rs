//! The QEMU driver: a `microvm` machine, on KVM or in software, whose devices
//! are virtio over MMIO.
//!
//! Two processes per machine: QEMU and `walnut-vsock`, which serves the vsock
//! device through vhost-user, so that no vhost-vsock module is needed.
//! `machine` owns their life, `command` writes the command line, `qmp` talks to its
//! monitor. `snapshot` saves and restores, from the files that `state` and `memory`
//! know; `sockets` spares QEMU the one device that it cannot save.
//!
//! QEMU gets descriptors, not paths: kernel, initramfs, disks, sockets and the
//! monitor are opened here and inherited. Where this process is root, QEMU runs
//! as a user of its own ([`crate::files`]), in an empty network namespace,
//! under its own seccomp filter.

mod command;
mod machine;
mod memory;
mod nics;
mod plug;
mod qmp;
mod registers;
mod snapshot;
mod sockets;
mod state;
mod tsc;

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use async_trait::async_trait;

use command::Threads;
pub use machine::State;

use crate::{Driver, Error, Machine, MachineSpec, Restore, SnapshotFiles, host};

/// How QEMU runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// Hardware virtualization.
    Kvm,
    /// Software emulation, a thread for each vCPU where QEMU does that well.
    Tcg,
}

/// The driver.
#[derive(Debug, Clone)]
pub struct Qemu {
    accel: Accel,
    qemu: PathBuf,
    vsock: PathBuf,
    /// Its major and minor version, once somebody had to know.
    version: Arc<OnceLock<Option<(u32, u32)>>>,
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
            version: Arc::default(),
            made: tsc::Moment::now(),
        }
    }

    /// How to run `vcpus` emulated processors.
    ///
    /// Before 8.1, QEMU may translate an instruction while another vCPU's thread
    /// replaces it, and keep the stale translation for good. A kernel replaces
    /// instructions with all processors running (its static keys), so one boot
    /// in some hundred with two vCPUs came to a breakpoint that was long gone,
    /// and died of it. Vcpus that take turns cannot meet that.
    fn threads(&self, vcpus: u32) -> Threads {
        const SAFE: (u32, u32) = (8, 1);
        if vcpus == 1 {
            return Threads::Multi;
        }
        let version = self.version.get_or_init(|| host::qemu_version(&self.qemu));
        match version {
            Some(version) if *version >= SAFE => Threads::Multi,
            _ => Threads::Single,
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

    fn as_restore(&self) -> Option<&dyn Restore> {
        Some(self)
    }
}

#[async_trait]
impl Restore for Qemu {
    fn programs(&self) -> Vec<PathBuf> {
        vec![self.qemu.clone(), self.vsock.clone()]
    }

    fn has_room(&self, spec: &MachineSpec) -> bool {
        // What the spare disks become is read-only, as they are.
        spec.disks.iter().all(|disk| disk.read_only) && command::check_clone(spec).is_ok()
    }

    async fn restore(
        &self,
        spec: MachineSpec,
        from: &SnapshotFiles,
    ) -> Result<Box<dyn Machine>, Error> {
        Ok(Box::new(snapshot::restore(self, spec, from).await?))
    }
}
