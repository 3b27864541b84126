//! Where a test's containers are, and the command line that makes them.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
    thread,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use walnut_tests::{
    assert_gone, cgroups,
    client::{Done, finish, repository},
    processes, unique, until,
};

/// Directories of a test's own.
pub(crate) struct Place {
    /// Short: sockets' addresses are.
    pub(crate) dir: PathBuf,
    /// Names of everything that has run.
    names: Mutex<Vec<String>>,
}

impl Place {
    pub(crate) fn new() -> Self {
        let program = repository().join("out/bin/walnut-oci");
        assert!(program.exists(), "run `make build` first");
        let dir = Path::new("/tmp").join(unique("oci"));
        fs::create_dir_all(&dir).unwrap();
        Self {
            dir,
            names: Mutex::default(),
        }
    }

    /// A container of this name is made.
    pub(crate) fn note(&self, name: &str) {
        self.names.lock().unwrap().push(name.to_owned());
    }

    /// The runtime's root.
    pub(crate) fn root(&self) -> PathBuf {
        self.dir.join("s")
    }

    /// A `walnut-oci` command line.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(repository().join("out/bin/walnut-oci"));
        command
            .arg("--root")
            .arg(self.root())
            .args(args)
            .env("WALNUT_RUN", self.dir.join("w"))
            .env("WALNUT_ROOT", self.dir.join("r"))
            .env_remove("WALNUT_LIB")
            .env_remove("WALNUT_LOG")
            .env_remove("WALNUT_DRIVER");
        command
    }

    /// Runs `walnut-oci` to its end. Not for what leaves a container behind, which has
    /// its streams: [`Self::create`].
    #[track_caller]
    pub(crate) fn oci(&self, args: &[&str]) -> Done {
        finish(&mut self.command(args), b"")
    }

    /// A bundle of busybox whose program this script is, changed by `change`.
    pub(crate) fn bundle(&self, script: &str, change: impl FnOnce(&mut Value)) -> PathBuf {
        let dir = self.dir.join(unique("b"));
        let bin = dir.join("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
        for name in ["sh", "cat", "sleep", "stty", "touch", "ls", "true"] {
            symlink("busybox", bin.join(name)).unwrap();
        }
        self.oci(&["spec", "--bundle", dir.to_str().unwrap()])
            .exits(0);
        let file = dir.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["sh", "-c", script]);
        config["root"]["readonly"] = json!(false);
        change(&mut config);
        fs::write(&file, config.to_string()).unwrap();
        dir
    }

    /// `create`, with files as streams; what it said on its standard error, which is the
    /// container's too.
    #[track_caller]
    pub(crate) fn create(&self, id: &str, bundle: &Path, more: &[&str]) -> Done {
        self.note(id);
        let mut args = vec!["create", "--bundle", bundle.to_str().unwrap()];
        args.extend(more);
        args.push(id);
        let status = self
            .command(&args)
            .stdin(Stdio::null())
            .stdout(File::create(self.output(id)).unwrap())
            .stderr(File::create(self.dir.join(format!("{id}.err"))).unwrap())
            .status()
            .unwrap();
        Done {
            code: status.code().unwrap_or(-1),
            stdout: String::new(),
            stderr: fs::read_to_string(self.dir.join(format!("{id}.err"))).unwrap(),
        }
    }

    /// `create` and `start`.
    #[track_caller]
    pub(crate) fn start(&self, id: &str, bundle: &Path) {
        self.create(id, bundle, &[]).exits(0);
        self.oci(&["start", id]).exits(0);
    }

    /// File that a created container writes to.
    fn output(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.out"))
    }

    /// Waits until a container has written `text`.
    #[track_caller]
    pub(crate) fn until_says(&self, id: &str, text: &str) {
        until(&format!("{id} says {text:?}"), || {
            fs::read_to_string(self.output(id)).is_ok_and(|said| said.contains(text))
        });
    }

    /// A container's state.
    #[track_caller]
    pub(crate) fn state(&self, id: &str) -> Value {
        let done = self.oci(&["state", id]).exits(0);
        serde_json::from_str(&done.stdout).unwrap()
    }

    /// Waits until a container is `status`.
    #[track_caller]
    pub(crate) fn until_is(&self, id: &str, status: &str) {
        until(&format!("{id} is {status}"), || {
            self.state(id)["status"] == status
        });
    }

    /// The same of one that somebody else is making.
    #[track_caller]
    pub(crate) fn until_runs(&self, id: &str) {
        until(&format!("{id} runs"), || {
            let state = self.oci(&["state", id]);
            state.stdout.contains("\"running\"")
        });
    }

    /// Text in every command line of a container's processes.
    pub(crate) fn mark(&self) -> &str {
        self.dir.to_str().unwrap()
    }

    /// Processes of the containers: some are told of a directory, some of a name.
    fn processes(&self) -> Vec<(i32, String)> {
        let names = self.names.lock().unwrap();
        let words = names.iter().map(String::as_str).chain([self.mark()]);
        words.flat_map(processes).collect()
    }

    /// Kills the process of this name, as `kill -9` does.
    #[track_caller]
    pub(crate) fn kill_process(&self, name: &str) {
        let mut pid = None;
        until(&format!("{name} runs"), || {
            let all = self.processes();
            pid = all.into_iter().find(|(_, n)| n.starts_with(name));
            pid.is_some()
        });
        kill(Pid::from_raw(pid.unwrap().0), Signal::SIGKILL).unwrap();
    }

    /// Everything of any container that is on the host.
    fn traces(&self) -> Vec<String> {
        let mut found: Vec<_> = self
            .processes()
            .into_iter()
            .map(|(pid, name)| format!("process {pid} {name}"))
            .collect();
        for table in ["/proc/self/mountinfo", "/proc/net/unix"] {
            let text = fs::read_to_string(table).unwrap();
            let ours = text
                .lines()
                .filter(|l| l.contains(&format!("{}/w/oci", self.mark())));
            found.extend(ours.map(Into::into));
        }
        let names = self.names.lock().unwrap();
        found.extend(names.iter().flat_map(|name| cgroups(name)));
        for dir in [self.root(), self.dir.join("w/oci")] {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            let hidden = |name: &str| name.starts_with('.') && !name.starts_with(".new");
            found.extend(
                entries
                    .filter(|e| !hidden(&e.file_name().to_string_lossy()))
                    .map(|e| e.path().display().to_string()),
            );
        }
        found
    }

    /// Panics unless everything of all containers goes away.
    #[track_caller]
    pub(crate) fn assert_nothing_left(&self) {
        assert_gone(|| self.traces());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if thread::panicking() {
            for entry in fs::read_dir(self.root()).into_iter().flatten().flatten() {
                let log = fs::read_to_string(entry.path().join("log")).unwrap_or_default();
                eprintln!("log of {}:\n{log}", entry.path().display());
            }
        } else {
            self.assert_nothing_left();
        }
        for (pid, _) in self.processes() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}
