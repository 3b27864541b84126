//! QEMU's command line, from a specification and the numbers of inherited
//! descriptors. Nothing a user names appears in it but checked identifiers.

use std::os::fd::RawFd;

use super::{Accel, nics, plug, sockets};
use crate::{Error, MachineSpec, Nic};

/// virtio-mmio transports of a microvm without ACPI. With ACPI there are 24, but
/// then the kernel has no legacy timer: where the calibration of its TSC fails,
/// as it does now and then under emulation, it hangs for ever.
const SLOTS: usize = 8;
/// Where their registers begin, and how far they are apart (qemu,
/// include/hw/i386/microvm.h).
const REGISTERS: u64 = 0xfeb0_0000;
const REGISTERS_SIZE: u64 = 512;
/// The first one's interrupt; the others' follow.
const FIRST_LINE: usize = 5;
/// The kernel's bound.
const CMDLINE_MAX: usize = 2048;

/// How a guest's vCPUs and clock run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timing {
    pub(super) threads: Threads,
    /// The rate of the guest's TSC, if that is known.
    pub(super) tsc_khz: Option<u64>,
}

/// How emulated vCPUs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Threads {
    /// One thread takes turns.
    Single,
    /// A thread for each.
    Multi,
}

/// What a guest begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begin {
    /// These descriptors.
    Boot { kernel: RawFd, initramfs: RawFd },
    /// Where a saved guest stood, once the monitor says so.
    Restore,
}

/// Numbers of the descriptors QEMU inherits.
#[derive(Debug, Default)]
pub(super) struct Fds {
    pub(super) memory: RawFd,
    pub(super) qmp: RawFd,
    pub(super) registers: RawFd,
    pub(super) vsock: RawFd,
    pub(super) disks: Vec<RawFd>,
    pub(super) shares: Vec<RawFd>,
    /// The queues of each network interface.
    pub(super) nics: Vec<Vec<RawFd>>,
}

/// Refuses what cannot be turned into a machine, with a sentence.
pub(super) fn check(spec: &MachineSpec) -> Result<(), Error> {
    crate::spec::refuse(spec, problem(spec))
}

/// The same for what is to go on where a saved machine stood. Its shares and network
/// interfaces are more than that one had.
pub(super) fn check_clone(spec: &MachineSpec) -> Result<(), Error> {
    let more = spec.shares.len() + spec.nics.len();
    let room = SLOTS - slots(&without_late(spec)).0.min(SLOTS);
    let problem = problem(spec).or_else(|| {
        (more > room).then(|| {
            format!(
                "{more} shares and network interfaces were asked for; a clone has room for {room}"
            )
        })
    });
    crate::spec::refuse(spec, problem)
}

/// What the saved machine had of a clone's.
pub(super) fn without_late(spec: &MachineSpec) -> MachineSpec {
    MachineSpec {
        shares: Vec::new(),
        nics: Vec::new(),
        ..spec.clone()
    }
}

/// The transports that a machine's devices take.
fn slots(spec: &MachineSpec) -> Slots {
    Slots(1 + devices(spec) + free(spec).min(2))
}

fn problem(spec: &MachineSpec) -> Option<String> {
    if let Some(problem) = crate::spec::problem(spec) {
        return Some(problem);
    }
    if spec.max_vcpus > spec.vcpus || spec.max_memory > spec.memory {
        return Some(
            "QEMU's machines keep the size they boot with; ask for no more, or use the driver vmm"
                .to_owned(),
        );
    }
    let devices = devices(spec);
    if devices >= SLOTS {
        return Some(format!(
            "{devices} disks, spare disks, shares and network interfaces were asked for; a microvm has room for {}",
            SLOTS - 1
        ));
    }
    if kernel_cmdline(Accel::Tcg, spec, Some(u64::MAX)).len() > CMDLINE_MAX {
        return Some(format!(
            "the kernel command line is longer than {CMDLINE_MAX} bytes"
        ));
    }
    None
}

/// The device of the `n`th share.
pub(super) fn share(n: usize) -> String {
    format!("share{n}")
}

