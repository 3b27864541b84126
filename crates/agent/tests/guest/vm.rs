//! A guest under QEMU's software emulation, and a host's view of its agent.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use walnut_protocol::agent::{
    ConfigureSandboxRequest, ContainerRequest, CreateContainerRequest, ExecProcessRequest,
    ProcessRequest, Stdio as Streams, Storage, TerminalSize, WaitProcessResponse,
};
use walnut_protocol::agent_ttrpc::AgentClient;
use walnut_protocol::{
    AGENT_PORT, READY_PORT, STREAM_PORT, connect_hybrid, parse_ready_line, write_stream_id,
};

/// Longest that anything in an emulated guest on a busy machine may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A booted guest. Dropping it kills its processes.
pub(crate) struct Vm {
    pub(crate) dir: TempDir,
    pub(crate) agent: AgentClient,
    qemu: Child,
    vsock: Child,
    next_stream: u32,
}

impl Drop for Vm {
    fn drop(&mut self) {
        for child in [&mut self.qemu, &mut self.vsock] {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let console = fs::read_to_string(self.dir.path().join("console"));
            eprintln!("console:\n{}", console.unwrap_or_default());
        }
    }
}

fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A file of the product, or the one that `variable` names.
fn product(variable: &str, default: &str, how: &str) -> PathBuf {
    let path = std::env::var_os(variable).map_or_else(|| checkout().join(default), PathBuf::from);
    assert!(
        path.exists(),
        "{} is missing: {how}, or name another in {variable}",
        path.display()
    );
    path
}

/// An EROFS of busybox: the root file system of every container here.
fn image(dir: &Path) -> PathBuf {
    let root = dir.join("root");
    for name in ["bin", "etc", "tmp", "proc", "sys", "dev", "root"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))
        .expect("busybox is missing: apt-get install busybox-static");
    for name in [
        "sh",
        "cat",
        "echo",
        "sleep",
        "true",
        "id",
        "stty",
        "wc",
        "sha256sum",
        "head",
        "dd",
        "kill",
        "mknod",
        "env",
        "pwd",
        "ls",
        "tail",
        "grep",
        "tty",
        "hostname",
        "mount",
        "date",
        "readlink",
    ] {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    let users = "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n";
    fs::write(root.join("etc/passwd"), users).unwrap();
    fs::write(root.join("etc/not-executable"), "text").unwrap();
    let image = dir.join("base.erofs");
    let made = Command::new("mkfs.erofs")
        .args([&image, &root])
        .stdout(Stdio::null())
        .status()
        .expect("mkfs.erofs is missing: apt-get install erofs-utils");
    assert!(made.success());
    image
}

impl Vm {
    /// Boots, and returns when the agent serves.
    pub(crate) async fn boot() -> Self {
        let smp = std::env::var("WALNUT_TEST_CPUS").unwrap_or_else(|_| "1".into());
        Self::boot_with(&smp, "").await
    }

