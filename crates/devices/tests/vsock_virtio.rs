//! The socket device on a worker's thread: no wake-up is lost, a pause keeps the
//! connections, a reset ends them, a restored guest is told.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/rig.rs"]
mod rig;
mod support;

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
};

use rig::{LIMIT, Rig, Vring};
use support::{config, driver::*, guest::Guest, memory, pull, set_up};
use tempfile::TempDir;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use walnut_devices::{
    Log,
    virtio::Device as _,
    vsock::{self, Device, EVENT_QUEUE, FEATURES, RX_QUEUE, SocketDir, TX_QUEUE, Virtio},
};

/// Where the event queue and its buffer are, behind the driver's own.
const EVENTS: u64 = MEMORY as u64 - 0x8000;
const EVENT: u64 = MEMORY as u64 - 0x1000;

struct Bed {
    rig: Rig,
    guest: Guest,
    events: Vring,
    dir: TempDir,
}

fn device(dir: &TempDir) -> Virtio {
    let sockets = SocketDir::open(dir.path()).unwrap();
    Virtio::new(Device::new(config(), sockets, Log::new(|_| {})).unwrap())
}

impl Bed {
    fn new() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let device = device(&dir);
        let bed = Bed::idle(device, dir);
        bed.boot();
        bed
    }

    fn idle(device: Virtio, dir: TempDir) -> Bed {
        let memory = memory();
        let mut guest = Guest::new(Driver::new(memory.clone()));
        guest.echo = true;
        guest.listening.insert(9);
        Bed {
            events: Vring::new(&memory, EVENTS, 8),
            rig: Rig::new(device, memory),
            guest,
            dir,
        }
    }

    fn boot(&self) {
        let mut rx = Queue::new(vsock::QUEUE_SIZE).unwrap();
        let mut tx = Queue::new(vsock::QUEUE_SIZE).unwrap();
        set_up(&mut rx, &self.guest.driver.rx);
        set_up(&mut tx, &self.guest.driver.tx);
        rx.set_ready(true);
        tx.set_ready(true);
        let events = self.events.queue(vsock::QUEUE_SIZE, true);
        self.rig.activate_with(FEATURES, vec![rx, tx, events]);
    }

    /// A driver that has begun anew.
    fn reboot(&mut self) {
        self.rig.reset();
        let memory = self.guest.driver.mem.clone();
        memory
            .write_slice(&vec![0; MEMORY], GuestAddress(0))
            .unwrap();
        self.events = Vring::new(&memory, EVENTS, 8);
        self.guest = Guest::new(Driver::new(memory));
        self.guest.echo = true;
        self.guest.listening.insert(9);
        self.boot();
    }

    /// Lets the guest work until the condition holds.
    fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Guest) -> bool) {
        let (rig, guest) = (&self.rig, &mut self.guest);
        rig.until(what, || {
            guest.turn();
            rig.kick(RX_QUEUE);
            rig.kick(TX_QUEUE);
            condition(guest)
        });
    }

    fn client(&self) -> UnixStream {
        let mut stream = UnixStream::connect(self.dir.path().join("v")).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream.write_all(b"CONNECT 9\n").unwrap();
        stream
    }

    fn dial(&mut self) -> UnixStream {
        let mut client = self.client();
        let mut line = Vec::new();
        self.until("OK", |_| {
            pull(&mut client, &mut line);
            line.ends_with(b"\n")
        });
        client
    }

    fn echoes(&mut self, client: &mut UnixStream, words: &[u8]) {
        client.write_all(words).unwrap();
        let mut got = Vec::new();
        self.until("echo", |_| {
            pull(client, &mut got);
            got == words
        });
    }
}

/// More sockets become ready together than one look at them tells, while no kick
/// comes: each must be served by the events alone.
#[test]
fn no_event_of_many_sockets_is_lost() {
    let mut bed = Bed::new();
    let mut clients: Vec<_> = (0..300).map(|_| (bed.client(), Vec::new())).collect();
    bed.until("every OK", |_| {
        clients.iter_mut().fold(true, |all, (client, line)| {
            pull(client, line);
            all & line.ends_with(b"\n")
        })
    });
    for round in 0u8..3 {
        for (client, got) in &mut clients {
            got.clear();
            client.write_all(&[round; 100]).unwrap();
        }
        bed.until("every echo", |_| {
            clients.iter_mut().fold(true, |all, (client, got)| {
                pull(client, got);
                all & (*got == [round; 100])
            })
        });
    }
    // The guest never kicks: data of the host's alone must reach it.
    let (client, _) = &mut clients[299];
    client.write_all(b"quiet").unwrap();
    let guest = &mut bed.guest;
    bed.rig.until("data without a kick", || {
        guest.turn();
        let mut sockets = guest.sockets.values();
        sockets.any(|socket| socket.inbox.ends_with(b"quiet"))
    });
}

