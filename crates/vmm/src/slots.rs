//! The registers by which slots of the bus come and go, in I/O ports, and what the
//! host has asked the guest for.
//!
//! | port | | |
//! |---|---|---|
//! | +0 | read | slots whose device is new since the last read, a bit each |
//! | +4 | read | slots whose device is to be let go, since the last read |
//! | +8 | write | slots whose device the guest has let go |
//!
//! Accesses are of 32 bits. The pin is raised whenever there is something to read,
//! and stays so until a guest serves it. A guest can let go only of what it was asked
//! for, and once; what else it writes changes nothing.

use std::{
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use vmm_sys_util::eventfd::EventFd;
use walnut_devices::pci::{Root, VirtioPci};

/// Slots for devices: the first is the host bridge's.
pub(crate) const SLOTS: RangeInclusive<u8> = 1..=31;
/// Ports that they take.
pub(crate) const PORTS: u16 = 12;
const CAME: u16 = 0;
const GOES: u16 = 4;
const EJECT: u16 = 8;

/// Who takes a device apart that the guest has let go. Called on a vCPU's thread:
/// it may neither wait, nor drop what it is given.
pub(crate) trait Ejected: Send + Sync + std::fmt::Debug {
    fn ejected(&self, function: Box<VirtioPci>);
}

/// The registers.
#[derive(Debug)]
pub(crate) struct Slots {
    came: AtomicU32,
    goes: AtomicU32,
    /// What the guest may let go.
    asked: AtomicU32,
    pin: EventFd,
    root: Arc<Root>,
    ejected: Arc<dyn Ejected>,
}

impl Slots {
    /// `pin` is wired to [`crate::ports::SLOTS_PIN`].
    pub(crate) fn new(root: Arc<Root>, pin: EventFd, ejected: Arc<dyn Ejected>) -> Self {
        Self {
            came: AtomicU32::new(0),
            goes: AtomicU32::new(0),
            asked: AtomicU32::new(0),
            pin,
            root,
            ejected,
        }
    }

    /// There is a new device in a slot.
    pub(crate) fn came(&self, slot: u8) {
        let mask = mask(slot);
        // Nothing is asked of this one yet.
        self.asked.fetch_and(!mask, Ordering::AcqRel);
        self.goes.fetch_and(!mask, Ordering::AcqRel);
        self.came.fetch_or(mask, Ordering::AcqRel);
        self.raise();
    }

    /// The guest shall let go of what is in a slot. May be said again.
    pub(crate) fn ask(&self, slot: u8) {
        let mask = mask(slot);
        self.asked.fetch_or(mask, Ordering::AcqRel);
        self.goes.fetch_or(mask, Ordering::AcqRel);
        self.raise();
    }

    /// The registers, for a snapshot.
    pub(crate) fn save(&self) -> [u32; 3] {
        [&self.came, &self.goes, &self.asked].map(|it| it.load(Ordering::Acquire))
    }

    /// Undoes [`Self::save`]. A guest that was told and did not ask yet is told again.
    pub(crate) fn restore(&self, saved: [u32; 3]) {
        let registers = [&self.came, &self.goes, &self.asked];
        for (register, value) in registers.into_iter().zip(saved) {
            register.store(value, Ordering::Release);
        }
        self.raise();
    }

    fn raise(&self) {
        // Fails only when the counter is full: then it has been raised.
        let _ = self.pin.write(1);
    }

    /// `port` is from the first on.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        let register = match port {
            CAME => &self.came,
            GOES => &self.goes,
            _ => return,
        };
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = register.swap(0, Ordering::AcqRel).to_le_bytes();
        }
    }

    /// `port` is from the first on.
    pub(crate) fn write(&self, port: u16, data: &[u8]) {
        let (EJECT, Ok(data)) = (port, <[u8; 4]>::try_from(data)) else {
            return;
        };
        let let_go = u32::from_le_bytes(data);
        for slot in SLOTS {
            let mask = mask(slot);
            if let_go & mask != 0
                && self.asked.fetch_and(!mask, Ordering::AcqRel) & mask != 0
                && let Some(function) = self.root.remove(slot)
            {
                self.ejected.ejected(function);
            }
        }
    }
}

fn mask(slot: u8) -> u32 {
    1u32.checked_shl(slot.into()).unwrap_or(0)
}
