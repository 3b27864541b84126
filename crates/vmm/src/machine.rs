//! Putting a machine together, in the one order that works.

use std::{
    fs::File,
    os::fd::{AsFd, IntoRawFd, OwnedFd},
    sync::{Arc, OnceLock},
    time::Duration,
};

use kvm_bindings::{KVM_CAP_TSC_DEADLINE_TIMER, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use walnut_devices::virtio::Memory;
use walnut_vmm_api::{Attachment, Config, Device, End, FdIndex, Jail, Stats, VERSION};

use crate::{
    Error,
    acpi::Tables,
    boot::Boot,
    bus::{Bus, Failures},
    cpu,
    irq::Routes,
    jail::{self, Filter},
    layout, memory,
    ports::{self, Ports},
    slots::Slots,
    vcpu::Vcpus,
};

/// vCPUs at most.
const VCPUS_MAX: u8 = 32;
/// How long a device may take to finish what is in flight.
const QUIESCE: Duration = Duration::from_secs(10);
/// `KVM_CREATE_VM` is interrupted by signals that a busy host's timers send.
const CREATE_TRIES: u32 = 5;

/// A running machine.
#[derive(Debug)]
pub(crate) struct Machine {
    vcpus: Vcpus,
    bus: Arc<Bus>,
    slots: Arc<Slots>,
    /// Why a device's thread could not go on.
    failure: Arc<OnceLock<String>>,
    /// What keeps KVM's machine alive; nothing is asked of it any more.
    _vm: Arc<VmFd>,
    /// The mapping that KVM reads and writes.
    memory: Memory,
}

/// The descriptors of a request, each to be taken once.
#[derive(Debug)]
pub(crate) struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    pub(crate) fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    pub(crate) fn take(&mut self, index: FdIndex) -> Result<OwnedFd, Error> {
        self.0
            .get_mut(usize::from(index.0))
            .and_then(Option::take)
            .ok_or_else(|| {
                Error::Config(format!("descriptor {} is missing or named twice", index.0))
            })
    }
}

fn check(config: &Config) -> Result<(), Error> {
    let complain = |what: String| Err(Error::Config(what));
    if config.version != VERSION {
        return complain(format!(
            "the supervisor speaks version {} of the control protocol, this VMM {VERSION}; \
             install both from one release",
            config.version
        ));
    }
    if config.vcpus == 0 || config.max_vcpus < config.vcpus || config.max_vcpus > VCPUS_MAX {
        return complain(format!(
            "{} of {} vCPUs were asked for; 1 to {VCPUS_MAX} can be had",
            config.vcpus, config.max_vcpus
        ));
    }
    if config.max_memory != config.memory {
        return complain("memory that grows is not there yet".to_owned());
    }
    if config.memory < 32 << 20 || !config.memory.is_multiple_of(1 << 20) {
        return complain(format!(
            "{} bytes of memory are not a multiple of 1 MiB, or less than 32 MiB",
            config.memory
        ));
    }
    Ok(())
}

impl Machine {
    /// Builds the machine of `config`, with every thread waiting and locked in.
    /// `ended` is rung when the guest has ended, `gone` when [`Self::gone`] has news.
    pub(crate) fn build(
        config: &Config,
        fds: Vec<OwnedFd>,
        ended: EventFd,
        gone: EventFd,
    ) -> Result<Self, Error> {
        check(config)?;
        let mut fds = Fds::new(fds);
        let kvm = open_kvm(fds.take(config.kvm)?)?;
        let vm = Arc::new(create_vm(&kvm)?);
        let memory = memory::create(config.memory, config.backing)?;
        map(&vm, &memory)?;
        vm.set_tss_address(layout::KVM_TSS)
            .map_err(|e| Error::Kvm("place the TSS", e))?;
        vm.create_irq_chip()
            .map_err(|e| Error::Kvm("create the interrupt controllers", e))?;
        let routes = Arc::new(Routes::new(Arc::clone(&vm)));

        let window64 = layout::window64(config.memory);
        let shared = config.backing.shared;
        let mut bus = Bus::new(&vm, &routes, &memory, window64.clone(), shared)?;
        let root = sockets(config, &fds)?;
        for attachment in &config.devices {
            bus.add(attachment, |fd| fds.take(fd))?;
        }
        let tables = Tables {
            vcpus: config.vcpus,
            max_vcpus: config.max_vcpus,
            last_bus: bus.last(),
            window64,
        };
        let boot = Boot {
            kernel: fds.take(config.kernel)?.into(),
            initramfs: config
                .initramfs
                .map(|fd| fds.take(fd))
                .transpose()?
                .map(File::from),
            cmdline: &config.cmdline,
            rsdp: tables.write(&memory)?,
        };
        let entry = boot.load(&memory)?;
        cpu::write_descriptors(&memory)?;

        let console = config.console.map(|fd| fds.take(fd)).transpose()?;
        let ports = Ports::new(
            console.map(File::from),
            routes.pin(ports::SERIAL_IRQ)?,
            bus.slots(),
        );
        let supported = cpu::supported(&kvm)?;
        let deadline = kvm.check_extension_raw(u64::from(KVM_CAP_TSC_DEADLINE_TIMER)) > 0;
        let mut vcpus: Vec<VcpuFd> = Vec::new();
        for id in 0..config.max_vcpus {
            let vcpu = vm
                .create_vcpu(u64::from(id))
                .map_err(|e| Error::Kvm("create a vCPU", e))?;
            let cpuid = cpu::cpuid(&supported, id, config.max_vcpus, deadline);
            cpu::prepare(&vcpu, &cpuid, (id == 0).then_some(entry))?;
            vcpus.push(vcpu);
        }
        // From here on everything is open that ever will be.
        drop(fds);
        let jailed = match config.jail {
            Jail::Full { user } => {
                jail::leave_host(root.as_ref().map(AsFd::as_fd), user)?;
                true
            }
            Jail::Off => false,
        };
        drop(root);
        let failure = Arc::new(OnceLock::new());
        bus.start(jailed, &failures(&failure, &ended)?, gone)?;
        let bus = Arc::new(bus);
        let on_bus: Arc<dyn crate::vcpu::Bus> = bus.clone();
        let filter = match jailed {
            true => Some(Arc::new(Filter::vcpu()?)),
            false => None,
        };
        let lock_in = move || filter.as_ref().map_or(Ok(()), |filter| filter.install());
        let vcpus = Vcpus::new(vcpus, ports, on_bus, ended, lock_in)?;
        if jailed {
            Filter::control()?.install().map_err(Error::Config)?;
        }
        Ok(Self {
            vcpus,
            slots: bus.slots(),
            bus,
            failure,
            _vm: vm,
            memory,
        })
    }

