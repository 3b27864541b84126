//! The control queue (virtio 1.3 §5.1.6.5): how many queue pairs the driver uses.

use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET};
use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes};

use super::ring::Vring;
use crate::virtio::{Broken, Memory};

/// Commands served before others have their turn.
const BUDGET: usize = 16;
/// Longest command known: class, command, number of pairs.
const COMMAND: usize = 4;
/// Most descriptors of a command.
const MAX_DESCRIPTORS: usize = 64;
const OK: u8 = 0;
const ERR: u8 = 1;

/// What a command asks for.
fn parse(command: &[u8], pairs: u16) -> Option<u16> {
    let &[class, what, low, high] = command else {
        return None;
    };
    let set = u32::from(class) == VIRTIO_NET_CTRL_MQ
        && u32::from(what) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    let wanted = u16::from_le_bytes([low, high]);
    (set && (1..=pairs).contains(&wanted)).then_some(wanted)
}

/// Serves commands; true if some are left. `active` is the number of pairs in use,
/// `pairs` the most there are.
pub(super) fn run(
    ring: &mut Vring,
    mem: &Memory,
    pairs: u16,
    active: &mut u16,
) -> Result<bool, Broken> {
    use virtio_queue::QueueT;
    for _ in 0..BUDGET {
        let Some(chain) = ring.next(mem)? else {
            if ring.queue.enable_notification(mem)? {
                continue;
            }
            return Ok(false);
        };
        let head = chain.head_index();
        let written = serve(chain, mem, pairs, active);
        ring.publish(mem, std::iter::once((head, written)))?;
    }
    Ok(true)
}

/// Does a command, and says how many bytes of an answer were written.
fn serve(chain: DescriptorChain<&Memory>, mem: &Memory, pairs: u16, active: &mut u16) -> u32 {
    // One byte more than the longest, to know that one is longer.
    let mut command = [0; COMMAND + 1];
    let mut have = 0;
    for (n, desc) in chain.enumerate() {
        if n == MAX_DESCRIPTORS {
            return 0;
        }
        if !desc.is_write_only() {
            let len = usize::try_from(desc.len()).unwrap_or(usize::MAX);
            let into = &mut command[have..];
            let part = into.len().min(len);
            if mem.read_slice(&mut into[..part], desc.addr()).is_err() {
                return 0;
            }
            have += part;
            continue;
        }
        // The answer goes to the first byte behind the command.
        if desc.len() == 0 || desc.addr().checked_add(1).is_none() {
            return 0;
        }
        let wanted = parse(&command[..have], pairs);
        let answer = if wanted.is_some() { OK } else { ERR };
        if mem.write_obj(answer, desc.addr()).is_err() {
            return 0;
        }
        if let Some(wanted) = wanted {
            *active = wanted;
        }
        return 1;
    }
    0
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn only_a_possible_number_of_pairs_is_taken() {
        for class in 0..=255 {
            for what in 0..4 {
                for pairs in [0, 1, 3, 4, 5, 256, 65535] {
                    let [low, high] = u16::to_le_bytes(pairs);
                    let right = class == 4 && what == 0 && (1..=4).contains(&pairs);
                    let expected = right.then_some(pairs);
                    assert_eq!(parse(&[class, what, low, high], 4), expected);
                }
            }
        }
        assert_eq!(parse(&[4, 0, 1], 4), None);
        assert_eq!(parse(&[4, 0, 1, 0, 0], 4), None);
        assert_eq!(parse(&[], 4), None);
    }
}
