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
        atomic::{AtomicBool, AtomicU32, Ordering},
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
    /// A register has been read since the last acknowledgement.
    read: AtomicBool,
    pin: EventFd,
    root: Arc<Root>,
    ejected: Arc<dyn Ejected>,
}

impl Slots {
    /// `pin` is wired to [`crate::ports::SLOTS_PIN`]. When the guest has acknowledged
    /// it, [`Self::look_again`] is to be called.
    pub(crate) fn new(root: Arc<Root>, pin: EventFd, ejected: Arc<dyn Ejected>) -> Self {
        Self {
            came: AtomicU32::new(0),
            goes: AtomicU32::new(0),
            asked: AtomicU32::new(0),
            read: AtomicBool::new(false),
            pin,
            root,
            ejected,
        }
    }

    /// An acknowledgement lowers the pin, also for what came after the guest had
    /// read the registers: raises it again if there is anything. Not for a guest that
    /// acknowledges and does not read.
    pub(crate) fn look_again(&self) {
        let news = self.came.load(Ordering::Acquire) | self.goes.load(Ordering::Acquire);
        if self.read.swap(false, Ordering::AcqRel) && news != 0 {
            self.raise();
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
            self.read.store(true, Ordering::Release);
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vm_memory::{GuestAddress, GuestMemoryMmap};
    use walnut_devices::{
        limit::LimitConfig,
        pci::{Doorbells, Message, Messages},
        rng,
        virtio::{MemoryCell, Worker},
    };

    use super::*;

    #[derive(Debug)]
    struct Nobody;

    impl Messages for Nobody {
        fn route(&self, _: usize, _: Option<Message>) {}
        fn send(&self, _: usize) {}
    }

    impl Doorbells for Nobody {
        fn moved(&self, _: Option<u64>) {}
    }

    #[derive(Debug, Default)]
    struct Out(Mutex<Vec<VirtioPci>>);

    impl Ejected for Out {
        fn ejected(&self, function: Box<VirtioPci>) {
            self.0.lock().unwrap().push(*function);
        }
    }

    struct Bus {
        slots: Slots,
        out: Arc<Out>,
        pin: EventFd,
        memory: MemoryCell,
        workers: Vec<Worker>,
    }

    impl Bus {
        fn new() -> Self {
            let root = Arc::new(Root::new(0xe000_0000, 0x8_0000_0000..0x8_1000_0000));
            let pin = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            let out = Arc::<Out>::default();
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
            Self {
                slots: Slots::new(root, pin.try_clone().unwrap(), out.clone()),
                out,
                pin,
                memory: MemoryCell::new(memory),
                workers: Vec::new(),
            }
        }

        fn plug(&mut self) -> u8 {
            let device = Box::new(rng::Rng::new(LimitConfig::default()));
            let (worker, port) = Worker::new(device).unwrap();
            self.workers.push(worker);
            let root = &self.slots.root;
            let memory = self.memory.clone();
            let slot = root
                .plug(port, memory, Arc::new(Nobody), Box::new(Nobody))
                .unwrap();
            self.slots.came(slot);
            slot
        }

        fn read(&self, port: u16) -> u32 {
            let mut data = [0xff; 4];
            self.slots.read(port, &mut data);
            u32::from_le_bytes(data)
        }

        fn eject(&self, slots: u32) -> usize {
            let before = self.out.0.lock().unwrap().len();
            self.slots.write(EJECT, &slots.to_le_bytes());
            self.out.0.lock().unwrap().len() - before
        }
    }

    #[test]
    fn news_is_raised_and_read_once() {
        let mut bus = Bus::new();
        assert_eq!((bus.read(CAME), bus.read(GOES)), (0, 0));
        assert_eq!((bus.plug(), bus.plug()), (1, 2));
        assert_eq!(bus.pin.read().unwrap(), 2);
        // Other widths and ports read nothing, and clear nothing.
        for len in [1, 2, 3, 8] {
            let mut data = vec![0xff; len];
            bus.slots.read(CAME, &mut data);
            assert_eq!(data, vec![0xff; len]);
        }
        for port in [1, 2, 3, 5, EJECT, 11] {
            assert_eq!(bus.read(port), u32::MAX);
        }
        assert_eq!((bus.read(CAME), bus.read(CAME)), (0b110, 0));
        bus.slots.ask(2);
        assert!(bus.pin.read().is_ok());
        assert_eq!((bus.read(GOES), bus.read(GOES)), (0b100, 0));
    }

    #[test]
    fn what_came_between_read_and_acknowledgement_is_raised_again() {
        let mut bus = Bus::new();
        bus.plug();
        assert!(bus.pin.read().is_ok());
        // Acknowledged first: the guest is about to read.
        bus.slots.look_again();
        assert!(bus.pin.read().is_err());
        assert_eq!(bus.read(CAME), 0b10);
        bus.plug();
        assert!(bus.pin.read().is_ok());
        bus.slots.look_again();
        assert_eq!(bus.pin.read().unwrap(), 1);
        // A guest that does not read is not told again and again.
        bus.slots.look_again();
        assert!(bus.pin.read().is_err());
        assert_eq!((bus.read(CAME), bus.read(GOES)), (0b100, 0));
        bus.slots.look_again();
        assert!(bus.pin.read().is_err());
    }

    #[test]
    fn a_guest_lets_go_only_of_what_it_was_asked_for() {
        let mut bus = Bus::new();
        bus.plug();
        bus.plug();
        assert_eq!(bus.eject(u32::MAX), 0, "nobody asked");
        bus.slots.ask(2);
        for odd in [&[0xff][..], &[0xff; 2], &[0xff; 8], &[]] {
            bus.slots.write(EJECT, odd);
        }
        bus.slots.write(CAME, &[0xff; 4]);
        bus.slots.write(GOES, &[0xff; 4]);
        assert_eq!(bus.eject(0b010), 0, "another");
        assert_eq!(bus.eject(u32::MAX), 1);
        assert_eq!(bus.eject(u32::MAX), 0, "twice");
        // Asked for an empty slot, or none, nothing goes.
        for slot in [2, 0, 31, 32, 255] {
            bus.slots.ask(slot);
        }
        assert_eq!(bus.eject(u32::MAX), 0);
        // The next in the slot has not been asked for, whatever the last was.
        bus.slots.ask(2);
        assert_eq!(bus.plug(), 2);
        assert_eq!(bus.read(GOES) & 0b100, 0);
        assert_eq!(bus.eject(u32::MAX), 0);
        bus.slots.ask(2);
        assert_eq!(bus.eject(u32::MAX), 1);
    }
}
