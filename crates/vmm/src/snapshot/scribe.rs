//! The thread that saves a paused machine.
//!
//! It is there from the start, like every thread, and has a filter of its own: to
//! read KVM's state and to write files are calls that no other thread need have.

use std::{
    fs::File,
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
    state::{Serial, State},
};
use crate::{Error, bus::Bus, jail::Filter, ports::Ports};

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
    /// Random: of which the identities of this machine's snapshots are made, so that
    /// no call is needed for them.
    pub(crate) seed: [u8; 16],
}

/// One snapshot, asked for.
#[derive(Debug)]
struct Order {
    state: File,
    memory: File,
    done: SyncSender<Result<(), Error>>,
}

/// The way to the thread.
#[derive(Debug)]
pub(crate) struct Scribe(SyncSender<Order>);

impl Scribe {
    /// Starts the thread, behind `filter` if there is one.
    pub(crate) fn start(subject: Subject, filter: Option<Filter>) -> Result<Self, Error> {
        let (sender, orders) = sync_channel::<Order>(1);
        let (locked_in, hears) = sync_channel(1);
        std::thread::Builder::new()
            .name("snapshot".to_owned())
            .stack_size(crate::STACK)
            .spawn(move || {
                let installed = filter.map_or(Ok(()), |filter| filter.install());
                let _ = locked_in.send(installed);
                serve(&subject, &orders);
                // To end takes more system calls than to stay.
                loop {
                    std::thread::park();
                }
            })
            .map_err(|e| Error::Host("start the snapshot's thread", crate::vcpu::errno(&e)))?;
        match hears.recv() {
            Ok(Ok(())) => Ok(Self(sender)),
            Ok(Err(e)) => Err(Error::Config(e)),
            Err(_) => Err(Error::Config("the snapshot's thread died".to_owned())),
        }
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
        devices: subject.bus.save()?,
    })
}
