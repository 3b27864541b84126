//! The devices on their PCI bus, wired to KVM.

use std::{
    ops::Range,
    os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::sync_channel},
    time::Duration,
};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;
use walnut_devices::{
    pci::{self, Doorbells, Messages, Root},
    virtio::{self, MemoryCell, Port, Quiesced, Worker},
};
use walnut_vmm_api::{Attachment, Device, FdIndex, NAME_MAX};

use crate::{
    Error, devices,
    irq::{Line, Message, Routes},
    jail::calls::Thread,
    layout,
    machine::Fds,
    nursery::{Job, Nursery, Queue},
    ports,
    slots::Slots,
    snapshot::state,
    threads::Threads,
};

/// virtio 1.3 §5.11.
const VIRTIO_ID_FS: u32 = 26;
/// virtio 1.3 §5.15.
const VIRTIO_ID_MEM: u32 = 24;

/// The bus, and the ports of what sits on it.
#[derive(Debug)]
pub(crate) struct Bus {
    wiring: Arc<Wiring>,
    slots: Arc<Slots>,
    members: Mutex<Vec<Member>>,
    /// Until they are started. (Locked only because a device is not `Sync`.)
    fitted: Mutex<Vec<Fitted>>,
    /// To the thread that adds and takes devices apart while the guest runs.
    queue: Arc<Queue>,
}

/// What a device is wired to.
#[derive(Debug)]
pub(crate) struct Wiring {
    root: Arc<Root>,
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    memory: MemoryCell,
    /// Whether guest memory can be shared with a back end.
    shared: bool,
    /// Whether it comes and goes.
    grows: bool,
}

/// A device in its slot, without a thread.
#[derive(Debug)]
pub(crate) struct Fitted {
    pub(crate) member: Member,
    pub(crate) worker: Worker,
    /// The kind of its thread.
    pub(crate) thread: &'static Thread,
}

/// A device on the bus.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    /// What requests call it.
    pub(crate) name: String,
    pub(crate) slot: u8,
    pub(crate) port: Port,
    /// What it said when it came to rest.
    rest: Arc<Mutex<Quiesced>>,
}

