//! The real `walnut-vsock`, jail included, against a vhost-user front end.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use support::{PATIENCE, Rng, driver::*, guest::*, pull, push};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserConfigFlags, VhostUserProtocolFeatures},
    },
};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Where the machine has guest memory, as its own addresses go.
const USER: u64 = 0x7000_0000_0000;
const BINARY: &str = env!("CARGO_BIN_EXE_walnut-vsock");

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A machine: the process, the front end and the guest behind it.
struct Machine {
    child: Option<Child>,
    frontend: Frontend,
    guest: Guest,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    dir: tempfile::TempDir,
}

impl Machine {
    fn start(prepare: impl FnOnce(&mut Command, &Path)) -> Machine {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(BINARY);
        command
            .arg("--vhost-socket")
            .arg(dir.path().join("vhost"))
            .arg("--uds")
            .arg(dir.path().join("v"))
            .stderr(Stdio::piped());
        prepare(&mut command, dir.path());
        let child = command.spawn().unwrap();
        let socket = dir.path().join("vhost");
        wait_for("the sockets", || {
            socket.exists() && dir.path().join("v").exists()
        });
        let mut frontend = None;
        wait_for("a listener", || {
            frontend = Frontend::connect(&socket, 3).ok();
            frontend.is_some()
        });
        Machine::connect(Some(child), frontend.unwrap(), dir)
    }

    fn connect(child: Option<Child>, frontend: Frontend, dir: tempfile::TempDir) -> Machine {
        let name = c"guest";
        let memory: OwnedFd =
            nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::empty()).unwrap();
        let file = File::from(memory);
        file.set_len(MEMORY as u64).unwrap();
        let region = (
            GuestAddress(0),
            MEMORY,
            Some(FileOffset::new(file.try_clone().unwrap(), 0)),
        );
        let mem = GuestMemoryMmap::from_ranges_with_files([region]).unwrap();
        let mut machine = Machine {
            child,
            frontend,
            guest: Guest::new(Driver::new(mem)),
            kicks: Vec::new(),
            calls: Vec::new(),
            dir,
        };
        machine.negotiate(&file);
        machine.start_rings();
        machine
    }

    fn negotiate(&mut self, memory: &File) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        assert_eq!(features, 1 << 32 | 1 << 29 | 1 << 30);
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG));
        frontend
            .set_protocol_features(
                VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ,
            )
            .unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), 3);
        let flags = VhostUserConfigFlags::WRITABLE;
        let (_, config) = frontend.get_config(0, 8, flags, &[0; 8]).unwrap();
        assert_eq!(config, GUEST_CID.to_le_bytes());
        frontend.set_features(features).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: memory.as_raw_fd(),
        };
        frontend.set_mem_table(&[region]).unwrap();
    }

    fn start_rings(&mut self) {
        self.kicks.clear();
        self.calls.clear();
        for index in 0..2 {
            let ring = if index == 0 {
                &self.guest.driver.rx
            } else {
                &self.guest.driver.tx
            };
            let data = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: USER + ring.desc,
                used_ring_addr: USER + ring.used,
                avail_ring_addr: USER + ring.avail,
                log_addr: None,
            };
            let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            let call = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            self.frontend.set_vring_num(index, QUEUE_SIZE).unwrap();
            self.frontend.set_vring_addr(index, &data).unwrap();
            self.frontend.set_vring_kick(index, &kick).unwrap();
            self.frontend.set_vring_call(index, &call).unwrap();
            self.frontend.set_vring_enable(index, true).unwrap();
            self.kicks.push(kick);
            self.calls.push(call);
        }
        // Answered in order: the rings run when this returns.
        self.frontend.get_features().unwrap();
    }

    fn turn(&mut self) {
        self.guest.turn();
        for kick in &self.kicks {
            kick.write(1).unwrap();
        }
        thread::sleep(Duration::from_micros(100));
    }

    fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Machine) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            assert!(start.elapsed() < PATIENCE, "never: {what}");
            self.turn();
        }
    }

    fn dial(&mut self, port: u32) -> (UnixStream, Key) {
        self.guest.listening.insert(port);
        let mut client = UnixStream::connect(self.dir.path().join("v")).unwrap();
        client.set_nonblocking(true).unwrap();
        client
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        let mut line = Vec::new();
        self.until("OK", |_| {
            pull(&mut client, &mut line);
            line.ends_with(b"\n")
        });
        let text = String::from_utf8(line).unwrap();
        let host = text.trim_end().strip_prefix("OK ").unwrap();
        (client, (port, host.parse().unwrap()))
    }

    /// Half a megabyte there and back.
    fn echo(&mut self) {
        self.guest.echo = true;
        let (mut client, _) = self.dial(1024);
        let data = Rng(11).bytes(512 << 10);
        let (mut left, mut got) = (&data[..], Vec::new());
        self.until("echo", |_| {
            assert!(push(&mut client, &mut left));
            pull(&mut client, &mut got);
            got.len() == data.len()
        });
        assert!(got == data);
    }

    /// The machine goes away; what the process had to say at its end.
    fn end(self) -> (Output, tempfile::TempDir) {
        let Machine {
            child,
            frontend,
            dir,
            ..
        } = self;
        drop(frontend);
        (child.unwrap().wait_with_output().unwrap(), dir)
    }
}

