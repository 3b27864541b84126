//! A device without a thread: the test calls it, so every step is the test's own.

#![allow(dead_code, reason = "every test program uses its part")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use virtio_queue::Queue;
use walnut_devices::virtio::*;

use super::rig::{Bell, PATIENCE, Vring};

pub(crate) struct Direct<D> {
    pub(crate) device: D,
    pub(crate) memory: MemoryCell,
    pub(crate) bell: Arc<Bell>,
    /// The device has said that its driver broke it.
    pub(crate) broken: bool,
}

impl<D: Device> Direct<D> {
    pub(crate) fn new(device: D, memory: Memory) -> Self {
        Self {
            device,
            memory: MemoryCell::new(memory),
            bell: Arc::default(),
            broken: false,
        }
    }

    pub(crate) fn activate(&mut self, features: u64, rings: &[&Vring]) {
        let event_idx = features & 1 << 29 != 0;
        let queues = rings
            .iter()
            .zip(self.device.queue_sizes())
            .map(|(ring, max)| ring.queue(*max, event_idx))
            .collect();
        self.activate_with(features, queues);
    }

    pub(crate) fn activate_with(&mut self, features: u64, queues: Vec<Queue>) {
        self.broken = false;
        let activation = Activation {
            memory: self.memory.clone(),
            features,
            queues,
            interrupt: self.bell.clone(),
        };
        self.device.activate(activation).unwrap();
    }

    /// Gives the device one event, as the worker does.
    pub(crate) fn event(&mut self, event: Event) {
        let returning =
            matches!(event, Event::Watched(_) | Event::Deadline) && self.device.in_flight();
        if (!self.broken || returning) && self.device.event(event).is_err() {
            self.broken = true;
        }
    }

    /// Whether the device wants to be called at once.
    pub(crate) fn due(&self) -> bool {
        self.device
            .deadline()
            .is_some_and(|at| at <= Instant::now())
    }

    /// Lets what is in flight come back.
    pub(crate) fn drain(&mut self) {
        let start = Instant::now();
        while self.device.in_flight() {
            assert!(start.elapsed() < PATIENCE, "never came back");
            self.event(Event::Watched(0));
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// Kicks a queue, and goes on until nothing is left to be done.
    pub(crate) fn kick(&mut self, queue: usize) {
        self.event(Event::Queue(queue));
        loop {
            self.drain();
            if self.broken || !self.due() {
                return;
            }
            self.event(Event::Deadline);
        }
    }
}