    /// With that many processors, and more words for the kernel.
    pub(crate) async fn boot_with(smp: &str, words: &str) -> Self {
        let kernel = product(
            "WALNUT_KERNEL",
            "out/lib/walnut/vmlinux",
            "build it with guest/kernel/build.sh",
        );
        let initramfs = product(
            "WALNUT_INITRAMFS",
            "out/lib/walnut/initramfs.cpio",
            "build it with `make`",
        );
        let program = product(
            "WALNUT_VSOCK",
            "target/release/walnut-vsock",
            "build it with `cargo build --release -p walnut-devices`",
        );
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let image = image(dir.path());
        let ready = UnixListener::bind(at(&format!("vsock_{READY_PORT}"))).unwrap();
        let vsock = Command::new(program)
            .args(["--vhost-socket".as_ref(), at("vhost").as_os_str()])
            .args(["--uds".as_ref(), at("vsock").as_os_str()])
            .spawn()
            .unwrap();
        until(|| at("vhost").exists()).await;
        let extra = std::env::var("WALNUT_TEST_CMDLINE").unwrap_or_default();
        let cmdline = format!("console=ttyS0 quiet panic=-1 reboot=t {words} {extra}");
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(["-M", "microvm,acpi=off,pit=on,pic=on,rtc=on,isa-serial=on,auto-kernel-cmdline=on,x-option-roms=off,memory-backend=mem"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "256M", "-bios", "qboot.rom"])
            .args(["-smp", smp])
            .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .args(["-append", &cmdline])
            .arg("-kernel").arg(kernel)
            .arg("-initrd").arg(initramfs)
            .arg("-chardev").arg(format!("socket,id=vsock,path={}", at("vhost").display()))
            .args(["-device", "vhost-user-vsock-device,chardev=vsock"])
            .arg("-drive").arg(format!("id=base,if=none,format=raw,read-only=on,file={}", image.display()))
            .args(["-device", "virtio-blk-device,drive=base,serial=base"])
            .arg("-serial").arg(format!("file:{}", at("console").display()));
        let mut qemu = qemu
            .spawn()
            .expect("qemu-system-x86_64 is missing: apt-get install qemu-system-x86");
        let connection = tokio::time::timeout(PATIENCE, ready.accept()).await;
        let Ok(Ok((mut peer, _))) = connection else {
            let console = fs::read_to_string(at("console")).unwrap_or_default();
            let _ = qemu.kill();
            panic!("the agent did not say that it is ready; console:\n{console}");
        };
        let mut line = String::new();
        peer.read_to_string(&mut line).await.unwrap();
        assert_eq!(parse_ready_line(&line), Some(walnut_protocol::PROTOCOL));
        let control = connect_hybrid(&at("vsock"), AGENT_PORT).await.unwrap();
        let client = ttrpc::r#async::Client::new(ttrpc::r#async::transport::Socket::from(control));
        Self {
            agent: AgentClient::new(client),
            dir,
            qemu,
            vsock,
            next_stream: 1,
        }
    }

    /// Opens a stream; returns its number and the host's end.
    pub(crate) async fn stream(&mut self) -> (u32, UnixStream) {
        let number = self.next_stream;
        self.next_stream += 1;
        let uds = self.dir.path().join("vsock");
        let mut stream = connect_hybrid(&uds, STREAM_PORT).await.unwrap();
        write_stream_id(&mut stream, number).await.unwrap();
        (number, stream)
    }

