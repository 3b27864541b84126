//! What a machine is besides its memory, as the body of a state file.
//!
//! The body is hostile when it is read: postcard allocates no more than what is
//! there, every list is counted here, and whatever else it says is checked by who
//! uses it: KVM (registers), the bus (functions), devices (their own state).

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};
use vm_superio::SerialState;
use walnut_devices::pci::FunctionState;
use walnut_vmm_api::NAME_MAX;

use super::Error;

/// vCPUs that a snapshot may have.
const VCPUS_MAX: usize = 32;
/// CPUID leaves of a vCPU, what `KVM_GET_SUPPORTED_CPUID` answers at most.
const LEAVES_MAX: usize = kvm_bindings::KVM_MAX_CPUID_ENTRIES;
/// MSRs of a vCPU at most.
const MSRS_MAX: usize = kvm_bindings::KVM_MAX_MSR_ENTRIES;
/// Devices: slots of the bus but the bridge's.
const DEVICES_MAX: usize = 31;
/// What the device is called that has the memory of a machine that grows.
pub(crate) const MEMORY: &str = "memory";
/// Bytes of what a device says of itself: the largest is a bit for each block of
/// pluggable memory.
const DEVICE_MAX: usize = 256 << 10;

/// All of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) vcpus: Vec<Vcpu>,
    /// The PIC's two halves, and the IOAPIC.
    pub(crate) chips: [kvm_irqchip; 3],
    /// What the guest's KVM clock showed.
    pub(crate) clock: kvm_clock_data,
    pub(crate) serial: Serial,
    /// Slots whose device came, goes, and may be let go: a bit each.
    pub(crate) slots: [u32; 3],
    /// If its memory can grow: then one of the devices is called [`MEMORY`].
    pub(crate) room: Option<Room>,
    pub(crate) devices: Vec<Device>,
}

/// How far a machine's memory grows, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Room {
    /// What it booted with.
    pub(crate) memory: u64,
    /// What it can have.
    pub(crate) max_memory: u64,
}

/// A vCPU between two instructions.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Vcpu {
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    pub(crate) mp: kvm_mp_state,
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    pub(crate) xsave: kvm_xsave,
    pub(crate) xcrs: kvm_xcrs,
    pub(crate) debug: kvm_debugregs,
    pub(crate) lapic: kvm_lapic_state,
    pub(crate) msrs: Vec<kvm_msr_entry>,
    pub(crate) events: kvm_vcpu_events,
    /// Of the guest's time stamp counter; 0 if the host does not say.
    pub(crate) tsc_khz: u32,
}

/// The serial port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Serial {
    /// In the order of [`SerialState`].
    registers: [u8; 9],
    input: Vec<u8>,
}

/// A device on the bus.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) slot: u8,
    pub(crate) function: FunctionState,
    /// [`walnut_devices::virtio::Device::save`].
    pub(crate) own: Vec<u8>,
}

impl From<&SerialState> for Serial {
    fn from(state: &SerialState) -> Self {
        Self {
            registers: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            input: state.in_buffer.clone(),
        }
    }
}

impl From<&Serial> for SerialState {
    fn from(serial: &Serial) -> Self {
        let [
            low,
            high,
            enable,
            id,
            line,
            status,
            modem,
            modem_status,
            scratch,
        ] = serial.registers;
        Self {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: id,
            line_control: line,
            line_status: status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: serial.input.clone(),
        }
    }
}

impl State {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, Error> {
        postcard::to_allocvec(self).map_err(|_| Error::State("it cannot be encoded".to_owned()))
    }

    /// Undoes [`Self::encode`]; the bytes are hostile.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let (state, rest): (Self, _) = postcard::take_from_bytes(bytes)
            .map_err(|e| Error::State(format!("it cannot be decoded: {e}")))?;
        if !rest.is_empty() {
            return Err(Error::State(format!("{} bytes are left over", rest.len())));
        }
        state.check()?;
        Ok(state)
    }

    fn check(&self) -> Result<(), Error> {
        let within = |what: &str, found: usize, most: usize| match found <= most {
            true => Ok(()),
            false => Err(Error::State(format!(
                "it has {found} {what}, there can be {most}"
            ))),
        };
        if self.vcpus.is_empty() {
            return Err(Error::State("it has no vCPU".to_owned()));
        }
        within("vCPUs", self.vcpus.len(), VCPUS_MAX)?;
        for vcpu in &self.vcpus {
            within("CPUID leaves", vcpu.cpuid.len(), LEAVES_MAX)?;
            within("MSRs", vcpu.msrs.len(), MSRS_MAX)?;
        }
        within("devices", self.devices.len(), DEVICES_MAX)?;
        for device in &self.devices {
            within("bytes of a device's name", device.name.len(), NAME_MAX)?;
            within("bytes of a device's own", device.own.len(), DEVICE_MAX)?;
        }
        let memory = self.devices.iter().filter(|device| device.name == MEMORY);
        if self.room.is_some() && memory.count() != 1 {
            return Err(Error::State(
                "its memory can grow, and it has no device for that, or several".to_owned(),
            ));
        }
        for (expected, chip) in (0u32..).zip(&self.chips) {
            if chip.chip_id != expected {
                return Err(Error::State(format!(
                    "interrupt controller {expected} is called {}",
                    chip.chip_id
                )));
            }
        }
        Ok(())
    }
}
