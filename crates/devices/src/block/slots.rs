//! Room for the requests in flight, reserved before the guest runs.

use super::{
    MAX_PIECES, MAX_TASKS,
    task::{Piece, Task},
};

/// Requests in flight, and room for their pieces.
#[derive(Debug)]
pub(super) struct Slots {
    pub(super) tasks: Vec<Option<Task>>,
    /// Never longer than its first capacity: the kernel knows its addresses.
    pub(super) pieces: Vec<Piece>,
    free: Vec<usize>,
}

impl Slots {
    pub(super) fn new() -> Self {
        Self {
            tasks: (0..MAX_TASKS).map(|_| None).collect(),
            pieces: Vec::with_capacity(MAX_TASKS * MAX_PIECES),
            free: (0..MAX_TASKS).rev().collect(),
        }
    }

    pub(super) fn used(&self) -> usize {
        MAX_TASKS - self.free.len()
    }

    /// The lowest free slots go first, so that memory follows the depth.
    pub(super) fn take(&mut self) -> Option<usize> {
        let slot = self.free.pop()?;
        let end = (slot + 1) * MAX_PIECES;
        if self.pieces.len() < end {
            self.pieces.resize(end, Piece::EMPTY);
        }
        Some(slot)
    }

    pub(super) fn list(&mut self, slot: usize) -> &mut [Piece] {
        let from = slot * MAX_PIECES;
        self.pieces
            .get_mut(from..from + MAX_PIECES)
            .unwrap_or_default()
    }

    pub(super) fn put_back(&mut self, slot: usize) -> Option<Task> {
        let task = self.tasks.get_mut(slot)?.take();
        self.free.push(slot);
        task
    }
}