#[test]
fn a_guest_reaches_a_listener_on_the_host() {
    let mut bed = Bed::new();
    let listener = UnixListener::bind(bed.dir.path().join("v_700")).unwrap();
    let key = bed.guest.connect(700);
    bed.until("response", |guest| guest.socket(key).established);
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"from the host").unwrap();
    let mut got = [0; 13];
    bed.until("data", |guest| guest.socket(key).inbox == b"from the host");
    stream.set_nonblocking(true).unwrap();
    bed.until(
        "echo",
        |_| matches!(stream.read(&mut got), Ok(n) if n == got.len()),
    );
}

#[test]
fn a_pause_keeps_connections_and_loses_no_data() {
    let mut bed = Bed::new();
    let mut client = bed.dial();
    bed.echoes(&mut client, b"before");
    for round in 0u8..20 {
        let quiesced = bed.rig.port.pause(LIMIT).unwrap();
        assert_eq!(quiesced.queues.unwrap().len(), 3);
        client.write_all(&[round; 1000]).unwrap();
        // A newcomer waits in the backlog.
        let mut late = bed.client();
        bed.rig.port.resume();
        let (mut got, mut line) = (Vec::new(), Vec::new());
        bed.until("both", |_| {
            pull(&mut client, &mut got);
            pull(&mut late, &mut line);
            got == [round; 1000] && line.ends_with(b"\n")
        });
    }
}

#[test]
fn a_reset_ends_connections() {
    let mut bed = Bed::new();
    let mut client = bed.dial();
    bed.reboot();
    let mut rest = Vec::new();
    bed.until("the end", |_| pull(&mut client, &mut rest));
    let mut client = bed.dial();
    bed.echoes(&mut client, b"again");
}

#[test]
fn a_restored_guest_is_told_once_it_can_listen() {
    let mut bed = Bed::new();
    let _client = bed.dial();
    let quiesced = bed.rig.port.pause(LIMIT).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let mut clone = device(&dir);
    for bad in [&[] as &[u8], &[0], &[2, 0, 0, 0, 0], &[1], &[1; 6]] {
        assert!(clone.restore(bad).is_err(), "{bad:?}");
    }
    clone.restore(&quiesced.state).unwrap();
    let mut bed = Bed::idle(clone, dir);
    bed.boot();
    // It works before the driver has left a buffer for the event.
    let mut client = bed.dial();
    let guest_port = bed.guest.on_port(9).unwrap();
    assert!(guest_port.1 > 1 << 30, "the host's port was used before");
    bed.echoes(&mut client, b"well");
    assert_eq!(bed.events.pop_used(), None);
    bed.guest
        .driver
        .mem
        .write_obj(77u32, GuestAddress(EVENT))
        .unwrap();
    let head = bed.events.add(&[(EVENT, 4, true)]);
    bed.rig.kick(EVENT_QUEUE);
    let events = &mut bed.events;
    bed.rig
        .until("the event", || events.pop_used() == Some((head, 4)));
    let event: u32 = bed.guest.driver.mem.read_obj(GuestAddress(EVENT)).unwrap();
    assert_eq!(event, 0);
    assert!(bed.rig.bell.told().queues[EVENT_QUEUE] > 0);
}

#[test]
fn a_broken_ring_rests_until_the_reset() {
    let mut bed = Bed::new();
    let mem = bed.guest.driver.mem.clone();
    for queue in [RX_QUEUE, TX_QUEUE] {
        let ring = match queue {
            RX_QUEUE => &bed.guest.driver.rx,
            _ => &bed.guest.driver.tx,
        };
        // More entries than there are.
        mem.write_obj(0x7777u16, GuestAddress(ring.avail + 2))
            .unwrap();
        let _client = bed.client();
        bed.rig.kick(queue);
        bed.rig.until("needs reset", || bed.rig.bell.told().broken);
        bed.reboot();
        assert!(!bed.rig.bell.told().broken);
        let mut client = bed.dial();
        bed.echoes(&mut client, b"better");
    }
}

/// Reset, pause, resume and activation in every order, with traffic.
#[test]
fn any_order_of_requests() {
    let mut bed = Bed::new();
    let mut rng = rig::Rng(0x5eed_0003);
    let mut clients = Vec::new();
    for _ in 0..300 {
        match rng.below(6) {
            0 => bed.reboot(),
            1 => drop(bed.rig.port.pause(LIMIT).unwrap()),
            2 => bed.rig.port.resume(),
            3 => bed.boot(),
            4 => bed.rig.port.config_written(),
            _ => clients.push(bed.client()),
        }
        bed.guest.turn();
        bed.rig.kick(usize::try_from(rng.below(3)).unwrap());
        clients.truncate(30);
    }
    bed.rig.port.resume();
    bed.reboot();
    drop(clients);
    let mut client = bed.dial();
    bed.echoes(&mut client, b"still here");
}