fn quiet(output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {said}", output.status);
    assert_eq!(said, "");
}

fn status(machine: &Machine, key: &str) -> String {
    let pid = machine.child.as_ref().unwrap().id();
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().to_owned()
}

#[test]
fn serves_a_machine_and_leaves_nothing() {
    let mut machine = Machine::start(|_, _| ());
    machine.echo();
    for call in &machine.calls {
        assert!(call.read().is_ok(), "the driver was interrupted");
    }
    // A call of the guest's.
    let path = machine.dir.path().join("v_1024");
    let listener = UnixListener::bind(path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let key = machine.guest.connect(1024);
    machine.until("the guest's call", |m| m.guest.socket(key).established);
    let refused = machine.guest.connect(4242);
    machine.until("a refusal", |m| m.guest.socket(refused).reset);
    assert_eq!(status(&machine, "Seccomp:"), "2");
    assert_eq!(status(&machine, "NoNewPrivs:"), "1");
    assert_eq!(status(&machine, "CapEff:"), "0000000000000000");
    assert_eq!(status(&machine, "Threads:"), "1");
    let (output, dir) = machine.end();
    quiet(&output);
    let left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["v_1024"], "only what the test made");
}

#[test]
fn pause_keeps_connections_and_restart_ends_them() {
    let mut machine = Machine::start(|_, _| ());
    let (mut client, key) = machine.dial(5);
    let bases = [0, 1].map(|index| machine.frontend.get_vring_base(index).unwrap());
    client.write_all(b"while paused").unwrap();
    for (index, base) in bases.into_iter().enumerate() {
        let base = u16::try_from(base).unwrap();
        machine.frontend.set_vring_base(index, base).unwrap();
    }
    machine.start_rings();
    machine.until("the data", |m| m.guest.socket(key).inbox == b"while paused");
    // The same device, a new driver.
    for index in 0..2 {
        machine.frontend.get_vring_base(index).unwrap();
        machine.frontend.set_vring_base(index, 0).unwrap();
    }
    let mem = machine.guest.driver.mem.clone();
    vm_memory::Bytes::write_slice(&mem, &vec![0; MEMORY], GuestAddress(0)).unwrap();
    machine.guest = Guest::new(Driver::new(mem));
    machine.start_rings();
    machine.until("close", |_| pull(&mut client, &mut Vec::new()));
    machine.echo();
    quiet(&machine.end().0);
}

#[test]
fn a_guest_whose_memory_was_restored_goes_on() {
    let mut saved = Machine::start(|_, _| ());
    saved.echo();
    for index in 0..2 {
        saved.frontend.get_vring_base(index).unwrap();
    }
    let mut memory = vec![0; MEMORY];
    let mem = saved.guest.driver.mem.clone();
    vm_memory::Bytes::read_slice(&mem, &mut memory, GuestAddress(0)).unwrap();

    // Another process, for which QEMU's device starts all rings at 0.
    let mut clone = Machine::start(|_, _| ());
    for index in 0..2 {
        clone.frontend.get_vring_base(index).unwrap();
        clone.frontend.set_vring_base(index, 0).unwrap();
    }
    let mem = clone.guest.driver.mem.clone();
    vm_memory::Bytes::write_slice(&mem, &memory, GuestAddress(0)).unwrap();
    clone.guest = saved.guest;
    clone.guest.driver.mem = mem;
    clone.start_rings();
    clone.echo();
    quiet(&clone.end().0);
}

#[test]
fn works_without_privileges() {
    // As another user, if we may choose; else as whoever we are.
    let machine = Machine::start(|command, dir| {
        if nix::unistd::geteuid().is_root() {
            let binary = dir.join("walnut-vsock");
            std::fs::copy(BINARY, &binary).unwrap();
            std::fs::set_permissions(dir, PermissionsExt::from_mode(0o755)).unwrap();
            let nobody = Some(nix::unistd::Uid::from_raw(65534));
            nix::unistd::chown(dir, nobody, None).unwrap();
            let mut other = Command::new(binary);
            other.args(command.get_args()).stderr(Stdio::piped());
            other.uid(65534).gid(65534);
            *command = other;
        }
    });
    let mut machine = machine;
    machine.echo();
    assert_eq!(status(&machine, "Seccomp:"), "2");
    quiet(&machine.end().0);
}

