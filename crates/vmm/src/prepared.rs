//! Devices that are made, and not yet on a bus: what takes the host is done, what takes
//! KVM is not.

use std::os::fd::OwnedFd;

use walnut_devices::virtio::{self, MemoryCell};
use walnut_vmm_api::{Attachment, Device, FdIndex, NAME_MAX};

use crate::{Error, backends::BackEnds, devices, jail::calls::Thread, snapshot::state};

/// What devices need to know of their machine.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) memory: MemoryCell,
    /// Whether guest memory can be shared with a back end.
    pub(crate) shared: bool,
    /// Who else has it mapped.
    pub(crate) back_ends: BackEnds,
}

/// When a device comes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum When<'a> {
    Boot,
    Running,
    /// It was there before.
    Saved(&'a state::Device),
}

/// Where a device goes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    Next,
    /// The next one, of which the guest hears.
    Plugged,
    Slot(u8),
}

/// A device without a place.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) name: String,
    pub(crate) device: Box<dyn virtio::Device>,
    /// The kind of its thread.
    pub(crate) thread: &'static Thread,
    pub(crate) place: Place,
}

impl Prepared {
    /// Makes a device. `take` gives the descriptors that came with the request.
    pub(crate) fn new(
        site: &Site,
        attachment: &Attachment,
        when: When<'_>,
        take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
    ) -> Result<Self, Error> {
        let name = &attachment.name;
        let complain = |e: Error| Error::Config(format!("device {name}: {e}"));
        let mut wanted = attachment.device.clone();
        if let (Device::Block { queues, .. }, When::Saved(saved)) = (&mut wanted, when) {
            // Its driver has set up as many as there were.
            *queues = u16::try_from(saved.function.queues()).unwrap_or(u16::MAX);
        }
        check(site, &wanted, when).map_err(complain)?;
        let (device, thread) = devices::make(&wanted, &site.memory, take).map_err(complain)?;
        let place = match when {
            When::Boot => Place::Next,
            When::Running => Place::Plugged,
            When::Saved(saved) => Place::Slot(saved.slot),
        };
        let mut prepared = Self {
            name: name.clone(),
            device,
            thread,
            place,
        };
        if let When::Saved(saved) = when {
            prepared.be(saved)?;
        }
        Ok(prepared)
    }

    /// Makes the device what it was, in the place where it was.
    pub(crate) fn be(&mut self, saved: &state::Device) -> Result<(), Error> {
        self.device.restore(&saved.own).map_err(|_| {
            Error::Config(format!(
                "device {}: what the snapshot says of it makes no sense",
                self.name
            ))
        })?;
        self.place = Place::Slot(saved.slot);
        Ok(())
    }

    /// Makes the devices of a new machine.
    pub(crate) fn all(
        site: &Site,
        attachments: &[Attachment],
        mut take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
    ) -> Result<Vec<Self>, Error> {
        let mut all = Vec::new();
        for attachment in attachments {
            Self::add(&mut all, site, attachment, When::Boot, &mut take)?;
        }
        Ok(all)
    }

    /// Makes the devices of a snapshot, in its order.
    pub(crate) fn saved(
        site: &Site,
        attachments: &[Attachment],
        saved: &[&state::Device],
        mut take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
    ) -> Result<Vec<Self>, Error> {
        if let Some(stranger) = attachments
            .iter()
            .find(|a| !saved.iter().any(|device| device.name == a.name))
        {
            return Err(Error::Config(format!(
                "the snapshot has no device {}: attach it once the guest runs",
                stranger.name
            )));
        }
        let mut all = Vec::new();
        for device in saved {
            let named = attachments.iter().find(|a| a.name == device.name);
            let attachment = named.ok_or_else(|| {
                Error::Config(format!(
                    "the snapshot has a device {:?}, which is to be given as well",
                    device.name
                ))
            })?;
            Self::add(&mut all, site, attachment, When::Saved(device), &mut take)?;
        }
        Ok(all)
    }

    fn add(
        all: &mut Vec<Self>,
        site: &Site,
        attachment: &Attachment,
        when: When<'_>,
        take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
    ) -> Result<(), Error> {
        check_name(
            &attachment.name,
            all.iter().map(|other| other.name.as_str()),
        )?;
        all.push(Self::new(site, attachment, when, take)?);
        Ok(())
    }
}

/// Whether a device can be called that beside others.
pub(crate) fn check_name<'a>(
    name: &str,
    mut others: impl Iterator<Item = &'a str>,
) -> Result<(), Error> {
    if name.is_empty() || name.len() > NAME_MAX || name.contains('\0') {
        return Err(Error::Config(format!(
            "a device cannot be called {name:?}: a name has 1 to {NAME_MAX} bytes"
        )));
    }
    match others.any(|other| other == name) {
        true => Err(Error::Config(format!("two devices are called {name}"))),
        false => Ok(()),
    }
}

fn check(site: &Site, device: &Device, when: When<'_>) -> Result<(), Error> {
    let complain = |what: &str| Err(Error::Config(what.to_owned()));
    match device {
        _ if !site.shared && devices::shares_memory(device) => {
            complain("its back end needs guest memory that is shared, and this machine's is not")
        }
        Device::Vsock { .. } if matches!(when, When::Running) => {
            complain("a vsock device is there from the start or not at all")
        }
        _ => Ok(()),
    }
}
