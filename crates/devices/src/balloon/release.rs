//! Giving memory back to the host.

use std::fmt::Debug;

use vm_memory::{Address, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

use crate::virtio::MemoryCell;

/// Gives guest memory back to the host. Called from the balloon's thread.
pub trait Release: Send + Debug {
    /// Gives `len` bytes at `at` back: whole pages of [`super::PAGE`] bytes, all of
    /// them in guest memory as it was a moment ago. The guest has no use for what is
    /// in them, and may use them again at any time. What cannot be given back stays.
    fn release(&self, at: GuestAddress, len: u64);
}

/// Gives back what guest memory is mapped with, by madvise: shared memory is taken
/// out of its file, private memory is let go of.
#[derive(Debug)]
pub struct Advise {
    memory: MemoryCell,
}

impl Advise {
    /// For this guest memory.
    pub fn new(memory: MemoryCell) -> Self {
        Self { memory }
    }
}

impl Release for Advise {
    fn release(&self, at: GuestAddress, len: u64) {
        let memory = self.memory.memory();
        let (Some(_), Ok(len)) = (at.checked_add(len), usize::try_from(len)) else {
            return;
        };
        // The regions as they are now: what has gone meanwhile is left out.
        for slice in GuestMemoryBackend::get_slices(&*memory, at, len) {
            let Ok(slice) = slice else {
                return;
            };
            let host = slice.ptr_guard_mut().as_ptr();
            let shared = memory.iter().any(|region| {
                let start = region.as_ptr().addr();
                let len = usize::try_from(region.len()).unwrap_or(0);
                let inside = host.addr().checked_sub(start).is_some_and(|at| at < len);
                inside && region.flags() & libc::MAP_SHARED != 0
            });
            let advice = if shared {
                libc::MADV_REMOVE
            } else {
                libc::MADV_DONTNEED
            };
            // SAFETY: the slice is guest memory, mapped as long as `memory` lives;
            // nobody holds a reference into it, and its contents are the guest's to
            // give away. A failure leaves it as it is.
            let _ = unsafe { libc::madvise(host.cast(), slice.len(), advice) };
        }
    }
}