pub(super) fn spare(spec: &MachineSpec) -> usize {
    usize::try_from(spec.spare_disks).unwrap_or(SLOTS)
}

/// Transports that the spec's own devices take.
fn devices(spec: &MachineSpec) -> usize {
    spec.disks.len() + spec.shares.len() + spec.nics.len() + spare(spec)
}

/// Transports for what a guest can do without.
fn free(spec: &MachineSpec) -> usize {
    SLOTS.saturating_sub(1 + devices(spec))
}

/// Where the vsock device's registers begin. `spec` has passed [`check`].
pub(super) fn vsock_registers(spec: &MachineSpec) -> u64 {
    let mut slots = Slots::default();
    for _ in 0..free(spec).min(2) {
        slots.next();
    }
    registers(slots.next())
}

fn registers(slot: usize) -> u64 {
    REGISTERS + REGISTERS_SIZE * u64::try_from(slot).unwrap_or(0)
}

/// Transports in the order in which QEMU itself would hand them out.
#[derive(Debug, Default)]
struct Slots(usize);

impl Slots {
    fn next(&mut self) -> usize {
        self.0 += 1;
        SLOTS.saturating_sub(self.0)
    }
}

/// `panic=-1 reboot=t` and QEMU's `-no-reboot`: a guest that panics or restarts
/// ends its QEMU at once. A microvm without ACPI cannot power off, so the agent
/// ends a guest by a restart.
///
/// Emulated code does not speculate, so mitigations in an emulated guest only
/// cost time.
fn kernel_cmdline(accel: Accel, spec: &MachineSpec, tsc_khz: Option<u64>) -> String {
    let mut words = vec![
        "console=ttyS0",
        "quiet",
        "panic=-1",
        "reboot=t",
        "no_timer_check",
        "tsc=reliable",
        "random.trust_cpu=on",
        // Spares the kernel the search for tables and buses that are not there.
        "acpi=off",
        "pci=off",
        // Links that nobody asked for would show in every container.
        "fb_tunnels=none",
        "dummy.numdummies=0",
    ];
    let tsc = tsc_khz.map(|khz| format!("tsc_early_khz={khz}"));
    words.extend(tsc.as_deref());
    // QEMU announces transports that have a device. Those of a machine that others are to
    // begin from, which has no disk of its own, may have one later.
    let begun_from = spec.spare_disks > 0 && spec.disks.is_empty();
    let mut empty = slots(spec);
    let mut announced = Vec::new();
    while begun_from && empty.0 < SLOTS {
        let slot = empty.next();
        let (at, line) = (registers(slot), FIRST_LINE + slot);
        announced.push(format!(
            "virtio_mmio.device={REGISTERS_SIZE}@{at:#x}:{line}"
        ));
    }
    words.extend(announced.iter().map(String::as_str));
    if accel == Accel::Tcg {
        words.push("mitigations=off");
        // Calibrating the local APIC's timer by the PIT takes 220 ms emulated. One vCPU
        // does without for a boot, but the PIT counts 27 ms at most: an idle guest wakes 36
        // times a second for nothing. A machine that others are to begin from takes the
        // time once. (More vCPUs would wake each other through the PIT.)
        if spec.vcpus == 1 && !begun_from {
            words.push("nolapic_timer");
        }
        // Patching lock prefixes out of the kernel takes 75 ms emulated, and
        // gains nothing there.
        words.push("noreplace-smp");
    }
    words.extend(spec.cmdline.iter().map(String::as_str));
    words.join(" ")
}

