//! A virtqueue of the network device.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::tap::IoVec;
use crate::virtio::{Broken, Memory};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (§2.7.6).
const NO_INTERRUPT: u16 = 1;

/// Pieces of guest memory, kept for their allocation only: between runs the list
/// is empty.
#[derive(Debug, Default)]
pub(super) struct Pieces(pub(super) Vec<IoVec>);

// SAFETY: the addresses are used only during a run, by the thread that found them.
unsafe impl Send for Pieces {}

/// A queue in service, or, by default, none.
#[derive(Debug, Default)]
pub(super) struct Vring {
    pub(super) queue: Queue,
    event_idx: bool,
    /// Where the used index was when the driver was last asked whether it wants to
    /// know.
    asked: u16,
    /// The driver is to be interrupted whatever it asked for.
    forced: bool,
}

impl Vring {
    pub(super) fn new(mut queue: Queue, event_idx: bool) -> Self {
        queue.set_event_idx(event_idx);
        Self {
            event_idx,
            asked: queue.next_used(),
            // The driver may wait for an interrupt that was due before a pause.
            forced: queue.ready(),
            queue,
        }
    }

    /// The next available chain.
    pub(super) fn next<'m>(
        &mut self,
        mem: &'m Memory,
    ) -> Result<Option<DescriptorChain<&'m Memory>>, Broken> {
        Ok(self.queue.iter(mem)?.next())
    }

    /// Hands the chains (head, bytes written) to the driver, all at once: it must
    /// not see the first buffer of a frame without the others (§5.1.6.3.2).
    pub(super) fn publish(
        &mut self,
        mem: &Memory,
        chains: impl Iterator<Item = (u16, u32)>,
    ) -> Result<(), Broken> {
        let size = self.queue.size();
        let mut index = self.queue.next_used();
        for (head, len) in chains {
            if head >= size {
                return Err(Broken);
            }
            let at = 4 + 8 * u64::from(index % size);
            let elem = u64::from(len) << 32 | u64::from(head);
            mem.write_obj(elem.to_le(), self.used(at)?)
                .map_err(|_| Broken)?;
            index = index.wrapping_add(1);
        }
        mem.store(index.to_le(), self.used(2)?, Ordering::Release)
            .map_err(|_| Broken)?;
        self.queue.set_next_used(index);
        Ok(())
    }

    fn used(&self, offset: u64) -> Result<GuestAddress, Broken> {
        let at = self.queue.used_ring().checked_add(offset);
        at.map(GuestAddress).ok_or(Broken)
    }

    /// Whether the driver wants to know of what was published since the last time.
    pub(super) fn signal(&mut self, mem: &Memory) -> bool {
        let (old, new) = (self.asked, self.queue.next_used());
        self.asked = new;
        if std::mem::take(&mut self.forced) {
            return true;
        }
        if old == new {
            return false;
        }
        // The used index must be seen before the driver's wish is read (§2.7.7.2).
        fence(Ordering::SeqCst);
        let offset = if self.event_idx {
            4 + 2 * u64::from(self.queue.size())
        } else {
            0
        };
        let at = self.queue.avail_ring().checked_add(offset);
        let word = at.and_then(|at| mem.load::<u16>(GuestAddress(at), Ordering::Relaxed).ok());
        match word.map(u16::from_le) {
            // An interrupt too many does no harm.
            None => true,
            Some(flags) if !self.event_idx => flags & NO_INTERRUPT == 0,
            Some(event) => wants(event, old, new),
        }
    }
}

/// Whether the index went past the event (§2.7.10.1).
fn wants(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::wants;

    #[test]
    fn an_event_is_one_of_the_indices_passed() {
        for old in [0u16, 1, 65530, 65535] {
            for count in 1u16..40 {
                let new = old.wrapping_add(count);
                for event in 0..=u16::MAX {
                    let passed = event.wrapping_sub(old) < count;
                    assert_eq!(wants(event, old, new), passed, "{event} {old} {new}");
                }
            }
        }
    }
}
