//! The devices on their PCI bus, wired to KVM.

use std::{
    ops::Range,
    os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    time::Duration,
};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;
use walnut_devices::{
    pci::{self, Doorbells, Messages, Root},
    virtio::{MemoryCell, Port, Quiesced, Worker},
};
use walnut_vmm_api::{Attachment, FdIndex, NAME_MAX};

use crate::{
    Error, devices,
    irq::{Line, Message, Routes},
    jail::{Filter, calls::Thread},
    layout,
    snapshot::state,
};

/// virtio 1.3 §5.11.
const VIRTIO_ID_FS: u32 = 26;

/// The bus, and the ports of what sits on it.
#[derive(Debug)]
pub(crate) struct Bus {
    root: Root,
    members: Vec<Member>,
    /// Until they are started, each with its name and its list of calls. (Locked only
    /// because a device is not `Sync`.)
    workers: Mutex<Vec<(String, Worker, &'static Thread)>>,
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    memory: MemoryCell,
}

/// A device on the bus.
#[derive(Debug)]
struct Member {
    /// What requests call it.
    name: String,
    slot: usize,
    port: Port,
    /// What it said when it came to rest.
    rest: Mutex<Quiesced>,
}

/// The messages of one function.
#[derive(Debug)]
struct Lines(Vec<Line>);

impl Messages for Lines {
    fn route(&self, vector: usize, message: Option<pci::Message>) {
        let message = message.map(|m| Message {
            address: m.address,
            data: m.data,
        });
        if let Some(line) = self.0.get(vector) {
            // KVM refuses a route only for want of memory: then the guest misses
            // an interrupt, and nobody else.
            let _ = line.route(message);
        }
    }

    fn send(&self, vector: usize) {
        if let Some(line) = self.0.get(vector) {
            line.send();
        }
    }
}

/// Turns the guest's writes to doorbells into kicks, without leaving KVM.
#[derive(Debug)]
struct Kicks {
    vm: Arc<VmFd>,
    kicks: Vec<EventFd>,
    at: Mutex<Option<u64>>,
}

impl Doorbells for Kicks {
    fn moved(&self, first: Option<u64>) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        if *at == first {
            return;
        }
        let address = |first: u64, index: usize| {
            let offset = Self::stride().saturating_mul(index as u64);
            IoEventAddress::Mmio(first.saturating_add(offset))
        };
        // Where KVM refuses, the write leaves it and the transport kicks.
        for (index, kick) in self.kicks.iter().enumerate() {
            if let Some(old) = *at {
                let _ = self
                    .vm
                    .unregister_ioevent(kick, &address(old, index), NoDatamatch);
            }
            if let Some(new) = first {
                let _ = self
                    .vm
                    .register_ioevent(kick, &address(new, index), NoDatamatch);
            }
        }
        *at = first;
    }
}

fn duplicate(fd: impl AsFd) -> Result<EventFd, Error> {
    let fd = fd
        .as_fd()
        .try_clone_to_owned()
        .map_err(|e| Error::Host("copy an eventfd", crate::vcpu::errno(&e)))?;
    // SAFETY: the descriptor is ours alone, and of an eventfd.
    Ok(unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) })
}

impl Bus {
    pub(crate) fn new(
        vm: &Arc<VmFd>,
        routes: &Arc<Routes>,
        memory: &MemoryCell,
        window64: Range<u64>,
    ) -> Self {
        Self {
            root: Root::new(layout::ECAM, window64),
            members: Vec::new(),
            workers: Mutex::default(),
            vm: Arc::clone(vm),
            routes: Arc::clone(routes),
            memory: memory.clone(),
        }
    }

    /// Adds a device in the next slot. Its thread starts with [`Self::start`].
    pub(crate) fn add(
        &mut self,
        attachment: &Attachment,
        take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
    ) -> Result<(), Error> {
        self.put(attachment, None, take)
    }

    /// Adds the devices of a snapshot where they were. Their threads start with
    /// [`Self::start`], and [`Self::restore`] makes them what they were.
    pub(crate) fn add_saved(
        &mut self,
        attachments: &[Attachment],
        saved: &[state::Device],
        mut take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
    ) -> Result<(), Error> {
        if let Some(stranger) = attachments
            .iter()
            .find(|a| !saved.iter().any(|device| device.name == a.name))
        {
            return Err(Error::Config(format!(
                "the snapshot has no device {}: attach it once the guest runs",
                stranger.name
            )));
        }
        for device in saved {
            let named = attachments.iter().find(|a| a.name == device.name);
            let attachment = named.ok_or_else(|| {
                Error::Config(format!(
                    "the snapshot has a device {:?}, which is to be given as well",
                    device.name
                ))
            })?;
            self.put(attachment, Some(device), &mut take)?;
        }
        Ok(())
    }

