//! A podman of a test's own.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use walnut_tests::{
    Namespace,
    client::{self, Done, finish, repository},
    unique, until,
};

use crate::place::Place;

/// Name of the image in it.
const IMAGE: &str = "localhost/demo:latest";
/// Of that with systemd.
const PROGRAMS_IMAGE: &str = "localhost/programs:latest";

/// Directories that podman keeps to, and the test image.
pub(crate) struct Engine {
    pub(crate) place: Place,
    /// What must not lie on an overlay: containers' layers.
    root: PathBuf,
    /// Where it is, if not on the host: its network stands for a node's.
    node: Option<Namespace>,
}

/// The network of its containers.
const NETWORK: &str = r#"{
    "cniVersion": "0.4.0",
    "name": "podman",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "engine0",
            "isGateway": true,
            "ipMasq": true,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": "@dir@/addresses",
                "ranges": [[{"subnet": "10.76.0.0/24"}]],
                "routes": [{"dst": "0.0.0.0/0"}]
            }
        },
        {"type": "portmap", "capabilities": {"portMappings": true}},
        {"type": "firewall"}
    ]
}"#;

/// An image store that podmans share, and write to no more; the first caller makes it.
fn store() -> PathBuf {
    // Of both images, and named after both.
    let image = client::image();
    let programs = client::programs_image();
    let stem = programs.file_stem().unwrap().to_string_lossy();
    let store = image.with_extension(format!("{stem}.podman"));
    let lock = fs::File::create(store.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if !store.exists() {
        let new = image.with_extension("podman-new");
        let _ = fs::remove_dir_all(&new);
        fs::create_dir_all(&new).unwrap();
        // podman wants a short name for it.
        let run = Path::new("/tmp").join(unique("podman"));
        let podman = || {
            let mut command = Command::new("podman");
            command.arg("--root").arg(new.join("store"));
            command.arg("--runroot").arg(&run);
            command.arg("--tmpdir").arg(new.join("tmp"));
            command.args([
                "--storage-driver=overlay",
                "--events-backend=none",
                "--cgroup-manager=cgroupfs",
            ]);
            command
        };
        for (file, tag) in [(&image, IMAGE), (&programs, PROGRAMS_IMAGE)] {
            let loaded = finish(podman().arg("load").arg("--input").arg(file), b"").exits(0);
            let name = loaded.stdout.trim().rsplit(' ').next().unwrap().to_owned();
            finish(podman().args(["tag", &name, tag]), b"").exits(0);
        }
        fs::rename(new.join("store"), &store).unwrap();
        for dir in [&new, &run] {
            let _ = fs::remove_dir_all(dir);
        }
    }
    store
}

impl Engine {
    pub(crate) fn new() -> Self {
        store();
        let place = Place::new();
        let root = client::cache().join("e2e").join(unique("podman"));
        fs::create_dir_all(&root).unwrap();
        // conmon passes hardly any variable on.
        let runtime = place.dir.join("walnut-oci");
        let script = format!(
            "#!/bin/sh\nexport WALNUT_RUN={0}/w WALNUT_ROOT={0}/r\nexec {1} --root {0}/s \"$@\"\n",
            place.mark(),
            repository().join("out/bin/walnut-oci").display(),
        );
        fs::write(&runtime, script).unwrap();
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).unwrap();
        // This host's settings are not the tests'.
        let networks = place.dir.join("networks");
        fs::create_dir(&networks).unwrap();
        let network = NETWORK.replace("@dir@", place.mark());
        fs::write(networks.join("podman.conflist"), network).unwrap();
        let conf =
            format!("[network]\nnetwork_backend = \"cni\"\nnetwork_config_dir = {networks:?}\n");
        fs::write(place.dir.join("containers.conf"), conf).unwrap();
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\nrunroot = {:?}\ngraphroot = {:?}\n",
            place.dir.join("run"),
            root.join("store"),
        );
        fs::write(place.dir.join("storage.conf"), storage).unwrap();
        Self {
            place,
            root,
            node: None,
        }
    }

    /// One on a node.
    pub(crate) fn on(node: Namespace) -> Self {
        let mut engine = Self::new();
        engine.node = Some(node);
        engine
    }

    /// A program on the node.
    #[track_caller]
    pub(crate) fn on_the_node(&self, program: &str, args: &[&str]) -> Done {
        finish(self.program(program).args(args), b"")
    }

    fn program(&self, program: &str) -> Command {
        match &self.node {
            Some(node) => node.within(program),
            None => Command::new(program),
        }
    }

    /// A podman command line; the images are `demo` and `programs`.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let dir = &self.place.dir;
        let mut command = self.program("podman");
        for (option, at) in [
            ("--root", self.root.join("store")),
            ("--runroot", dir.join("run")),
            ("--tmpdir", dir.join("tmp")),
            ("--runtime", dir.join("walnut-oci")),
        ] {
            command.arg(option).arg(at);
        }
        let store = store();
        command
            .arg("--storage-driver=overlay")
            .arg(format!(
                "--storage-opt=overlay.imagestore={}",
                store.display()
            ))
            .args(["--cgroup-manager=cgroupfs", "--events-backend=file"])
            .args(args.iter().map(|arg| match *arg {
                "demo" => IMAGE,
                "programs" => PROGRAMS_IMAGE,
                other => other,
            }))
            .env("CONTAINERS_CONF", dir.join("containers.conf"))
            .env("CONTAINERS_STORAGE_CONF", dir.join("storage.conf"));
        command
    }

    /// Runs podman to its end.
    #[track_caller]
    pub(crate) fn podman(&self, args: &[&str]) -> Done {
        finish(&mut self.command(args), b"")
    }

    /// The same with input.
    #[track_caller]
    pub(crate) fn podman_with(&self, input: &[u8], args: &[&str]) -> Done {
        finish(&mut self.command(args), input)
    }

    /// Has the containers that there are looked for by their IDs.
    pub(crate) fn note_all(&self) {
        let all = self.podman(&["ps", "--all", "--quiet", "--no-trunc"]);
        all.exits(0)
            .stdout
            .lines()
            .for_each(|id| self.place.note(id));
    }

    /// What podman says of a container.
    #[track_caller]
    pub(crate) fn shows(&self, name: &str, format: &str) -> String {
        let done = self.podman(&["inspect", "--format", format, name]).exits(0);
        done.stdout.trim().to_owned()
    }

    /// Waits until podman says `wanted` of a container.
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
            self.podman(&["logs", name]).stdout.contains(text)
        });
    }

    /// Panics unless everything of all containers goes away, as podman and the host see it.
    #[track_caller]
    pub(crate) fn assert_nothing_left(&self) {
        let all = self.podman(&["ps", "--all", "--quiet"]).exits(0);
        assert_eq!(all.stdout, "", "podman has containers");
        self.place.assert_nothing_left();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let mut remove = self.command(&["rm", "--all", "--force", "--time=0"]);
        let _ = remove.stdout(Stdio::null()).stderr(Stdio::null()).status();
        // The mount that podman makes of its own directory.
        let _ = nix::mount::umount(&self.root.join("store/overlay"));
        let _ = fs::remove_dir_all(&self.root);
    }
}
