//! Devices that another process serves: the back end and the guest are both bad.

use std::{io::Write, sync::Arc, time::Duration};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use walnut_devices::{
    Log, fs,
    vhost::{self, Frontend, Limits, NetConfig},
    virtio::{Activation, Device, Event, MemoryCell},
};

use super::{
    backend::{FAULTS, Fault, Script, start},
    driver::Input,
    rig::{Bell, Vring, shared_memory},
};

fn make(kind: u8, sock: std::os::fd::OwnedFd) -> Option<Frontend> {
    // A back end that is silent is waited for; one that is slow today is as good.
    let limits = Limits {
        connect: Duration::from_millis(20),
        change: Duration::from_millis(20),
    };
    let log = Log::new(|_| {});
    match kind % 3 {
        0 => fs::connect(sock, "tag", 3, limits, log).ok(),
        1 => vhost::block(sock, 2, limits, log).ok(),
        _ => {
            let config = NetConfig {
                mac: [2; 6],
                mtu: None,
            };
            vhost::net(sock, config, limits, log).ok()
        }
    }
}

/// A device, its back end, and what a driver does with it.
pub(crate) fn vhost(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.u8();
    let mut script = Script {
        queues: u64::from(7 - input.u8() % 8),
        base: u32::from(input.u16()),
        ..Script::default()
    };
    match input.u8() {
        0 => script.features = u64::from(input.u32()) << 32 | u64::from(input.u32()),
        n => script.features |= u64::from(n),
    }
    match input.u8() {
        n @ 1..32 => script.protocol = u64::from(n),
        32 => script.queues = u64::MAX,
        _ => {}
    }
    for byte in &mut script.config {
        *byte = input.u8();
    }
    // One that says nothing only costs time: the tests have it.
    let fault = FAULTS[usize::from(input.u8()) % FAULTS.len()];
    let at = usize::from(input.u8());
    if fault != Fault::Silence && (1..64).contains(&at) {
        script.fault = Some((at - 1, fault));
    }
    let (backend, sock) = start(script);
    let Some(mut device) = make(kind, sock) else {
        return;
    };
    let split = (kind & 0x40 != 0).then_some(0x2_0000);
    let memory = shared_memory(0x4_0000, split);
    let queues = device.queue_sizes().len();
    assert!((1..=256).contains(&queues));
    let mut active = false;
    while !input.0.is_empty() {
        match input.u8() % 8 {
            0 | 1 if !active => active = activate(&mut device, &memory, &mut input),
            2 if active => {
                let returned = device.deactivate();
                assert!(returned.len() <= queues);
                active = false;
                if input.u8() % 2 == 0 {
                    device.reset();
                }
            }
            3 => {
                let token = match input.u8() {
                    0 => u32::MAX,
                    n => u32::from(n),
                };
                if active && device.event(Event::Watched(token)).is_err() {
                    device.deactivate();
                    active = false;
                }
            }
            4 if active => {
                let event = match input.u8() % 4 {
                    0 => Event::Config,
                    1 => Event::Deadline,
                    _ => Event::Queue(usize::from(input.u8())),
                };
                let _ = device.event(event);
            }
            5 => {
                let part = usize::from(input.u8() % 40);
                let bytes: Vec<_> = (0..part).map(|_| input.u8()).collect();
                let _ = (&backend.sock).write_all(&bytes);
            }
            6 => {
                let state: Vec<_> = (0..input.u8() % 8).map(|_| input.u8()).collect();
                let _ = device.restore(&state);
            }
            7 => {
                let at = u64::from(input.u16());
                let _ = memory.write_obj(input.u32(), GuestAddress(at));
                let mut seen = [0; 64];
                device.config().read(0, &mut seen);
                device.config().write(0, &seen);
            }
            _ => {}
        }
    }
    if active {
        device.deactivate();
    }
}

/// As the worker does it: a ring that memory does not hold comes no further.
fn activate(
    device: &mut Frontend,
    memory: &walnut_devices::virtio::Memory,
    input: &mut Input<'_>,
) -> bool {
    let mut queues = Vec::new();
    for (n, max) in (0u64..).zip(device.queue_sizes().to_vec()) {
        let ring = Vring::new(memory, 0x1000 + 0x4000 * (n % 4), 64);
        let mut queue = ring.queue(max, true);
        match input.u8() {
            0 => queue.set_size(input.u16()),
            1 => queue.set_desc_table_address(Some(input.u32() & 0x3_fff0), None),
            2 => queue.set_used_ring_address(Some(input.u32() & 0x3_fffc), None),
            3 => queue = Queue::new(max).unwrap(),
            4 => queue.set_next_avail(input.u16()),
            _ => {}
        }
        queues.push(queue);
    }
    if queues.iter().any(|q| q.ready() && !q.is_valid(memory)) {
        return false;
    }
    let activation = Activation {
        memory: MemoryCell::new(memory.clone()),
        features: device.features(),
        queues,
        interrupt: Arc::new(Bell::default()),
    };
    let active = device.activate(activation).is_ok();
    if !active {
        device.deactivate();
    }
    active
}
