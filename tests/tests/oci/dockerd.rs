//! A dockerd of a test's own, with a containerd of its own, in a network namespace that
//! stands for the node. `walnut install` has told it of the runtime. It is the host's, or the
//! one in the directory that `WALNUT_TEST_DOCKER` names, with its containerd and runc.

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Mutex,
};

use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use walnut_tests::{
    assert_gone,
    client::{self, Done, finish, repository},
    unique, until,
};

use walnut_tests::Namespace;

use crate::place::Place;

/// Where Debian's client is, whatever else a host has.
const CLIENT_DIR: &str = "/usr/bin";
/// Name of the image in it.
const IMAGE: &str = "demo:latest";
const RUNTIME: &str = "walnut-oci";

/// The directory of docker's programs, unless they are the host's.
fn dir() -> Option<PathBuf> {
    env::var_os("WALNUT_TEST_DOCKER").map(PathBuf::from)
}

/// Where dockerd and its containerd find programs, the installed shim among them.
fn path(place: &Place) -> OsString {
    let installed = place.dir.join("installed/bin");
    let host = env::var_os("PATH").unwrap();
    env::join_paths(
        [installed]
            .into_iter()
            .chain(dir())
            .chain(env::split_paths(&host)),
    )
    .unwrap()
}

pub(crate) struct Docker {
    pub(crate) place: Place,
    /// What must not lie on an overlay: layers.
    root: PathBuf,
    node: Namespace,
    daemon: Mutex<Child>,
}

/// The test image as docker reads it; the first caller makes it.
fn archive() -> PathBuf {
    let image = client::image();
    let archive = image.with_extension("docker.tar");
    let lock = fs::File::create(image.with_extension("docker.lock")).unwrap();
    lock.lock().unwrap();
    if !archive.exists() {
        let new = image.with_extension("docker-new.tar");
        let _ = fs::remove_file(&new);
        let mut copy = Command::new("skopeo");
        copy.args(["--insecure-policy", "copy", "--quiet"])
            .arg(format!("oci-archive:{}", image.display()))
            .arg(format!("docker-archive:{}:{IMAGE}", new.display()));
        finish(&mut copy, b"").exits(0);
        fs::rename(&new, &archive).unwrap();
    }
    archive
}

impl Docker {
    pub(crate) fn start() -> Self {
        let archive = archive();
        let place = Place::new();
        let root = client::cache().join("e2e").join(unique("docker"));
        fs::create_dir_all(&root).unwrap();
        let mut install = Command::new(repository().join("out/bin/walnut"));
        install
            .args(["install", "--no-containerd", "--no-podman", "--prefix"])
            .arg(place.dir.join("installed"))
            .arg("--docker-config")
            .arg(place.dir.join("daemon.json"))
            .env_remove("WALNUT_LIB");
        finish(&mut install, b"").exits(0);
        let node = Namespace::new();
        node.ip("link set lo up");
        let daemon = Mutex::new(spawn(&place, &root, &node));
        let docker = Self {
            place,
            root,
            node,
            daemon,
        };
        docker.until_it_answers();
        let archive = archive.to_str().unwrap();
        docker.docker(&["load", "--input", archive]).exits(0);
        docker
    }

    /// Major version of the daemon.
    pub(crate) fn version(&self) -> u32 {
        let format = ["version", "--format", "{{.Server.Version}}"];
        let said = self.docker(&format).exits(0).stdout;
        said.split('.').next().unwrap().parse().unwrap()
    }

    fn until_it_answers(&self) {
        until("dockerd answers", || self.docker(&["version"]).code == 0);
    }

    /// Kills it as `kill -9` does, and starts it again.
    pub(crate) fn restart(&self) {
        let pid = fs::read_to_string(self.place.dir.join("x/containerd/containerd.pid"));
        let pid = pid.unwrap();
        let mut daemon = self.daemon.lock().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        // It dies of the daemon's death; one that is dying would be taken for one that runs.
        until("its containerd is gone", || {
            !PathBuf::from("/proc").join(pid.trim()).exists()
        });
        *daemon = spawn(&self.place, &self.root, &self.node);
        drop(daemon);
        self.until_it_answers();
    }

