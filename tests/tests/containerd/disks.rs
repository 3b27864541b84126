//! Root file systems on disks: those of containerd's block snapshotters.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use containerd_shim_protos::{
    api::{
        CreateTaskRequest, DeleteRequest, KillRequest, Mount, ShutdownRequest, StartRequest,
        StateRequest, WaitRequest,
    },
    shim_async::{Client, TaskClient},
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use ttrpc::context::{self, Context};
use walnut_tests::{driver, unique};

use crate::{
    bootstrap::Bench,
    daemon::{Daemon, finish, repository},
    programs::Format,
};

/// A shim, called as containerd calls it with a block snapshotter: containerd 1.6 has none
/// that this host could serve.
struct Shim {
    bench: Bench,
    runtime: Runtime,
    tasks: TaskClient,
}

fn soon() -> Context {
    context::with_duration(Duration::from_secs(120))
}

/// Debian's busybox, and a few names that it has.
fn tree(dir: &Path) {
    let bin = dir.join("bin");
    fs::create_dir_all(&bin).unwrap();
    fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
    for name in ["sh", "cat", "sleep", "touch", "sync"] {
        symlink("busybox", bin.join(name)).unwrap();
    }
}

impl Shim {
    fn start() -> Self {
        let bench = Bench::new();
        bench
            .shim("start", &[("MAX_SHIM_VERSION", "2")], b"")
            .exits(0);
        let runtime = Runtime::new().unwrap();
        let client = runtime.block_on(Client::connect(&bench.address())).unwrap();
        Self {
            tasks: TaskClient::new(client),
            runtime,
            bench,
        }
    }

    /// A file with a file system of this kind, with the tree.
    fn disk(&self, name: &str, kind: &str) -> PathBuf {
        let (root, file) = (self.bench.dir.join("tree"), self.bench.dir.join(name));
        if !root.exists() {
            tree(&root);
        }
        let mut make = Command::new(format!("mkfs.{kind}"));
        make.args(["-q", "-d"]).arg(&root).arg(&file).arg("16M");
        finish(&mut make, b"").exits(0);
        file
    }