    fn put(
        &mut self,
        attachment: &Attachment,
        saved: Option<&state::Device>,
        take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
    ) -> Result<(), Error> {
        let name = &attachment.name;
        if name.is_empty() || name.len() > NAME_MAX || name.contains('\0') {
            return Err(Error::Config(format!(
                "a device cannot be called {name:?}: a name has 1 to {NAME_MAX} bytes"
            )));
        }
        if self.members.iter().any(|member| member.name == *name) {
            return Err(Error::Config(format!("two devices are called {name}")));
        }
        let (mut device, thread) = devices::make(&attachment.device, &self.memory, take)
            .map_err(|e| Error::Config(format!("device {name}: {e}")))?;
        if let Some(saved) = saved {
            device.restore(&saved.own).map_err(|_| {
                Error::Config(format!(
                    "device {name}: what the snapshot says of it makes no sense"
                ))
            })?;
        }
        let (worker, port) = Worker::new(device)?;
        let mut kicks = Vec::new();
        let mut lines = vec![self.routes.line()?];
        for index in 0..port.queue_sizes().len() {
            if let Some(kick) = port.kick(index) {
                kicks.push(duplicate(kick)?);
            }
            lines.push(self.routes.line()?);
        }
        let doorbells = Kicks {
            vm: Arc::clone(&self.vm),
            kicks,
            at: Mutex::new(None),
        };
        let lines = Arc::new(Lines(lines));
        let (memory, doorbells) = (self.memory.clone(), Box::new(doorbells));
        let slot = match saved {
            None => self.root.add(port.clone(), memory, lines, doorbells),
            Some(saved) => {
                let slot = usize::from(saved.slot);
                self.root
                    .insert(slot, port.clone(), memory, lines, doorbells)
                    .map(|()| slot)
            }
        };
        self.members.push(Member {
            name: name.clone(),
            slot: slot.map_err(|e| Error::Config(e.to_string()))?,
            port,
            rest: Mutex::default(),
        });
        self.workers().push((name.clone(), worker, thread));
        Ok(())
    }

    /// Starts the devices' threads, each behind its own filter if `jailed`.
    pub(crate) fn start(&mut self, jailed: bool, ended: &Failures) -> Result<(), Error> {
        for (name, worker, thread) in std::mem::take(self.workers()) {
            let filter = match jailed {
                true => Some(Filter::of(thread)?),
                false => None,
            };
            let (locked_in, hears) = sync_channel(1);
            let ended = ended.clone();
            std::thread::Builder::new()
                .name(name.clone())
                .stack_size(crate::STACK)
                .spawn(move || serve(&name, worker, filter.as_ref(), &locked_in, &ended))
                .map_err(|e| Error::Host("start a device's thread", crate::vcpu::errno(&e)))?;
            match hears.recv() {
                Ok(Ok(())) => {}
                Ok(Err(e)) => return Err(Error::Config(e)),
                Err(_) => return Err(Error::Config("a device's thread died".to_owned())),
            }
        }
        Ok(())
    }

    fn workers(&mut self) -> &mut Vec<(String, Worker, &'static Thread)> {
        let workers = self.workers.get_mut();
        workers.unwrap_or_else(PoisonError::into_inner)
    }

    /// The last bus.
    pub(crate) fn last(&self) -> u8 {
        0
    }

    pub(crate) fn resume(&self) {
        for member in &self.members {
            member.port.resume();
        }
    }

    /// Lets the devices rest. No vCPU runs.
    pub(crate) fn pause(&self, limit: Duration) -> Result<(), Error> {
        for member in &self.members {
            let rest = (member.port.pause(limit))
                .ok_or_else(|| Error::Config(format!("device {} does not rest", member.name)))?;
            *member.rest.lock().unwrap_or_else(PoisonError::into_inner) = rest;
        }
        Ok(())
    }

    /// What the devices are, all of which rest.
    pub(crate) fn save(&self) -> Result<Vec<state::Device>, Error> {
        let mut devices = Vec::with_capacity(self.members.len());
        for member in &self.members {
            let name = &member.name;
            if member.port.id() == VIRTIO_ID_FS {
                return Err(Error::Config(format!(
                    "device {name} cannot be saved: what its guest has open is known to the \
                     process that serves it; detach it first"
                )));
            }
            let rest = member.rest.lock().unwrap_or_else(PoisonError::into_inner);
            let function = self.root.save(member.slot, &rest);
            devices.push(state::Device {
                name: name.clone(),
                slot: u8::try_from(member.slot).unwrap_or(0),
                function: function
                    .ok_or_else(|| Error::Config(format!("device {name} is not on the bus")))?,
                own: rest.state.clone(),
            });
        }
        Ok(devices)
    }

    /// Makes the devices of [`Self::add_saved`] what they were; they rest.
    pub(crate) fn restore(&self, saved: &[state::Device]) -> Result<(), Error> {
        for (member, device) in self.members.iter().zip(saved) {
            let queues = (self.root.restore(member.slot, &device.function))
                .map_err(|e| Error::Config(format!("restore device {}: {e}", device.name)))?;
            // So that a machine can be saved again before it has run.
            let rest = Quiesced {
                queues,
                state: device.own.clone(),
            };
            *member.rest.lock().unwrap_or_else(PoisonError::into_inner) = rest;
        }
        Ok(())
    }
}

/// Who hears of a device's thread that cannot go on.
pub(crate) type Failures = Arc<dyn Fn(String) + Send + Sync>;

/// A device's thread.
fn serve(
    name: &str,
    worker: Worker,
    filter: Option<&Filter>,
    locked_in: &SyncSender<Result<(), String>>,
    failed: &Failures,
) {
    let result = filter.map_or(Ok(()), Filter::install);
    let ready = result.is_ok();
    // The other end waits for it.
    let _ = locked_in.send(result);
    if ready && let Err(e) = worker.run() {
        failed(format!("{name}: {e}"));
    }
    // To end a thread takes system calls that it need not have.
    loop {
        std::thread::park();
    }
}

impl crate::vcpu::Bus for Bus {
    fn read(&self, address: u64, data: &mut [u8]) {
        self.root.read(address, data);
    }

    fn write(&self, address: u64, data: &[u8]) {
        self.root.write(address, data);
    }
}
