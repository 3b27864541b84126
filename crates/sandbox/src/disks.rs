//! Disks of a machine: root file systems of its containers.

use std::{path::Path, time::Duration};

use tracing::warn;
use walnut_machine::{Disk, Pluggable, Programs};

use crate::{
    Error, Result, Sandbox, SandboxConfig, checkpoint::Attached, guest_spec, sandbox::lock,
};

/// How long a guest may take to let go of a disk that it does not use any more.
const LET_GO: Duration = Duration::from_secs(5);

impl SandboxConfig {
    /// Whether the machine that is made for the container of this bundle takes disks that
    /// are written to, and lets go of them: root file systems can then be such disks.
    /// `own` as in [`ContainerRequest`](crate::ContainerRequest).
    pub fn takes_disks(&self, bundle: &Path, own: bool) -> Result<bool> {
        let spec = guest_spec::load(bundle)?;
        let settings = self.settings.asked_by(&spec, own)?;
        let programs = Programs {
            cache: self.cache.clone(),
            ..Programs::new(&self.assets.dir)
        };
        Ok(walnut_machine::driver(settings.machine.driver, &programs)?.plugs())
    }
}

impl Sandbox {
    /// The same of a machine that is there.
    pub fn takes_disks(&self) -> bool {
        self.machine.as_hot_plug().is_some()
    }

    /// Gives the machine a disk.
    pub(crate) async fn attach(&self, disk: &Disk) -> Result<()> {
        let spare = self.machine.as_spare_disks().ok_or_else(|| {
            Error::Invalid(format!(
                "give the machine a disk: the driver {} cannot",
                self.driver()
            ))
        })?;
        let attached = Attached::new(disk.clone());
        spare.attach_disk(disk).await?;
        lock(&self.disks).push(attached);
        Ok(())
    }

    /// Takes a disk away that no container needs any more, where machines let go of disks. A
    /// machine keeps one that its guest does not let go of.
    pub(crate) async fn release(&self, serial: &str) {
        let Some(plug) = self.machine.as_hot_plug() else {
            return;
        };
        let attached = lock(&self.disks).clone();
        let Some(attached) = attached.into_iter().find(|a| a.disk.serial == serial) else {
            return;
        };
        match plug.detach(&Pluggable::Disk(attached.disk), LET_GO).await {
            Ok(()) => lock(&self.disks).retain(|a| a.disk.serial != serial),
            Err(e) => warn!(disk = serial, "{e}"),
        }
    }
}
