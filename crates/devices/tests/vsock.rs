//! The device against a guest made by hand and real Unix sockets.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::{
    io::Write,
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    time::{Duration, Instant},
};

use support::{Bed, PATIENCE, Rng, config, driver::*, pull, push};
use walnut_devices::vsock::{RX_QUEUE, TX_QUEUE, Timeouts};

fn brief() -> Timeouts {
    Timeouts {
        handshake: Duration::from_millis(50),
        request: Duration::from_millis(50),
        connect: Duration::from_millis(50),
        close: Duration::from_millis(50),
    }
}

#[test]
fn connect_line_may_come_byte_by_byte() {
    let mut bed = Bed::new();
    bed.guest.listening.insert(1024);
    let mut client = bed.client();
    for byte in b"CoNnEcT 1024\n" {
        assert!(bed.guest.sockets.is_empty());
        client.write_all(&[*byte]).unwrap();
        bed.settle();
    }
    let mut answer = Vec::new();
    bed.until("OK", |_| {
        pull(&mut client, &mut answer);
        answer.ends_with(b"\n")
    });
    let key = bed.guest.on_port(1024).unwrap();
    assert_eq!(answer, format!("OK {}\n", key.1).as_bytes());
    assert_eq!(key.1 >> 30, 1, "bit 30 set, bit 31 clear");
}

#[test]
fn data_behind_the_line_reaches_the_guest() {
    let mut bed = Bed::new();
    bed.guest.listening.insert(7);
    let mut client = bed.client();
    client.write_all(b"CONNECT 7\nhello, guest").unwrap();
    bed.until("the data", |bed| {
        bed.guest
            .on_port(7)
            .is_some_and(|key| bed.guest.socket(key).inbox == b"hello, guest")
    });
    let mut answer = Vec::new();
    pull(&mut client, &mut answer);
    assert!(answer.starts_with(b"OK "), "the answer comes first");
}

#[test]
fn data_behind_the_line_survives_an_early_end() {
    let mut bed = Bed::new();
    bed.guest.listening.insert(7);
    let mut client = bed.client();
    client.write_all(b"CONNECT 7\nbye").unwrap();
    drop(client);
    bed.until("the data and the end", |bed| {
        bed.guest.on_port(7).is_some_and(|key| {
            let socket = bed.guest.socket(key);
            socket.inbox == b"bye" && socket.peer_shut == 3
        })
    });
}

#[test]
fn refusals_close_without_an_answer() {
    let mut bed = Bed::new();
    for line in [
        &b"CONNECT 99\n"[..],
        b"HELLO 99\n",
        &[b'x'; 40],
        b"CONNECT 4294967296\n",
    ] {
        let mut client = bed.client();
        client.write_all(line).unwrap();
        let mut answer = Vec::new();
        bed.until("close", |_| pull(&mut client, &mut answer));
        assert_eq!(answer, b"");
    }
    assert_eq!(bed.device.connections(), 0);
}

#[test]
fn nobody_connects_before_the_guest_is_up() {
    let mut bed = Bed::idle(config());
    let mut client = bed.client();
    client.write_all(b"CONNECT 1024\n").unwrap();
    bed.until("close", |_| pull(&mut client, &mut Vec::new()));
    bed.boot();
    bed.dial(1024);
}

#[test]
fn silent_peers_are_dropped() {
    let mut bed = Bed::with(support_config());
    let mut client = bed.client();
    client.write_all(b"CONNECT 10").unwrap();
    bed.until("close", |_| pull(&mut client, &mut Vec::new()));
    // A guest that never answers.
    bed.guest.driver.refill = false;
    let mut client = bed.client();
    client.write_all(b"CONNECT 10\n").unwrap();
    let mut events = Vec::new();
    let mut ended = false;
    while !ended {
        bed.device.wait(&mut events).unwrap();
        bed.device.run();
        ended = pull(&mut client, &mut Vec::new());
    }
    assert_eq!(bed.device.connections(), 0);
}

fn support_config() -> walnut_devices::vsock::Config {
    walnut_devices::vsock::Config {
        timeouts: brief(),
        ..config()
    }
}