    /// The storages and spec of a container that runs `process`.
    pub(crate) fn request(id: &str, process: Value, extra: &Value) -> CreateContainerRequest {
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs", "readonly": false},
            "hostname": "container",
            "process": process,
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc",
                 "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                 "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                 "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                 "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                 "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            ],
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"},
                    {"type": "mount"}, {"type": "cgroup"}, {"type": "network"}],
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
                "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
            },
        });
        merge(&mut spec, extra);
        let storage =
            |driver: &str, source: &str, fstype: &str, options: &[String], at: String| Storage {
                driver: driver.into(),
                source: source.into(),
                fstype: fstype.into(),
                options: options.to_vec(),
                mount_point: at,
                ..Storage::default()
            };
        let here = format!("/run/walnut/{id}");
        CreateContainerRequest {
            container_id: id.into(),
            spec: serde_json::to_vec(&spec).unwrap(),
            storages: vec![
                storage(
                    "blk",
                    "base",
                    "erofs",
                    &["ro".into()],
                    format!("{here}/base"),
                ),
                storage(
                    "overlay",
                    "overlay",
                    "overlay",
                    &[
                        format!("lowerdir={here}/base"),
                        format!("upperdir={here}/upper"),
                        format!("workdir={here}/work"),
                    ],
                    format!("{here}/rootfs"),
                ),
            ],
            ..CreateContainerRequest::default()
        }
    }

    /// Creates and starts; the host's ends of stdin, stdout and stderr.
    pub(crate) async fn run(&mut self, mut request: CreateContainerRequest) -> [UnixStream; 3] {
        let (stdio, streams) = self.stdio().await;
        request.stdio = Some(stdio).into();
        let id = request.container_id.clone();
        self.agent
            .create_container(context(), &request)
            .await
            .unwrap();
        self.agent
            .start_container(context(), &container(&id))
            .await
            .unwrap();
        streams
    }

    pub(crate) async fn stdio(&mut self) -> (Streams, [UnixStream; 3]) {
        let (stdin, a) = self.stream().await;
        let (stdout, b) = self.stream().await;
        let (stderr, c) = self.stream().await;
        let stdio = Streams {
            stdin,
            stdout,
            stderr,
            ..Streams::default()
        };
        (stdio, [a, b, c])
    }

    /// Runs a container to its end: its output, and how it ended.
    pub(crate) async fn output(
        &mut self,
        request: CreateContainerRequest,
    ) -> (String, WaitProcessResponse) {
        let id = request.container_id.clone();
        let [_stdin, mut stdout, mut stderr] = self.run(request).await;
        let mut text = String::new();
        stdout.read_to_string(&mut text).await.unwrap();
        stderr.read_to_string(&mut text).await.unwrap();
        let end = self.wait(&id, "").await;
        self.agent
            .remove_container(context(), &container(&id))
            .await
            .unwrap();
        (text, end)
    }

    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> WaitProcessResponse {
        self.agent
            .wait_process(context(), &process_of(id, exec_id))
            .await
            .unwrap()
    }

    /// Runs an exec to its end.
    pub(crate) async fn exec(&mut self, id: &str, exec_id: &str, process: Value) -> (String, u32) {
        let (stdio, [_stdin, mut stdout, mut stderr]) = self.stdio().await;
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: serde_json::to_vec(&process).unwrap(),
            stdio: Some(stdio).into(),
            ..ExecProcessRequest::default()
        };
        self.agent.exec_process(context(), &request).await.unwrap();
        let mut text = String::new();
        stdout.read_to_string(&mut text).await.unwrap();
        stderr.read_to_string(&mut text).await.unwrap();
        let end = self.wait(id, exec_id).await;
        (text, end.exit_code)
    }

    pub(crate) async fn configure(&self, sysctls: HashMap<String, String>) -> ttrpc::Result<()> {
        let request = ConfigureSandboxRequest {
            sandbox_id: "test".into(),
            hostname: "walnut-guest".into(),
            realtime_ns: 1_800_000_000_000_000_000,
            entropy: vec![7; 64],
            sysctls,
            ..ConfigureSandboxRequest::default()
        };
        self.agent
            .configure_sandbox(context(), &request)
            .await
            .map(drop)
    }

    /// Waits until QEMU has ended by itself.
    pub(crate) async fn gone(&mut self) {
        let qemu = &mut self.qemu;
        until(|| qemu.try_wait().unwrap().is_some()).await;
    }
}

pub(crate) fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(PATIENCE)
}

pub(crate) fn container(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.into(),
        ..ContainerRequest::default()
    }
}

pub(crate) fn process_of(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        ..ProcessRequest::default()
    }
}

pub(crate) fn size(columns: u32, rows: u32) -> TerminalSize {
    TerminalSize {
        columns,
        rows,
        ..TerminalSize::default()
    }
}

/// A process that runs `script` in a shell, as root with Docker's usual powers.
pub(crate) fn sh(script: &str) -> Value {
    process(&["sh", "-c", script])
}

pub(crate) fn process(args: &[&str]) -> Value {
    let powers = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_KILL",
        "CAP_SYS_CHROOT",
    ];
    json!({
        "args": args, "cwd": "/", "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0},
        "capabilities": {"bounding": powers, "effective": powers, "permitted": powers},
        "noNewPrivileges": false,
    })
}

pub(crate) fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

/// Waits for a condition.
pub(crate) async fn until(mut done: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !done() {
        assert!(tokio::time::Instant::now() < deadline, "waited in vain");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Reads until `wanted` has come.
pub(crate) async fn read_until(stream: &mut UnixStream, wanted: &str) -> String {
    let mut text = Vec::new();
    let read = async {
        loop {
            let so_far = String::from_utf8_lossy(&text).into_owned();
            if so_far.contains(wanted) {
                return so_far;
            }
            let byte = stream.read_u8().await;
            text.push(byte.unwrap_or_else(|e| panic!("{e}; wanted {wanted:?}, got {so_far:?}")));
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect(wanted)
}

pub(crate) async fn type_in(stream: &mut UnixStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
}
