//! Machines of the QEMU driver that are saved, and clones of them: with the test init
//! (`guest/init.c`), and with the product's own agent.

#![allow(clippy::unwrap_used, clippy::panic)]

mod guest;

use std::{
    fs,
    os::unix::fs::{FileExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use guest::{initramfs, kernel, own};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use ttrpc::asynchronous::{Client, transport::Socket};
use walnut_machine::{
    Disk, Driver, DriverChoice, Exit, Machine, MachineSpec, Programs, SnapshotFiles,
};
use walnut_protocol::{
    AGENT_PORT, PROTOCOL, STREAM_PORT,
    agent::{
        ConfigureSandboxRequest, ContainerRequest, CreateContainerRequest, HelloRequest,
        Stdio as Streams, Storage,
    },
    agent_ttrpc::AgentClient,
    write_stream_id,
};

/// Two cores, emulation, and other tests beside: not a figure, a limit.
const BOOT: Duration = Duration::from_secs(60);

fn driver() -> Box<dyn Driver> {
    walnut_machine::driver(DriverChoice::QemuTcg, &Programs::new(&own())).unwrap()
}

fn spec(run: &TempDir, disks: &[Disk], spare_disks: u32) -> MachineSpec {
    MachineSpec {
        id: "test".to_owned(),
        run_dir: run.path().to_owned(),
        kernel: kernel(),
        initramfs: initramfs(),
        cmdline: vec!["test=serve".to_owned()],
        vcpus: 1,
        max_vcpus: 1,
        memory: 128 << 20,
        max_memory: 128 << 20,
        disks: disks.to_vec(),
        spare_disks,
        shares: Vec::new(),
        nics: Vec::new(),
    }
}

/// A disk that begins with `first`.
fn disk(dir: &TempDir, serial: &str, first: u8, read_only: bool) -> Disk {
    let path = dir.path().join(serial);
    fs::write(&path, vec![first; 1 << 16]).unwrap();
    Disk {
        serial: serial.to_owned(),
        path,
        read_only,
    }
}

fn run_dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn snapshot(dir: &TempDir, name: &str) -> SnapshotFiles {
    SnapshotFiles {
        state: dir.path().join(format!("{name}.state")),
        memory: dir.path().join(format!("{name}.memory")),
    }
}

/// A machine of `spec` that serves, and what was saved of it.
async fn saved(spec: MachineSpec, to: &SnapshotFiles) -> Box<dyn Machine> {
    let machine = driver().start(spec).await.unwrap();
    if let Err(error) = machine.ready(BOOT).await {
        panic!("{error}\n{}", machine.console_tail());
    }
    machine.as_pause().unwrap().pause().await.unwrap();
    machine.as_snapshot().unwrap().save(to).await.unwrap();
    machine
}

async fn restored(spec: MachineSpec, from: &SnapshotFiles) -> Box<dyn Machine> {
    let driver = driver();
    let clone = driver.as_restore().unwrap().restore(spec, from).await;
    let clone = clone.unwrap();
    clone.ready(BOOT).await.unwrap();
    clone
}

/// What the test init answers, if it does.
async fn ask(machine: &dyn Machine, question: &[u8]) -> String {
    let answer = tokio::time::timeout(BOOT, guest::ask(machine, question)).await;
    answer.unwrap_or_else(|_| panic!("no answer\n{}", machine.console_tail()))
}

/// The disks that the guest sees, once it has looked again.
async fn disks(machine: &dyn Machine) -> Vec<String> {
    ask(machine, b"p").await;
    let answer = ask(machine, b"d").await;
    let mut lines: Vec<_> = answer.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    lines
}

fn pid(machine: &dyn Machine, role: &str) -> Pid {
    let processes = machine.processes();
    let pid = processes.iter().find(|(r, _)| *r == role).unwrap().1;
    Pid::from_raw(pid.try_into().unwrap())
}

/// Nothing is in a directory.
fn assert_empty(dir: &Path) {
    let left: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

async fn echo(stream: &mut UnixStream, byte: u8) {
    stream.write_all(&[byte]).await.unwrap();
    let answer = tokio::time::timeout(BOOT, stream.read_u8()).await;
    assert_eq!(answer.unwrap().unwrap(), byte);
}

/// Sends more than a ring's buffers hold, and gets it back.
async fn echo_much(stream: &mut UnixStream) {
    const LENGTH: usize = 24 << 10;
    let (mut from, mut to) = stream.split();
    let bytes = vec![b'x'; LENGTH];
    let send = to.write_all(&bytes);
    let mut answer = vec![0; LENGTH];
    let receive = from.read_exact(&mut answer);
    let both = async { tokio::join!(send, receive) };
    let (sent, got) = tokio::time::timeout(BOOT, both).await.unwrap();
    sent.unwrap();
    got.unwrap();
    assert!(answer == bytes);
}

#[tokio::test]
async fn clones_go_on_where_the_saved_machine_stood() {
    let (files, images, run) = (run_dir(), run_dir(), run_dir());
    let to = snapshot(&files, "first");
    let base = disk(&images, "base", b'A', true);
    let machine = driver()
        .start(spec(&run, std::slice::from_ref(&base), 4))
        .await
        .unwrap();
    machine.ready(BOOT).await.unwrap();
    let mut stream = machine.connect(1024).await.unwrap();
    echo(&mut stream, b'1').await;
    let (pause, save) = (machine.as_pause().unwrap(), machine.as_snapshot().unwrap());
    let said = save.save(&to).await.unwrap_err().to_string();
    assert!(said.contains("pause it first"), "{said}");
    assert_empty(files.path());
    pause.pause().await.unwrap();
    save.save(&to).await.unwrap();
    let said = save.save(&to).await.unwrap_err().to_string();
    assert!(said.contains("File exists"), "{said}");
    let again = save.save(&snapshot(&files, "again")).await;
    let said = again.unwrap_err().to_string();
    assert!(said.contains("resume it in between"), "{said}");
    pause.resume().await.unwrap();
    // It has lost nothing, connections neither. The guest serves one at a time.
    echo(&mut stream, b'2').await;
    drop(stream);

    let mut clones = Vec::new();
    for n in 0u8..3 {
        let run = run_dir();
        let own = disk(&run, &format!("own-{n}"), b'a' + n, true);
        let both = vec![base.clone(), own];
        let clone = restored(spec(&run, &both, 0), &to).await;
        let expected = [
            "base A 0".to_owned(),
            format!("own-{n} {} 0", char::from(b'a' + n)),
        ];
        assert_eq!(disks(&*clone).await, expected, "{}", clone.console_tail());
        clones.push((run, both, clone));
    }
    assert_eq!(disks(&*machine).await, ["base A 0"]);

    // It has had the disk of one spare: three may come later.
    let later = run_dir();
    let (_, own, clone) = &mut clones[1];
    let spare = clone.as_spare_disks().unwrap();
    let refused = async |disk: &Disk| spare.attach_disk(disk).await.unwrap_err().to_string();
    let said = refused(&disk(&later, "own-1", b'N', true)).await;
    assert!(said.contains("a disk with the serial own-1"), "{said}");
    let said = refused(&disk(&later, "no", b'N', false)).await;
    assert!(said.contains("is read-only, and no is not"), "{said}");
    let mut stream = clone.connect(1024).await.unwrap();
    echo_much(&mut stream).await;
    for (serial, first) in [("late", b'L'), ("later", b'M')] {
        let disk = disk(&later, serial, first, true);
        spare.attach_disk(&disk).await.unwrap();
        own.push(disk);
    }
    echo_much(&mut stream).await;
    drop(stream);
    let expected = ["base A 0", "late L 0", "later M 0", "own-1 b 0"];
    assert_eq!(disks(&**clone).await, expected, "{}", clone.console_tail());
    // One that has booted can be given disks as well.
    let spare = machine.as_spare_disks().unwrap();
    let mine = disk(&later, "mine", b'O', true);
    let mut stream = machine.connect(1024).await.unwrap();
    echo_much(&mut stream).await;
    spare.attach_disk(&mine).await.unwrap();
    echo_much(&mut stream).await;
    drop(stream);
    assert_eq!(disks(&*machine).await, ["base A 0", "mine O 0"]);

    // One that dies is no matter of the others.
    let (run, _, clone) = clones.remove(0);
    kill(pid(&*clone, "qemu"), Signal::SIGKILL).unwrap();
    assert!(matches!(clone.wait().await, Exit::Failed(_)));
    fs::remove_file(run.path().join("own-0")).unwrap();
    assert_empty(run.path());
    for (_, _, clone) in &clones {
        assert_eq!(ask(&**clone, b"x").await, "x");
    }

    // A clone is a machine like others.
    let (run, mut all, clone) = clones.remove(0);
    let to = snapshot(&files, "second");
    clone.as_pause().unwrap().pause().await.unwrap();
    clone.as_snapshot().unwrap().save(&to).await.unwrap();
    clone.stop().await;
    all.push(disk(&images, "third", b'T', true));
    let grandchild = restored(spec(&run, &all, 0), &to).await;
    let expected = [
        "base A 0",
        "late L 0",
        "later M 0",
        "own-1 b 0",
        "third T 0",
    ];
    assert_eq!(disks(&*grandchild).await, expected);
    let spare = grandchild.as_spare_disks().unwrap();
    let fourth = disk(&images, "fourth", b'F', true);
    let said = spare.attach_disk(&fourth).await.unwrap_err().to_string();
    assert!(said.contains("no spare disk left of 0"), "{said}");
    let pids = grandchild.processes();
    drop(grandchild);
    for (role, pid) in pids {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{role} lives");
    }
}

#[tokio::test]
async fn two_vcpus_are_saved_too() {
    let (files, run) = (run_dir(), run_dir());
    let to = snapshot(&files, "two");
    let mut spec = spec(&run, &[], 0);
    (spec.vcpus, spec.max_vcpus) = (2, 2);
    let machine = saved(spec.clone(), &to).await;
    machine.stop().await;
    (spec.vcpus, spec.max_vcpus) = (1, 1);
    let clone = restored(spec, &to).await;
    assert_eq!(ask(&*clone, b"c").await, "2\n");
}

/// A state file whose digest is right, with another stream.
fn forge(state: &[u8], stream: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let header = u32::from_le_bytes(state[40..44].try_into().unwrap());
    let start = 44 + usize::try_from(header).unwrap();
    let mut forged = state[start..].to_vec();
    stream(&mut forged);
    let rest = [&state[40..start], &forged].concat();
    [&state[..8], &Sha256::digest(&rest), &rest].concat()
}

#[tokio::test]
async fn what_cannot_be_restored_says_why_and_leaves_nothing() {
    let (files, images, run) = (run_dir(), run_dir(), run_dir());
    let good = snapshot(&files, "good");
    let base = disk(&images, "base", b'A', true);
    let machine = saved(spec(&run, std::slice::from_ref(&base), 1), &good).await;
    machine.stop().await;
    let state = fs::read(&good.state).unwrap();
    let driver = driver();
    let failed = async |from: &SnapshotFiles, disks: &[Disk]| {
        let spec = spec(&run, disks, 1);
        let restore = driver.as_restore().unwrap();
        let error = restore.restore(spec, from).await.unwrap_err().to_string();
        assert_empty(run.path());
        error
    };
    let base = [base];
    let bad = |name: &str| SnapshotFiles {
        state: files.path().join(name),
        memory: good.memory.clone(),
    };
    let missing = failed(&bad("missing"), &base).await;
    assert!(missing.contains("No such file"), "{missing}");
    let forged = [
        ("half", state[..state.len() / 2].to_vec(), "is damaged"),
        ("empty", Vec::new(), "is damaged"),
        ("text", b"not a state of anything".repeat(99), "is damaged"),
        (
            "short",
            forge(&state, |stream| stream.truncate(stream.len() / 2)),
            "restore the machine: qemu exited with code 1",
        ),
        (
            "nonsense",
            forge(&state, |stream| stream[200..].fill(0xa5)),
            "restore the machine: qemu ",
        ),
    ];
    for (name, bytes, why) in forged {
        let from = bad(name);
        fs::write(&from.state, bytes).unwrap();
        let said = failed(&from, &base).await;
        assert!(said.contains(why), "{name}: {said}");
    }
    let from = bad("fifo");
    mkfifo(&from.state, Mode::S_IRWXU).unwrap();
    let said = failed(&from, &base).await;
    assert!(said.contains("no regular file"), "{said}");

    let short = SnapshotFiles {
        state: good.state.clone(),
        memory: files.path().join("short.memory"),
    };
    let memory = fs::File::create(&short.memory).unwrap();
    memory.set_len(64 << 20).unwrap();
    let said = failed(&short, &base).await;
    assert!(said.contains("134217728 bytes"), "{said}");
    // Of the right length, and not the guest's: that guest is lost, and nothing else.
    memory.set_len(128 << 20).unwrap();
    memory.write_all_at(&[0x5a; 4096], 1 << 20).unwrap();
    let restore = driver.as_restore().unwrap();
    // It may be gone before the restore has been seen to its end.
    if let Ok(lost) = restore.restore(spec(&run, &base, 1), &short).await {
        lost.ready(Duration::from_secs(2)).await.unwrap_err();
        lost.stop().await;
    }
    assert_empty(run.path());

    let said = failed(&good, &[]).await;
    assert!(said.contains("must be the saved machine's"), "{said}");
    let more = ["b", "c"].map(|serial| disk(&images, serial, b'B', true));
    let many = [&base[..], &more].concat();
    let said = failed(&good, &many).await;
    assert!(said.contains("has room for 1"), "{said}");
    // And after all of this the good one is good.
    let clone = restored(spec(&run, &many[..2], 0), &good).await;
    assert_eq!(disks(&*clone).await, ["b B 0", "base A 0"]);
}

#[tokio::test]
async fn a_machine_that_dies_while_it_is_saved_leaves_no_files() {
    let (files, run) = (run_dir(), run_dir());
    let to = snapshot(&files, "vain");
    let machine = driver().start(spec(&run, &[], 0)).await.unwrap();
    machine.ready(BOOT).await.unwrap();
    machine.as_pause().unwrap().pause().await.unwrap();
    let qemu = pid(&*machine, "qemu");
    kill(qemu, Signal::SIGSTOP).unwrap();
    let dies = async {
        while !to.memory.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        kill(qemu, Signal::SIGKILL).unwrap();
    };
    let save = machine.as_snapshot().unwrap();
    let (outcome, ()) = tokio::join!(save.save(&to), dies);
    let said = outcome.unwrap_err().to_string();
    assert!(said.contains("killed by signal 9"), "{said}");
    assert_empty(files.path());
    // A caller who gives up leaves none either.
    let machine = driver().start(spec(&run, &[], 0)).await.unwrap();
    machine.ready(BOOT).await.unwrap();
    machine.as_pause().unwrap().pause().await.unwrap();
    let save = machine.as_snapshot().unwrap();
    assert!(
        tokio::time::timeout(Duration::ZERO, save.save(&to))
            .await
            .is_err()
    );
    assert_empty(files.path());
    machine.as_pause().unwrap().resume().await.unwrap();
    assert_eq!(ask(&*machine, b"y").await, "y");
}

/// An EROFS of busybox.
fn busybox(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    for name in ["bin", "proc", "dev"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))
        .expect("busybox is missing: apt-get install busybox-static");
    for name in ["sh", "cat", "head", "sha256sum", "date", "hostname"] {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    let image = dir.join("busybox.erofs");
    let made = Command::new("mkfs.erofs")
        .args([&image, &root])
        .stdout(Stdio::null())
        .status()
        .expect("mkfs.erofs is missing: apt-get install erofs-utils");
    assert!(made.success());
    image
}

fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(BOOT)
}

async fn agent(machine: &dyn Machine) -> AgentClient {
    let stream = machine.connect(AGENT_PORT).await.unwrap();
    let agent = AgentClient::new(Client::new(Socket::from(stream)));
    let hello = HelloRequest {
        protocol: PROTOCOL,
        ..HelloRequest::default()
    };
    agent.hello(context(), &hello).await.unwrap();
    agent
}

/// What a script prints in a container whose root is the disk `serial`.
async fn run(machine: &dyn Machine, agent: &AgentClient, serial: &str, script: &str) -> String {
    let mut streams = Vec::new();
    for number in 1..=3 {
        let mut stream = machine.connect(STREAM_PORT).await.unwrap();
        write_stream_id(&mut stream, number).await.unwrap();
        streams.push(stream);
    }
    let rootfs = "/run/walnut/c/rootfs";
    let spec = json!({
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs", "readonly": true},
        "process": {
            "args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
    });
    let request = CreateContainerRequest {
        container_id: "c".into(),
        spec: serde_json::to_vec(&spec).unwrap(),
        storages: vec![Storage {
            driver: "blk".into(),
            source: serial.into(),
            fstype: "erofs".into(),
            options: vec!["ro".into()],
            mount_point: rootfs.into(),
            ..Storage::default()
        }],
        stdio: Some(Streams {
            stdin: 1,
            stdout: 2,
            stderr: 3,
            ..Streams::default()
        })
        .into(),
        ..CreateContainerRequest::default()
    };
    agent.create_container(context(), &request).await.unwrap();
    let container = ContainerRequest {
        container_id: "c".into(),
        ..ContainerRequest::default()
    };
    agent.start_container(context(), &container).await.unwrap();
    let mut text = String::new();
    streams[1].read_to_string(&mut text).await.unwrap();
    streams[2].read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn clones_of_an_agent_are_themselves() {
    let (files, images, dir) = (run_dir(), run_dir(), run_dir());
    let to = snapshot(&files, "agent");
    let product = |run: &TempDir, disks: &[Disk]| MachineSpec {
        initramfs: kernel().with_file_name("initramfs.cpio"),
        cmdline: Vec::new(),
        ..spec(run, disks, 2)
    };
    let machine = driver().start(product(&dir, &[])).await.unwrap();
    machine.ready(BOOT).await.unwrap();
    // A connection that the clones do not have any more.
    let first = agent(&*machine).await;
    machine.as_pause().unwrap().pause().await.unwrap();
    machine.as_snapshot().unwrap().save(&to).await.unwrap();
    machine.as_pause().unwrap().resume().await.unwrap();
    let hello = HelloRequest::default();
    first.hello(context(), &hello).await.unwrap();
    machine.stop().await;

    let image = Disk {
        serial: "busybox".to_owned(),
        path: busybox(images.path()),
        read_only: true,
    };
    let script = "head -c 32 /dev/urandom | sha256sum; cat /proc/sys/kernel/random/uuid; date +%Y";
    let mut said = Vec::new();
    for n in 0u8..2 {
        let dir = run_dir();
        let clone = restored(product(&dir, std::slice::from_ref(&image)), &to).await;
        let agent = agent(&*clone).await;
        let identity = ConfigureSandboxRequest {
            sandbox_id: format!("clone-{n}"),
            hostname: format!("clone-{n}"),
            realtime_ns: 1_900_000_000_000_000_000,
            entropy: vec![n; 32],
            ..ConfigureSandboxRequest::default()
        };
        agent.configure_sandbox(context(), &identity).await.unwrap();
        let text = run(&*clone, &agent, "busybox", script).await;
        assert_eq!(text.lines().count(), 3, "{text}\n{}", clone.console_tail());
        assert_eq!(text.lines().last(), Some("2030"), "{text}");
        said.push(text);
        clone.stop().await;
    }
    for (one, other) in said[0].lines().zip(said[1].lines()).take(2) {
        assert_ne!(one, other);
    }
}
