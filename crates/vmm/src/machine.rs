//! Putting a machine together, in the one order that works.

use std::{
    fs::File,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
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
use walnut_devices::virtio::{Memory, MemoryCell};
use walnut_vmm_api::{Attachment, Config, Device, End, FdIndex, Jail, Restore, Stats, VERSION};

use crate::{
    Error,
    acpi::{Tables, generation},
    backends::BackEnds,
    boot::Boot,
    bus::{Bus, Failures},
    cpu,
    creation::Creation,
    crew::Crew,
    irq::Routes,
    jail::{
        self, Filter,
        calls::{self, Thread},
    },
    layout, memory,
    nursery::Queue,
    ports::{self, Ports},
    prepared::{Prepared, Site},
    sizes::{self, Sizes},
    slots::Slots,
    snapshot::{
        self, Snapshot,
        scribe::{Processor, Scribe, Subject},
        state::{self, MEMORY, Room},
    },
    vcpu::Vcpus,
};

/// vCPUs at most.
const VCPUS_MAX: u8 = 32;
/// How long a device may take to finish what is in flight.
const QUIESCE: Duration = Duration::from_secs(10);

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
    sizes: Sizes,
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
    sizes::check(&room(config))
}

/// Whether the host's processor reaches the devices above all memory.
fn check_window(window64: &Range<u64>, kvm: &Kvm) -> Result<(), Error> {
    if window64.end > cpu::address_end(&cpu::supported(kvm)?) {
        return Err(Error::Config(
            "memory, or room for it, is more than the host's processor can address \
             beside devices"
                .to_owned(),
        ));
    }
    Ok(())
}

