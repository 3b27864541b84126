//! The virtual machine generation ID (Microsoft's specification of that name):
//! sixteen random bytes in a page of their own, other ones in each clone. The guest's
//! kernel hears of a change by an event, and reseeds its random numbers.

use acpi_tables::{
    Aml,
    aml::{Device, Name, Notify, Package, Path},
};
use vm_memory::{Address, Bytes};
use walnut_devices::virtio::Memory;

use super::{Raw, ged::Event};
use crate::{Error, layout};

/// Of the I/O APIC, this event's alone.
pub(crate) const PIN: u32 = 20;
/// "The generation ID has changed".
const CHANGED: u8 = 0x80;

/// The device, for the scope `\_SB`.
pub(super) fn device() -> impl Aml {
    let address = layout::GENERATION.raw_value();
    let half = |at: u32| u32::try_from(address >> at & 0xffff_ffff).unwrap_or(0);
    let (low, high) = (half(0), half(32));
    let hid = Name::new("_HID".into(), &"WALNVMGI");
    let cid = Name::new("_CID".into(), &"VM_Gen_Counter");
    let ddn = Name::new("_DDN".into(), &"VM_Gen_Counter");
    let address = Package::new(vec![&low, &high]);
    let address = Name::new("ADDR".into(), &address);
    let mut bytes = Vec::new();
    Device::new(Path::new("VGEN"), vec![&hid, &cid, &ddn, &address]).to_aml_bytes(&mut bytes);
    Raw(bytes)
}

/// What a guest does when it hears that the ID has changed.
pub(super) fn event() -> Event {
    let mut aml = Vec::new();
    Notify::new(&Path::new("\\_SB_.VGEN"), &CHANGED).to_aml_bytes(&mut aml);
    Event { pin: PIN, aml }
}

/// Writes an ID, which must be random.
pub(crate) fn write(memory: &Memory, id: &[u8; 16]) -> Result<(), Error> {
    memory
        .write_slice(id, layout::GENERATION)
        .map_err(|e| Error::Boot(format!("write the generation ID: {e}")))
}