#[test]
fn guest_reaches_listeners_and_is_reset_elsewhere() {
    let mut bed = Bed::new();
    let nobody = bed.guest.connect(77);
    bed.until("reset", |bed| bed.guest.socket(nobody).reset);
    let listener = bed.listener(1024);
    let (mut stream, key) = bed.call(&listener, 1024);
    bed.guest.socket(key).outbox.extend(b"walnut-agent 1\n");
    bed.guest.socket(key).shut = 3;
    let mut got = Vec::new();
    bed.until("line and end", |_| pull(&mut stream, &mut got));
    assert_eq!(got, b"walnut-agent 1\n");
    bed.until("goodbye", |bed| bed.guest.socket(key).reset);
    assert_eq!(bed.device.connections(), 0);
    // A socket file whose listener has gone.
    drop(listener);
    let refused = bed.guest.connect(1024);
    bed.until("reset", |bed| bed.guest.socket(refused).reset);
}

/// A listener with a backlog of one, and the connections that fill it.
fn full(bed: &Bed, port: u32) -> (UnixListener, Vec<UnixStream>) {
    use nix::sys::socket::{Backlog, listen};
    let listener = bed.listener(port);
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let path = bed.dir.path().join(format!("v_{port}"));
    let fill = vec![UnixStream::connect(path).unwrap()];
    (listener, fill)
}

#[test]
fn full_backlog_stalls_nobody_else() {
    let mut bed = Bed::new();
    let (busy, _fill) = full(&bed, 500);
    let waiting = bed.guest.connect(500);
    bed.settle();
    assert!(!bed.guest.socket(waiting).established);
    // Others work meanwhile.
    bed.guest.echo = true;
    let (mut client, _) = bed.dial(9);
    client.write_all(b"still alive").unwrap();
    let mut got = Vec::new();
    bed.until("echo", |_| {
        pull(&mut client, &mut got);
        got == b"still alive"
    });
    assert!(!bed.guest.socket(waiting).established);
    assert!(!bed.guest.socket(waiting).reset);
    // Room appears, and the guest gets through.
    busy.accept().unwrap();
    bed.until("established", |bed| bed.guest.socket(waiting).established);
    busy.accept().unwrap();
}

#[test]
fn full_backlog_ends_in_a_reset() {
    let mut bed = Bed::with(support_config());
    let (_busy, _fill) = full(&bed, 500);
    let waiting = bed.guest.connect(500);
    bed.until("reset", |bed| bed.guest.socket(waiting).reset);
    assert_eq!(bed.device.connections(), 0);
}

#[test]
fn dead_host_ends_the_guests_socket() {
    let mut bed = Bed::new();
    let (client, key) = bed.dial(5);
    drop(client);
    bed.until("end", |bed| bed.guest.socket(key).peer_shut == 3);
    // A guest that still writes is told off, not answered with data loss later.
    bed.guest.socket(key).shut = 3;
    bed.until("goodbye", |bed| bed.guest.socket(key).reset);
    assert_eq!(bed.device.connections(), 0);
}

#[test]
fn dead_guest_program_ends_the_hosts_socket() {
    let mut bed = Bed::new();
    let (mut client, key) = bed.dial(5);
    bed.guest.post(key, RST);
    bed.until("end", |_| pull(&mut client, &mut Vec::new()));
    assert_eq!(bed.device.connections(), 0);
}

#[test]
fn last_bytes_to_the_guest_arrive() {
    let mut bed = Bed::new();
    let (mut client, key) = bed.dial(5);
    let data = Rng(1).bytes(1 << 20);
    let mut left = &data[..];
    bed.until("written", |_| {
        assert!(push(&mut client, &mut left));
        left.is_empty()
    });
    drop(client);
    bed.until("end", |bed| bed.guest.socket(key).peer_shut & 2 != 0);
    assert!(bed.guest.socket(key).inbox == data);
}

#[test]
fn last_bytes_to_the_host_arrive() {
    let mut bed = Bed::new();
    let (mut client, key) = bed.dial(5);
    let data = Rng(2).bytes(1 << 20);
    // Everything and the end, long before the host reads.
    bed.guest.socket(key).outbox.extend(&data);
    bed.guest.socket(key).shut = 3;
    bed.settle();
    let mut got = Vec::new();
    bed.until("all of it", |_| pull(&mut client, &mut got));
    assert!(got == data);
    bed.until("goodbye", |bed| bed.guest.socket(key).reset);
    assert_eq!(bed.device.connections(), 0);
}