impl Member {
    fn rest(&self) -> MutexGuard<'_, Quiesced> {
        // It is whole whoever panicked.
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// When a device comes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum When<'a> {
    Boot,
    Running,
    /// It was there before.
    Saved(&'a state::Device),
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

impl Wiring {
    /// Makes a device, and puts it in the first free slot.
    pub(crate) fn fit(
        &self,
        attachment: &Attachment,
        when: When<'_>,
        take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
    ) -> Result<Fitted, Error> {
        let name = &attachment.name;
        let complain = |e: Error| Error::Config(format!("device {name}: {e}"));
        self.check(&attachment.device, when).map_err(complain)?;
        let (mut device, thread) =
            devices::make(&attachment.device, &self.memory, take).map_err(complain)?;
        if let When::Saved(saved) = when {
            device.restore(&saved.own).map_err(|_| {
                let what = "what the snapshot says of it makes no sense";
                complain(Error::Config(what.to_owned()))
            })?;
        }
        self.install(name, device, thread, when)
    }

    /// Puts a device into a slot.
    fn install(
        &self,
        name: &str,
        device: Box<dyn virtio::Device>,
        thread: &'static Thread,
        when: When<'_>,
    ) -> Result<Fitted, Error> {
        let (worker, port) = Worker::new(device)?;
        let mut kicks = Vec::new();
        let mut lines = vec![self.routes.line()?];
        for index in 0..port.queue_sizes().len() {
            if let Some(kick) = port.kick(index) {
                kicks.push(duplicate(kick)?);
            }
            lines.push(self.routes.line()?);
        }
        let doorbells = Box::new(Kicks {
            vm: Arc::clone(&self.vm),
            kicks,
            at: Mutex::new(None),
        });
        let (port_too, memory, lines) = (port.clone(), self.memory.clone(), Arc::new(Lines(lines)));
        let slot = match when {
            When::Boot => self.root.add(port_too, memory, lines, doorbells),
            When::Running => self.root.plug(port_too, memory, lines, doorbells),
            When::Saved(saved) => {
                let slot = saved.slot;
                let inserted = self.root.insert(slot, port_too, memory, lines, doorbells);
                inserted.map(|()| slot)
            }
        };
        let slot = slot.map_err(|e| Error::Config(e.to_string()))?;
        let member = Member {
            name: name.to_owned(),
            slot,
            port,
            rest: Arc::default(),
        };
        Ok(Fitted {
            member,
            worker,
            thread,
        })
    }

    fn check(&self, device: &Device, when: When<'_>) -> Result<(), Error> {
        let complain = |what: &str| Err(Error::Config(what.to_owned()));
        match device {
            _ if !self.shared && devices::shares_memory(device) => complain(
                "its back end needs guest memory that is shared, and this machine's is not",
            ),
            _ if self.grows && devices::shares_memory(device) => complain(
                "its back end would keep memory that the guest gives up; \
                 a machine whose memory grows has no vhost-user devices",
            ),
            Device::Vsock { .. } if matches!(when, When::Running) => {
                complain("a vsock device is there from the start or not at all")
            }
            _ => Ok(()),
        }
    }

    /// Undoes [`Self::fit`].
    pub(crate) fn remove(&self, fitted: Fitted) {
        let function = self.root.remove(fitted.member.slot);
        if let Some(function) = &function {
            function.unplug();
        }
        // The worker first: it may hold a way back to the driver.
        drop(fitted.worker);
    }
}

impl Bus {
    pub(crate) fn new(
        vm: &Arc<VmFd>,
        routes: &Arc<Routes>,
        memory: &MemoryCell,
        window64: Range<u64>,
        shared: bool,
        grows: bool,
        acknowledged: &EventFd,
    ) -> Result<Self, Error> {
        let root = Arc::new(Root::new(layout::ECAM, window64));
        let queue = Arc::new(Queue::new());
        let pin = routes.latch(ports::SLOTS_PIN, acknowledged)?;
        let slots = Slots::new(Arc::clone(&root), pin, Arc::clone(&queue) as Arc<_>);
        let wiring = Wiring {
            root,
            vm: Arc::clone(vm),
            routes: Arc::clone(routes),
            memory: memory.clone(),
            shared,
            grows,
        };
        Ok(Self {
            wiring: Arc::new(wiring),
            slots: Arc::new(slots),
            members: Mutex::default(),
            fitted: Mutex::default(),
            queue,
        })
    }

    /// The registers by which devices come and go.
    pub(crate) fn slots(&self) -> Arc<Slots> {
        Arc::clone(&self.slots)
    }

    /// Adds a device in the next slot. Its thread starts with [`Self::start`].
    pub(crate) fn add(
        &mut self,
        attachment: &Attachment,
        take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
    ) -> Result<(), Error> {
        self.put(attachment, When::Boot, take)
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
            self.put(attachment, When::Saved(device), &mut take)?;
        }
        Ok(())
    }

    fn put(
        &mut self,
        attachment: &Attachment,
        when: When<'_>,
        take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
    ) -> Result<(), Error> {
        self.check_name(&attachment.name)?;
        let fitted = self.wiring.fit(attachment, when, take)?;
        self.keep(fitted);
        Ok(())
    }

    /// Adds a device that no request names, in the next slot.
    pub(crate) fn place(
        &mut self,
        name: &str,
        device: Box<dyn virtio::Device>,
        thread: &'static Thread,
    ) -> Result<(), Error> {
        self.check_name(name)?;
        let fitted = self.wiring.install(name, device, thread, When::Boot)?;
        self.keep(fitted);
        Ok(())
    }

    fn keep(&mut self, fitted: Fitted) {
        self.members().push(fitted.member.clone());
        let all = self.fitted.get_mut();
        all.unwrap_or_else(PoisonError::into_inner).push(fitted);
    }

    fn check_name(&self, name: &str) -> Result<(), Error> {
        if name.is_empty() || name.len() > NAME_MAX || name.contains('\0') {
            return Err(Error::Config(format!(
                "a device cannot be called {name:?}: a name has 1 to {NAME_MAX} bytes"
            )));
        }
        if self.members().iter().any(|member| member.name == *name) {
            return Err(Error::Config(format!("two devices are called {name}")));
        }
        Ok(())
    }

    /// Starts the devices' threads, and the one that will see to those that come
    /// and go; each behind its own filter if `jailed`. `gone` is rung when there is
    /// something to hear from [`Self::gone`].
    pub(crate) fn start(
        &mut self,
        jailed: bool,
        failed: &Failures,
        gone: EventFd,
    ) -> Result<(), Error> {
        let threads = Threads::new(jailed, failed.clone(), Arc::clone(&self.queue));
        let (wiring, slots) = (Arc::clone(&self.wiring), Arc::clone(&self.slots));
        let mut nursery = Nursery::new(wiring, slots, threads, gone);
        let fitted = self.fitted.get_mut();
        for fitted in std::mem::take(fitted.unwrap_or_else(PoisonError::into_inner)) {
            nursery.adopt(fitted)?;
        }
        nursery.start(jailed, &self.queue)
    }

    /// Adds a device to the running machine, and tells the guest.
    pub(crate) fn attach(&self, attachment: Attachment, fds: Fds) -> Result<(), Error> {
        self.check_name(&attachment.name)?;
        let (reply, hears) = sync_channel(1);
        self.queue.push(Job::Attach {
            attachment: Box::new(attachment),
            fds,
            reply,
        });
        let member = hears
            .recv()
            .map_err(|_| Error::Config("the thread that adds devices died".to_owned()))??;
        self.members().push(member);
        Ok(())
    }

    /// Asks the guest to let go of a device.
    pub(crate) fn detach(&self, name: &str) -> Result<(), Error> {
        let members = self.members();
        let Some(member) = members.iter().find(|member| member.name == name) else {
            return Err(Error::Config(format!("no device is called {name}")));
        };
        // Where a newer device has its slot, it has been let go already.
        let newest = members.iter().rfind(|other| other.slot == member.slot);
        if newest.is_some_and(|newest| newest.name == name) {
            self.slots.ask(member.slot);
        }
        Ok(())
    }

    /// Forgets the devices that are gone; their names.
    pub(crate) fn gone(&self) -> Vec<String> {
        let names = self.queue.take_gone();
        self.members()
            .retain(|member| !names.contains(&member.name));
        names
    }

    fn members(&self) -> MutexGuard<'_, Vec<Member>> {
        // A list is whole whoever panicked.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last bus.
    pub(crate) fn last(&self) -> u8 {
        0
    }

    pub(crate) fn resume(&self) {
        for member in self.members().iter() {
            member.port.resume();
        }
    }

    /// Lets the devices rest. No vCPU runs.
    pub(crate) fn pause(&self, limit: Duration) -> Result<(), Error> {
        for member in self.members().iter() {
            match member.port.pause(limit) {
                Some(rest) => *member.rest() = rest,
                // One that the guest has let go may have ended just now.
                None if member.port.ended() => {}
                None => {
                    let name = &member.name;
                    return Err(Error::Config(format!("device {name} does not rest")));
                }
            }
        }
        Ok(())
    }

    /// What the devices are, all of which rest.
    pub(crate) fn save(&self) -> Result<Vec<state::Device>, Error> {
        let mut devices = Vec::new();
        for member in self.members().iter() {
            let name = &member.name;
            if member.port.id() == VIRTIO_ID_FS {
                return Err(Error::Config(format!(
                    "device {name} cannot be saved: what its guest has open is known to the \
                     process that serves it; detach it first"
                )));
            }
            if member.port.id() == VIRTIO_ID_MEM {
                return Err(Error::Config(
                    "a machine whose memory can grow cannot be saved; make it without \
                     max-memory beyond memory"
                        .to_owned(),
                ));
            }
            let rest = member.rest();
            // One that the guest has let go is not there any more.
            let Some(function) = self.wiring.root.save(member.slot, &rest) else {
                continue;
            };
            devices.push(state::Device {
                name: name.clone(),
                slot: member.slot,
                function,
                own: rest.state.clone(),
            });
        }
        Ok(devices)
    }

    /// Makes the devices of [`Self::add_saved`] what they were; they rest.
    pub(crate) fn restore(&self, saved: &[state::Device]) -> Result<(), Error> {
        for (member, device) in self.members().iter().zip(saved) {
            let queues = (self.wiring.root.restore(member.slot, &device.function))
                .map_err(|e| Error::Config(format!("restore device {}: {e}", device.name)))?;
            // So that a machine can be saved again before it has run.
            *member.rest() = Quiesced {
                queues,
                state: device.own.clone(),
            };
        }
        Ok(())
    }
}

/// Who hears of a device's thread that cannot go on.
pub(crate) type Failures = Arc<dyn Fn(String) + Send + Sync>;

impl crate::vcpu::Bus for Bus {
    fn read(&self, address: u64, data: &mut [u8]) {
        self.wiring.root.read(address, data);
    }

    fn write(&self, address: u64, data: &[u8]) {
        self.wiring.root.write(address, data);
    }
}