    /// A docker command line.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let client = dir().unwrap_or_else(|| CLIENT_DIR.into()).join("docker");
        let mut command = Command::new(client);
        let socket = self.place.dir.join("d.sock");
        command
            .arg("--host")
            .arg(format!("unix://{}", socket.display()))
            .args(args)
            .env("DOCKER_CONFIG", &self.place.dir)
            .env_remove("DOCKER_HOST")
            .env_remove("DOCKER_CONTEXT");
        command
    }

    /// Runs docker to its end.
    #[track_caller]
    pub(crate) fn docker(&self, args: &[&str]) -> Done {
        self.docker_with(b"", args)
    }

    /// The same with input.
    #[track_caller]
    pub(crate) fn docker_with(&self, input: &[u8], args: &[&str]) -> Done {
        finish(&mut self.command(args), input)
    }

    /// The command line of `docker run` with the runtime under test.
    pub(crate) fn run_command(&self, options: &[&str], program: &[&str]) -> Command {
        let args = [&["run", "--runtime", RUNTIME], options, &[IMAGE], program];
        self.command(&args.concat())
    }

    /// `docker run` with the runtime under test.
    #[track_caller]
    pub(crate) fn run(&self, options: &[&str], program: &[&str]) -> Done {
        finish(&mut self.run_command(options, program), b"")
    }

    /// A container behind, which is looked for by its ID.
    #[track_caller]
    pub(crate) fn detached(&self, options: &[&str], program: &[&str]) {
        let done = self.run(&[&["-d"], options].concat(), program).exits(0);
        self.place.note(done.stdout.trim());
    }

    /// A program on the node.
    #[track_caller]
    pub(crate) fn on_the_node(&self, program: &str, args: &[&str]) -> Done {
        finish(self.node.within(program).args(args), b"")
    }

    /// What docker says of a container.
    #[track_caller]
    pub(crate) fn shows(&self, name: &str, format: &str) -> String {
        let done = self.docker(&["inspect", "--format", format, name]).exits(0);
        done.stdout.trim().to_owned()
    }

    /// Waits until docker says `wanted` of a container.
    #[track_caller]
    pub(crate) fn until_shows(&self, name: &str, format: &str, wanted: &str) {
        until(&format!("{format} of {name} is {wanted}"), || {
            self.shows(name, format) == wanted
        });
    }

    /// Waits until a container's log has `text`.
    #[track_caller]
    pub(crate) fn until_logs(&self, name: &str, text: &str) {
        until(&format!("{name} logs {text:?}"), || {
            self.docker(&["logs", name]).stdout.contains(text)
        });
    }

    /// Panics unless everything of all containers goes away, as docker and the host see it.
    #[track_caller]
    pub(crate) fn assert_nothing_left(&self) {
        let all = self.docker(&["ps", "--all", "--quiet"]).exits(0);
        assert_eq!(all.stdout, "", "docker has containers");
        self.place.assert_nothing_left();
        // Where docker has runtimes keep their states: in a directory for each of them, or
        // in runc's.
        let dir = self.place.dir.join("x");
        assert_gone(|| {
            let of = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
            let runtimes = of(dir.clone()).map(|entry| entry.path());
            let runtimes = runtimes.filter(|dir| {
                let name = dir.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with("runtime-")
            });
            let states = runtimes.flat_map(|dir| of(dir.join("moby")));
            let names = states.map(|entry| entry.path().display().to_string());
            names.filter(|name| !name.contains("/.")).collect()
        });
    }
}

fn spawn(place: &Place, root: &PathBuf, node: &Namespace) -> Child {
    let dir = &place.dir;
    let log = fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(dir.join("dockerd.log"))
        .unwrap();
    let mut command = node.within("dockerd");
    command
        .arg("--config-file")
        .arg(dir.join("daemon.json"))
        .arg("--data-root")
        .arg(root)
        .arg("--exec-root")
        .arg(dir.join("x"))
        .arg("--pidfile")
        .arg(dir.join("dockerd.pid"))
        .arg("--host")
        .arg(format!("unix://{}", dir.join("d.sock").display()))
        .args(["--storage-driver=overlay2", "--live-restore"])
        .env("PATH", path(place))
        .env("WALNUT_RUN", dir.join("w"))
        .env("WALNUT_ROOT", dir.join("r"))
        .env_remove("WALNUT_LIB")
        .env_remove("WALNUT_LOG")
        .env_remove("WALNUT_DRIVER")
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        // ^C is for the tests, which end it.
        .process_group(0);
    command.spawn().expect("start dockerd")
}

impl Drop for Docker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.place.dir.join("dockerd.log")).unwrap_or_default();
            let bad = |line: &&str| !line.contains("level=info");
            let lines: Vec<_> = log.lines().filter(bad).collect();
            let last = &lines[lines.len().saturating_sub(60)..];
            eprintln!("dockerd's log ends so:\n{}", last.join("\n"));
        }
        let all = self.docker(&["ps", "--all", "--quiet"]).stdout;
        let all: Vec<_> = all.split_whitespace().collect();
        if !all.is_empty() {
            self.docker(&[&["rm", "--force"], &*all].concat());
        }
        let daemon = self.daemon.get_mut().unwrap_or_else(|e| e.into_inner());
        // So that its containerd ends with it.
        let _ = kill(Pid::from_raw(daemon.id().cast_signed()), Signal::SIGTERM);
        let _ = daemon.wait();
        let root = self.root.to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for line in mounts.lines().rev() {
            if let Some(point) = line.split(' ').nth(4)
                && (point.contains(self.place.mark()) || point.contains(root))
            {
                let _ = umount2(point, MntFlags::MNT_DETACH);
            }
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}