#[test]
fn what_the_guest_sent_before_it_vanished_arrives() {
    let mut bed = Bed::new();
    let (mut client, key) = bed.dial(5);
    // More than the socket takes, so that some of it is the device's to keep.
    let data = Rng(3).bytes(400 << 10);
    bed.guest.socket(key).outbox.extend(&data);
    bed.until("sent", |bed| bed.guest.socket(key).outbox.is_empty());
    bed.guest.post(key, RST);
    bed.settle();
    bed.reboot();
    let mut got = Vec::new();
    bed.until("all of it", |_| pull(&mut client, &mut got));
    assert!(got == data);
    assert_eq!(bed.device.connections(), 0);
}

#[test]
fn a_thousand_connections_at_once() {
    let mut bed = Bed::new();
    bed.guest.echo = true;
    bed.guest.listening.insert(1024);
    let mut rng = Rng(4);
    let mut clients: Vec<_> = (0..1000)
        .map(|i| {
            let mut client = bed.client();
            client.write_all(b"CONNECT 1024\n").unwrap();
            if i % 100 == 0 {
                bed.turn();
            }
            (client, rng.bytes(3000 + i * 20), 0, Vec::new())
        })
        .collect();
    bed.until("every answer", |bed| bed.guest.sockets.len() == 1000);
    assert_eq!(bed.device.connections(), 1000);
    bed.until("every echo", |_| {
        let mut done = true;
        for (client, data, written, got) in &mut clients {
            let mut left = &data[*written..];
            assert!(push(client, &mut left));
            *written = data.len() - left.len();
            pull(client, got);
            let text = got.iter().position(|&b| b == b'\n').map_or(0, |n| n + 1);
            done &= got.len() - text == data.len();
        }
        done
    });
    for (_, data, _, got) in &clients {
        let text = got.iter().position(|&b| b == b'\n').unwrap() + 1;
        assert!(got[text..] == data[..]);
    }
    drop(clients);
    bed.until("every end", |bed| {
        bed.device.connections() == 0 || {
            let keys: Vec<_> = bed.guest.sockets.keys().copied().collect();
            for key in keys {
                if bed.guest.socket(key).peer_shut == 3 {
                    bed.guest.socket(key).shut = 3;
                }
            }
            false
        }
    });
}

#[test]
fn the_limit_refuses_and_recovers() {
    let mut limited = config();
    limited.max_connections = 3;
    let mut bed = Bed::with(limited);
    let listener = bed.listener(8);
    let (a, key) = bed.dial(5);
    let (_b, _) = bed.dial(5);
    let (_c, _) = bed.call(&listener, 8);
    let mut client = bed.client();
    bed.until("close", |_| pull(&mut client, &mut Vec::new()));
    let refused = bed.guest.connect(8);
    bed.until("reset", |bed| bed.guest.socket(refused).reset);
    drop(a);
    bed.guest.socket(key).shut = 3;
    bed.until("room", |bed| bed.device.connections() == 2);
    bed.dial(5);
}

#[test]
fn guests_credit_is_respected_and_asked_for() {
    let mut bed = Bed::new();
    let (mut client, key) = bed.dial(5);
    {
        let socket = bed.guest.socket(key);
        socket.buf_alloc = 1000;
        socket.greedy = false;
    }
    bed.guest.post(key, CREDIT_UPDATE);
    bed.settle();
    let data = Rng(5).bytes(5500);
    client.write_all(&data).unwrap();
    bed.until("a full buffer", |bed| {
        bed.guest.socket(key).inbox.len() == 1000
    });
    bed.until("a question", |bed| {
        bed.guest.socket(key).credit_requests == 1
    });
    bed.settle();
    // Asked once, and silent until something changes.
    assert_eq!(bed.guest.socket(key).credit_requests, 1);
    assert_eq!(bed.guest.socket(key).inbox.len(), 1000);
    assert!(bed.idle_wakeups() <= 2);
    while bed.guest.socket(key).inbox.len() < data.len() {
        let before = bed.guest.socket(key).inbox.len();
        bed.guest.read_all(key);
        bed.until("more", |bed| bed.guest.socket(key).inbox.len() > before);
    }
    assert!(bed.guest.socket(key).inbox == data);
}

