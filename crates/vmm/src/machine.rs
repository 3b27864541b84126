//! Putting a machine together, in the one order that works.

use std::{
    fs::File,
    ops::Range,
    os::fd::{AsFd, IntoRawFd, OwnedFd},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kvm_bindings::{
    CpuId, KVM_CAP_TSC_DEADLINE_TIMER, kvm_clock_data, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use walnut_devices::{
    mem::Target,
    virtio::{Memory, MemoryCell},
};
use walnut_vmm_api::{Attachment, Config, Device, End, FdIndex, Jail, Restore, Stats, VERSION};

use crate::{
    Error,
    acpi::{Tables, generation},
    boot::Boot,
    bus::{Bus, Failures},
    cpu, growth,
    irq::Routes,
    jail::{self, Filter, calls},
    layout, memory,
    ports::{self, Ports},
    slots::Slots,
    snapshot::{
        self,
        scribe::{Processor, Scribe, Subject},
    },
    vcpu::Vcpus,
};

/// vCPUs at most.
const VCPUS_MAX: u8 = 32;
/// How much memory may be added, bytes.
const GROWTH_MAX: u64 = 1 << 40;
/// What requests call the memory device, which is not theirs to name.
const MEMORY: &str = "memory";
/// How long a device may take to finish what is in flight.
const QUIESCE: Duration = Duration::from_secs(10);
/// `KVM_CREATE_VM` is interrupted by signals that a busy host's timers send.
const CREATE_TRIES: u32 = 5;

/// What a machine rings.
#[derive(Debug)]
pub(crate) struct Bells {
    /// The guest has ended.
    pub(crate) ended: EventFd,
    /// [`Machine::gone`] has news.
    pub(crate) gone: EventFd,
    /// The guest has acknowledged news of its slots: [`Machine::look_again`].
    pub(crate) acknowledged: EventFd,
}

/// A running machine.
#[derive(Debug)]
pub(crate) struct Machine {
    vcpus: Vcpus,
    bus: Arc<Bus>,
    slots: Arc<Slots>,
    /// Why a device's thread could not go on.
    failure: Arc<OnceLock<String>>,
    scribe: Scribe,
    /// Neither vCPUs nor devices run.
    paused: AtomicBool,
    /// Memory at boot, bytes.
    boot_memory: u64,
    /// How to ask for more, if there may be more.
    growth: Option<Growth>,
}

/// Memory that may be added.
#[derive(Debug, Clone)]
struct Growth {
    target: Target,
    /// What all memory can grow to, bytes.
    max: u64,
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

fn check_version(version: u32) -> Result<(), Error> {
    match version {
        VERSION => Ok(()),
        other => Err(Error::Config(format!(
            "the supervisor speaks version {other} of the control protocol, this VMM {VERSION}; \
             install both from one release"
        ))),
    }
}

fn check(config: &Config) -> Result<(), Error> {
    let complain = |what: String| Err(Error::Config(what));
    check_version(config.version)?;
    if config.vcpus == 0 || config.max_vcpus < config.vcpus || config.max_vcpus > VCPUS_MAX {
        return complain(format!(
            "{} of {} vCPUs were asked for; 1 to {VCPUS_MAX} can be had",
            config.vcpus, config.max_vcpus
        ));
    }
    let more = config.max_memory.checked_sub(config.memory);
    if more.is_none_or(|more| !more.is_multiple_of(2 << 20) || more > GROWTH_MAX) {
        return complain(format!(
            "memory cannot grow from {} bytes to {}: the difference must be a multiple of 2 MiB, \
             and 1 TiB at most",
            config.memory, config.max_memory
        ));
    }
    if config.memory < 32 << 20 || !config.memory.is_multiple_of(1 << 20) {
        return complain(format!(
            "{} bytes of memory are not a multiple of 1 MiB, or less than 32 MiB",
            config.memory
        ));
    }
    Ok(())
}

/// KVM's side of a machine, before anything is on it.
struct Base {
    kvm: Kvm,
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    memory: MemoryCell,
    /// The MSRs that KVM has here.
    msrs: Vec<u32>,
}

impl Base {
    fn new(kvm: OwnedFd, memory: Memory) -> Result<Self, Error> {
        let kvm = open_kvm(kvm)?;
        let vm = Arc::new(create_vm(&kvm)?);
        map(&vm, &memory)?;
        vm.set_tss_address(layout::KVM_TSS)
            .map_err(|e| Error::Kvm("place the TSS", e))?;
        vm.create_irq_chip()
            .map_err(|e| Error::Kvm("create the interrupt controllers", e))?;
        Ok(Self {
            routes: Arc::new(Routes::new(Arc::clone(&vm))),
            msrs: snapshot::cpu::msrs(&kvm)?,
            memory: MemoryCell::new(memory),
            kvm,
            vm,
        })
    }

    fn bus(
        &self,
        window64: Range<u64>,
        shared: bool,
        grows: bool,
        bells: &Bells,
    ) -> Result<Bus, Error> {
        let (vm, routes, memory) = (&self.vm, &self.routes, &self.memory);
        let acknowledged = &bells.acknowledged;
        Bus::new(vm, routes, memory, window64, shared, grows, acknowledged)
    }

    fn vcpu(&self, id: u8) -> Result<VcpuFd, Error> {
        self.vm
            .create_vcpu(u64::from(id))
            .map_err(|e| Error::Kvm("create a vCPU", e))
    }

    /// The CPUID of each of `count` vCPUs on this host.
    fn cpuids(&self, count: u8) -> Result<Vec<CpuId>, Error> {
        let supported = cpu::supported(&self.kvm)?;
        let deadline = self
            .kvm
            .check_extension_raw(u64::from(KVM_CAP_TSC_DEADLINE_TIMER))
            > 0;
        Ok((0..count)
            .map(|id| cpu::cpuid(&supported, id, count, deadline))
            .collect())
    }
}

/// What is put together before the process is locked in.
struct Parts {
    base: Base,
    bus: Bus,
    ports: Ports,
    processors: Vec<Processor>,
    growth: Option<Growth>,
    /// The directory of the sockets, which is to become the root.
    root: Option<OwnedFd>,
    jail: Jail,
}

impl Machine {
    /// Builds the machine of `config`, with every thread waiting and locked in.
    pub(crate) fn build(config: &Config, fds: Vec<OwnedFd>, bells: Bells) -> Result<Self, Error> {
        check(config)?;
        let mut fds = Fds::new(fds);
        let memory = memory::create(config.memory, config.backing)?;
        let base = Base::new(fds.take(config.kvm)?, memory.clone())?;
        let window64 = layout::window64(config.memory, config.max_memory);
        if window64.end > cpu::address_end(&cpu::supported(&base.kvm)?) {
            return Err(Error::Config(format!(
                "{} bytes of memory are more than the host's processor can address beside devices",
                config.max_memory
            )));
        }
        let grows = config.max_memory > config.memory;
        let mut bus = base.bus(window64.clone(), config.backing.shared, grows, &bells)?;
        let root = sockets(&config.devices, &fds)?;
        for attachment in &config.devices {
            bus.add(attachment, |fd| fds.take(fd))?;
        }
        let mut growth = None;
        if let Some((device, target, thread)) = growth::device(config, &base.vm, &base.memory)? {
            bus.place(MEMORY, Box::new(device), thread)?;
            let max = config.max_memory;
            growth = Some(Growth { target, max });
        }
        let tables = Tables {
            vcpus: config.max_vcpus,
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
            cmdline: &cmdline(config),
            rsdp: tables.write(&memory)?,
        };
        generation::write(&memory, &random()?)?;
        let entry = boot.load(&memory)?;
        cpu::write_descriptors(&memory)?;

        let console = config.console.map(|fd| fds.take(fd)).transpose()?;
        let ports = Ports::new(
            console.map(File::from),
            base.routes.pin(ports::SERIAL_IRQ)?,
            bus.slots(),
        );
        let mut processors = Vec::new();
        for (id, cpuid) in (0..).zip(base.cpuids(config.max_vcpus)?) {
            let vcpu = base.vcpu(id)?;
            cpu::prepare(&vcpu, &cpuid, (id == 0).then_some(entry))?;
            processors.push(Processor::new(vcpu, cpuid));
        }
        Self::lock_in(
            Parts {
                base,
                bus,
                ports,
                processors,
                growth,
                root,
                jail: config.jail,
            },
            bells,
            |_| Ok(()),
        )
    }

    /// Builds the machine that a snapshot describes, as [`Self::build`] does. What the
    /// files say is hostile.
    pub(crate) fn restore(
        restore: &Restore,
        fds: Vec<OwnedFd>,
        bells: Bells,
    ) -> Result<Self, Error> {
        check_version(restore.version)?;
        let mut fds = Fds::new(fds);
        let (state, memory) = (fds.take(restore.state)?, fds.take(restore.memory)?);
        let (state, memory) = snapshot::read(&state.into(), &memory.into(), restore.backing)?;
        generation::write(&memory, &random()?)?;
        let size = memory.iter().map(GuestMemoryRegion::len).sum();
        let base = Base::new(fds.take(restore.kvm)?, memory)?;
        let mut bus = base.bus(
            layout::window64(size, size),
            restore.backing.shared,
            false,
            &bells,
        )?;
        let root = sockets(&restore.devices, &fds)?;
        bus.add_saved(&restore.devices, &state.devices, |fd| fds.take(fd))?;

        let console = restore.console.map(|fd| fds.take(fd)).transpose()?;
        let irq = base.routes.pin(ports::SERIAL_IRQ)?;
        let ports = Ports::restore(
            console.map(File::from),
            irq,
            bus.slots(),
            &(&state.serial).into(),
        )?;
        let failed = |e| Error::Kvm("set an interrupt controller to what the snapshot says", e);
        for chip in &state.chips {
            base.vm.set_irqchip(chip).map_err(failed)?;
        }
        let count = u8::try_from(state.vcpus.len()).unwrap_or(u8::MAX);
        let mut processors = Vec::new();
        for (saved, (id, own)) in state.vcpus.iter().zip((0..).zip(base.cpuids(count)?)) {
            let vcpu = base.vcpu(id)?;
            let cpuid = snapshot::cpu::restore(&base.kvm, &vcpu, saved, &own, &base.msrs)?;
            processors.push(Processor::new(vcpu, cpuid));
        }
        // One that was on its way when the state was taken may be neither in the port
        // nor in the interrupt controller. A driver that finds nothing does nothing.
        pulse(&base.vm, ports::SERIAL_IRQ)?;
        // It waits in the interrupt controller for the guest's first instruction.
        pulse(&base.vm, generation::PIN)?;
        // Only what the clock showed: where it stood beside the host's does not count.
        let clock = kvm_clock_data {
            clock: state.clock.clock,
            ..Default::default()
        };
        let failed = |e| Error::Kvm("set the guest's clock", e);
        base.vm.set_clock(&clock).map_err(failed)?;
        Self::lock_in(
            Parts {
                base,
                bus,
                ports,
                processors,
                growth: None,
                root,
                jail: restore.jail,
            },
            bells,
            // After the local APICs, which the interrupts of devices may reach.
            |bus| {
                bus.pause(QUIESCE)?;
                bus.restore(&state.devices)?;
                bus.slots().restore(state.slots);
                Ok(())
            },
        )
    }

    /// Starts the threads, and gives up what the running guest does not need.
    /// Everything is open that ever will be. `settle` is called when the devices'
    /// threads are there.
    fn lock_in(
        parts: Parts,
        Bells { ended, gone, .. }: Bells,
        settle: impl FnOnce(&Bus) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let Parts {
            base,
            mut bus,
            ports,
            processors,
            growth,
            root,
            jail,
        } = parts;
        let seed = random()?;
        let boot_memory = base.memory.memory().iter().map(|r| r.len()).sum();
        let jailed = match jail {
            Jail::Full { user } => {
                jail::leave_host(root.as_ref().map(AsFd::as_fd), user)?;
                jail::reserve_heap()?;
                true
            }
            Jail::Off => false,
        };
        drop(root);
        let failure = Arc::new(OnceLock::new());
        bus.start(jailed, &failures(&failure, &ended)?, gone)?;
        settle(&bus)?;
        let (bus, ports) = (Arc::new(bus), Arc::new(ports));
        let on_bus: Arc<dyn crate::vcpu::Bus> = bus.clone();
        let filter = |thread| jailed.then(|| Filter::of(thread)).transpose();
        let vcpu_filter = filter(&calls::VCPU_THREAD)?.map(Arc::new);
        let lock_in = move || vcpu_filter.as_ref().map_or(Ok(()), |it| it.install());
        let fds = processors.iter().map(|it| Arc::clone(&it.fd)).collect();
        let vcpus = Vcpus::new(fds, Arc::clone(&ports), on_bus, ended, lock_in)?;
        let subject = Subject {
            vm: base.vm,
            processors,
            msrs: base.msrs,
            ports,
            bus: Arc::clone(&bus),
            memory: base.memory.clone(),
            seed,
        };
        let scribe = Scribe::start(subject, filter(&calls::SNAPSHOT_THREAD)?)?;
        if jailed {
            let filter = Filter::of(&calls::CONTROL_THREAD)?;
            filter.install().map_err(Error::Config)?;
        }
        Ok(Self {
            vcpus,
            slots: bus.slots(),
            bus,
            scribe,
            paused: AtomicBool::new(true),
            failure,
            boot_memory,
            growth,
        })
    }

    /// Saves the machine, which must be paused.
    pub(crate) fn save(&self, state: OwnedFd, memory: OwnedFd) -> Result<(), Error> {
        if !self.paused.load(Ordering::Acquire) {
            return Err(Error::Config(
                "the machine runs; pause it before it is saved".to_owned(),
            ));
        }
        self.scribe.save(state.into(), memory.into())
    }

    /// Lets the guest run.
    pub(crate) fn resume(&self) {
        self.paused.store(false, Ordering::Release);
        self.bus.resume();
        self.vcpus.run();
    }

    /// Stops the vCPUs, then lets the devices rest.
    pub(crate) fn pause(&self) -> Result<(), Error> {
        self.vcpus.pause();
        self.bus.pause(QUIESCE)?;
        self.paused.store(true, Ordering::Release);
        Ok(())
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

    /// Tells the guest again of slots that it has not yet looked at.
    pub(crate) fn look_again(&self) {
        self.slots.look_again();
    }

    /// The devices that are gone since the last call, by name.
    pub(crate) fn gone(&self) -> Vec<String> {
        self.bus.gone()
    }

    /// What it has done so far.
    pub(crate) fn stats(&self) -> Stats {
        let plugged = self.growth.as_ref().map_or(0, |it| it.target.plugged());
        Stats {
            exits: self.vcpus.exits(),
            memory: self.boot_memory + plugged,
        }
    }

    /// Asks the guest to have that much memory.
    pub(crate) fn resize(&self, memory: u64) -> Result<(), Error> {
        let boot = self.boot_memory;
        let more = memory.checked_sub(boot).ok_or_else(|| {
            Error::Config(format!(
                "{memory} bytes of memory are less than the machine booted with, {boot}"
            ))
        })?;
        let max = self.growth.as_ref().map_or(boot, |it| it.max);
        match &self.growth {
            _ if memory > max => Err(Error::Config(format!(
                "{memory} bytes of memory are more than the machine was made for, {max}"
            ))),
            Some(Growth { target, .. }) => {
                (target.set(more)).map_err(|e| Error::Config(e.to_string()))
            }
            // As much as there is.
            None => Ok(()),
        }
    }
}

/// The kernel's command line: it leaves vCPUs offline that it is not to boot with.
fn cmdline(config: &Config) -> String {
    match config.max_vcpus > config.vcpus {
        true => format!("{} maxcpus={}", config.cmdline, config.vcpus),
        false => config.cmdline.clone(),
    }
}

/// The directory of the sockets, which is to become the root.
fn sockets(devices: &[Attachment], fds: &Fds) -> Result<Option<OwnedFd>, Error> {
    let dir = devices
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

fn random() -> Result<[u8; 16], Error> {
    let mut bytes = [0; 16];
    // SAFETY: the buffer is that long, and so few bytes come whole.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match usize::try_from(got) {
        Ok(len) if len == bytes.len() => Ok(bytes),
        _ => Err(Error::Host("get random bytes", nix::errno::Errno::last())),
    }
}

/// Raises a pin of the interrupt controller for a moment.
fn pulse(vm: &VmFd, pin: u32) -> Result<(), Error> {
    [true, false]
        .into_iter()
        .try_for_each(|level| vm.set_irq_line(pin, level))
        .map_err(|e| Error::Kvm("raise an interrupt", e))
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
