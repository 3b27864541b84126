//! The programs under test, and how a test calls them.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread::JoinHandle,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{assert_nothing_left, until};

/// Where everything is.
#[derive(Debug)]
pub struct Host {
    /// The command under test.
    pub walnut: PathBuf,
    /// Kernel, initramfs and helpers.
    pub lib: PathBuf,
    /// `WALNUT_ROOT` of the tests.
    pub root: PathBuf,
    /// `WALNUT_RUN` of the tests.
    pub run: PathBuf,
    /// The test image's reference.
    pub image: String,
}

/// What a command left behind.
#[derive(Debug)]
pub struct Done {
    /// Exit code; 128 + signal.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error, as text.
    pub stderr: String,
    /// The container's ID, if one came to be.
    pub id: Option<String>,
}

impl Done {
    /// Standard output as text, without the last newline.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout)
            .expect("output is text")
            .trim_end_matches('\n')
    }

    /// Panics unless the exit code is `code`.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }

    /// Panics unless it failed with one sentence that has `part` in it.
    #[track_caller]
    pub fn fails(self, code: i32, part: &str) -> Self {
        let this = self.exits(code);
        let said: Vec<_> = this
            .stderr
            .lines()
            .filter(|line| line.starts_with("walnut: "))
            .collect();
        assert!(
            said.len() == 1 && said[0].contains(part),
            "{part:?} not in one sentence of {this:#?}"
        );
        this
    }
}

/// The program whose process is the machine here, and what it is called in
/// messages.
pub fn machine() -> (&'static str, &'static str) {
    match driver() {
        "vmm" => ("walnut-vmm", "walnut-vmm"),
        _ => ("qemu", "qemu"),
    }
}

/// The driver that is chosen here unless another is asked for.
pub fn driver() -> &'static str {
    static DRIVER: OnceLock<String> = OnceLock::new();
    DRIVER.get_or_init(|| {
        let report = crate::walnut(&["check", "--format", "json"]);
        let report: serde_json::Value =
            serde_json::from_slice(&report.stdout).expect("parse `walnut check`");
        let driver = report["auto"]["driver"].as_str();
        driver.expect("`walnut check` names a driver").to_owned()
    })
}

/// The host under test; the first caller builds up what is missing.
pub fn host() -> &'static Host {
    static HOST: OnceLock<Host> = OnceLock::new();
    HOST.get_or_init(set_up)
}

fn set_up() -> Host {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ is in the repository");
    let out = repository.join("out");
    let walnut = out.join("bin/walnut");
    for file in [&walnut, &out.join("lib/walnut/vmlinux")] {
        assert!(
            file.exists(),
            "{} is missing; run `make build` first",
            file.display()
        );
    }
    let home = std::env::var_os("HOME").expect("HOME is set");
    let cache = std::env::var_os("WALNUT_CACHE")
        .map_or_else(|| Path::new(&home).join(".cache/walnut"), PathBuf::from);
    let root = cache.join("e2e");
    let uid = nix::unistd::geteuid();
    let run = PathBuf::from(format!("/tmp/walnut-e2e-{uid}"));
    fs::create_dir_all(&root).expect("create the tests' root");
    // One process at a time makes the image and pulls it.
    let lock = fs::File::create(root.join("set-up.lock")).expect("create the lock");
    lock.lock().expect("lock");
    let image = served(repository, "demo");
    let host = Host {
        walnut,
        lib: out.join("lib/walnut"),
        root,
        run,
        image,
    };
    let pulled = output(&mut command_on(&host, &["pull", &host.image]), b"");
    assert_eq!(pulled.code, 0, "{pulled:#?}");
    host
}

/// The reference of an image that the registry serves.
fn served(repository: &Path, image: &str) -> String {
    let registry = Command::new(repository.join("tests/image/registry.sh"))
        .args(["start", image])
        // Its registry must not hold the test runner's output open.
        .stderr(Stdio::null())
        .output()
        .expect("run registry.sh");
    assert!(
        registry.status.success(),
        "tests/image/registry.sh start {image} failed; run it to see why"
    );
    let text = String::from_utf8(registry.stdout).expect("text");
    text.lines().last().expect("the image's name").to_owned()
}