#[test]
fn stuck_host_reader_stops_the_guest_alone() {
    let mut bed = Bed::new();
    let (mut stuck, key) = bed.dial(5);
    let data = Rng(6).bytes(2 << 20);
    bed.guest.socket(key).outbox.extend(&data);
    bed.settle();
    bed.settle();
    let left = bed.guest.socket(key).outbox.len();
    assert!(left > 1 << 20, "the device holds a bounded amount");
    assert!(bed.idle_wakeups() <= 2, "and does not spin");
    assert_eq!(bed.guest.socket(key).outbox.len(), left);
    let (mut other, other_key) = bed.dial(6);
    bed.guest.socket(other_key).outbox.extend(b"free");
    let mut got = Vec::new();
    bed.until("the other", |_| {
        pull(&mut other, &mut got);
        got == b"free"
    });
    let mut got = Vec::new();
    bed.until("recovery", |_| {
        pull(&mut stuck, &mut got);
        got.len() == data.len()
    });
    assert!(got == data);
}

#[test]
fn a_guest_that_overdraws_its_credit_is_reset() {
    let mut bed = Bed::new();
    let (mut client, key) = bed.dial(5);
    let data = vec![0; 60 << 10];
    for _ in 0..20 {
        let packet = Packet::new(key.0, key.1, RW);
        bed.guest.driver.send(packet, &data);
        bed.turn();
    }
    assert!(bed.guest.socket(key).reset);
    let mut got = Vec::new();
    bed.until("close", |_| pull(&mut client, &mut got));
    assert_eq!(bed.device.connections(), 0);
}

#[test]
fn host_half_close_leaves_the_other_half() {
    let mut bed = Bed::new();
    let (mut client, key) = bed.dial(5);
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    bed.until("end of input", |bed| bed.guest.socket(key).peer_shut == 2);
    assert_eq!(bed.guest.socket(key).inbox, b"question");
    assert!(bed.idle_wakeups() <= 2);
    bed.guest.socket(key).outbox.extend(&Rng(7).bytes(300_000));
    bed.guest.socket(key).shut = 2;
    let mut got = Vec::new();
    bed.until("answer and end", |_| pull(&mut client, &mut got));
    assert!(got == Rng(7).bytes(300_000));
    bed.until("both told", |bed| bed.guest.socket(key).peer_shut == 3);
}

#[test]
fn guest_half_close_leaves_the_other_half() {
    let mut bed = Bed::new();
    let (mut client, key) = bed.dial(5);
    bed.guest.socket(key).outbox.extend(b"question");
    bed.guest.socket(key).shut = 2;
    let mut got = Vec::new();
    bed.until("question and end", |_| pull(&mut client, &mut got));
    assert_eq!(got, b"question");
    assert!(bed.idle_wakeups() <= 2);
    let data = Rng(8).bytes(300_000);
    let mut left = &data[..];
    bed.until("answer", |bed| {
        assert!(push(&mut client, &mut left));
        bed.guest.socket(key).inbox.len() == data.len()
    });
    assert!(bed.guest.socket(key).inbox == data);
    client.shutdown(Shutdown::Write).unwrap();
    bed.until("end", |bed| bed.guest.socket(key).peer_shut == 3);
}

#[test]
fn guest_that_stops_reading_stops_the_host() {
    let mut bed = Bed::new();
    let (mut client, key) = bed.dial(5);
    bed.guest.socket(key).shut = 1;
    bed.until("broken pipe", |_| client.write(b"x").is_err());
    // Its own direction is untouched.
    bed.guest.socket(key).outbox.extend(b"result");
    let mut got = Vec::new();
    bed.until("result", |_| {
        pull(&mut client, &mut got);
        got == b"result"
    });
}

#[test]
fn a_guest_that_never_says_goodbye_is_forgotten() {
    let mut bed = Bed::with(support_config());
    let (mut client, key) = bed.dial(5);
    bed.guest.socket(key).greedy = false;
    client.write_all(b"unread").unwrap();
    drop(client);
    // Not while it has something to read…
    bed.until("probes", |bed| bed.guest.socket(key).credit_requests >= 2);
    assert!(!bed.guest.socket(key).reset);
    assert_eq!(bed.device.connections(), 1);
    // …but then.
    bed.guest.socket(key).greedy = true;
    bed.until("reset", |bed| bed.guest.socket(key).reset);
    assert_eq!(bed.device.connections(), 0);
}

