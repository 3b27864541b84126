//! Runs the probe's guest. Everything here happens in a forked child that may
//! hang or die.

use std::{io, time::Instant};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use super::guest;

const CR0: u64 = 0x8001_0033; // PG, WP, NE, ET, MP, PE
const CR4: u64 = 0x620; // PAE, OSFXSR, OSXMMEXCPT
const CR4_OSXSAVE: u64 = 1 << 18;
const EFER: u64 = 0x500; // LME, LMA

/// Nanoseconds the timed loop took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Speed {
    pub(super) guest_ns: u64,
    pub(super) native_ns: u64,
}

/// Why the guest did not do what it should.
#[derive(Debug)]
pub(super) enum Failure {
    /// A KVM call failed.
    Call(&'static str, i32),
    /// The guest left in a way it should not.
    Exit(&'static str),
    /// A result was wrong.
    Wrong(&'static str),
}

fn call(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Failure {
    move |e| Failure::Call(what, e.errno())
}

/// Anonymous memory that goes with the process.
fn guest_memory() -> io::Result<&'static mut [u8]> {
    // SAFETY: a fresh private mapping aliases nothing.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            guest::MEMORY,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping has this length and is never unmapped. The guest
    // writes to it only inside KVM_RUN, while nothing here reads it.
    Ok(unsafe { std::slice::from_raw_parts_mut(at.cast(), guest::MEMORY) })
}

/// Builds and runs the guest; `passed` hears of every check it passes.
pub(super) fn run(kvm: &Kvm, mut passed: impl FnMut(u8)) -> Result<Speed, Failure> {
    let memory = guest_memory()
        .map_err(|e| Failure::Call("mapping its memory", e.raw_os_error().unwrap_or(0)))?;
    let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    // Needed by old Intel processors only, and refused by nothing that works.
    let _ = vm.set_tss_address(0xfffb_d000);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: guest::MEMORY as u64,
        userspace_addr: memory.as_ptr() as u64,
    };
    // SAFETY: the mapping outlives the virtual machine.
    unsafe { vm.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
    let leaf = |function, index| {
        cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index)
    };
    let signature = leaf(1, 0).map_or(0, |e| e.eax);
    let has_xsave = leaf(1, 0).is_some_and(|e| e.ecx & 1 << 26 != 0);
    // x87, SSE, AVX: what a kernel turns on first.
    let xcr0 = leaf(0xd, 0).map_or(0, |e| e.eax & 7);
    let xcr0 = if has_xsave { u64::from(xcr0) } else { 0 };
    guest::load(memory, xcr0);

    let mut vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
    vcpu.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
    let mut sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    long_mode(&mut sregs, xcr0 != 0);
    vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        rip: guest::CODE as u64,
        rsp: guest::STACK_TOP as u64,
        rflags: 2,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;

    let guest_ns = drive(&mut vcpu, &mut passed)?;
    if let Some(what) = guest::wrong(memory, signature) {
        return Err(Failure::Wrong(what));
    }
    Ok(Speed {
        guest_ns,
        native_ns: native_ns(),
    })
}

/// The best of three: the first run pays for cold caches.
fn native_ns() -> u64 {
    let run = || {
        let start = Instant::now();
        guest::native_loop();
        nanos(start)
    };
    run().min(run()).min(run())
}

fn nanos(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

fn long_mode(sregs: &mut kvm_sregs, xsave: bool) {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: guest::CODE_SELECTOR,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment {
        selector: guest::DATA_SELECTOR,
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };
    sregs.cs = code;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    let table = |base: usize, limit| kvm_dtable {
        base: base as u64,
        limit,
        ..kvm_dtable::default()
    };
    sregs.gdt = table(guest::GDT, guest::GDT_LIMIT);
    sregs.idt = table(guest::IDT, guest::IDT_LIMIT);
    sregs.cr0 = CR0;
    sregs.cr3 = guest::PML4 as u64;
    sregs.cr4 = if xsave { CR4 | CR4_OSXSAVE } else { CR4 };
    sregs.efer = EFER;
}

/// Runs the vCPU until it halts; the nanoseconds of its timed loop.
fn drive(vcpu: &mut VcpuFd, passed: &mut impl FnMut(u8)) -> Result<u64, Failure> {
    let mut expected = 1;
    let mut loop_start = Instant::now();
    let mut loop_ns = 0;
    loop {
        match vcpu.run().map_err(call("KVM_RUN"))? {
            VcpuExit::IoOut(guest::PORT_STEP, &[step]) if step == expected => {
                if step == guest::STEP_LOOP_END {
                    loop_ns = nanos(loop_start);
                }
                passed(step);
                expected += 1;
                if step == guest::STEP_LOOP_START {
                    loop_start = Instant::now();
                }
            }
            VcpuExit::IoIn(guest::PORT_INPUT, data) => data.fill(guest::INPUT),
            VcpuExit::Hlt if expected > guest::STEP_LOOP_END => return Ok(loop_ns),
            VcpuExit::Hlt => return Err(Failure::Exit("it halted too early")),
            VcpuExit::IoOut(guest::PORT_STRAY, _) => {
                return Err(Failure::Exit("it got an exception it had not caused"));
            }
            VcpuExit::IoOut(guest::PORT_WRONG, _) => {
                return Err(Failure::Exit("a result was wrong"));
            }
            VcpuExit::IoOut(..) => return Err(Failure::Exit("it went astray")),
            VcpuExit::Shutdown => return Err(Failure::Exit("it ended in a triple fault")),
            VcpuExit::InternalError => {
                return Err(Failure::Exit("KVM could not emulate an instruction"));
            }
            VcpuExit::FailEntry(..) => {
                return Err(Failure::Exit("the processor refused to enter it"));
            }
            VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..) => {
                return Err(Failure::Exit("it reached for memory it does not have"));
            }
            _ => return Err(Failure::Exit("it left in an unforeseen way")),
        }
    }
}