/// QEMU's arguments. `spec` has passed [`check`].
pub(super) fn arguments(
    accel: Accel,
    spec: &MachineSpec,
    begin: Begin,
    fds: &Fds,
    timing: Timing,
) -> Vec<String> {
    let mut args = Args::default();
    args.base(accel, spec, fds, timing.threads);
    let base;
    let (here, late) = match begin {
        Begin::Boot { .. } => (spec, None),
        Begin::Restore => {
            base = without_late(spec);
            (&base, Some(spec))
        }
    };
    match begin {
        Begin::Boot { kernel, initramfs } => {
            args.add("-kernel", format!("/proc/self/fd/{kernel}"));
            args.add("-initrd", format!("/proc/self/fd/{initramfs}"));
            args.add("-append", kernel_cmdline(accel, spec, timing.tsc_khz));
        }
        Begin::Restore => {
            args.0.push("-S".to_owned());
            args.add("-incoming", "defer");
        }
    }
    // What a guest can do without gives way to disks: it has the processor's
    // random numbers and the agent's seed, and may keep its free memory.
    let free = free(here);
    if free >= 1 {
        args.device("virtio-balloon-device,free-page-reporting=on");
    }
    if free >= 2 {
        args.add("-object", "rng-builtin,id=rng");
        args.device("virtio-rng-device,rng=rng,max-bytes=4096,period=1000");
    }
    args.add("-chardev", format!("socket,id=vsock,fd={}", fds.vsock));
    args.device(&format!(
        "vhost-user-vsock-device,chardev=vsock,id={}",
        sockets::ID
    ));
    args.shares(here, fds);
    for (n, (disk, fd)) in spec.disks.iter().zip(&fds.disks).enumerate() {
        let node = format!("disk{n}");
        args.add("-add-fd", format!("fd={fd},set={n}"));
        args.add(
            "-blockdev",
            plug::drive(&node, n, disk.read_only).to_string(),
        );
        args.device(&format!(
            "virtio-blk-device,drive={node},serial={}",
            disk.serial
        ));
    }
    args.nics(here, fds);
    // Read-only, and so must be what they become: what its driver has agreed to, and
    // what QEMU itself has asked of the drive, stays.
    for n in 0..spare(spec) {
        let (node, id) = (plug::nothing(n), plug::device(n));
        args.add(
            "-blockdev",
            format!("driver=null-co,node-name={node},size=0,read-only=on"),
        );
        args.device(&format!("virtio-blk-device,drive={node},id={id}"));
    }
    // On transports that were empty.
    if let Some(spec) = late {
        args.shares(spec, fds);
        args.nics(spec, fds);
    }
    args.0
}

#[derive(Default)]
struct Args(Vec<String>, Slots);

impl Args {
    fn add(&mut self, option: &str, value: impl Into<String>) {
        self.0.extend([option.to_owned(), value.into()]);
    }

    /// A virtio device, on the next transport.
    fn device(&mut self, device: &str) {
        let slot = self.1.next();
        self.add("-device", format!("{device},bus=virtio-mmio-bus.{slot}"));
    }

    fn shares(&mut self, spec: &MachineSpec, fds: &Fds) {
        for (n, (share, fd)) in spec.shares.iter().zip(&fds.shares).enumerate() {
            self.add("-chardev", format!("socket,id=fs{n},fd={fd}"));
            self.device(&format!(
                "vhost-user-fs-device,chardev=fs{n},tag={},queue-size=1024,id={}",
                share.tag,
                self::share(n)
            ));
        }
    }

    fn nics(&mut self, spec: &MachineSpec, fds: &Fds) {
        for (n, (nic, queues)) in spec.nics.iter().zip(&fds.nics).enumerate() {
            self.nic(n, nic, queues);
        }
    }

    /// A network interface on a tap, whose frames QEMU itself moves: there may be no vhost.
    fn nic(&mut self, n: usize, nic: &Nic, queues: &[RawFd]) {
        let numbers: Vec<_> = queues.iter().map(RawFd::to_string).collect();
        let network = nics::network(n);
        self.add(
            "-netdev",
            format!("tap,id={network},fds={},vhost=off", numbers.join(":")),
        );
        let several = if queues.len() > 1 { ",mq=on" } else { "" };
        self.device(&format!(
            "virtio-net-device,netdev={network},mac={},host_mtu={}{several}",
            nics::text(nic.mac),
            nic.mtu
        ));
    }

