//! The thread that saves a paused machine.
//!
//! It is there from the start, like every thread, and has a filter of its own: to
//! read KVM's state and to write files are calls that no other thread need have.

use std::{
    fs::File,
    mem::ManuallyDrop,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip,
};
use kvm_ioctls::{VcpuFd, VmFd};
use sha2::{Digest, Sha256};
use vm_memory::GuestAddressSpace;
use walnut_devices::virtio::MemoryCell;

use super::{
    cpu,
    envelope::{Envelope, Identity},
    memory,
    state::{Room, Serial, State},
};
use crate::{
    Error,
    bus::Bus,
    jail::calls,
    ports::Ports,
    post::{Inbox, Post, Ready},
};

/// A vCPU, and the CPUID that it was given. Its thread holds the lock while it is in
/// the guest.
#[derive(Debug)]
pub(crate) struct Processor {
    pub(crate) fd: Arc<Mutex<VcpuFd>>,
    pub(crate) cpuid: CpuId,
}

impl Processor {
    pub(crate) fn new(fd: VcpuFd, cpuid: CpuId) -> Self {
        Self {
            fd: Arc::new(Mutex::new(fd)),
            cpuid,
        }
    }
}

/// What of a machine is saved.
#[derive(Debug)]
pub(crate) struct Subject {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) processors: Vec<Processor>,
    pub(crate) msrs: Vec<u32>,
    pub(crate) ports: Arc<Ports>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) memory: MemoryCell,
    /// If memory can grow.
    pub(crate) room: Option<Room>,
    /// Random: of which the identities of this machine's snapshots are made, so that
    /// no call is needed for them.
    pub(crate) seed: [u8; 16],
}

/// What the thread is given, once.
pub(crate) type Duty = (Subject, Receiver<Order>);

/// One snapshot, asked for.
#[derive(Debug)]
pub(crate) struct Order {
    state: File,
    memory: File,
    done: SyncSender<Result<(), Error>>,
}

/// The way to the thread.
#[derive(Debug)]
pub(crate) struct Scribe(SyncSender<Order>);

impl Scribe {
    /// Starts the thread, behind its filter if `jailed`.
    pub(crate) fn post(jailed: bool) -> Result<Post<Duty>, Error> {
        let serve = |inbox: &Inbox<Duty>| {
            // To drop it takes more system calls than to keep it.
            let duty = ManuallyDrop::new(inbox.take());
            let (subject, orders) = &*duty;
            serve(subject, orders);
        };
        Post::open(
            "snapshot".to_owned(),
            &calls::SNAPSHOT_THREAD,
            jailed,
            serve,
        )
    }

    /// The way to a thread that saves `subject`.
    pub(crate) fn new(thread: &Ready<Duty>, subject: Subject) -> Self {
        let (sender, orders) = sync_channel::<Order>(1);
        thread.inbox.put((subject, orders));
        Self(sender)
    }

    /// Saves the machine, none of which may run, to two empty files.
    pub(crate) fn save(&self, state: File, memory: File) -> Result<(), Error> {
        let gone = || Error::Config("the snapshot's thread died".to_owned());
        let (done, hears) = sync_channel(1);
        let order = Order {
            state,
            memory,
            done,
        };
        self.0.send(order).map_err(|_| gone())?;
        hears.recv().map_err(|_| gone())?
    }
}

fn serve(subject: &Subject, orders: &Receiver<Order>) {
    while let Ok(order) = orders.recv() {
        let result = write(subject, &order.state, &order.memory);
        // Closed before the answer, by which they are the supervisor's alone.
        drop((order.state, order.memory));
        let _ = order.done.send(result);
    }
}

fn write(subject: &Subject, state: &File, file: &File) -> Result<(), Error> {
    let body = gather(subject)?.encode()?;
    let identity = identity(&subject.seed, &body);
    let guest = subject.memory.memory();
    let size = memory::write(&guest, &identity, file)?;
    let envelope = Envelope {
        identity,
        memory: size,
        body,
    };
    envelope.write(state)?;
    Ok(())
}

/// Of its own for every snapshot: no two moments of a machine, and no two machines,
/// have the same time stamp counters and seed.
fn identity(seed: &[u8; 16], body: &[u8]) -> Identity {
    let digest: [u8; 32] = Sha256::new()
        .chain_update(seed)
        .chain_update(body)
        .finalize()
        .into();
    let mut identity = Identity::default();
    for (to, from) in identity.iter_mut().zip(digest) {
        *to = from;
    }
    identity
}

fn gather(subject: &Subject) -> Result<State, Error> {
    let mut vcpus = Vec::with_capacity(subject.processors.len());
    for processor in &subject.processors {
        // Its thread is not in the guest, so nobody holds it.
        let fd = processor.fd.lock().unwrap_or_else(PoisonError::into_inner);
        vcpus.push(cpu::save(&fd, &processor.cpuid, &subject.msrs)?);
    }
    let chip = |id: u32| {
        let mut chip = kvm_irqchip {
            chip_id: id,
            ..Default::default()
        };
        let result = subject.vm.get_irqchip(&mut chip);
        result
            .map(|()| chip)
            .map_err(|e| Error::Kvm("read an interrupt controller", e))
    };
    Ok(State {
        vcpus,
        chips: [
            chip(KVM_IRQCHIP_PIC_MASTER)?,
            chip(KVM_IRQCHIP_PIC_SLAVE)?,
            chip(KVM_IRQCHIP_IOAPIC)?,
        ],
        clock: (subject.vm.get_clock()).map_err(|e| Error::Kvm("read the guest's clock", e))?,
        serial: Serial::from(&subject.ports.state()),
        slots: subject.bus.slots().save(),
        room: subject.room,
        devices: subject.bus.save()?,
    })
}