fn room(config: &Config) -> Room {
    Room {
        memory: config.memory,
        max_memory: config.max_memory,
    }
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
    fn new(creation: Creation, memory: &MemoryCell) -> Result<Self, Error> {
        let (kvm, vm) = creation.finish()?;
        let vm = Arc::new(vm);
        map(&vm, &memory.memory())?;
        vm.set_tss_address(layout::KVM_TSS)
            .map_err(|e| Error::Kvm("place the TSS", e))?;
        vm.create_irq_chip()
            .map_err(|e| Error::Kvm("create the interrupt controllers", e))?;
        Ok(Self {
            routes: Arc::new(Routes::new(Arc::clone(&vm))),
            msrs: snapshot::cpu::msrs(&kvm)?,
            memory: memory.clone(),
            kvm,
            vm,
        })
    }

    fn bus(
        &self,
        site: Site,
        window64: Range<u64>,
        bells: &Bells,
        queue: &Arc<Queue>,
    ) -> Result<Bus, Error> {
        let (vm, routes, queue) = (&self.vm, &self.routes, Arc::clone(queue));
        Bus::new(vm, routes, site, window64, &bells.acknowledged, queue)
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

/// What was made of the host, which the process then left.
struct Aboard {
    crew: Crew,
    /// Hears of a device's thread that cannot go on.
    failure: Arc<OnceLock<String>>,
    jailed: bool,
}

/// What is put together before the last filter.
struct Parts {
    base: Base,
    bus: Bus,
    ports: Ports,
    processors: Vec<Processor>,
    sizes: Sizes,
}

impl Aboard {
    /// Gives up what is the host's: everything is open that ever will be, but what
    /// comes of KVM. Then starts the threads of `devices`, of `vcpus` and of the rest.
    fn enter(
        jail: Jail,
        root: Option<OwnedFd>,
        devices: &[Prepared],
        memory: Option<(&str, &'static Thread)>,
        vcpus: u8,
        ended: &EventFd,
    ) -> Result<Self, Error> {
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
        let devices = devices
            .iter()
            .map(|it| (it.name.as_str(), it.thread))
            .chain(memory);
        let crew = Crew::muster(jailed, devices, vcpus, failures(&failure, ended)?)?;
        Ok(Self {
            crew,
            failure,
            jailed,
        })
    }
}

impl Machine {
    /// Builds the machine of `config`, with every thread waiting and locked in.
    pub(crate) fn build(config: &Config, fds: Vec<OwnedFd>, bells: Bells) -> Result<Self, Error> {
        check(config)?;
        let mut fds = Fds::new(fds);
        let creation = Creation::start(fds.take(config.kvm)?)?;
        let memory = memory::create(config.memory, config.backing)?;
        let window64 = layout::window64(config.memory, config.max_memory);
        check_window(&window64, creation.kvm())?;
        let site = Site {
            memory: MemoryCell::new(memory.clone()),
            shared: config.backing.shared,
            back_ends: BackEnds::default(),
        };
        let root = sockets(&config.devices, &fds)?;
        let devices = Prepared::all(&site, &config.devices, |fd| fds.take(fd))?;
        let tables = Tables {
            vcpus: config.max_vcpus,
            last_bus: Bus::LAST,
            window64: window64.clone(),
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
        drop(fds);

        let vcpus = config.max_vcpus;
        let memory = Sizes::thread(&room(config), config.backing);
        let aboard = Aboard::enter(config.jail, root, &devices, memory, vcpus, &bells.ended)?;
        let base = Base::new(creation, &site.memory)?;
        let mut bus = base.bus(site, window64, &bells, &aboard.crew.queue)?;
        for device in devices {
            bus.put(device)?;
        }
        let mut sizes = Sizes::fixed(config.memory);
        if memory.is_some() {
            let (vm, site) = (&base.vm, bus.site());
            let (growing, device) = Sizes::growing(room(config), config.backing, vm, site, None)?;
            bus.put(device)?;
            sizes = growing;
        }
        let ports = Ports::new(
            console.map(File::from),
            base.routes.pin(ports::SERIAL_IRQ)?,
            bus.slots(),
        );
        let mut processors = Vec::new();
        for (id, cpuid) in (0..).zip(base.cpuids(vcpus)?) {
            let vcpu = base.vcpu(id)?;
            cpu::prepare(&vcpu, &cpuid, (id == 0).then_some(entry))?;
            processors.push(Processor::new(vcpu, cpuid));
        }
        let parts = Parts {
            base,
            bus,
            ports,
            processors,
            sizes,
        };
        Self::lock_in(parts, aboard, bells, |_, _| Ok(()))
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
        let creation = Creation::start(fds.take(restore.kvm)?)?;
        let (state, memory) = (fds.take(restore.state)?, fds.take(restore.memory)?);
        let Snapshot {
            state,
            memory,
            plugged,
        } = Snapshot::read(&state.into(), memory.into(), restore.backing)?;
        generation::write(&memory, &random()?)?;
        let mut sizes = Sizes::fixed(memory.iter().map(GuestMemoryRegion::len).sum());
        let room = state.room.unwrap_or(sizes.room);
        let window64 = layout::window64(room.memory, room.max_memory);
        if state.room.is_some() {
            check_window(&window64, creation.kvm())?;
        }
        let site = Site {
            memory: MemoryCell::new(memory),
            shared: restore.backing.shared,
            back_ends: BackEnds::default(),
        };
        let root = sockets(&restore.devices, &fds)?;
        let own = |device: &state::Device| state.room.is_some() && device.name == MEMORY;
        let others = state.devices.iter().filter(|device| !own(device));
        let others: Vec<_> = others.collect();
        let devices = Prepared::saved(&site, &restore.devices, &others, |fd| fds.take(fd))?;
        let console = restore.console.map(|fd| fds.take(fd)).transpose()?;
        drop(fds);

        let vcpus = u8::try_from(state.vcpus.len()).unwrap_or(u8::MAX);
        let memory = Sizes::thread(&room, restore.backing);
        let aboard = Aboard::enter(restore.jail, root, &devices, memory, vcpus, &bells.ended)?;
        let base = Base::new(creation, &site.memory)?;
        let mut bus = base.bus(site, window64, &bells, &aboard.crew.queue)?;
        let mut devices = devices.into_iter();
        // In the snapshot's order, as all that is told of them.
        for saved in &state.devices {
            if own(saved) {
                let (vm, site) = (&base.vm, bus.site());
                let plugged = plugged.as_ref();
                let (growing, mut device) =
                    Sizes::growing(room, restore.backing, vm, site, plugged)?;
                device.be(saved)?;
                bus.put(device)?;
                sizes = growing;
            } else if let Some(device) = devices.next() {
                bus.put(device)?;
            }
        }
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
        let mut processors = Vec::new();
        for (saved, (id, own)) in state.vcpus.iter().zip((0..).zip(base.cpuids(vcpus)?)) {
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
        let parts = Parts {
            base,
            bus,
            ports,
            processors,
            sizes,
        };
        // After the local APICs, which the interrupts of devices may reach.
        Self::lock_in(parts, aboard, bells, |bus, routes| {
            bus.pause(QUIESCE)?;
            routes.together(|| bus.restore(&state.devices))?;
            bus.slots().restore(state.slots);
            Ok(())
        })
    }

    /// Gives the threads what they are there for, and gives up what the running guest
    /// does not need. `settle` is called when the devices' threads have their devices.
    fn lock_in(
        parts: Parts,
        aboard: Aboard,
        Bells { ended, gone, .. }: Bells,
        settle: impl FnOnce(&Bus, &Routes) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let Parts {
            base,
            mut bus,
            ports,
            processors,
            sizes,
        } = parts;
        let Aboard {
            crew,
            failure,
            jailed,
        } = aboard;
        let seed = random()?;
        bus.start(crew.devices, &crew.nursery, gone)?;
        settle(&bus, &base.routes)?;
        let (bus, ports) = (Arc::new(bus), Arc::new(ports));
        let on_bus: Arc<dyn crate::vcpu::Bus> = bus.clone();
        let fds = processors.iter().map(|it| Arc::clone(&it.fd)).collect();
        let vcpus = Vcpus::new(&crew.vcpus, fds, Arc::clone(&ports), on_bus, ended)?;
        let subject = Subject {
            vm: base.vm,
            processors,
            msrs: base.msrs,
            ports,
            bus: Arc::clone(&bus),
            memory: base.memory.clone(),
            room: sizes.saved(),
            seed,
        };
        let scribe = Scribe::new(&crew.scribe, subject);
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
            sizes,
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
        Stats {
            exits: self.vcpus.exits(),
            memory: self.sizes.now(),
        }
    }

    /// Asks the guest to have that much memory.
    pub(crate) fn resize(&self, memory: u64) -> Result<(), Error> {
        self.sizes.resize(memory)
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