/// The image with node, systemd and programs of Go's, in the store; the first caller pulls
/// it.
pub fn programs_image() -> &'static str {
    static IMAGE: OnceLock<String> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let host = host();
        let lock = fs::File::create(host.root.join("set-up.lock")).expect("create the lock");
        lock.lock().expect("lock");
        let image = served(crate::client::repository(), "programs");
        let pulled = output(&mut command_on(host, &["pull", &image]), b"");
        assert_eq!(pulled.code, 0, "{pulled:#?}");
        image
    })
}

fn command_on(host: &Host, args: &[&str]) -> Command {
    let mut command = Command::new(&host.walnut);
    command
        .args(args)
        .env("WALNUT_ROOT", &host.root)
        .env("WALNUT_RUN", &host.run)
        // Tests of networks have hosts of their own.
        .env("WALNUT_NETWORK", "none")
        .env_remove("WALNUT_LIB")
        .env_remove("WALNUT_DRIVER");
    command
}

/// A `walnut` command line, to be changed before it is spawned.
pub fn command(args: &[&str]) -> Command {
    command_on(host(), args)
}

/// Runs `walnut` to its end.
#[track_caller]
pub fn walnut(args: &[&str]) -> Done {
    output(&mut command(args), b"")
}

/// `walnut run --rm` with `args` (the image is named by `IMAGE`), in front, and
/// nothing left after it.
#[track_caller]
pub fn run(args: &[&str]) -> Done {
    run_with(args, b"", |_| {})
}

/// As [`run`], with input and a changed command.
#[track_caller]
pub fn run_with(args: &[&str], input: &[u8], change: impl FnOnce(&mut Command)) -> Done {
    let mut running = spawn_run(&[&["--rm"], args].concat(), change);
    running.input(input);
    let done = running.wait();
    if let Some(id) = &done.id {
        assert_nothing_left(id);
        assert!(
            !host().root.join("containers").join(id).exists(),
            "--rm left the container"
        );
    }
    done
}

/// A command that runs.
#[derive(Debug)]
pub struct Running {
    /// The process.
    pub child: Child,
    cidfile: PathBuf,
    stdout: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<Vec<u8>>>,
}

/// Starts `walnut run` in front with `args`, with all three streams piped.
pub fn spawn_run(args: &[&str], change: impl FnOnce(&mut Command)) -> Running {
    let cidfile = std::env::temp_dir().join(unique("cid"));
    let file = cidfile.to_str().expect("a plain path").to_owned();
    let image = host().image.as_str();
    let args: Vec<&str> = ["run", "--cidfile", &file]
        .into_iter()
        .chain(args.iter().map(|&a| if a == "IMAGE" { image } else { a }))
        .collect();
    let mut command = command(&args);
    change(&mut command);
    spawn(&mut command, cidfile)
}

/// Starts any `walnut` command, with all three streams piped.
pub fn spawn_walnut(args: &[&str]) -> Running {
    spawn(&mut command(args), std::env::temp_dir().join(unique("cid")))
}

fn spawn(command: &mut Command, cidfile: PathBuf) -> Running {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start walnut");
    let stdout = Arc::default();
    let readers = vec![
        read(child.stdout.take().expect("piped"), Arc::clone(&stdout)),
        read(child.stderr.take().expect("piped"), Arc::default()),
    ];
    Running {
        child,
        cidfile,
        stdout,
        readers,
    }
}

impl Running {
    /// The container's ID, once there is one.
    pub fn id(&self) -> String {
        let read = || fs::read_to_string(&self.cidfile).unwrap_or_default();
        until("the container's ID is written", || read().len() == 32);
        read()
    }

    /// Waits until it has printed `text`.
    #[track_caller]
    pub fn prints(&self, text: &str) {
        until(&format!("it prints {text:?}"), || {
            let stdout = self.stdout.lock().expect("no panic");
            String::from_utf8_lossy(&stdout).contains(text)
        });
    }

    /// Sends a signal to the command.
    pub fn signal(&self, signal: Signal) {
        let pid = self.child.id().try_into().expect("a PID");
        kill(Pid::from_raw(pid), signal).expect("signal walnut");
    }

    /// Writes all of `bytes` and closes the input.
    pub fn input(&mut self, bytes: &[u8]) {
        let mut stdin = self.child.stdin.take().expect("input is open");
        // A command that ended early has its own reason.
        let _ = stdin.write_all(bytes);
    }

