//! A containerd of a test's own.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Mutex,
    thread,
};

use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
pub(crate) use walnut_tests::client::{Done, finish, image, repository};
use walnut_tests::{assert_gone, cgroups, client::cache, processes, unique, until};

use crate::{
    programs::{self, Format, program},
    seeds,
};

/// Namespace of all containers here but those of Kubernetes.
pub(crate) const NAMESPACE: &str = "walnut-test";
/// Kubernetes' namespace.
pub(crate) const KUBERNETES: &str = "k8s.io";
/// The runtime under test.
const RUNTIME: &str = "io.containerd.walnut.v2";
/// Name of the image in it.
pub(crate) const IMAGE: &str = "demo:latest";

/// The same for Kubernetes, which wants a registry's.
pub(crate) const KUBERNETES_IMAGE: &str = "walnut.test/demo:latest";
/// The image with node, systemd and programs of Go's, for Kubernetes.
pub(crate) const PROGRAMS_IMAGE: &str = "walnut.test/programs:latest";
/// What a pod's first container runs.
pub(crate) const PAUSE_IMAGE: &str = "walnut.test/pause";
/// Where `walnut install` puts its programs, below a daemon's own directory.
const INSTALLED: &str = "installed";

/// A containerd with the test image.
pub(crate) struct Daemon {
    /// What must not lie on an overlay: content and snapshots.
    root: PathBuf,
    /// Sockets, bundles, and what Walnut keeps.
    state: PathBuf,
    child: Mutex<Child>,
    kind: Kind,
    /// Names of everything that has run.
    names: Mutex<BTreeSet<String>>,
}

/// What is shown of a log after a failure.
const LOG_LINES: usize = 300;

/// Where Debian has CNI's plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// The network of a node's pods.
const POD_NETWORK: &str = r#"{
    "cniVersion": "0.4.0",
    "name": "pods",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "pods0",
            "isGateway": true,
            "hairpinMode": true,
            "mtu": 1400,
            "ipam": {
                "type": "host-local",
                "dataDir": "@state@/addresses",
                "ranges": [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd77::/64"}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
            }
        },
        {"type": "portmap", "capabilities": {"portMappings": true}}
    ]
}"#;

/// Stands for the daemon's own directory in [`POD_NETWORK`].
const DAEMON_STATE: &str = "@state@";

/// What a containerd is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `ctr`.
    Plain,
    /// Kubernetes, with pods of the node's network.
    Kubernetes,
    /// Kubernetes, with a network for pods, in a network namespace that stands for the node.
    Networked,
}

/// Where daemons have their files. An emulated host has nothing but an overlay and memory.
pub(crate) fn roots() -> PathBuf {
    let roots = std::env::var_os("WALNUT_TEST_ROOT").map(PathBuf::from);
    roots.unwrap_or_else(|| cache().join("e2e"))
}

impl Daemon {
    /// Starts it. It has the image.
    pub(crate) fn start() -> Self {
        Self::launch(Kind::Plain, Some(&seeds::usual()))
    }

    /// Starts it with its interface for Kubernetes, and with Walnut set up in it by
    /// `walnut install`.
    pub(crate) fn start_for_kubernetes() -> Self {
        Self::launch(Kind::Kubernetes, Some(&seeds::usual()))
    }

    /// The same with a network for pods: CNI's plugins as Debian has them, a bridge with
    /// addresses of both families and ports of the node's, in a network namespace that
    /// stands for the node ([`Daemon::on_the_node`]).
    pub(crate) fn start_with_pod_network() -> Self {
        Self::launch(Kind::Networked, Some(&seeds::usual()))
    }

    /// The same, and it has the image with node, systemd and programs of Go's too.
    pub(crate) fn start_with_programs() -> Self {
        Self::launch(Kind::Networked, Some(&seeds::with_programs()))
    }