    /// Lets the guest run.
    pub(crate) fn resume(&self) {
        self.bus.resume();
        self.vcpus.run();
    }

    /// Stops the vCPUs, then lets the devices rest.
    pub(crate) fn pause(&self) -> Result<(), Error> {
        self.vcpus.pause();
        self.bus.pause(QUIESCE)
    }

    /// Ends it: no vCPU runs, and what was in flight is done or given up. How the
    /// guest ended.
    pub(crate) fn wind_up(&self) -> End {
        self.vcpus.stop();
        // A device that cannot finish in time is cut off, as by the plug.
        let _ = self.bus.pause(QUIESCE);
        match self.failure.get() {
            Some(failure) => End::Failed(failure.clone()),
            None => self.vcpus.end().unwrap_or(End::Stopped),
        }
    }

    /// Adds a device, and tells the guest.
    pub(crate) fn attach(&self, attachment: Attachment, fds: Vec<OwnedFd>) -> Result<(), Error> {
        self.bus.attach(attachment, Fds::new(fds))
    }

    /// Asks the guest to let go of a device.
    pub(crate) fn detach(&self, name: &str) -> Result<(), Error> {
        self.bus.detach(name)
    }

    /// The registers by which devices come and go.
    pub(crate) fn slots(&self) -> &Slots {
        &self.slots
    }

    /// The devices that are gone since the last call, by name.
    pub(crate) fn gone(&self) -> Vec<String> {
        self.bus.gone()
    }

    /// What it has done so far.
    pub(crate) fn stats(&self) -> Stats {
        Stats {
            exits: self.vcpus.exits(),
            memory: self.memory.iter().map(GuestMemoryRegion::len).sum(),
        }
    }
}

/// The directory of the sockets, which is to become the root.
fn sockets(config: &Config, fds: &Fds) -> Result<Option<OwnedFd>, Error> {
    let dir = config
        .devices
        .iter()
        .find_map(|attachment| match &attachment.device {
            Device::Vsock { dir, .. } => Some(*dir),
            _ => None,
        });
    let Some(fd) = dir.and_then(|dir| fds.0.get(usize::from(dir.0))) else {
        return Ok(None);
    };
    fd.as_ref()
        .map(|fd| fd.try_clone())
        .transpose()
        .map_err(|e| Error::Host("copy a descriptor", crate::vcpu::errno(&e)))
}

/// Keeps the first failure of a device's thread, and rings `ended`.
fn failures(failure: &Arc<OnceLock<String>>, ended: &EventFd) -> Result<Failures, Error> {
    let ended = ended
        .try_clone()
        .map_err(|e| Error::Host("copy an eventfd", crate::vcpu::errno(&e)))?;
    let failure = Arc::clone(failure);
    Ok(Arc::new(move |reason| {
        let _ = failure.set(reason);
        let _ = ended.write(1);
    }))
}

fn open_kvm(fd: OwnedFd) -> Result<Kvm, Error> {
    // SAFETY: the descriptor is ours, and Kvm takes it over. If it is not
    // /dev/kvm, the version below says so.
    let kvm = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd.into_raw_fd()) };
    let kvm: Kvm = kvm;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        _ => Err(Error::Config(
            "the descriptor given as /dev/kvm is not KVM's stable API".to_owned(),
        )),
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    let mut tries = 0;
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR && tries < CREATE_TRIES => tries += 1,
            other => return other.map_err(|e| Error::Kvm("create a machine", e)),
        }
    }
}

fn map(vm: &VmFd, memory: &Memory) -> Result<(), Error> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping lives as long as the machine: both end with the
        // process.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|e| Error::Kvm("map guest memory", e))?;
    }
    Ok(())
}