    /// Waits for the end.
    #[track_caller]
    pub fn wait(mut self) -> Done {
        drop(self.child.stdin.take());
        let status = end(&mut self.child);
        let mut read = self.readers.drain(..).map(|r| r.join().expect("reader"));
        let stdout = read.next().expect("stdout");
        let stderr = read.next().expect("stderr");
        drop(read);
        let done = Done {
            code: status.map_or(-1, code),
            stdout,
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            id: fs::read_to_string(&self.cidfile).ok(),
        };
        assert!(
            status.is_some(),
            "walnut hangs: {done:#?}\n{}",
            shim_log(&done)
        );
        done
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After a failed test: a container in front ends with its command.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.cidfile);
    }
}

/// What the container's supervisor had to say, while the container is there.
fn shim_log(done: &Done) -> String {
    let Some(id) = &done.id else {
        return String::new();
    };
    let path = host().root.join("containers").join(id).join("shim.log");
    fs::read_to_string(path).unwrap_or_default()
}

/// Waits for the end; kills what reaches the deadline.
fn end(child: &mut Child) -> Option<ExitStatus> {
    let start = std::time::Instant::now();
    while start.elapsed() < crate::DEADLINE {
        if let Some(status) = child.try_wait().expect("wait") {
            return Some(status);
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

/// Reads to the end; what has come so far can be seen in `seen`.
fn read(mut from: impl Read + Send + 'static, seen: Arc<Mutex<Vec<u8>>>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut chunk = vec![0; 64 << 10];
        while let Ok(read @ 1..) = from.read(&mut chunk) {
            seen.lock()
                .expect("no panic")
                .extend_from_slice(&chunk[..read]);
        }
        std::mem::take(&mut *seen.lock().expect("no panic"))
    })
}

/// Runs a command to its end.
#[track_caller]
fn output(command: &mut Command, input: &[u8]) -> Done {
    let mut running = spawn(command, std::env::temp_dir().join(unique("cid")));
    running.input(input);
    running.wait()
}

/// A name no other test has.
pub fn unique(what: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{what}-{}-{count}", std::process::id())
}

/// A container behind; removed, and looked for, when dropped.
#[derive(Debug)]
pub struct Detached {
    /// Its name.
    pub name: String,
    /// Its ID.
    pub id: String,
}

impl Detached {
    /// `walnut run -d` with `args`; the image is named by `IMAGE`.
    #[track_caller]
    pub fn start(args: &[&str]) -> Self {
        let name = unique("t");
        let image = host().image.as_str();
        let all: Vec<&str> = ["run", "-d", "--name", &name]
            .into_iter()
            .chain(args.iter().map(|&a| if a == "IMAGE" { image } else { a }))
            .collect();
        let done = walnut(&all).exits(0);
        let id = done.text().to_owned();
        assert_eq!(id.len(), 32, "{done:#?}");
        Self { name, id }
    }

    /// `walnut exec` in it.
    #[track_caller]
    pub fn exec(&self, args: &[&str]) -> Done {
        self.exec_with(&[], args, b"")
    }

    /// `walnut exec` in it, with options and input.
    #[track_caller]
    pub fn exec_with(&self, options: &[&str], args: &[&str], input: &[u8]) -> Done {
        let all: Vec<&str> = ["exec"]
            .into_iter()
            .chain(options.iter().copied())
            .chain([self.name.as_str()])
            .chain(args.iter().copied())
            .collect();
        output(&mut command(&all), input)
    }

    /// Its entry in `walnut ps -a`.
    pub fn record(&self) -> Option<serde_json::Value> {
        let done = walnut(&["ps", "-a", "--format", "json"]).exits(0);
        let all: Vec<serde_json::Value> = serde_json::from_slice(&done.stdout).expect("JSON");
        all.into_iter().find(|r| r["id"] == self.id.as_str())
    }

    /// Waits until it has ended; its record then.
    #[track_caller]
    pub fn ended(&self) -> serde_json::Value {
        let mut last = None;
        until("the container has ended", || {
            last = self.record();
            last.as_ref().is_none_or(|r| r["status"] == "exited")
        });
        last.expect("it has a record")
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        let done = walnut(&["rm", "-f", &self.name]);
        if !std::thread::panicking() {
            let known = self.record().is_some();
            assert!(!known, "not removed: {done:#?}");
            assert_nothing_left(&self.id);
        }
    }
}