    /// With a copy of the images, unless it is to begin without.
    pub(crate) fn launch(kind: Kind, seed: Option<&Path>) -> Self {
        let name = unique("ctd");
        let root = roots().join(&name);
        // Short: sockets' addresses are.
        let state = Path::new("/tmp").join(&name);
        for dir in [&root, &state] {
            fs::create_dir_all(dir).unwrap();
        }
        if let Some(seed) = seed {
            seeds::copy(seed, &root.join("containerd"));
        }
        let format = Format::of_daemon();
        let (root_dir, state_dir) = (root.display(), state.display());
        let mut config = format!(
            "{}\
             root = \"{root_dir}/containerd\"\n\
             state = \"{state_dir}/containerd\"\n\
             [grpc]\naddress = \"{state_dir}/c.sock\"\n\
             [ttrpc]\naddress = \"{state_dir}/c.sock.ttrpc\"\n\
             {}",
            format.head(kind != Kind::Plain),
            format.tail(&root)
        );
        let (kubernetes, cni) = (kind != Kind::Plain, state.join("cni"));
        if kubernetes {
            let image = format!("{PAUSE_IMAGE}:latest");
            let plugins = match kind {
                Kind::Networked => PLUGINS.as_ref(),
                _ => cni.as_path(),
            };
            config.push_str(&format.kubernetes(&image, plugins, &cni));
        }
        let file = state.join("config.toml");
        fs::write(&file, config).unwrap();
        if kubernetes {
            programs::install(&state.join(INSTALLED), &file);
        }
        if kind == Kind::Networked {
            fs::create_dir(&cni).unwrap();
            let network = POD_NETWORK.replace(DAEMON_STATE, state.to_str().unwrap());
            fs::write(cni.join("10-pods.conflist"), network).unwrap();
        }
        let child = spawn(&root, &state, kind);
        let daemon = Self {
            root,
            state,
            child: Mutex::new(child),
            kind,
            names: Mutex::default(),
        };
        daemon.until_it_answers();
        daemon
    }

    /// Ends it in order, and puts all that it has on disk there.
    pub(crate) fn become_seed(self, seed: &Path) {
        // So that what it has written is whole.
        let mut child = self.child.lock().unwrap();
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
        child.wait().unwrap();
        drop(child);
        fs::rename(self.root.join("containerd"), seed).unwrap();
    }

    /// Gives the daemon an image of a file.
    pub(crate) fn import(&self, namespace: &str, base: &str, file: &Path) {
        let mut args = vec!["--namespace", namespace, "image", "import"];
        args.extend(["--base-name", base, file.to_str().unwrap()]);
        self.ctr(&args).exits(0);
    }

    /// A sandbox of this name runs.
    pub(crate) fn note(&self, name: &str) {
        self.names.lock().unwrap().insert(name.to_owned());
    }

    /// Its own PID, in whose network namespace the node is.
    pub(crate) fn pid(&self) -> u32 {
        self.child.lock().unwrap().id()
    }

    /// Runs a program where the daemon's network is.
    #[track_caller]
    pub(crate) fn on_the_node(&self, program: &[&str]) -> Done {
        let pid = self.pid().to_string();
        let enter = ["--target", &pid, "--net"];
        finish(Command::new("nsenter").args(enter).args(program), b"")
    }

    /// Waits until there is a template for what starts next.
    pub(crate) fn until_there_is_a_template(&self) {
        let templates = self.root.join("walnut/templates");
        let whole = |dir: fs::DirEntry| dir.path().join("template.json").exists();
        until("there is a template", || {
            let all = fs::read_dir(&templates).into_iter().flatten().flatten();
            all.into_iter().any(whole)
        });
    }

    /// How many of its machines began from a template. QEMU's command line says so.
    pub(crate) fn clones(&self) -> usize {
        let line =
            |pid: i32| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let names = self.names.lock().unwrap();
        let all = names.iter().flat_map(|name| processes(name));
        all.filter(|(pid, _)| line(*pid).contains("\0-incoming\0"))
            .count()
    }