#[test]
fn pause_keeps_connections_and_reboot_ends_them() {
    let mut bed = Bed::new();
    let (mut client, key) = bed.dial(5);
    let state = |bed: &mut Bed, index| {
        use virtio_queue::QueueT;
        let queue = bed.device.queue_mut(index).unwrap();
        (queue.next_avail(), queue.next_used())
    };
    bed.device.stop(RX_QUEUE);
    bed.device.stop(TX_QUEUE);
    let before = (state(&mut bed, RX_QUEUE), state(&mut bed, TX_QUEUE));
    client.write_all(b"while paused").unwrap();
    bed.settle();
    assert_eq!(bed.guest.socket(key).inbox, b"");
    bed.device.start(RX_QUEUE);
    bed.device.start(TX_QUEUE);
    assert_eq!(
        before,
        (state(&mut bed, RX_QUEUE), state(&mut bed, TX_QUEUE))
    );
    bed.until("data", |bed| bed.guest.socket(key).inbox == b"while paused");
    bed.reboot();
    bed.until("close", |_| pull(&mut client, &mut Vec::new()));
    assert_eq!(bed.device.connections(), 0);
    bed.dial(5);
}

#[test]
fn a_guest_without_buffers_stalls_and_recovers() {
    let mut bed = Bed::new();
    let (mut client, key) = bed.dial(5);
    bed.guest.driver.refill = false;
    let data = Rng(9).bytes(2 << 20);
    let mut left = &data[..];
    for _ in 0..50 {
        push(&mut client, &mut left);
        bed.turn();
    }
    assert!(bed.guest.socket(key).inbox.len() < 65 * 4096);
    assert!(bed.idle_wakeups() <= 2);
    bed.guest.driver.refill = true;
    for chain in 0..CHAINS {
        bed.guest.driver.give(chain);
    }
    bed.until("the rest", |bed| {
        push(&mut client, &mut left);
        bed.guest.socket(key).inbox.len() == data.len()
    });
    assert!(bed.guest.socket(key).inbox == data);
}

#[test]
fn a_driver_on_another_processor_loses_no_packet() {
    const COUNT: usize = 300_000;
    let mut bed = Bed::new();
    let spare = Driver::new(support::memory());
    let mut driver = std::mem::replace(&mut bed.guest.driver, spare);
    // Packets that ask for no answer, published while the device looks.
    let sender = std::thread::spawn(move || {
        let mut sent = 0;
        let start = Instant::now();
        while sent < COUNT {
            assert!(start.elapsed() < PATIENCE, "the device stopped at {sent}");
            if driver.send(Packet::new(1, 2, RST), &[]) {
                sent += 1;
            }
        }
        driver
    });
    while !sender.is_finished() {
        bed.device.run();
    }
    bed.guest.driver = sender.join().unwrap();
    bed.dial(5);
}

#[test]
fn socket_file_is_private_and_removed() {
    use std::os::unix::fs::PermissionsExt;
    let bed = Bed::new();
    let mode = std::fs::metadata(bed.uds()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let Bed { device, dir, .. } = bed;
    drop(device);
    assert!(!dir.path().join("v").exists());
}

/// Class 8 of docs/hostile-guests.md: the directory is a descriptor. Who puts another
/// in its place, or a link, leads nobody there.
#[test]
fn a_directory_replaced_by_a_link_is_not_followed() {
    use walnut_devices::vsock::{Device, Log, SocketDir};
    let base = tempfile::tempdir().unwrap();
    let (place, moved, trap) = (
        base.path().join("place"),
        base.path().join("moved"),
        base.path().join("trap"),
    );
    for dir in [&place, &trap] {
        std::fs::create_dir(dir).unwrap();
    }
    let sockets = SocketDir::open(&place).unwrap();
    std::fs::rename(&place, &moved).unwrap();
    std::os::unix::fs::symlink(&trap, &place).unwrap();
    let device = Device::new(support_config(), sockets, Log::new(|_| {})).unwrap();
    assert_eq!(std::fs::read_dir(&trap).unwrap().count(), 0);
    assert!(moved.join("v").exists());
    drop(device);
    assert!(!moved.join("v").exists());
}