/// Starts the process with an inherited descriptor.
fn with_descriptor(dir: &Path, fd: &impl AsRawFd) -> Child {
    let number = fd.as_raw_fd();
    let mut command = Command::new(BINARY);
    command
        .args(["--vhost-fd", "3"])
        .arg("--uds")
        .arg(dir.join("v"))
        .stderr(Stdio::piped());
    // SAFETY: both calls are async-signal-safe, and touch only the child's table.
    unsafe {
        command.pre_exec(move || {
            // It may be 3 already, and would then be closed at exec.
            let done = if number == 3 {
                libc::fcntl(3, libc::F_SETFD, 0)
            } else {
                libc::dup2(number, 3)
            };
            if done < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        })
    };
    command.spawn().unwrap()
}

#[test]
fn takes_inherited_sockets() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let child = with_descriptor(dir.path(), &theirs);
    drop(theirs);
    let mut machine = Machine::connect(Some(child), Frontend::from_stream(ours, 3), dir);
    machine.echo();
    quiet(&machine.end().0);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vhost");
    let listener = UnixListener::bind(&path).unwrap();
    let child = with_descriptor(dir.path(), &listener);
    drop(listener);
    let frontend = Frontend::connect(&path, 3).unwrap();
    let mut machine = Machine::connect(Some(child), frontend, dir);
    machine.echo();
    quiet(&machine.end().0);
}

#[test]
fn a_signal_ends_it_in_order() {
    let machine = Machine::start(|_, _| ());
    let pid = nix::unistd::Pid::from_raw(machine.child.as_ref().unwrap().id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let Machine {
        child,
        dir,
        frontend: _frontend,
        ..
    } = machine;
    quiet(&child.unwrap().wait_with_output().unwrap());
    assert!(!dir.path().join("v").exists());
}

#[test]
fn dies_with_the_thread_that_started_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_path_buf();
    let mut child = thread::spawn(move || {
        let child = Command::new(BINARY)
            .arg("--vhost-socket")
            .arg(path.join("vhost"))
            .arg("--uds")
            .arg(path.join("v"))
            .arg(format!("--die-with-parent={}", std::process::id()))
            .spawn()
            .unwrap();
        wait_for("the socket", || path.join("v").exists());
        child
    })
    .join()
    .unwrap();
    wait_for("its death", || child.try_wait().unwrap().is_some());
}

#[test]
fn failures_are_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let v = dir.path().join("v");
    let there = dir.path().join("there");
    File::create(&there).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let vhost = text(&dir.path().join("vhost"));
    let nowhere = text(&dir.path().join("nowhere/v"));
    let cases: [(&[&str], &str); 6] = [
        (&["--vhost-fd", "99", "--uds", &text(&v)], "descriptor 99"),
        (
            &["--vhost-socket", &vhost, "--uds", &text(&there)],
            "cannot listen",
        ),
        (&["--vhost-socket", &vhost], "--uds is missing"),
        (
            &["--vhost-socket", &vhost, "--uds", &nowhere],
            "cannot enter",
        ),
        (
            &["--vhost-socket", &vhost, "--uds", &text(&v), "--cid", "2"],
            "CID 2",
        ),
        (
            &[
                "--vhost-socket",
                &vhost,
                "--uds",
                &text(&v),
                "--die-with-parent=1",
            ],
            "parent",
        ),
    ];
    for (args, expected) in cases {
        let _ = std::fs::remove_file(&vhost);
        let output = Command::new(BINARY).args(args).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.starts_with("walnut-vsock: "), "{said}");
        assert!(said.contains(expected), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn nobody_is_served_before_the_machine_comes() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(BINARY)
        .arg("--vhost-socket")
        .arg(dir.path().join("vhost"))
        .arg("--uds")
        .arg(dir.path().join("v"))
        .spawn()
        .unwrap();
    wait_for("the socket", || dir.path().join("v").exists());
    let mut client = None;
    wait_for("a listener", || {
        client = UnixStream::connect(dir.path().join("v")).ok();
        client.is_some()
    });
    let mut client = client.unwrap();
    client.write_all(b"CONNECT 1024\n").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = Vec::new();
    match client.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset),
    }
    assert_eq!(answer, b"");
    child.kill().unwrap();
    child.wait().unwrap();
}