    /// A file below its own directory.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.state.join(name)
    }

    /// The bundle of a task.
    pub(crate) fn bundle(&self, id: &str) -> PathBuf {
        let tasks = self.state.join("containerd/io.containerd.runtime.v2.task");
        tasks.join(NAMESPACE).join(id)
    }

    /// That of a container of Kubernetes'.
    pub(crate) fn kubernetes_bundle(&self, id: &str) -> PathBuf {
        let tasks = self.state.join("containerd/io.containerd.runtime.v2.task");
        tasks.join(KUBERNETES).join(id)
    }

    /// What it says that it is, as "1.6.20~ds1".
    pub(crate) fn version(&self) -> String {
        let said = self.ctr(&["version"]).exits(0).stdout;
        let server = said.split("Server:").nth(1).unwrap();
        let line = server
            .lines()
            .find_map(|l| l.trim().strip_prefix("Version:"));
        let version = line.unwrap().trim();
        version.trim_start_matches('v').to_owned()
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.state.join("c.sock")
    }

    /// The same for a snapshotter that is not the usual one.
    pub(crate) fn start_with_snapshotter(snapshotter: &str) -> Self {
        let daemon = Self::start();
        let mut args = vec!["image", "import", "--base-name", "demo"];
        args.extend(["--snapshotter", snapshotter]);
        args.extend(Format::of_daemon().import_by_ctr());
        let image = image();
        args.push(image.to_str().unwrap());
        daemon.ctr(&args).exits(0);
        daemon
    }

    fn until_it_answers(&self) {
        until("containerd answers", || self.ctr(&["version"]).code == 0);
    }

    /// Kills it as `kill -9` does, and starts it again after `meanwhile`.
    pub(crate) fn restart(&self, meanwhile: impl FnOnce()) {
        let mut child = self.child.lock().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        meanwhile();
        *child = spawn(&self.root, &self.state, self.kind);
        self.until_it_answers();
    }

    /// A directory for a test's own files.
    pub(crate) fn scratch(&self) -> &Path {
        &self.state
    }

    /// A `ctr` command line.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program("ctr"));
        command
            .arg("--address")
            .arg(self.socket())
            .args(["--namespace", NAMESPACE])
            .args(args);
        command
    }

    /// Runs `ctr` to its end.
    #[track_caller]
    pub(crate) fn ctr(&self, args: &[&str]) -> Done {
        finish(&mut self.command(args), b"")
    }

    /// The arguments of `ctr run` with the runtime under test.
    pub(crate) fn run_args<'a>(
        &self,
        options: &[&'a str],
        id: &'a str,
        program: &[&'a str],
    ) -> Vec<&'a str> {
        self.note(id);
        let mut args = vec!["run", "--runtime", RUNTIME];
        args.extend(options);
        args.extend([IMAGE, id]);
        args.extend(program);
        args
    }

    /// `ctr run` with the runtime under test.
    #[track_caller]
    pub(crate) fn run(&self, options: &[&str], id: &str, program: &[&str]) -> Done {
        self.ctr(&self.run_args(options, id, program))
    }

    /// The same, with input.
    #[track_caller]
    pub(crate) fn run_with(
        &self,
        input: &[u8],
        options: &[&str],
        id: &str,
        program: &[&str],
    ) -> Done {
        finish(
            &mut self.command(&self.run_args(options, id, program)),
            input,
        )
    }

    /// A container behind.
    #[track_caller]
    pub(crate) fn detached(&self, id: &str, program: &[&str]) {
        self.run(&["-d"], id, program).exits(0);
    }

    /// `ctr task exec`.
    #[track_caller]
    pub(crate) fn exec(&self, id: &str, program: &[&str]) -> Done {
        let exec_id = unique("exec");
        let mut args = vec!["task", "exec", "--exec-id", &exec_id, id];
        args.extend(program);
        self.ctr(&args)
    }

    /// PID and state of a task; `None` if there is none.
    #[track_caller]
    pub(crate) fn task(&self, id: &str) -> Option<(i32, String)> {
        let list = self.ctr(&["task", "ls"]).exits(0);
        list.stdout.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next()? == id).then_some(())?;
            Some((words.next()?.parse().ok()?, words.next()?.to_owned()))
        })
    }

    /// Waits until a task is in a state.
    #[track_caller]
    pub(crate) fn until_task_is(&self, id: &str, state: &str) {
        until(&format!("task {id} is {state}"), || {
            self.task(id).is_some_and(|(_, now)| now == state)
        });
    }

    /// Kills a container and removes it.
    #[track_caller]
    pub(crate) fn remove(&self, id: &str) {
        if self.task(id).is_some() {
            self.ctr(&["task", "kill", "--signal", "KILL", id]);
            self.until_task_is(id, "STOPPED");
            let done = self.ctr(&["task", "delete", id]);
            assert!(self.task(id).is_none(), "{done:#?}");
        }
        self.ctr(&["container", "rm", id]).exits(0);
    }

    /// Removes an ended task; the code that its program had is to be this.
    #[track_caller]
    pub(crate) fn delete(&self, id: &str, code: i32) {
        let done = self.ctr(&["task", "delete", id]).exits(0);
        let said = format!("non-zero exit code {code}");
        assert_eq!(done.stderr.contains("exit code"), code != 0, "{done:#?}");
        assert!(code == 0 || done.stderr.contains(&said), "{done:#?}");
    }

    /// The processes of this name: one at least.
    #[track_caller]
    pub(crate) fn pids_of(&self, name: &str) -> Vec<Pid> {
        let mut pids = Vec::new();
        until(&format!("{name} runs"), || {
            let mut all = processes(self.mark());
            all.retain(|(_, n)| n.starts_with(name));
            pids = all.into_iter().map(|(pid, _)| Pid::from_raw(pid)).collect();
            !pids.is_empty()
        });
        pids
    }

    /// Kills the process of this name, as `kill -9` does.
    #[track_caller]
    pub(crate) fn kill_process(&self, name: &str) {
        kill(self.pids_of(name)[0], Signal::SIGKILL).unwrap();
    }

    /// Text in every command line of this one's.
    fn mark(&self) -> &str {
        self.state.to_str().unwrap()
    }

    /// Where what must not lie on an overlay is.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Everything of any container that is on the host.
    pub(crate) fn traces(&self) -> Vec<String> {
        let mut found: Vec<_> = processes(self.mark())
            .into_iter()
            .map(|(pid, name)| format!("process {pid} {name}"))
            .collect();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        found.extend(
            mounts
                .lines()
                .filter(|l| l.contains(self.mark()))
                .map(Into::into),
        );
        found.extend(
            self.names
                .lock()
                .unwrap()
                .iter()
                .flat_map(|name| cgroups(name)),
        );
        let pods = self.state.join("w/containerd");
        let bundles = self.state.join("containerd/io.containerd.runtime.v2.task");
        let sandboxes = "containerd/io.containerd.sandbox.controller.v1.shim";
        let sandboxes = self.state.join(sandboxes).join(KUBERNETES);
        let tasks = [NAMESPACE, KUBERNETES].map(|name| bundles.join(name));
        for dir in tasks.into_iter().chain([pods, sandboxes]) {
            found.extend(entries(&dir));
        }
        found
    }

    /// Panics unless everything of all containers goes away.
    #[track_caller]
    pub(crate) fn assert_nothing_left(&self) {
        assert_gone(|| self.traces());
    }

    /// What containerd and its shims have logged.
    pub(crate) fn log(&self) -> String {
        let text = fs::read_to_string(self.state.join("log")).unwrap_or_default();
        let lines = text.lines().filter(|line| !line.contains("plugin"));
        lines.map(|line| format!("{line}\n")).collect()
    }
}

