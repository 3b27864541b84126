//! The device in process: driven by a [`crate::virtio::Worker`].

use std::{os::fd::BorrowedFd, sync::Arc, time::Instant};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;

use super::{Device, FEATURES, QUEUE_SIZE, QUEUES};
use crate::virtio::{self, Activation, Broken, ConfigSpace, Event, Interrupt, MemoryCell};

/// Version of what [`Virtio`] saves.
const STATE_VERSION: u8 = 1;
/// The virtio ID of the socket device (virtio 1.3 §5.10.1).
const ID: u32 = 19;

/// A socket device that a worker drives.
///
/// A pause keeps the connections, a reset of the driver's ends them. A device that
/// was restored has none: it says so to its guest as soon as it is active
/// (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`).
///
/// While the driver is not up, host programs wait in the listener's backlog.
#[derive(Debug)]
pub struct Virtio {
    device: Device,
    config: Arc<ConfigSpace>,
    active: Option<(MemoryCell, Arc<dyn Interrupt>)>,
    /// Events of the host's sockets were left over. The worker is told of an event
    /// once, so what is not fetched must be fetched without being told.
    unread: bool,
}

impl Virtio {
    /// Hands `device` to a worker.
    pub fn new(device: Device) -> Self {
        let config = Arc::new(ConfigSpace::new(device.config_space(), 0..0));
        Self {
            device,
            config,
            active: None,
            unread: false,
        }
    }

    fn poll(&mut self) -> Result<(), Broken> {
        // epoll_wait on a descriptor of ours fails for no reason of the guest's,
        // and never so far; without it there is no device.
        self.unread = !self.device.poll().map_err(|_| Broken)?;
        Ok(())
    }

    fn run(&mut self) -> Result<(), Broken> {
        let Some((memory, interrupt)) = &self.active else {
            return Ok(());
        };
        let signals = self.device.run_on(&memory.memory());
        for index in 0..QUEUES {
            if signals.contains(index) {
                interrupt.queue(index);
            }
        }
        if self.device.is_broken() {
            Err(Broken)
        } else {
            Ok(())
        }
    }
}

impl virtio::Device for Virtio {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    /// The epoll instance that holds every socket. It reports an event of its own
    /// for each of theirs, so edge-triggered is enough, provided that every event
    /// makes us fetch all of them.
    fn watched(&self) -> Vec<(BorrowedFd<'_>, u32)> {
        vec![(self.device.poll_fd(), 0)]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        let event_idx = activation.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mem = activation.memory.memory();
        let mut valid = activation.queues.len() == QUEUES;
        for (index, mut queue) in activation.queues.into_iter().enumerate() {
            queue.set_event_idx(event_idx);
            valid &= self.device.start_with(index, queue, &mem);
        }
        drop(mem);
        self.active = Some((activation.memory, activation.interrupt));
        if !valid {
            return Err(Broken);
        }
        // Events that came while nobody was interested.
        self.poll()?;
        self.run()
    }

    fn event(&mut self, event: Event) -> Result<(), Broken> {
        if self.unread || !matches!(event, Event::Queue(_)) {
            self.poll()?;
        }
        self.run()
    }

    fn deadline(&self) -> Option<Instant> {
        if self.unread {
            return Some(Instant::now());
        }
        self.device.due()
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        self.active = None;
        (0..QUEUES)
            .map(|index| self.device.take_queue(index))
            .collect()
    }

    fn reset(&mut self) {
        self.device.reset();
    }

    fn save(&self) -> Vec<u8> {
        let mut state = vec![STATE_VERSION];
        state.extend(self.device.next_port().to_le_bytes());
        state
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Broken> {
        let [STATE_VERSION, port @ ..] = state else {
            return Err(Broken);
        };
        let port = port.try_into().map_err(|_| Broken)?;
        self.device.set_next_port(u32::from_le_bytes(port));
        self.device.transport_reset();
        Ok(())
    }
}
