//! The devices on their PCI bus, wired to KVM.

use std::{
    ops::Range,
    os::fd::{AsFd, FromRawFd, IntoRawFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::sync_channel},
    time::Duration,
};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;
use walnut_devices::{
    pci::{self, Doorbells, Messages, Root},
    virtio::{Port, Quiesced, Worker},
};
use walnut_vmm_api::Attachment;

use crate::{
    Error,
    irq::{Line, Message, Routes},
    jail::calls::Thread,
    layout,
    machine::Fds,
    nursery::{self, Job, Nursery, Queue},
    ports,
    post::Ready,
    prepared::{Place, Prepared, Site, check_name},
    slots::Slots,
    snapshot::state,
    threads::Threads,
};

/// virtio 1.3 §5.11.
const VIRTIO_ID_FS: u32 = 26;

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
    site: Site,
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
    /// What devices are made for.
    pub(crate) fn site(&self) -> &Site {
        &self.site
    }

    /// Puts a device into its slot.
    pub(crate) fn fit(&self, prepared: Prepared) -> Result<Fitted, Error> {
        let Prepared {
            name,
            device,
            thread,
            place,
        } = prepared;
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
        let (port_too, lines) = (port.clone(), Arc::new(Lines(lines)));
        let memory = self.site.memory.clone();
        let slot = match place {
            Place::Next => self.root.add(port_too, memory, lines, doorbells),
            Place::Plugged => self.root.plug(port_too, memory, lines, doorbells),
            Place::Slot(slot) => {
                let inserted = self.root.insert(slot, port_too, memory, lines, doorbells);
                inserted.map(|()| slot)
            }
        };
        let slot = slot.map_err(|e| Error::Config(e.to_string()))?;
        let member = Member {
            name,
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
    /// The last bus.
    pub(crate) const LAST: u8 = 0;

    pub(crate) fn new(
        vm: &Arc<VmFd>,
        routes: &Arc<Routes>,
        site: Site,
        window64: Range<u64>,
        acknowledged: &EventFd,
        queue: Arc<Queue>,
    ) -> Result<Self, Error> {
        let root = Arc::new(Root::new(layout::ECAM, window64));
        let pin = routes.latch(ports::SLOTS_PIN, acknowledged)?;
        let slots = Slots::new(Arc::clone(&root), pin, Arc::clone(&queue) as Arc<_>);
        let wiring = Wiring {
            root,
            vm: Arc::clone(vm),
            routes: Arc::clone(routes),
            site,
        };
        Ok(Self {
            wiring: Arc::new(wiring),
            slots: Arc::new(slots),
            members: Mutex::default(),
            fitted: Mutex::default(),
            queue,
        })
    }

    /// What its devices are made for.
    pub(crate) fn site(&self) -> &Site {
        self.wiring.site()
    }

    /// The registers by which devices come and go.
    pub(crate) fn slots(&self) -> Arc<Slots> {
        Arc::clone(&self.slots)
    }

    /// Puts a device into its slot. Its thread gets it with [`Self::start`]; if it is of
    /// a snapshot, [`Self::restore`] makes it what it was.
    pub(crate) fn put(&mut self, prepared: Prepared) -> Result<(), Error> {
        self.check_name(&prepared.name)?;
        let fitted = self.wiring.fit(prepared)?;
        self.members().push(fitted.member.clone());
        let all = self.fitted.get_mut();
        all.unwrap_or_else(PoisonError::into_inner).push(fitted);
        Ok(())
    }

    fn check_name(&self, name: &str) -> Result<(), Error> {
        let members = self.members();
        check_name(name, members.iter().map(|member| member.name.as_str()))
    }

    /// Gives the devices to their threads, and the one that will see to those that come
    /// and go its duty. `gone` is rung when there is something to hear from
    /// [`Self::gone`].
    pub(crate) fn start(
        &mut self,
        threads: Threads,
        nursery: &Ready<nursery::Duty>,
        gone: EventFd,
    ) -> Result<(), Error> {
        let (wiring, slots) = (Arc::clone(&self.wiring), Arc::clone(&self.slots));
        let mut state = Nursery::new(wiring, slots, threads, gone);
        let fitted = self.fitted.get_mut();
        for fitted in std::mem::take(fitted.unwrap_or_else(PoisonError::into_inner)) {
            state.adopt(fitted)?;
        }
        nursery.inbox.put((state, Arc::clone(&self.queue)));
        Ok(())
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
