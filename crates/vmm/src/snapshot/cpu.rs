//! A vCPU's state, out of KVM and back into it.

use kvm_bindings::{CpuId, KVM_CAP_TSC_CONTROL, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::state::Vcpu;
use crate::Error;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// MSRs read or written by one call.
const CHUNK: usize = 64;
/// The guest's clock may be off by this many millionths (as much as the kernel's
/// own check of one TSC against another allows).
const TSC_TOLERANCE_PPM: u64 = 250;

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |e| Error::Kvm(what, e)
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::Config(format!("the snapshot cannot run here: {what}"))
}

/// The MSRs that KVM can read and write on this host.
pub(crate) fn msrs(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let list = kvm.get_msr_index_list();
    let list = list.map_err(|e| Error::Kvm("list the MSRs", e))?;
    Ok(list.as_slice().to_vec())
}

/// What a vCPU is that does not run. `cpuid` is what it was given.
pub(crate) fn save(vcpu: &VcpuFd, cpuid: &CpuId, msrs: &[u32]) -> Result<Vcpu, Error> {
    // First: it may change what follows.
    let mp = vcpu
        .get_mp_state()
        .map_err(kvm("read a vCPU's run state"))?;
    let failed = kvm("read a vCPU's registers");
    let state = Vcpu {
        cpuid: cpuid.as_slice().to_vec(),
        mp,
        regs: vcpu.get_regs().map_err(&failed)?,
        sregs: vcpu.get_sregs().map_err(&failed)?,
        xsave: vcpu.get_xsave().map_err(&failed)?,
        xcrs: vcpu.get_xcrs().map_err(&failed)?,
        debug: vcpu.get_debug_regs().map_err(&failed)?,
        lapic: vcpu.get_lapic().map_err(kvm("read a vCPU's local APIC"))?,
        msrs: read_msrs(vcpu, msrs)?,
        events: vcpu.get_vcpu_events().map_err(&failed)?,
        tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
    };
    // So that the guest does not take the pause for a lock-up. It fails where the
    // guest uses no KVM clock.
    let _ = vcpu.kvmclock_ctrl();
    Ok(state)
}

fn read_msrs(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut found = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let (chunk, _) = rest.split_at(rest.len().min(CHUNK));
        let entries: Vec<_> = chunk
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = list(&entries)?;
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(kvm("read a vCPU's MSRs"))?;
        found.extend(msrs.as_slice().iter().take(read).copied());
        // KVM stops at one that this guest does not have.
        let done = if read < chunk.len() { read + 1 } else { read };
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(found)
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(entries).map_err(|_| bad("it has too many MSRs"))
}

/// Makes a new vCPU what `state` says. `own` is the CPUID that this VMM would give
/// it on this host, `known` the MSRs that KVM has here.
pub(crate) fn restore(
    kvm_: &Kvm,
    vcpu: &VcpuFd,
    state: &Vcpu,
    own: &CpuId,
    known: &[u32],
) -> Result<CpuId, Error> {
    check_features(&state.cpuid, own.as_slice())?;
    let cpuid =
        CpuId::from_entries(&state.cpuid).map_err(|_| bad("it has too many CPUID leaves"))?;
    let failed = kvm("set a vCPU's registers to what the snapshot says");
    vcpu.set_cpuid2(&cpuid).map_err(&failed)?;
    set_tsc_rate(kvm_, vcpu, state.tsc_khz)?;
    vcpu.set_mp_state(state.mp).map_err(&failed)?;
    vcpu.set_regs(&state.regs).map_err(&failed)?;
    vcpu.set_sregs(&state.sregs).map_err(&failed)?;
    // SAFETY: the buffer has the size that KVM takes from a process that has asked
    // for no more of XSAVE's area (arch_prctl), as this one has not.
    unsafe { vcpu.set_xsave(&state.xsave) }.map_err(&failed)?;
    // None where the processor has no XSAVE; KVM refuses an empty list there.
    if state.xcrs.nr_xcrs > 0 {
        vcpu.set_xcrs(&state.xcrs).map_err(&failed)?;
    }
    vcpu.set_debug_regs(&state.debug).map_err(&failed)?;
    vcpu.set_lapic(&state.lapic)
        .map_err(kvm("set a vCPU's local APIC to what the snapshot says"))?;
    write_msrs(vcpu, state, known)?;
    vcpu.set_vcpu_events(&state.events).map_err(&failed)?;
    Ok(cpuid)
}

