//! Devices that come and go.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use async_trait::async_trait;
use walnut_vmm_api::{FdIndex, Request};

use super::machine::{VmmMachine, block, block_name, fs, fs_name};
use crate::{Disk, Error, HotPlug, Pluggable, SpareDisks, files, spec};

/// The request's only descriptor.
const ONLY: FdIndex = FdIndex(0);

fn name(device: &Pluggable) -> String {
    match device {
        Pluggable::Disk(disk) => block_name(disk),
        Pluggable::Share(share) => fs_name(share),
    }
}

fn problem(device: &Pluggable) -> Option<String> {
    match device {
        Pluggable::Disk(disk) => spec::disk_problem(disk),
        Pluggable::Share(share) => spec::share_problem(share),
    }
}

fn open(device: &Pluggable) -> Result<OwnedFd, Error> {
    match device {
        Pluggable::Disk(disk) => files::open_disk(disk),
        Pluggable::Share(share) => files::connect_share(share),
    }
}

#[async_trait]
impl SpareDisks for VmmMachine {
    async fn attach_disk(&self, disk: &Disk) -> Result<(), Error> {
        self.attach(&Pluggable::Disk(disk.clone())).await
    }
}

#[async_trait]
impl HotPlug for VmmMachine {
    async fn attach(&self, device: &Pluggable) -> Result<(), Error> {
        if let Some(problem) = problem(device) {
            return Err(Error::Other(problem));
        }
        let fd = open(device)?;
        let attachment = match device {
            Pluggable::Disk(disk) => block(disk, ONLY, self.queues()),
            Pluggable::Share(share) => fs(share, ONLY),
        };
        let name = attachment.name.clone();
        let request = Request::Attach(Box::new(attachment));
        self.ask_with("attach a device", "attach", &request, &[fd.as_fd()])
            .await?;
        // Whatever was noticed of one so called was another.
        self.control().forget(&name);
        Ok(())
    }

    async fn detach(&self, device: &Pluggable, deadline: Duration) -> Result<(), Error> {
        let name = name(device);
        let attempt = self.control().detach(&name, deadline);
        self.or_end("detach a device", attempt).await
    }
}
