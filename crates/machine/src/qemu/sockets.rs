//! The vsock device, taken out of a machine that stands and put back.
//!
//! QEMU neither saves nor loads a machine that has a vhost-user-vsock device: it has
//! no state of it to write. So the device is taken out for the while and made anew
//! after it, and its registers, which only the guest's driver knows how to write, are
//! written again as that driver wrote them (virtio 1.3 §4.2). The guest stands and
//! notices nothing: its rings are in its memory, and `walnut-vsock` goes on where they
//! say. In the machine that was saved connections live on; in a clone, whose
//! `walnut-vsock` has never seen those rings, the driver is told that they are gone.
//!
//! The registers are written through QEMU's test protocol, the only door to a device's
//! registers from outside.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    qmp::{self, Qmp},
    registers::Registers,
};
use crate::Error;

/// The device, as its own name and in QEMU's tree of objects.
pub(super) const ID: &str = "vsock";
const PATH: &str = "/machine/peripheral/vsock";
/// Queues of a vsock device.
const QUEUES: usize = 3;
/// The queue of events, of which no device process knows: vhost leaves it to QEMU.
const EVENTS: usize = 2;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.3 §5.10.6.7), and an event's length.
const TRANSPORT_RESET: u32 = 0;
const EVENT_SIZE: u32 = 4;
/// Of a descriptor: the device writes there (virtio 1.3 §2.7.5).
const WRITE: u16 = 2;

/// Registers of a device (virtio 1.3 §4.2.2).
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;

/// What the guest's driver took: all that `walnut-vsock` offers, by QEMU's names and as
/// bits 0–31 and 32–63.
const FEATURES: [&str; 2] = ["VIRTIO_RING_F_EVENT_IDX", "VIRTIO_F_VERSION_1"];
const FEATURE_BITS: [u32; 2] = [1 << 29, 1];

/// Steps of the status, the last being a driver's at work (virtio 1.3 §3.1.1).
const STEPS: [u32; 4] = [0, 1, 3, 11];
const AT_WORK: u32 = 15;

