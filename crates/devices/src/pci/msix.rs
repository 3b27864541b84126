//! Message-signalled interrupts (PCI 3.0 §6.8.2): the capability's two bits, the
//! table, the pending bits.

use std::{fmt::Debug, sync::Arc};

use serde::{Deserialize, Serialize};

/// The capability's ID.
pub(super) const CAPABILITY: u8 = 0x11;
/// Of the message control register, in its high byte.
const ENABLE: u8 = 1 << 7;
const FUNCTION_MASK: u8 = 1 << 6;
/// Bytes of a table entry.
pub(super) const ENTRY: usize = 16;
/// Of an entry's vector control.
const MASKED: u8 = 1;

/// Where a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// The address written to.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// Who delivers messages, by vector.
pub trait Messages: Send + Sync + Debug {
    /// What vector `vector` sends from now on; `None` while it must not.
    fn route(&self, vector: usize, message: Option<Message>);
    /// Sends it. Called from any thread.
    fn send(&self, vector: usize);
}

/// The table and the pending bits, for a snapshot. Whether messages are enabled
/// stands in the configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    table: Vec<[u8; ENTRY]>,
    pending: Vec<bool>,
}

impl State {
    pub(super) fn vectors(&self) -> usize {
        match self.table.len() == self.pending.len() {
            true => self.table.len(),
            false => usize::MAX,
        }
    }
}

/// A function's messages.
#[derive(Debug)]
pub(super) struct Msix {
    table: Vec<[u8; ENTRY]>,
    pending: Vec<bool>,
    enabled: bool,
    masked: bool,
    sink: Arc<dyn Messages>,
}

impl Msix {
    pub(super) fn new(vectors: usize, sink: Arc<dyn Messages>) -> Self {
        // Masked, as at reset.
        let mut entry = [0; ENTRY];
        entry[12] = MASKED;
        Self {
            table: vec![entry; vectors],
            pending: vec![false; vectors],
            enabled: false,
            masked: false,
            sink,
        }
    }

    pub(super) fn vectors(&self) -> usize {
        self.table.len()
    }

    pub(super) fn save(&self) -> State {
        State {
            table: self.table.clone(),
            pending: self.pending.clone(),
        }
    }

    /// Undoes [`Self::save`] while messages are not enabled; false if the state has
    /// another number of vectors.
    pub(super) fn restore(&mut self, state: &State) -> bool {
        if state.table.len() != self.table.len() || state.pending.len() != self.pending.len() {
            return false;
        }
        self.table.clone_from(&state.table);
        self.pending.clone_from(&state.pending);
        true
    }

    /// The capability after ID and link, for a table and pending bits in BAR 0.
    pub(super) fn capability(&self, table: u32, pending: u32) -> Vec<u8> {
        let size = u16::try_from(self.table.len().saturating_sub(1)).unwrap_or(0);
        let mut body = size.to_le_bytes().to_vec();
        body.extend(table.to_le_bytes());
        body.extend(pending.to_le_bytes());
        body
    }

    /// The message control register's high byte has been written.
    pub(super) fn control(&mut self, high: u8) {
        let (enabled, masked) = (high & ENABLE != 0, high & FUNCTION_MASK != 0);
        if (enabled, masked) == (self.enabled, self.masked) {
            return;
        }
        (self.enabled, self.masked) = (enabled, masked);
        for vector in 0..self.table.len() {
            self.update(vector);
        }
    }

    pub(super) fn read_table(&self, at: usize, data: &mut [u8]) {
        for (n, byte) in data.iter_mut().enumerate() {
            let at = at.saturating_add(n);
            let entry = self.table.get(at / ENTRY);
            *byte = entry.and_then(|e| e.get(at % ENTRY)).copied().unwrap_or(0);
        }
    }

    pub(super) fn write_table(&mut self, at: usize, data: &[u8]) {
        let mut changed = Vec::with_capacity(2);
        for (n, new) in data.iter().enumerate() {
            let at = at.saturating_add(n);
            let (vector, offset) = (at / ENTRY, at % ENTRY);
            if let Some(byte) = self.table.get_mut(vector).and_then(|e| e.get_mut(offset))
                && *byte != *new
            {
                *byte = *new;
                if changed.last() != Some(&vector) {
                    changed.push(vector);
                }
            }
        }
        for vector in changed {
            self.update(vector);
        }
    }

    pub(super) fn read_pending(&self, at: usize, data: &mut [u8]) {
        for (n, byte) in data.iter_mut().enumerate() {
            let first = at.saturating_add(n).saturating_mul(8);
            *byte = 0;
            for bit in 0..8 {
                if self.pending.get(first.saturating_add(bit)) == Some(&true) {
                    *byte |= 1 << bit;
                }
            }
        }
    }

    /// Sends vector `vector`, or remembers it while it is masked.
    pub(super) fn raise(&mut self, vector: usize) {
        if !self.enabled {
            return;
        }
        if self.message(vector).is_some() {
            self.sink.send(vector);
        } else if let Some(pending) = self.pending.get_mut(vector) {
            *pending = true;
        }
    }

    /// What a vector may send now.
    fn message(&self, vector: usize) -> Option<Message> {
        let entry = self.table.get(vector)?;
        if !self.enabled || self.masked || entry[12] & MASKED != 0 {
            return None;
        }
        let word = |at: usize| {
            let mut bytes = [0; 4];
            for (to, from) in bytes.iter_mut().zip(entry.iter().skip(at)) {
                *to = *from;
            }
            u32::from_le_bytes(bytes)
        };
        Some(Message {
            address: u64::from(word(4)) << 32 | u64::from(word(0)),
            data: word(8),
        })
    }

    fn update(&mut self, vector: usize) {
        let message = self.message(vector);
        self.sink.route(vector, message);
        if message.is_some()
            && let Some(pending) = self.pending.get_mut(vector)
            && std::mem::take(pending)
        {
            self.sink.send(vector);
        }
    }
}
