//! The file system device with the real virtiofsd behind it, started as the
//! product starts it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/rig.rs"]
mod rig;

use std::{
    fs,
    os::{
        fd::AsRawFd,
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    process::{Child, Command, Stdio},
    sync::Arc,
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use rig::{LIMIT, Rig, Vring, shared_memory};
use tempfile::TempDir;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
};
use walnut_devices::{
    Log, fs as virtiofs,
    vhost::{Frontend, Limits},
    virtio::{Device, Memory},
};

const PLACES: [&str; 2] = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"];

const INIT: u32 = 26;
const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const CREATE: u32 = 35;
const ROOT: u64 = 1;

struct Server {
    child: Child,
    dir: TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// virtiofsd with a directory to share, and a connection to it.
fn virtiofsd() -> (Server, UnixStream) {
    let program = PLACES.iter().find(|path| fs::exists(path).unwrap());
    let program = program.expect("virtiofsd must be installed");
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let path = dir.path().join("sock");
    let listener = UnixListener::bind(&path).unwrap();
    let fd = listener.as_raw_fd();
    let source = shared.to_str().unwrap();
    let mut command = Command::new(program);
    if program.contains("qemu") {
        command.args(["-f", &format!("--fd={fd}"), "-o"]);
        command.arg(format!("source={source},sandbox=namespace,log_level=err"));
    } else {
        command.args([format!("--fd={fd}"), format!("--shared-dir={source}")]);
        command.args(["--sandbox=namespace", "--log-level=error"]);
    }
    let child = command.stdin(Stdio::null());
    // SAFETY: one system call on a descriptor that the closure's owner keeps open.
    unsafe {
        child.pre_exec(move || {
            let fd = std::os::fd::BorrowedFd::borrow_raw(fd);
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            Ok(())
        });
    }
    let child = child.spawn().unwrap();
    let sock = UnixStream::connect(&path).unwrap();
    (Server { child, dir }, sock)
}

fn connect(sock: UnixStream) -> Frontend {
    virtiofs::connect(
        sock.into(),
        "volumes",
        1,
        Limits::default(),
        Log::new(|m| eprintln!("{m}")),
    )
    .unwrap()
}

/// A FUSE client on the request queue.
struct Fuse {
    rig: Rig,
    high: Vring,
    requests: Vring,
    base: u64,
    /// Where buffers are.
    buffers: u64,
    unique: u64,
}

impl Fuse {
    /// `base`: where guest memory for rings and buffers begins.
    fn new(device: Frontend, memory: Memory, base: u64) -> Fuse {
        Fuse {
            high: Vring::new(&memory, base, 64),
            requests: Vring::new(&memory, base + 0x4000, 64),
            rig: Rig::new(device, memory),
            base,
            buffers: base + 0x10000,
            unique: 0,
        }
    }

    fn boot(&mut self) {
        let features = self.rig.port.features();
        self.rig
            .activate(features, &[Some(&self.high), Some(&self.requests)]);
        let flags: [u32; 4] = [7, 31, 0, 0];
        let body = flags.map(u32::to_le_bytes).concat();
        let reply = self.call(INIT, 0, &body).unwrap();
        assert_eq!(reply[..4], 7u32.to_le_bytes());
    }

    /// A request and its answer, as the driver sends it. Errors are errno's.
    fn call(&mut self, op: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.unique += 2;
        let request = self.buffers;
        let answer = self.buffers + 0x10000;
        let mut message = Vec::new();
        message.extend(u32::try_from(40 + body.len()).unwrap().to_le_bytes());
        message.extend(op.to_le_bytes());
        message.extend(self.unique.to_le_bytes());
        message.extend(node.to_le_bytes());
        message.extend([0; 16]);
        message.extend(body);
        let mem = self.rig.memory.memory().into_inner();
        mem.write_slice(&message, GuestAddress(request)).unwrap();
        let len = u32::try_from(message.len()).unwrap();
        // As Linux does: header and arguments in buffers of their own.
        let head = self.requests.add(&[
            (request, 40, false),
            (request + 40, len - 40, false),
            (answer, 16, true),
            (answer + 16, 0x10000, true),
        ]);
        self.rig.kick(1);
        let mut used = None;
        let requests = &mut self.requests;
        self.rig.until("an answer", || {
            used = requests.pop_used();
            used.is_some()
        });
        let (got, _) = used.unwrap();
        assert_eq!(got, head);
        let mut header = [0; 16];
        mem.read_slice(&mut header, GuestAddress(answer)).unwrap();
        assert_eq!(header[8..], self.unique.to_le_bytes());
        let error = i32::from_le_bytes(header[4..8].try_into().unwrap());
        if error != 0 {
            return Err(error);
        }
        let len = u32::from_le_bytes(header[..4].try_into().unwrap());
        let mut reply = vec![0; usize::try_from(len).unwrap() - 16];
        mem.read_slice(&mut reply, GuestAddress(answer + 16))
            .unwrap();
        Ok(reply)
    }

    fn lookup(&mut self, name: &str) -> Result<u64, i32> {
        let reply = self.call(LOOKUP, ROOT, format!("{name}\0").as_bytes())?;
        Ok(u64::from_le_bytes(reply[..8].try_into().unwrap()))
    }

    fn read(&mut self, name: &str) -> Result<Vec<u8>, i32> {
        let node = self.lookup(name)?;
        let reply = self.call(OPEN, node, &[0; 8])?;
        let mut body = reply[..8].to_vec();
        body.extend(0u64.to_le_bytes());
        body.extend(4096u32.to_le_bytes());
        body.extend([0; 20]);
        self.call(READ, node, &body)
    }

    fn create(&mut self, name: &str, data: &[u8]) -> Result<(), i32> {
        let words = [0o2u32, 0o644, 0, 0].map(u32::to_le_bytes).concat();
        let body = [&words, name.as_bytes(), &[0]].concat();
        let reply = self.call(CREATE, ROOT, &body)?;
        let node = u64::from_le_bytes(reply[..8].try_into().unwrap());
        let mut body = reply[128..136].to_vec();
        body.extend(0u64.to_le_bytes());
        body.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        body.extend([0; 20]);
        body.extend(data);
        self.call(WRITE, node, &body).map(drop)
    }
}

#[test]
fn files_are_read_and_written_over_pauses_and_resets() {
    let (server, sock) = virtiofsd();
    let shared = server.dir.path().join("shared");
    fs::write(shared.join("greeting"), "hello, guest").unwrap();
    let device = connect(sock);
    let config = device.config().bytes();
    assert_eq!((&config[..8], config.len()), (&b"volumes\0"[..], 40));
    assert_eq!(config[36..], 1u32.to_le_bytes());
    let mut fuse = Fuse::new(device, shared_memory(1 << 20, None), 0x1000);
    fuse.boot();
    assert_eq!(fuse.read("greeting").unwrap(), b"hello, guest");
    assert_eq!(fuse.read("absent"), Err(-libc::ENOENT));
    fuse.create("answer", b"hello, host").unwrap();
    assert_eq!(fs::read(shared.join("answer")).unwrap(), b"hello, host");

    for round in 0..3 {
        let state = fuse.rig.port.pause(LIMIT).unwrap();
        let queue = &state.queues.unwrap()[1];
        assert_eq!(queue.next_avail, fuse.requests.avail_idx);
        assert_eq!(queue.next_used, fuse.requests.used_idx);
        fs::write(shared.join("round"), [round; 9]).unwrap();
        fuse.rig.port.resume();
        assert_eq!(fuse.read("round").unwrap(), [round; 9]);
    }
    assert!(fuse.rig.bell.told().queues[1] > 0);

    // A new driver.
    fuse.rig.reset();
    let memory = fuse.requests.mem.clone();
    fuse.high = Vring::new(&memory, fuse.base, 64);
    fuse.requests = Vring::new(&memory, fuse.base + 0x4000, 64);
    fuse.boot();
    assert_eq!(fuse.read("greeting").unwrap(), b"hello, guest");
    assert!(!fuse.rig.bell.told().broken);
}

#[test]
fn memory_in_two_regions_is_shared_right() {
    let (server, sock) = virtiofsd();
    fs::write(server.dir.path().join("shared/x"), "far away").unwrap();
    let memory = shared_memory(2 << 20, Some(1 << 20));
    let mut fuse = Fuse::new(connect(sock), memory, 1 << 32);
    fuse.boot();
    assert_eq!(fuse.read("x").unwrap(), b"far away");
}

/// The files are the same, whatever is added or taken away.
#[test]
fn memory_that_comes_and_goes_is_where_virtiofsd_looks() {
    let (server, sock) = virtiofsd();
    fs::write(server.dir.path().join("shared/x"), "where I am told").unwrap();
    let large = shared_memory(2 << 20, Some(1 << 20));
    let first = large.iter().next().unwrap();
    let first = GuestRegionMmap::with_arc(first.get_mmap(), first.start_addr()).unwrap();
    let small = Memory::from_arc_regions(vec![Arc::new(first)]).unwrap();
    let mut fuse = Fuse::new(connect(sock), small.clone(), 0x1000);
    let now_it_is = |fuse: &Fuse, memory: &Memory| {
        let cell = fuse.rig.memory.lock().unwrap();
        cell.replace(memory.clone());
        fuse.rig.port.remap(LIMIT)
    };
    assert!(fuse.rig.port.maps_memory());
    // Nobody has it yet.
    assert!(now_it_is(&fuse, &small));
    fuse.boot();
    for _ in 0..3 {
        assert!(now_it_is(&fuse, &large));
        fuse.buffers = 1 << 32;
        assert_eq!(fuse.read("x").unwrap(), b"where I am told");
        // What is at rest looks when it goes on.
        fuse.rig.port.pause(LIMIT).unwrap();
        assert!(now_it_is(&fuse, &small));
        fuse.rig.port.resume();
        fuse.buffers = fuse.base + 0x10000;
        assert_eq!(fuse.read("x").unwrap(), b"where I am told");
    }
    assert!(!fuse.rig.bell.told().broken);
    // Who has ended is not waited for.
    assert!(now_it_is(&fuse, &large));
    drop(server);
    fuse.rig.until("broken", || fuse.rig.bell.told().broken);
    assert!(now_it_is(&fuse, &small));
    fuse.rig.port.stop();
    fuse.rig.until("ended", || fuse.rig.port.ended());
    assert!(now_it_is(&fuse, &large));
}

/// Each request is served once, whenever the device is taken out of service.
#[test]
fn requests_are_served_while_memory_comes_and_goes() {
    let (server, sock) = virtiofsd();
    let shared = server.dir.path().join("shared");
    let mut fuse = Fuse::new(connect(sock), shared_memory(1 << 20, None), 0x1000);
    fuse.boot();
    let port = fuse.rig.port.clone();
    std::thread::scope(|scope| {
        let remaps = scope.spawn(move || (0..1000).all(|_| port.remap(LIMIT)));
        let mut n = 0u32;
        while !remaps.is_finished() {
            fs::write(shared.join("n"), n.to_string()).unwrap();
            assert_eq!(fuse.read("n").unwrap(), n.to_string().as_bytes());
            n += 1;
        }
        assert!(remaps.join().unwrap());
        assert!(n > 0);
    });
    assert!(!fuse.rig.bell.told().broken);
}

#[test]
fn the_death_of_virtiofsd_breaks_the_device_alone() {
    let (server, sock) = virtiofsd();
    let memory = shared_memory(1 << 20, None);
    let mut fuse = Fuse::new(connect(sock), memory.clone(), 0x1000);
    fuse.boot();
    drop(server);
    let rig = &fuse.rig;
    rig.until("broken", || rig.bell.told().broken);
    // The driver may try again, to no avail.
    rig.reset();
    let ring = Vring::new(&memory, 0x1000, 64);
    rig.activate(rig.port.features(), &[Some(&ring), Some(&ring)]);
    rig.until("broken again", || rig.bell.told().broken);
    assert!(rig.port.pause(LIMIT).is_some());
}
