//! Slots of the PCI bus whose devices come and go: what the guest's ACPI driver for
//! hot-plug (Linux: acpiphp) wants to find, over the registers of [`crate::slots`].

use acpi_tables::{
    Aml,
    aml::{
        And, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local,
        Method, Name, Notify, OpRegion, OpRegionSpace, Path, Store,
    },
};

use super::{Raw, ged::Event};
use crate::{
    ports,
    slots::{PORTS, SLOTS},
};

/// Of `Notify` (ACPI 6.5 §5.6.6).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// The scan's event.
pub(super) fn event() -> Event {
    let mut aml = Vec::new();
    Path::new("\\_SB_.PCI0.SCAN").to_aml_bytes(&mut aml);
    Event {
        pin: ports::SLOTS_PIN,
        aml,
    }
}

fn name(slot: u8) -> Path {
    Path::new(&format!("S{slot:03}"))
}

/// The slots and their scan, for the scope of the PCI root.
pub(super) fn slots() -> Vec<u8> {
    let mut aml = Vec::new();
    let (first, len) = (ports::SLOTS, PORTS);
    OpRegion::new("PLUG".into(), OpRegionSpace::SystemIO, &first, &len).to_aml_bytes(&mut aml);
    let fields = [*b"CAME", *b"GOES", *b"EJCT"].map(|name| FieldEntry::Named(name, 32));
    Field::new(
        "PLUG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.to_vec(),
    )
    .to_aml_bytes(&mut aml);

    let (came, goes) = (Local(0), Local(1));
    let (came_now, goes_now, eject) = (Path::new("CAME"), Path::new("GOES"), Path::new("EJCT"));
    let mut scan = Vec::new();
    Store::new(&came, &came_now).to_aml_bytes(&mut scan);
    Store::new(&goes, &goes_now).to_aml_bytes(&mut scan);
    for slot in SLOTS {
        let mask = 1u32 << slot;
        let address = Name::new("_ADR".into(), &(u32::from(slot) << 16));
        let number = Name::new("_SUN".into(), &slot);
        let let_go = Store::new(&eject, &mask);
        let let_go = Method::new("_EJ0".into(), 1, false, vec![&let_go]);
        Device::new(name(slot), vec![&address, &number, &let_go]).to_aml_bytes(&mut aml);
        for (news, kind) in [(&came, DEVICE_CHECK), (&goes, EJECT_REQUEST)] {
            let device = name(slot);
            let notify = Notify::new(&device, &kind);
            let is_set = And::new(&Nowhere, news, &mask);
            If::new(&is_set, vec![&notify]).to_aml_bytes(&mut scan);
        }
    }
    Method::new("SCAN".into(), 0, true, vec![&Raw(scan)]).to_aml_bytes(&mut aml);
    aml
}

/// The result is wanted nowhere else.
struct Nowhere;

impl Aml for Nowhere {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.byte(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_can_be_scanned_and_ejected() {
        let aml = slots();
        let count = |part: &[u8]| aml.windows(part.len()).filter(|w| *w == part).count();
        assert_eq!(count(b"_ADR"), 31);
        assert_eq!(count(b"_EJ0"), 31);
        // Its declaration, and two notifications.
        assert_eq!(count(b"S001"), 3);
        assert_eq!(count(b"S031"), 3);
        // Every machine's guest reads it.
        assert!(aml.len() < 4096, "{}", aml.len());
    }
}