/// The guest uses what it was told it had: all of it must be here.
fn check_features(wanted: &[kvm_cpuid_entry2], own: &[kvm_cpuid_entry2]) -> Result<(), Error> {
    for leaf in wanted {
        let here = own
            .iter()
            .find(|e| (e.function, e.index) == (leaf.function, leaf.index));
        let here = here.copied().unwrap_or_default();
        // Leaves whose bits are features, with the registers that hold them.
        let pairs: &[(&str, u32, u32)] = match (leaf.function, leaf.index) {
            (1, _) | (0x8000_0001, _) => {
                &[("ecx", leaf.ecx, here.ecx), ("edx", leaf.edx, here.edx)]
            }
            (7, 0) => &[
                ("ebx", leaf.ebx, here.ebx),
                ("ecx", leaf.ecx, here.ecx),
                ("edx", leaf.edx, here.edx),
            ],
            (7, 1) | (0xd, 1) => &[("eax", leaf.eax, here.eax)],
            (0xd, 0) => &[("eax", leaf.eax, here.eax), ("edx", leaf.edx, here.edx)],
            (0x8000_0008, _) => &[("ebx", leaf.ebx, here.ebx)],
            (0x4000_0001, _) => &[("eax", leaf.eax, here.eax)],
            _ => &[],
        };
        for (register, wanted, here) in pairs {
            let missing = wanted & !here;
            if missing != 0 {
                return Err(bad(format!(
                    "its guest uses processor features that this host lacks \
                     (CPUID {:#x}.{}, {register} bits {missing:#x}); take a new one here",
                    leaf.function, leaf.index
                )));
            }
        }
    }
    Ok(())
}

fn set_tsc_rate(kvm_: &Kvm, vcpu: &VcpuFd, wanted: u32) -> Result<(), Error> {
    let Ok(here) = vcpu.get_tsc_khz() else {
        return Ok(());
    };
    let off = u64::from(wanted.abs_diff(here)) * 1_000_000;
    if wanted == 0 || off <= u64::from(here) * TSC_TOLERANCE_PPM {
        return Ok(());
    }
    if kvm_.check_extension_raw(u64::from(KVM_CAP_TSC_CONTROL)) <= 0 {
        return Err(bad(format!(
            "its time stamp counter runs at {wanted} kHz, this host's at {here}, and this \
             processor cannot scale it"
        )));
    }
    vcpu.set_tsc_khz(wanted)
        .map_err(kvm("set the rate of a vCPU's time stamp counter"))
}

fn write_msrs(vcpu: &VcpuFd, state: &Vcpu, known: &[u32]) -> Result<(), Error> {
    let deadline = |entry: &&kvm_msr_entry| entry.index == MSR_TSC_DEADLINE;
    if let Some(stranger) = state.msrs.iter().find(|m| !known.contains(&m.index)) {
        return Err(bad(format!("it has MSR {:#x}", stranger.index)));
    }
    // The deadline is compared with a counter that must have been set before.
    let mut entries: Vec<kvm_msr_entry> = state
        .msrs
        .iter()
        .filter(|m| !deadline(m))
        .copied()
        .collect();
    if let Some(last) = state.msrs.iter().find(deadline) {
        let tsc = state.msrs.iter().find(|m| m.index == MSR_TSC);
        let mut last = *last;
        // A timer that has fired but whose interrupt is not yet in the local APIC
        // reads as zero, which would mean never: let it fire at once.
        if last.data == 0 && deadline_mode(state) {
            last.data = tsc.map_or(0, |tsc| tsc.data);
        }
        entries.push(last);
    }
    let mut rest: &[kvm_msr_entry] = &entries;
    while !rest.is_empty() {
        let (chunk, _) = rest.split_at(rest.len().min(CHUNK));
        let set = vcpu
            .set_msrs(&list(chunk)?)
            .map_err(kvm("set a vCPU's MSRs"))?;
        if let Some(refused) = chunk.get(set) {
            // Some can be read and not written; that is all right if nothing is lost.
            let mut now = list(&[kvm_msr_entry {
                data: 0,
                ..*refused
            }])?;
            let read = vcpu.get_msrs(&mut now).map_err(kvm("read a vCPU's MSRs"))?;
            let same = now.as_slice().first().map(|m| m.data) == Some(refused.data);
            if read != 1 || !same {
                return Err(bad(format!(
                    "KVM refuses {:#x} for MSR {:#x}",
                    refused.data, refused.index
                )));
            }
        }
        let done = if set < chunk.len() { set + 1 } else { set };
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(())
}

/// Whether the local APIC's timer waits for the TSC to pass a deadline.
fn deadline_mode(state: &Vcpu) -> bool {
    // Bits 17 and 18 of the timer's entry (Intel SDM 3, 11.5.1), unmasked (bit 16).
    const LVT_TIMER: usize = 0x320;
    let byte = state.lapic.regs.get(LVT_TIMER + 2).copied();
    let byte = byte.unwrap_or_default().cast_unsigned();
    byte & 0b111 == 0b100
}