    fn base(&mut self, accel: Accel, spec: &MachineSpec, fds: &Fds, threads: Threads) {
        self.0
            .extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
        self.add("-name", format!("walnut-{}", spec.id));
        self.add("-display", "none");
        self.add(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        );
        // PIC and PIT stay: without KVM's clock the kernel calibrates by them.
        self.add(
            "-machine",
            "microvm,acpi=off,pit=on,pic=on,rtc=on,pcie=off,usb=off,isa-serial=on,\
                 x-option-roms=off,auto-kernel-cmdline=on,dump-guest-core=off,\
                 memory-backend=mem",
        );
        // "Enhanced" and "fast short" string instructions are those that a kernel uses to move
        // and clear memory byte by byte. A processor makes more of them; emulated, every byte
        // takes as long as eight do.
        const EMULATED: &str = "max,-erms,-fsrm";
        let (name, cpu) = match (accel, threads) {
            (Accel::Kvm, _) => ("kvm", "host"),
            (Accel::Tcg, Threads::Multi) => ("tcg,thread=multi", EMULATED),
            (Accel::Tcg, Threads::Single) => ("tcg,thread=single", EMULATED),
        };
        self.add("-accel", name);
        self.add("-cpu", cpu);
        self.add("-smp", spec.vcpus.to_string());
        self.add("-m", format!("{}M", spec.memory >> 20));
        // Shared, because vhost-user back ends map it.
        self.add(
            "-object",
            format!(
                "memory-backend-file,id=mem,size={},share=on,mem-path=/proc/self/fd/{}",
                spec.memory, fds.memory
            ),
        );
        self.add("-global", "virtio-mmio.force-legacy=false");
        self.add("-bios", "qboot.rom");
        // The console is QEMU's standard output, a pipe whose reader keeps the
        // tail: a guest that prints for ever is slowed by it, not stored.
        self.add("-chardev", "stdio,id=console,signal=off,mux=off");
        self.add("-serial", "chardev:console");
        self.add("-chardev", format!("socket,id=qmp,fd={}", fds.qmp));
        self.add("-mon", "chardev=qmp,mode=control");
        // QEMU wants this name.
        let registers = format!("socket,id=qtest,fd={}", fds.registers);
        self.add("-chardev", registers);
        self.add("-qtest", "chardev:qtest");
        self.add("-qtest-log", "none");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Disk, Share};

    fn spec() -> MachineSpec {
        MachineSpec {
            id: "pod-1".into(),
            run_dir: "/run".into(),
            kernel: "/k".into(),
            initramfs: "/i".into(),
            cmdline: vec!["a=b".into()],
            vcpus: 1,
            max_vcpus: 1,
            memory: 128 << 20,
            max_memory: 128 << 20,
            disks: vec![],
            spare_disks: 0,
            shares: vec![],
            nics: vec![],
        }
    }

    fn disks(n: usize) -> Vec<Disk> {
        (0..n)
            .map(|n| Disk {
                serial: format!("disk-{n}"),
                path: "/d".into(),
                read_only: n == 0,
            })
            .collect()
    }

    #[test]
    fn odd_specifications_are_refused_with_a_sentence() {
        let refused = |change: fn(&mut MachineSpec)| {
            let mut spec = spec();
            change(&mut spec);
            check(&spec).unwrap_err().to_string()
        };
        assert!(check(&spec()).is_ok());
        assert!(refused(|s| s.id = "a,b".into()).contains("the name must be"));
        assert!(refused(|s| s.vcpus = 0).contains("0 vCPUs"));
        assert!(refused(|s| s.max_vcpus = 0).contains("may become 0"));
        assert!(refused(|s| s.max_vcpus = 2).contains("keep the size"));
        assert!(refused(|s| s.max_memory = 64 << 20).contains("cannot grow"));
        assert!(refused(|s| s.max_memory += 1 << 20).contains("cannot grow"));
        assert!(refused(|s| s.max_memory += 2 << 20).contains("keep the size"));
        assert!(refused(|s| (s.memory, s.max_memory) = (1000, 1000)).contains("of 1 MiB"));
        assert!(refused(|s| s.disks = disks(8)).contains("room for 7"));
        assert!(refused(|s| s.cmdline = vec!["x".repeat(4096)]).contains("longer than"));
        let error = refused(|s| {
            s.shares = vec![Share {
                tag: "a,readonly".into(),
                socket: "/s".into(),
            }];
        });
        assert!(error.contains("share tag"), "{error}");
        let error = refused(|s| {
            s.disks = disks(1);
            s.disks[0].serial = "x".repeat(21);
        });
        assert!(error.contains("disk serial"), "{error}");
    }

