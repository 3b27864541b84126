//! What the shim answers those that start it, in each of their languages.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use walnut_tests::{processes, unique, until};

use crate::daemon::{Daemon, Done, finish, repository};

/// A bundle, and the shim's directories.
pub(crate) struct Bench {
    pub(crate) dir: PathBuf,
    pub(crate) id: String,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let id = unique("boot");
        let dir = Path::new("/tmp").join(&id);
        fs::create_dir_all(dir.join("bundle")).unwrap();
        fs::write(dir.join("bundle/config.json"), "{}").unwrap();
        Self { dir, id }
    }

    /// Calls the shim as containerd does.
    pub(crate) fn shim(&self, action: &str, env: &[(&str, &str)], input: &[u8]) -> Done {
        let mut command =
            Command::new(repository().join("out/lib/walnut/containerd-shim-walnut-v2"));
        command
            .args([
                "-namespace",
                "space",
                "-id",
                &self.id,
                "-address",
                "/nowhere",
            ])
            .args(["-publish-binary", "/usr/bin/containerd", action])
            .current_dir(self.dir.join("bundle"))
            .env("WALNUT_ROOT", self.dir.join("s"))
            .env("WALNUT_RUN", self.dir.join("r"))
            .env_remove("MAX_SHIM_VERSION")
            .envs(env.iter().copied());
        finish(&mut command, input)
    }

    /// The address that the bundle says; somebody answers there.
    pub(crate) fn address(&self) -> String {
        let address = fs::read_to_string(self.dir.join("bundle/address")).unwrap();
        UnixStream::connect(address.strip_prefix("unix://").unwrap()).unwrap();
        address
    }

    /// The shim of a container that was never created goes, with everything.
    pub(crate) fn end(self) {
        self.shim("delete", &[], b"").exits(0);
        self.goes();
    }

    /// The shim goes, with everything.
    pub(crate) fn goes(self) {
        until("the supervisor is gone", || {
            processes(self.dir.to_str().unwrap()).is_empty()
        });
        let left: Vec<_> = fs::read_dir(self.dir.join("r/containerd"))
            .unwrap()
            .collect();
        assert!(left.is_empty(), "{left:?}");
        fs::remove_dir_all(&self.dir).unwrap();
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for (pid, _) in processes(self.dir.to_str().unwrap()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        self.shim("delete", &[], b"");
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[test]
fn an_address_for_the_oldest() {
    let bench = Bench::new();
    let done = bench.shim("start", &[], b"").exits(0);
    assert_eq!(done.stdout, bench.address());
    // Whoever asks again gets the same supervisor.
    let again = bench.shim("start", &[], b"").exits(0);
    assert_eq!(again.stdout, done.stdout);
    assert_eq!(processes(bench.dir.to_str().unwrap()).len(), 1);
    let pid = fs::read_to_string(bench.dir.join("bundle/shim.pid")).unwrap();
    assert_eq!(processes(bench.dir.to_str().unwrap())[0].0.to_string(), pid);
    bench.end();
}

#[test]
fn json_for_those_who_name_a_version() {
    let bench = Bench::new();
    let done = bench
        .shim("start", &[("MAX_SHIM_VERSION", "2")], b"")
        .exits(0);
    let reply: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!(reply["version"], 2);
    assert_eq!(reply["protocol"], "ttrpc");
    assert_eq!(reply["address"], bench.address());
    bench.end();
}

#[test]
fn protobuf_for_those_who_write_it() {
    let bench = Bench::new();
    let text = |field: u8, text: &str| {
        let mut bytes = vec![field << 3 | 2, u8::try_from(text.len()).unwrap()];
        bytes.extend(text.as_bytes());
        bytes
    };
    let params = [text(1, &bench.id), text(2, "space")].concat();
    let env = [("MAX_SHIM_VERSION", "2")];
    let done = bench.shim("start", &env, &params).exits(0);
    let version = vec![1 << 3, 3];
    let want = [version, text(2, &bench.address()), text(3, "ttrpc")].concat();
    assert_eq!(done.stdout.as_bytes(), want);
    bench.end();
}

/// What the containerd under test made of the answer: it keeps it for its next start.
#[track_caller]
pub(crate) fn assert_spoken(daemon: &Daemon, bundle: &Path, version: i32) {
    let address = fs::read_to_string(bundle.join("address")).unwrap();
    match fs::read(bundle.join("bootstrap.json")) {
        Ok(kept) => {
            let kept: serde_json::Value = serde_json::from_slice(&kept).unwrap();
            let want = serde_json::json!({
                "version": version,
                "address": address,
                "protocol": "ttrpc",
            });
            assert_eq!(kept, want);
        }
        // 1.x keeps the address alone.
        Err(e) => assert!(daemon.version().starts_with("1."), "{e}"),
    }
}

#[test]
fn containerd_understands_the_answer() {
    let daemon = Daemon::start();
    let id = unique("c");
    daemon.detached(&id, &["sleep", "1000"]);
    // 2.x speaks both, and asks for what 1.7 asks for; see `Format::kubernetes` as well.
    assert_spoken(&daemon, &daemon.bundle(&id), 2);
    daemon.remove(&id);
}
