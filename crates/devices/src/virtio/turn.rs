//! A turn at a queue whose chains are each done at once.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use super::{Broken, Memory};

/// A descriptor chain.
pub(crate) type Chain<'m> = DescriptorChain<&'m Memory>;

/// What became of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handled {
    /// It is done; so many bytes were written to it.
    Used(u32),
    /// It stays in the queue.
    Later,
    /// It has been taken, and will be used another time.
    Kept,
}

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// Nothing is left; a kick will tell of more.
    Nothing,
    /// The turn was over before the queue was empty.
    More,
    /// A chain was put off.
    Later,
}

/// Handles at most `most` chains of a queue. Says what is left, and whether any
/// was used, so that the driver may want to know.
pub(crate) fn turn(
    queue: &mut Queue,
    memory: &Memory,
    most: usize,
    mut handle: impl FnMut(Chain<'_>) -> Handled,
) -> Result<(Left, bool), Broken> {
    let mut used = false;
    let mut announced = false;
    queue.disable_notification(memory)?;
    for _ in 0..most {
        let Some(chain) = queue.iter(memory)?.next() else {
            // It said that there is more, and there is not.
            if announced {
                return Err(Broken);
            }
            if !queue.enable_notification(memory)? {
                return Ok((Left::Nothing, used));
            }
            announced = true;
            continue;
        };
        announced = false;
        let head = chain.head_index();
        match handle(chain) {
            Handled::Used(len) => {
                queue.add_used(memory, head, len)?;
                used = true;
            }
            Handled::Later => {
                queue.go_to_previous_position();
                return Ok((Left::Later, used));
            }
            Handled::Kept => {}
        }
    }
    Ok((Left::More, used))
}