    /// Runs a container of the pod with that disk as its root, until it has started.
    fn run(&self, id: &str, script: &str, disk: &Path, options: &[&str]) -> Result<u32, String> {
        let bundle = self.bench.dir.join(unique("bundle"));
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let mut spec = Command::new(repository().join("out/bin/walnut-oci"));
        spec.args(["spec", "--bundle"]).arg(&bundle);
        finish(&mut spec, b"").exits(0);
        let file = bundle.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["sh", "-c", script]);
        config["root"]["readonly"] = json!(false);
        let kind = if id == self.bench.id {
            "sandbox"
        } else {
            "container"
        };
        config["annotations"] = json!({
            "io.kubernetes.cri.container-type": kind,
            "io.kubernetes.cri.sandbox-id": self.bench.id,
        });
        fs::write(&file, config.to_string()).unwrap();
        let request = CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            rootfs: vec![Mount {
                type_: "ext4".into(),
                source: disk.display().to_string(),
                options: options.iter().map(|&o| o.into()).collect(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let created = self.runtime.block_on(self.tasks.create(soon(), &request));
        let pid = created.map_err(|e| e.to_string())?.pid;
        let start = StartRequest {
            id: id.into(),
            ..Default::default()
        };
        self.runtime
            .block_on(self.tasks.start(soon(), &start))
            .unwrap();
        Ok(pid)
    }

    /// Waits for a container's end, and removes it; the code that its program had.
    fn end(&self, id: &str) -> u32 {
        let wait = WaitRequest {
            id: id.into(),
            ..Default::default()
        };
        let ended = self.runtime.block_on(self.tasks.wait(soon(), &wait));
        let delete = DeleteRequest {
            id: id.into(),
            ..Default::default()
        };
        self.runtime
            .block_on(self.tasks.delete(soon(), &delete))
            .unwrap();
        ended.unwrap().exit_status
    }

    fn kill(&self, id: &str) {
        let kill = KillRequest {
            id: id.into(),
            signal: 9,
            ..Default::default()
        };
        self.runtime
            .block_on(self.tasks.kill(soon(), &kill))
            .unwrap();
    }

    fn is_there(&self, id: &str) -> bool {
        let state = StateRequest {
            id: id.into(),
            ..Default::default()
        };
        let state = self.runtime.block_on(self.tasks.state(soon(), &state));
        state.is_ok()
    }

    fn shut_down(self) {
        let request = ShutdownRequest {
            id: self.bench.id.clone(),
            ..Default::default()
        };
        let _ = self.runtime.block_on(self.tasks.shutdown(soon(), &request));
        drop(self.tasks);
        self.bench.goes();
    }
}

/// A file of the file system in `disk`, which nobody has mounted.
fn read(disk: &Path, path: &str) -> String {
    let mut command = Command::new("debugfs");
    command.args(["-R", &format!("cat {path}")]).arg(disk);
    finish(&mut command, b"").exits(0).stdout
}

/// The file system is whole, and was unmounted as it should be. Where the host mounts it that
/// cannot be asserted: any process's mount namespace that was made meanwhile has a copy.
fn assert_clean(disk: &Path) {
    if driver() != "vmm" {
        return;
    }
    let mut check = Command::new("e2fsck");
    check.args(["-f", "-n"]).arg(disk);
    let done = finish(&mut check, b"").exits(0);
    assert!(!done.stdout.contains("recover"), "{done:#?}");
}

#[test]
fn containers_write_to_their_disks_and_come_again() {
    const ROUNDS: usize = 4;
    let shim = Shim::start();
    let pod = shim.bench.id.clone();
    let root = shim.disk("pod.img", "ext4");
    let disks = [shim.disk("a.img", "ext4"), shim.disk("b.img", "ext3")];
    let pid = shim.run(&pod, "sleep 1000", &root, &["loop"]).unwrap();
    for round in 0..ROUNDS {
        for (disk, id) in disks.iter().zip(["a", "b"]) {
            let id = format!("{id}{round}");
            let script = format!("echo {round} >>/log; cat /log | grep -q {round}");
            let script = script.replace("grep", "busybox grep");
            assert_eq!(shim.run(&id, &script, disk, &["loop"]).unwrap(), pid);
        }
        for (disk, id) in disks.iter().zip(["a", "b"]) {
            assert_eq!(shim.end(&format!("{id}{round}")), 0);
            // At once: the answer says that it is written.
            let want: String = (0..=round).map(|n| format!("{n}\n")).collect();
            assert_eq!(read(disk, "/log"), want);
            assert_clean(disk);
        }
    }
    // One that is killed.
    let script = "echo last >>/log; sync; touch /ready; sleep 1000";
    shim.run("killed", script, &disks[0], &["loop"]).unwrap();
    shim.kill("killed");
    assert_eq!(shim.end("killed"), 137);
    assert_clean(&disks[0]);
    // The pod's own goes with its machine.
    assert!(shim.is_there(&pod));
    shim.kill(&pod);
    assert_eq!(shim.end(&pod), 137);
    assert_clean(&root);
    shim.shut_down();
}

#[test]
fn what_is_no_file_system_is_refused_and_harms_no_other() {
    let shim = Shim::start();
    let pod = shim.bench.id.clone();
    let root = shim.disk("pod.img", "ext4");
    shim.run(&pod, "sleep 1000", &root, &["loop"]).unwrap();
    let noise = shim.bench.dir.join("noise.img");
    fs::write(&noise, vec![0x5a; 1 << 20]).unwrap();
    for disk in [&noise, &shim.bench.dir.join("nowhere.img"), &shim.bench.dir] {
        let refused = shim.run("bad", "true", disk, &["loop"]).unwrap_err();
        assert!(
            refused.contains("mount") || refused.contains("image"),
            "{refused}"
        );
        assert!(!shim.is_there("bad"));
    }
    // Its name can be had.
    let good = shim.disk("good.img", "ext4");
    shim.run("bad", "exit 3", &good, &["loop"]).unwrap();
    assert_eq!(shim.end("bad"), 3);
    shim.kill(&pod);
    assert_eq!(shim.end(&pod), 137);
    shim.shut_down();
}

/// The block snapshotter that containerd has from 1.7 on, and that needs no device of the
/// host's.
#[test]
fn containerd_s_own_block_snapshotter() {
    if Format::of_daemon() == Format::Two {
        eprintln!("not tested: of Debian's containerds, 2.x has the snapshotter blockfile");
        return;
    }
    let daemon = Daemon::start_with_snapshotter("blockfile");
    let id = unique("c");
    let options = ["-d", "--snapshotter", "blockfile"];
    let script = "echo hers >/file; sleep 1000";
    daemon.run(&options, &id, &["sh", "-c", script]).exits(0);
    let read = || daemon.exec(&id, &["cat", "/file"]);
    walnut_tests::until("it has written", || read().stdout == "hers\n");
    let kind = daemon.exec(&id, &["stat", "-f", "-c", "%T", "/"]).exits(0);
    eprintln!("its root is {}", kind.stdout.trim());
    // A task of the same container again.
    daemon
        .ctr(&["task", "kill", "--signal", "KILL", &id])
        .exits(0);
    daemon.until_task_is(&id, "STOPPED");
    daemon.delete(&id, 137);
    daemon.ctr(&["task", "start", "-d", &id]).exits(0);
    assert_eq!(read().exits(0).stdout, "hers\n");
    daemon.remove(&id);
    daemon.assert_nothing_left();
}