    #[test]
    fn disks_take_the_place_of_what_can_be_spared() {
        let line = |count: usize, spare_disks: u32| {
            let spec = MachineSpec {
                disks: disks(count),
                spare_disks,
                ..spec()
            };
            let fds = Fds {
                disks: vec![25; count],
                ..Fds::default()
            };
            assert!(check(&spec).is_ok());
            let timing = Timing {
                threads: Threads::Single,
                tsc_khz: Some(2_600_000),
            };
            let begin = Begin::Boot {
                kernel: 30,
                initramfs: 31,
            };
            arguments(Accel::Tcg, &spec, begin, &fds, timing).join(" ")
        };
        let (few, more, most) = (line(5, 0), line(6, 0), line(7, 0));
        assert!(few.contains("virtio-rng") && few.contains("balloon"));
        assert!(!more.contains("virtio-rng") && more.contains("balloon"));
        assert!(!most.contains("virtio-rng") && !most.contains("balloon"));
        assert!(most.contains("-add-fd fd=25,set=6") && most.contains("serial=disk-6"));
        let read_only = few.matches("\"read-only\":true").count();
        assert_eq!(read_only, 2, "the first disk's two layers");
        // Disks to come count as disks.
        assert_eq!(line(1, 6).matches(" -device ").count(), 8);
        assert_ne!(line(3, 2), line(3, 1));
        let both = line(1, 4);
        assert!(both.contains("virtio-rng") && both.contains("balloon"));
    }

    #[test]
    fn a_clone_has_the_transports_of_the_machine_that_was_saved() {
        let fds = Fds {
            disks: vec![25, 26],
            ..Fds::default()
        };
        let line = |begin, disks, spare_disks| {
            let spec = MachineSpec {
                disks,
                spare_disks,
                ..spec()
            };
            let timing = Timing {
                threads: Threads::Multi,
                tsc_khz: None,
            };
            let line = arguments(Accel::Tcg, &spec, begin, &fds, timing).join(" ");
            (line, vsock_registers(&spec))
        };
        let boot = Begin::Boot {
            kernel: 30,
            initramfs: 31,
        };
        let (saved, registers) = line(boot, disks(1), 2);
        assert_eq!(registers, 0xfeb0_0a00);
        assert!(saved.contains("id=vsock,bus=virtio-mmio-bus.5"));
        assert!(saved.contains("serial=disk-0,bus=virtio-mmio-bus.4"));
        assert!(saved.contains("drive=nothing0,id=spare0,bus=virtio-mmio-bus.3"));
        assert!(saved.contains("drive=nothing1,id=spare1,bus=virtio-mmio-bus.2"));
        let (clone, same) = line(Begin::Restore, disks(2), 1);
        assert_eq!(same, registers);
        assert!(clone.contains("-S -incoming defer"), "{clone}");
        assert!(!clone.contains(" -kernel ") && !clone.contains(" -append "));
        assert!(clone.contains("serial=disk-1,bus=virtio-mmio-bus.3"));
        assert!(clone.contains("drive=nothing0,id=spare0,bus=virtio-mmio-bus.2"));
        for device in ["virtio-rng", "balloon", "id=vsock", "serial=disk-0"] {
            let of = |line: &str| {
                let words = line.split(' ').find(|word| word.contains(device));
                words.map(str::to_owned)
            };
            assert_eq!(of(&clone), of(&saved), "{device}");
        }
    }
}