/// What is in a directory, but for bundles that a containerd was removing when it was
/// killed: it renames them first, and never comes back to them.
pub(crate) fn entries(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter(|e| !e.file_name().to_string_lossy().starts_with('.'));
    names.map(|e| e.path().display().to_string()).collect()
}

fn spawn(root: &Path, state: &Path, kind: Kind) -> Child {
    let lib = repository().join("out/lib/walnut");
    assert!(lib.join("vmlinux").exists(), "run `make build` first");
    // The one that is installed, where one is.
    let path = programs::path(&[&state.join(INSTALLED).join("bin"), &lib]);
    let log = fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(state.join("log"))
        .unwrap();
    let mut command = match kind {
        Kind::Networked => {
            let mut command = Command::new("unshare");
            command.arg("--net").arg(program("containerd"));
            command
        }
        _ => Command::new(program("containerd")),
    };
    command
        .arg("--config")
        .arg(state.join("config.toml"))
        .args(["--log-level", "debug"])
        .env("PATH", path)
        .env("WALNUT_ROOT", root.join("walnut"))
        .env("WALNUT_RUN", state.join("w"))
        .env_remove("WALNUT_LIB")
        .env_remove("WALNUT_LOG")
        .env_remove("WALNUT_DRIVER")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        // ^C is for the tests, which end it.
        .process_group(0);
    command.spawn().expect("start containerd")
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let failed = thread::panicking();
        if failed {
            let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("containerd.log");
            let copied = fs::copy(self.state.join("log"), &kept);
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(LOG_LINES)..];
            eprintln!("containerd's log ends so:\n{}", last.join("\n"));
            if copied.is_ok() {
                eprintln!("all of it is in {}", kept.display());
            }
        } else {
            self.assert_nothing_left();
        }
        let child = self.child.get_mut().unwrap_or_else(|e| e.into_inner());
        let _ = child.kill();
        let _ = child.wait();
        for (pid, _) in processes(self.mark()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for line in mounts.lines().rev() {
            if let Some(point) = line.split(' ').nth(4)
                && point.contains(self.mark())
            {
                let _ = umount2(Path::new(point), MntFlags::MNT_DETACH);
            }
        }
        for dir in [&self.root, &self.state] {
            let _ = fs::remove_dir_all(dir);
        }
    }
}
