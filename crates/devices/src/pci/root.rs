//! The root complex: one bus, whose first function is the host bridge.

use std::{
    ops::Range,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use virtio_queue::QueueState;

use super::{
    FunctionState, StateError,
    config::{Config, Identity, SIZE},
    transport::{BAR_SIZE, Doorbells, VirtioPci},
};
use crate::virtio::{MemoryCell, Port, Quiesced};

/// Slots of a bus.
const SLOTS: usize = 32;
/// Bytes of the ECAM per slot: eight functions.
const SLOT_SIZE: u64 = 8 * SIZE as u64;

/// Why a function could not be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RootError {
    /// All slots are taken.
    #[error("the PCI bus is full: it has room for {} devices", SLOTS - 1)]
    Full,
    /// Not a slot, or one that is taken.
    #[error("there is no free slot {0} on the PCI bus")]
    Taken(u8),
    /// The window for BARs is too small.
    #[error("the window for PCI BARs is full")]
    Window,
}

/// What is in a slot.
type Content = Option<Box<VirtioPci>>;
/// A slot. An access holds the lock for as long as it lasts, which is never long:
/// so who takes a function out has it alone, and knows where its last use was.
type Slot = RwLock<Content>;

/// The bus. Functions come and go while the guest runs.
#[derive(Debug)]
pub struct Root {
    ecam: u64,
    window: Range<u64>,
    bridge: Config,
    slots: [Slot; SLOTS],
}

fn look(slot: &Slot) -> RwLockReadGuard<'_, Content> {
    // A slot is whole whoever panicked.
    slot.read().unwrap_or_else(PoisonError::into_inner)
}

fn change(slot: &Slot) -> RwLockWriteGuard<'_, Content> {
    slot.write().unwrap_or_else(PoisonError::into_inner)
}

impl Root {
    /// A bus whose configuration space is at `ecam` (1 MiB), and whose BARs are
    /// placed in `window`.
    pub fn new(ecam: u64, window: Range<u64>) -> Self {
        Self {
            ecam,
            window,
            // A bridge that is nothing but there (QEMU's generic one).
            bridge: Config::new(Identity {
                vendor: 0x1b36,
                device: 0x0008,
                revision: 0,
                class: [6, 0, 0],
                subsystem: 0x1100,
            }),
            slots: [const { RwLock::new(None) }; SLOTS],
        }
    }

    /// Bytes of the ECAM.
    pub fn ecam_size() -> u64 {
        1 << 20
    }

    /// Adds a virtio device in the first free slot before the guest runs, with its
    /// BAR placed, as firmware would; which slot that is.
    pub fn add(
        &self,
        port: Port,
        memory: MemoryCell,
        messages: Arc<dyn super::Messages>,
        doorbells: Box<dyn Doorbells>,
    ) -> Result<u8, RootError> {
        let (slot, mut place) = self.free()?;
        let bar = self.window.start.next_multiple_of(BAR_SIZE) + u64::from(slot) * BAR_SIZE;
        if bar + BAR_SIZE > self.window.end {
            return Err(RootError::Window);
        }
        let function = VirtioPci::new(port, memory, messages, doorbells, Some(bar));
        *place = Some(Box::new(function));
        Ok(slot)
    }

    /// Adds a virtio device in the first free slot while the guest runs, which then
    /// places its BAR: only the guest knows what it has put where. Which slot that is.
    pub fn plug(
        &self,
        port: Port,
        memory: MemoryCell,
        messages: Arc<dyn super::Messages>,
        doorbells: Box<dyn Doorbells>,
    ) -> Result<u8, RootError> {
        let (slot, mut place) = self.free()?;
        let function = VirtioPci::new(port, memory, messages, doorbells, None);
        *place = Some(Box::new(function));
        Ok(slot)
    }

    /// Adds a virtio device in a slot, 1 to 31, as a snapshot has it: where its BAR
    /// is, [`Self::restore`] says.
    pub fn insert(
        &self,
        slot: u8,
        port: Port,
        memory: MemoryCell,
        messages: Arc<dyn super::Messages>,
        doorbells: Box<dyn Doorbells>,
    ) -> Result<(), RootError> {
        let place = self.slots.get(usize::from(slot)).filter(|_| slot != 0);
        let mut place = change(place.ok_or(RootError::Taken(slot))?);
        if place.is_some() {
            return Err(RootError::Taken(slot));
        }
        let function = VirtioPci::new(port, memory, messages, doorbells, None);
        *place = Some(Box::new(function));
        Ok(())
    }

    /// What the function in a slot is, for a snapshot; `rest` is what its device said
    /// when it came to rest.
    pub fn save(&self, slot: u8, rest: &Quiesced) -> Option<FunctionState> {
        let place = self.slots.get(usize::from(slot))?;
        Some(look(place).as_ref()?.save(rest))
    }

    /// Undoes [`Self::save`] on a function that was just added and whose device
    /// rests. The state is hostile. Where the device stands in its queues, as
    /// [`Quiesced::queues`] says it.
    pub fn restore(
        &self,
        slot: u8,
        state: &FunctionState,
    ) -> Result<Option<Vec<QueueState>>, StateError> {
        let place = self.slots.get(usize::from(slot));
        match place.map(look).as_deref() {
            Some(Some(function)) => function.restore(state),
            _ => Err(StateError::Register("slot")),
        }
    }

    /// Takes what is in a slot off the bus. No access to it is under way
    /// afterwards, and none will come; its device runs on.
    pub fn remove(&self, slot: u8) -> Option<Box<VirtioPci>> {
        change(self.slots.get(usize::from(slot))?).take()
    }

    /// The first free slot, held.
    fn free(&self) -> Result<(u8, RwLockWriteGuard<'_, Content>), RootError> {
        (0u8..)
            .zip(&self.slots)
            .skip(1)
            .map(|(slot, place)| (slot, change(place)))
            .find(|(_, place)| place.is_none())
            .ok_or(RootError::Full)
    }

    /// What is at a physical address; all ones where nothing is.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((slot, at)) = self.configuration(address) {
            match slot {
                0 => self.bridge.read(at, data),
                _ => self.function(slot, |function| function.read_config(at, data)),
            }
            return;
        }
        self.decoder(address, |function, at| function.read_bar(at, data));
    }

    /// Writes to a physical address.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.configuration(address) {
            Some((slot, at)) => self.function(slot, |function| function.write_config(at, data)),
            None => self.decoder(address, |function, at| function.write_bar(at, data)),
        }
    }

    /// What is in a slot, if anything is.
    fn function(&self, slot: usize, access: impl FnOnce(&VirtioPci)) {
        if let Some(slot) = self.slots.get(slot)
            && let Some(function) = &*look(slot)
        {
            access(function);
        }
    }

    /// What decodes an address, if anything does, and the offset in its BAR.
    fn decoder(&self, address: u64, access: impl FnOnce(&VirtioPci, usize)) {
        for slot in &self.slots {
            if let Some(function) = &*look(slot)
                && let Some(at) = function.decodes(address)
            {
                return access(function, at);
            }
        }
    }

    /// Slot and offset of an address in the ECAM, if it is of a function 0.
    fn configuration(&self, address: u64) -> Option<(usize, usize)> {
        let offset = address.checked_sub(self.ecam)?;
        if offset >= Self::ecam_size() {
            return None;
        }
        let slot = usize::try_from(offset / SLOT_SIZE).ok()?;
        let at = usize::try_from(offset % SLOT_SIZE).ok()?;
        match at < SIZE {
            true => Some((slot, at)),
            // A function that is not there: no slot has this number.
            false => Some((SLOTS, at)),
        }
    }
}
