//! Devices that come and go.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use async_trait::async_trait;
use walnut_vmm_api::{FdIndex, Request};

use super::machine::{VmmMachine, block, block_name, fs, fs_name, net, net_name};
use crate::{Disk, Error, HotPlug, Nic, PlugNics, Pluggable, SpareDisks, agent::host, files, spec};

/// The request's first descriptor.
const FIRST: FdIndex = FdIndex(0);

fn name(device: &Pluggable) -> String {
    match device {
        Pluggable::Disk(disk) => block_name(disk),
        Pluggable::Share(share) => fs_name(share),
        Pluggable::Nic(nic) => net_name(nic),
    }
}

fn problem(device: &Pluggable) -> Option<String> {
    match device {
        Pluggable::Disk(disk) => spec::disk_problem(disk),
        Pluggable::Share(share) => spec::share_problem(share),
        Pluggable::Nic(nic) => spec::nic_problem(nic),
    }
}

fn open(device: &Pluggable) -> Result<Vec<OwnedFd>, Error> {
    match device {
        Pluggable::Disk(disk) => files::open_disk(disk).map(|fd| vec![fd]),
        Pluggable::Share(share) => files::connect_share(share).map(|fd| vec![fd]),
        Pluggable::Nic(nic) => files::share_taps(nic).map_err(host("hand over a tap")),
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
        let fds = open(device)?;
        let attachment = match device {
            Pluggable::Disk(disk) => block(disk, FIRST, self.queues()),
            Pluggable::Share(share) => fs(share, FIRST),
            Pluggable::Nic(nic) => net(nic, (0..).map(FdIndex).take(fds.len()).collect()),
        };
        let name = attachment.name.clone();
        let request = Request::Attach(Box::new(attachment));
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.ask_with("attach a device", "attach", &request, &fds)
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

#[async_trait]
impl PlugNics for VmmMachine {
    fn takes_more(&self) -> bool {
        true
    }

    async fn attach_nic(&self, nic: &Nic) -> Result<(), Error> {
        self.attach(&Pluggable::Nic(nic.clone())).await
    }

    async fn detach_nic(&self, mac: [u8; 6], deadline: Duration) -> Result<(), Error> {
        // By its address it is known; the rest is nobody's business any more.
        let (mtu, taps) = (0, Vec::new());
        self.detach(&Pluggable::Nic(Nic { mac, mtu, taps }), deadline)
            .await
    }
}
