//! A device, a guest made by hand and a directory of sockets.

#![allow(dead_code, reason = "every test program uses its part")]

pub(crate) mod driver;
pub(crate) mod guest;

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    time::{Duration, Instant},
};

use nix::sys::eventfd::EventFd;
use tempfile::TempDir;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use walnut_devices::vsock::*;

use driver::{Driver, MEMORY, QUEUE_SIZE, Ring};
use guest::Guest;

/// How long a test waits for a condition before it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Bed {
    pub(crate) device: Device,
    pub(crate) guest: Guest,
    pub(crate) dir: TempDir,
    // Always readable: the device's wait never blocks a test.
    _awake: EventFd,
}

pub(crate) fn config() -> Config {
    Config {
        cid: driver::GUEST_CID,
        name: "v".into(),
        max_connections: 2048,
        timeouts: Timeouts::default(),
    }
}

pub(crate) fn memory() -> Memory {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

impl Bed {
    pub(crate) fn new() -> Bed {
        Bed::with(config())
    }

    pub(crate) fn with(config: Config) -> Bed {
        let mut bed = Bed::idle(config);
        bed.boot();
        bed
    }

    /// A device whose guest has not come up.
    pub(crate) fn idle(config: Config) -> Bed {
        raise_limit();
        let dir = tempfile::tempdir().unwrap();
        let sockets = SocketDir::open(dir.path()).unwrap();
        let device = Device::new(config, sockets, Log::new(|_| {})).unwrap();
        let awake = EventFd::from_value(1).unwrap();
        device.watch(&awake, 9, false).unwrap();
        Bed {
            device,
            guest: Guest::new(Driver::new(memory())),
            dir,
            _awake: awake,
        }
    }

    /// The guest's driver takes the device into service.
    pub(crate) fn boot(&mut self) {
        self.device.set_memory(self.guest.driver.mem.clone());
        self.start_queue(RX_QUEUE);
        self.start_queue(TX_QUEUE);
    }

    pub(crate) fn start_queue(&mut self, index: usize) {
        let ring = match index {
            RX_QUEUE => &self.guest.driver.rx,
            _ => &self.guest.driver.tx,
        };
        let queue = self.device.queue_mut(index).unwrap();
        set_up(queue, ring);
        self.device.start(index);
    }

    /// The guest is replaced by a new one that knows nothing.
    pub(crate) fn reboot(&mut self) {
        self.device.stop(RX_QUEUE);
        self.device.stop(TX_QUEUE);
        self.device.reset();
        self.guest = Guest::new(Driver::new(memory()));
        self.boot();
    }

    /// The host's sockets, the device and the guest each do what they can.
    pub(crate) fn turn(&mut self) {
        let mut events = Vec::new();
        self.device.wait(&mut events).unwrap();
        self.device.run();
        self.guest.turn();
        self.device.run();
    }

    /// Turns until the condition holds.
    pub(crate) fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Bed) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            assert!(start.elapsed() < PATIENCE, "never: {what}");
            self.turn();
        }
    }

    /// Turns until nothing moves any more: the device would sleep.
    pub(crate) fn settle(&mut self) {
        for _ in 0..8 {
            self.turn();
        }
    }

    pub(crate) fn uds(&self) -> PathBuf {
        self.dir.path().join("v")
    }

    /// A host program that has connected to the device, non-blocking.
    pub(crate) fn client(&self) -> UnixStream {
        let stream = UnixStream::connect(self.uds()).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// A listener on the host for guest connections to `port`.
    pub(crate) fn listener(&self, port: u32) -> UnixListener {
        let path = self.dir.path().join(format!("v_{port}"));
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    /// A connection from the host to a guest port, through the handshake.
    pub(crate) fn dial(&mut self, port: u32) -> (UnixStream, guest::Key) {
        self.guest.listening.insert(port);
        let mut client = self.client();
        client
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        let mut line = Vec::new();
        self.until("OK", |_| {
            pull(&mut client, &mut line);
            line.ends_with(b"\n")
        });
        let text = String::from_utf8(line).unwrap();
        let host: u32 = text
            .strip_prefix("OK ")
            .unwrap()
            .trim_end()
            .parse()
            .unwrap();
        (client, (port, host))
    }

    /// A connection from the guest to the host, accepted.
    pub(crate) fn call(&mut self, listener: &UnixListener, port: u32) -> (UnixStream, guest::Key) {
        let key = self.guest.connect(port);
        let mut stream = None;
        self.until("accept and response", |bed| {
            if let Ok((new, _)) = listener.accept() {
                new.set_nonblocking(true).unwrap();
                stream = Some(new);
            }
            stream.is_some() && bed.guest.socket(key).established
        });
        (stream.unwrap(), key)
    }

    /// How often the device would wake up within 50 ms of nothing happening.
    pub(crate) fn idle_wakeups(&mut self) -> usize {
        use nix::sys::timerfd::*;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK).unwrap();
        self.device.unwatch(&self._awake);
        self.device.watch(&timer, 8, true).unwrap();
        let after = Expiration::OneShot(Duration::from_millis(50).into());
        timer.set(after, TimerSetTimeFlags::empty()).unwrap();
        let (mut events, mut count) = (Vec::new(), 0);
        while !events.contains(&8) {
            self.device.wait(&mut events).unwrap();
            self.device.run();
            count += 1;
        }
        self.device.unwatch(&timer);
        self.device.watch(&self._awake, 9, false).unwrap();
        count
    }
}

pub(crate) fn set_up(queue: &mut virtio_queue::Queue, ring: &Ring) {
    queue.reset();
    queue.set_size(QUEUE_SIZE);
    queue
        .try_set_desc_table_address(GuestAddress(ring.desc))
        .unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(ring.avail))
        .unwrap();
    queue
        .try_set_used_ring_address(GuestAddress(ring.used))
        .unwrap();
    queue.set_event_idx(true);
}

/// Reads what is there; true at the end of the stream or on a reset.
pub(crate) fn pull(stream: &mut UnixStream, into: &mut Vec<u8>) -> bool {
    let mut buf = [0; 65536];
    loop {
        match stream.read(&mut buf) {
            Ok(0) => return true,
            Ok(n) => into.extend(&buf[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return true,
            Err(e) => panic!("read: {e}"),
        }
    }
}

/// Writes what fits and removes it from `data`; false once the peer is gone.
pub(crate) fn push(stream: &mut UnixStream, data: &mut &[u8]) -> bool {
    while !data.is_empty() {
        match stream.write(data) {
            Ok(n) => *data = &data[n..],
            Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
            Err(_) => return false,
        }
    }
    true
}

/// Reproducible noise (xorshift64*).
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::try_from(self.next() >> 32).unwrap()
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::try_from(self.next() >> 48).unwrap()
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend(self.next().to_le_bytes());
        }
        out.truncate(len);
        out
    }
}

/// A thousand connections take three descriptors each in a test.
fn raise_limit() {
    use nix::sys::resource::*;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(8192), hard).unwrap();
}
