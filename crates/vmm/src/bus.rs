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
    virtio::{Device, Memory, MemoryCell, Port, Worker},
};
use walnut_vmm_api::{Attachment, FdIndex, NAME_MAX};

use crate::{
    Error, devices,
    irq::{Line, Message, Routes},
    jail::Filter,
    layout,
};

/// The bus, and the ports of what sits on it.
#[derive(Debug)]
pub(crate) struct Bus {
    root: Root,
    members: Vec<Member>,
    /// Until they are started, each with its name and system calls. (Locked only
    /// because a device is not `Sync`.)
    workers: Mutex<Vec<(String, Worker, devices::Calls)>>,
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    memory: MemoryCell,
    /// Memory comes and goes.
    grows: bool,
}

/// A device on the bus.
#[derive(Debug)]
struct Member {
    /// What requests call it.
    name: String,
    port: Port,
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
        memory: &Memory,
        window64: Range<u64>,
        grows: bool,
    ) -> Self {
        Self {
            root: Root::new(layout::ECAM, window64),
            members: Vec::new(),
            workers: Mutex::default(),
            vm: Arc::clone(vm),
            routes: Arc::clone(routes),
            memory: MemoryCell::new(memory.clone()),
            grows,
        }
    }

    /// Adds a device in the next slot. Its thread starts with [`Self::start`].
    pub(crate) fn add(
        &mut self,
        attachment: &Attachment,
        take: impl FnMut(FdIndex) -> Result<OwnedFd, Error>,
    ) -> Result<(), Error> {
        let name = &attachment.name;
        if name.is_empty() || name.len() > NAME_MAX || name.contains('\0') {
            return Err(Error::Config(format!(
                "a device cannot be called {name:?}: a name has 1 to {NAME_MAX} bytes"
            )));
        }
        if self.grows && devices::shares_memory(&attachment.device) {
            return Err(Error::Config(format!(
                "device {name}: its back end would keep memory that the guest gives up; \
                 a machine whose memory grows has no vhost-user devices"
            )));
        }
        let (device, calls) = devices::make(&attachment.device, &self.memory, take)
            .map_err(|e| Error::Config(format!("device {name}: {e}")))?;
        self.place(name, device, calls)
    }

    /// Puts a device into the next slot.
    pub(crate) fn place(
        &mut self,
        name: &str,
        device: Box<dyn Device>,
        calls: devices::Calls,
    ) -> Result<(), Error> {
        if self.members.iter().any(|member| member.name == *name) {
            return Err(Error::Config(format!("two devices are called {name}")));
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
        self.root
            .add(
                port.clone(),
                self.memory.clone(),
                Arc::new(Lines(lines)),
                Box::new(doorbells),
            )
            .map_err(|e| Error::Config(e.to_string()))?;
        self.members.push(Member {
            name: name.to_owned(),
            port,
        });
        self.workers().push((name.to_owned(), worker, calls));
        Ok(())
    }

    /// Starts the devices' threads, each behind its own filter if `jailed`.
    pub(crate) fn start(&mut self, jailed: bool, ended: &Failures) -> Result<(), Error> {
        for (name, worker, calls) in std::mem::take(self.workers()) {
            let filter = match jailed {
                true => Some(Filter::device(&calls)?),
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

    fn workers(&mut self) -> &mut Vec<(String, Worker, devices::Calls)> {
        let workers = self.workers.get_mut();
        workers.unwrap_or_else(PoisonError::into_inner)
    }

    /// Guest memory, as the devices see it.
    pub(crate) fn memory(&self) -> &MemoryCell {
        &self.memory
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
        for Member { name, port } in &self.members {
            port.pause(limit)
                .ok_or_else(|| Error::Config(format!("device {name} does not rest")))?;
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
