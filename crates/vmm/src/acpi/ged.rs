//! The Generic Event Device (ACPI 6.5 §5.6.9): how hardware-reduced ACPI hears of
//! events. Each has a pin of the IOAPIC, and AML that runs when it is raised.

use acpi_tables::{
    Aml,
    aml::{Arg, Device, Equal, If, Interrupt, Method, Name, Path, ResourceTemplate},
};

use super::Raw;

/// An event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event {
    /// A pin of the IOAPIC, of this event alone, beyond those of ISA (0–15).
    /// Level-triggered, active high: a pin that stays raised until it is served
    /// loses no event to a guest that is not ready yet.
    pub(super) pin: u32,
    /// What runs, with names from the root.
    pub(super) aml: Vec<u8>,
}

/// `GED`, for the scope `\_SB`; nothing where there are no events.
#[derive(Debug, Clone, Default)]
pub(super) struct Ged(Vec<Event>);

impl Ged {
    pub(super) fn new(events: Vec<Event>) -> Self {
        Self(events)
    }
}

impl Aml for Ged {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        if self.0.is_empty() {
            return;
        }
        let pin = |event: &Event| Interrupt::new(true, false, false, false, event.pin);
        let pins: Vec<_> = self.0.iter().map(pin).collect();
        let pins = pins.iter().map(|pin| pin as &dyn Aml).collect();
        let resources = ResourceTemplate::new(pins);
        let resources = Name::new("_CRS".into(), &resources);
        let mut body = Vec::new();
        for event in &self.0 {
            let same = Equal::new(&Arg(0), &event.pin);
            let aml = Raw(event.aml.clone());
            If::new(&same, vec![&aml]).to_aml_bytes(&mut body);
        }
        let body = Raw(body);
        let handler = Method::new("_EVT".into(), 1, true, vec![&body]);
        let hid = Name::new("_HID".into(), &"ACPI0013");
        let uid = Name::new("_UID".into(), &0u8);
        Device::new(Path::new("GED_"), vec![&hid, &uid, &resources, &handler]).to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_event_has_its_pin_and_its_code() {
        let mut none = Vec::new();
        Ged::default().to_aml_bytes(&mut none);
        assert!(none.is_empty());
        let event = |pin, aml| Event { pin, aml };
        let ged = Ged::new(vec![event(16, vec![0xa3]), event(17, vec![0xa3, 0xa3])]);
        let mut bytes = Vec::new();
        ged.to_aml_bytes(&mut bytes);
        let has = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
        // Extended interrupt descriptors: consumer, level, active high (§6.4.3.6).
        assert!(has(&[0x89, 6, 0, 0x01, 1, 16, 0, 0, 0]));
        assert!(has(&[0x89, 6, 0, 0x01, 1, 17, 0, 0, 0]));
        // If (Arg0 == pin) { Noop }.
        assert!(has(&[0xa0, 6, 0x93, 0x68, 0x0a, 16, 0xa3]));
        assert!(has(&[0xa0, 7, 0x93, 0x68, 0x0a, 17, 0xa3, 0xa3]));
    }
}
