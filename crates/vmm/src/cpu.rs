//! What a vCPU is before its first instruction: CPUID, registers, MSRs.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_msr_entry,
    kvm_regs, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::{Address, Bytes};
use walnut_devices::virtio::Memory;

use crate::{Error, boot::Entry, layout};

const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
/// Flat descriptors of 32-bit code and data, and a task state that nobody uses.
const DESCRIPTORS: [u64; 5] = [
    0,
    0,
    0x00cf_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
];
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;

/// `KVM_FEATURE_ASYNC_PF`, `…_VMEXIT` and `…_INT`
/// (Documentation/virt/kvm/x86/cpuid.rst).
const ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// "Always running APIC timer", of leaf 6.
const ARAT: u32 = 1 << 2;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// Enabled, write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// The CPUID that KVM can honour on this host, but for what names a vCPU.
pub(crate) fn supported(kvm: &Kvm) -> Result<CpuId, Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| Error::Kvm("ask for the CPUID", e))
}

/// The end of what a processor with this CPUID can address.
pub(crate) fn address_end(supported: &CpuId) -> u64 {
    let sizes = supported.as_slice().iter();
    let bits = sizes
        .filter(|entry| entry.function == 0x8000_0008)
        .map(|entry| entry.eax & 0xff)
        .next();
    // What every processor of this kind can, where one does not say.
    1u64.checked_shl(bits.unwrap_or(36)).unwrap_or(u64::MAX)
}

/// The CPUID of vCPU `id` of `count`.
pub(crate) fn cpuid(supported: &CpuId, id: u8, count: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    let id = u32::from(id);
    let count = u32::from(count);
    // Bits of an APIC ID that tell the processors of a package apart.
    let bits = u32::BITS - (count - 1).leading_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                const TSC_DEADLINE: u32 = 1 << 24;
                const HYPERVISOR: u32 = 1 << 31;
                const HTT: u32 = 1 << 28;
                entry.ebx = entry.ebx & 0xff | 8 << 8 | (1 << bits & 0xff) << 16 | id << 24;
                entry.ecx |= HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                entry.edx = match count {
                    1 => entry.edx & !HTT,
                    _ => entry.edx | HTT,
                };
            }
            // Cache sharing: every cache is a core's own, one package holds all.
            4 if entry.eax & 0x1f != 0 => {
                entry.eax = entry.eax & 0x3fff | (((1 << bits) - 1) & 0x3f) << 26;
            }
            // KVM's own: no asynchronous page faults. They let a guest run another
            // program while the host fetches a page, and forget the one that waits
            // when the machine is saved meanwhile.
            0x4000_0001 => entry.eax &= !ASYNC_PF,
            // No power management, but that the APIC's timer always runs, as KVM's does:
            // a kernel that thinks it might stop, and finds no other to stand in, keeps its
            // periodic tick for ever and has no timer finer than that.
            6 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (ARAT, 0, 0, 0),
            // No performance counters.
            0xa => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            // Topology: one thread per core, all cores in one package.
            0xb | 0x1f => {
                let (shift, number, level) = match entry.index {
                    0 => (0, 1, 1),
                    1 => (bits, count, 2),
                    _ => (0, 0, 0),
                };
                entry.eax = shift;
                entry.ebx = number;
                entry.ecx = level << 8 | entry.index & 0xff;
                entry.edx = id;
            }
            0x8000_0008 => {
                entry.ecx = entry.ecx & !0xf0ff | bits << 12 | (count - 1);
            }
            0x8000_001d if entry.eax & 0x1f != 0 => {
                // As leaf 4: shared by one.
                entry.eax &= 0x3fff;
            }
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

/// Puts the descriptor table of the first moment into memory.
pub(crate) fn write_descriptors(memory: &Memory) -> Result<(), Error> {
    let bytes: Vec<u8> = DESCRIPTORS.iter().flat_map(|d| d.to_le_bytes()).collect();
    memory
        .write_slice(&bytes, layout::GDT)
        .map_err(|e| Error::Boot(format!("write the descriptor table: {e}")))
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |e| Error::Kvm(what, e)
}

/// Prepares a vCPU: `entry` is where the first one begins, and absent for the
/// others, which the first one starts.
pub(crate) fn prepare(vcpu: &VcpuFd, cpuid: &CpuId, entry: Option<Entry>) -> Result<(), Error> {
    vcpu.set_cpuid2(cpuid).map_err(kvm("set a vCPU's CPUID"))?;
    let msr = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[
        msr(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        msr(MSR_MTRR_DEFAULT_TYPE, MTRR_WRITE_BACK),
    ])
    .map_err(|e| Error::Boot(format!("list a vCPU's MSRs: {e:?}")))?;
    let set = vcpu.set_msrs(&msrs).map_err(kvm("set a vCPU's MSRs"))?;
    if set != msrs.as_slice().len() {
        return Err(Error::Boot(format!(
            "KVM refused MSR number {set} of a vCPU"
        )));
    }
    set_local_interrupts(vcpu)?;
    let Some(entry) = entry else {
        return Ok(());
    };
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(kvm("set a vCPU's FPU"))?;
    let regs = kvm_regs {
        rflags: 2,
        rip: entry.rip,
        rbx: entry.rbx,
        rsi: entry.rsi,
        ..Default::default()
    };
    vcpu.set_regs(&regs)
        .map_err(kvm("set a vCPU's registers"))?;
    let mut sregs = vcpu
        .get_sregs()
        .map_err(kvm("read a vCPU's system registers"))?;
    sregs.cs = segment(CODE, 0xb);
    let data = segment(DATA, 0x3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        s: 0,
        g: 0,
        db: 0,
        ..segment(TASK, 0xb)
    };
    sregs.gdt = kvm_dtable {
        base: layout::GDT.raw_value(),
        limit: u16::try_from(DESCRIPTORS.len() * 8 - 1).unwrap_or(0),
        ..Default::default()
    };
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs)
        .map_err(kvm("set a vCPU's system registers"))
}

fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    }
}

/// LINT0 takes the PIC's interrupts, LINT1 is the NMI, as firmware leaves them.
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), Error> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_EXTINT: u8 = 7;
    const MODE_NMI: u8 = 4;
    let mut lapic: kvm_lapic_state = vcpu.get_lapic().map_err(kvm("read a vCPU's local APIC"))?;
    for (register, mode) in [(LVT_LINT0, MODE_EXTINT), (LVT_LINT1, MODE_NMI)] {
        // Bits 8-10 of the entry.
        if let Some(byte) = lapic.regs.get_mut(register + 1) {
            *byte = (byte.cast_unsigned() & !7 | mode).cast_signed();
        }
    }
    vcpu.set_lapic(&lapic)
        .map_err(kvm("set a vCPU's local APIC"))
}