/// Where the driver has put its queues.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sockets {
    queues: [Queue; QUEUES],
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Queue {
    size: u32,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl Sockets {
    /// Asks a QEMU whose guest stands.
    pub(super) async fn ask(qmp: &Qmp) -> Result<Self, Error> {
        const COMMAND: &str = "x-query-virtio-status";
        let status = qmp.execute_with(COMMAND, json!({ "path": PATH })).await?;
        if !at_work(&status) {
            let reason = "the guest's vsock driver is not at work as it should be; \
                          wait until the guest has booted";
            return Err(qmp::failed(COMMAND, reason));
        }
        let mut queues = [Queue::default(); QUEUES];
        for (index, queue) in queues.iter_mut().enumerate() {
            const COMMAND: &str = "x-query-virtio-queue-status";
            let question = json!({ "path": PATH, "queue": index });
            let answer = qmp.execute_with(COMMAND, question).await?;
            *queue = parse(&answer)
                .ok_or_else(|| qmp::failed(COMMAND, "the answer is not understood"))?;
        }
        Ok(Self { queues })
    }

    /// What to write, in order, to the registers at `base`.
    fn writes(&self, base: u64) -> Vec<(u64, u32)> {
        let mut writes: Vec<(u64, u32)> = STEPS[..3].iter().map(|&s| (STATUS, s)).collect();
        for (half, bits) in (0..).zip(FEATURE_BITS) {
            writes.extend([(DRIVER_FEATURES_SEL, half), (DRIVER_FEATURES, bits)]);
        }
        writes.push((STATUS, STEPS[3]));
        for (index, queue) in (0..).zip(&self.queues) {
            writes.extend([(QUEUE_SEL, index), (QUEUE_SIZE, queue.size)]);
            for (register, address) in [
                (QUEUE_DESC, queue.descriptors),
                (QUEUE_DRIVER, queue.available),
                (QUEUE_DEVICE, queue.used),
            ] {
                let [low, high] = halves(address);
                writes.extend([(register, low), (register + 4, high)]);
            }
            writes.push((QUEUE_READY, 1));
        }
        writes.push((STATUS, AT_WORK));
        for (register, _) in &mut writes {
            *register += base;
        }
        writes
    }

    /// Makes the device anew and gives it to the guest's driver.
    pub(super) async fn put_back(
        &self,
        qmp: &Qmp,
        registers: &mut Registers,
        base: u64,
    ) -> Result<(), Error> {
        realize(qmp, true).await?;
        registers.write(&self.writes(base)).await
    }

    /// Tells a guest that stands that all its connections are gone, as the device
    /// would: by an event in its ring. `walnut-vsock` interrupts it when it runs.
    ///
    /// A ring that makes no sense is the guest's own harm: all that can be written to
    /// is what the guest itself can write to.
    pub(super) async fn tell_reset(&self, registers: &mut Registers) -> Result<(), Error> {
        let queue = &self.queues[EVENTS];
        let Some(mask) = u16::try_from(queue.size)
            .ok()
            .and_then(|it| it.checked_sub(1))
        else {
            return Ok(());
        };
        let after = |address: u64, offset: u64| address.wrapping_add(offset);
        let used = registers.read_u16(after(queue.used, 2)).await?;
        let available = registers.read_u16(after(queue.available, 2)).await?;
        if used == available {
            // No buffer was left, which Linux never does.
            return Ok(());
        }
        let slot = u64::from(used & mask);
        let head = registers
            .read_u16(after(queue.available, 4 + 2 * slot))
            .await?;
        let descriptor = after(queue.descriptors, 16 * u64::from(head & mask));
        let buffer = registers.read_u64(descriptor).await?;
        let length = registers.read_u32(after(descriptor, 8)).await?;
        let flags = registers.read_u16(after(descriptor, 12)).await?;
        if flags & WRITE == 0 || length < EVENT_SIZE {
            return Ok(());
        }
        let element = after(queue.used, 4 + 8 * slot);
        let writes = [
            (buffer, TRANSPORT_RESET),
            (element, u32::from(head)),
            (after(element, 4), EVENT_SIZE),
        ];
        registers.write(&writes).await?;
        registers
            .write_u16(after(queue.used, 2), used.wrapping_add(1))
            .await
    }
}

/// Takes the device out.
pub(super) async fn take_out(qmp: &Qmp) -> Result<(), Error> {
    realize(qmp, false).await
}

async fn realize(qmp: &Qmp, realized: bool) -> Result<(), Error> {
    let change = json!({ "path": PATH, "property": "realized", "value": realized });
    qmp.execute_with("qom-set", change).await.map(drop)
}

fn halves(address: u64) -> [u32; 2] {
    let low = u32::try_from(address & u64::from(u32::MAX)).unwrap_or(0);
    [low, u32::try_from(address >> 32).unwrap_or(0)]
}

/// Whether a driver has taken the device, with the features that it has.
fn at_work(status: &Value) -> bool {
    let words = |pointer: &str| -> Vec<&str> {
        let list = status.pointer(pointer).and_then(Value::as_array);
        let words = list.into_iter().flatten().filter_map(Value::as_str);
        words
            .map(|words| words.split(':').next().unwrap_or_default())
            .collect()
    };
    let mut features = words("/guest-features/transports");
    let mut expected = FEATURES.to_vec();
    features.sort_unstable();
    expected.sort_unstable();
    words("/status/statuses").contains(&"VIRTIO_CONFIG_S_DRIVER_OK")
        && features == expected
        && words("/guest-features/dev-features").is_empty()
        && status
            .pointer("/guest-features/unknown-dev-features")
            .is_none()
}

fn parse(answer: &Value) -> Option<Queue> {
    let number = |name: &str| answer.get(name).and_then(Value::as_u64);
    Some(Queue {
        size: number("vring-num").and_then(|size| u32::try_from(size).ok())?,
        descriptors: number("vring-desc")?,
        available: number("vring-avail")?,
        used: number("vring-used")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_the_monitor_are_understood() {
        let mut status = json!({
            "status": {"statuses": [
                "VIRTIO_CONFIG_S_DRIVER: Guest OS compatible with device",
                "VIRTIO_CONFIG_S_DRIVER_OK: Driver setup and ready",
            ]},
            "guest-features": {"dev-features": [], "transports": [
                "VIRTIO_RING_F_EVENT_IDX: Used & avail. event fields enabled",
                "VIRTIO_F_VERSION_1: Device compliant for v1 spec (legacy)",
            ]},
        });
        assert!(at_work(&status));
        status["guest-features"]["transports"][0] = "VIRTIO_F_RING_PACKED: x".into();
        assert!(!at_work(&status) && !at_work(&json!({})));
        let queue = json!({
            "vring-num": 1024, "vring-desc": 4096, "vring-avail": 1_u64 << 33,
            "vring-used": 8192, "queue-index": 0,
        });
        assert_eq!(parse(&queue).unwrap().available, 1 << 33);
        assert_eq!(parse(&json!({"vring-num": -1})), None);
    }

    #[test]
    fn registers_are_written_as_a_driver_does() {
        let queue = Queue {
            size: 1024,
            descriptors: 0x1_0000_1000,
            available: 0x2000,
            used: 0x3000,
        };
        let sockets = Sockets { queues: [queue; 3] };
        let writes = sockets.writes(0x1000);
        assert_eq!(writes.first(), Some(&(0x1070, 0)));
        assert_eq!(writes.last(), Some(&(0x1070, 15)));
        assert!(writes.contains(&(0x1080, 0x1000)) && writes.contains(&(0x1084, 1)));
    }
}
