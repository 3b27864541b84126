//! The root complex: one bus, whose first function is the host bridge.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
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
    Taken(usize),
    /// The window for BARs is too small.
    #[error("the window for PCI BARs is full")]
    Window,
}

/// The bus. Functions are added before the guest runs.
#[derive(Debug)]
pub struct Root {
    ecam: u64,
    window: Range<u64>,
    bridge: Config,
    slots: [OnceLock<Arc<VirtioPci>>; SLOTS],
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
            slots: [const { OnceLock::new() }; SLOTS],
        }
    }

    /// Bytes of the ECAM.
    pub fn ecam_size() -> u64 {
        1 << 20
    }

    /// Adds a virtio device in the next free slot; which one.
    pub fn add(
        &self,
        port: Port,
        memory: MemoryCell,
        messages: Arc<dyn super::Messages>,
        doorbells: Box<dyn Doorbells>,
    ) -> Result<usize, RootError> {
        let free = self.slots.iter().skip(1).position(|s| s.get().is_none());
        let slot = free.ok_or(RootError::Full)? + 1;
        self.insert(slot, port, memory, messages, doorbells)?;
        Ok(slot)
    }

    /// Adds a virtio device in a slot, 1 to 31, that is free.
    pub fn insert(
        &self,
        slot: usize,
        port: Port,
        memory: MemoryCell,
        messages: Arc<dyn super::Messages>,
        doorbells: Box<dyn Doorbells>,
    ) -> Result<(), RootError> {
        let place = self.slots.get(slot).filter(|_| slot != 0);
        let place = place.filter(|place| place.get().is_none());
        let place = place.ok_or(RootError::Taken(slot))?;
        let bar = self.window.start.next_multiple_of(BAR_SIZE) + slot as u64 * BAR_SIZE;
        if bar + BAR_SIZE > self.window.end {
            return Err(RootError::Window);
        }
        let function = VirtioPci::new(port, memory, messages, doorbells, bar);
        // It was empty a moment ago, and nobody else adds.
        let _ = place.set(Arc::new(function));
        Ok(())
    }

    /// What the function in a slot is, for a snapshot; `rest` is what its device said
    /// when it came to rest.
    pub fn save(&self, slot: usize, rest: &Quiesced) -> Option<FunctionState> {
        Some(self.function(slot)?.save(rest))
    }

    /// Undoes [`Self::save`] on a function that was just added and whose device
    /// rests. The state is hostile. Where the device stands in its queues, as
    /// [`Quiesced::queues`] says it.
    pub fn restore(
        &self,
        slot: usize,
        state: &FunctionState,
    ) -> Result<Option<Vec<QueueState>>, StateError> {
        match self.function(slot) {
            Some(function) => function.restore(state),
            None => Err(StateError::Register("slot")),
        }
    }

    /// What is at a physical address; all ones where nothing is.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((slot, at)) = self.configuration(address) {
            match slot {
                0 => self.bridge.read(at, data),
                _ => {
                    if let Some(function) = self.function(slot) {
                        function.read_config(at, data);
                    }
                }
            }
            return;
        }
        for function in self.functions() {
            if let Some(at) = function.decodes(address) {
                return function.read_bar(at, data);
            }
        }
    }

    /// Writes to a physical address.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((slot, at)) = self.configuration(address) {
            if let Some(function) = self.function(slot) {
                function.write_config(at, data);
            }
            return;
        }
        for function in self.functions() {
            if let Some(at) = function.decodes(address) {
                return function.write_bar(at, data);
            }
        }
    }

    fn functions(&self) -> impl Iterator<Item = &VirtioPci> {
        self.slots
            .iter()
            .filter_map(|slot| slot.get().map(Arc::as_ref))
    }

    fn function(&self, slot: usize) -> Option<&VirtioPci> {
        self.slots.get(slot)?.get().map(Arc::as_ref)
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
