//! The containerd under test, and how it wants to be configured: the host's own, or the
//! one in the directory that `WALNUT_TEST_CONTAINERD` names.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use walnut_tests::client::{finish, repository};

/// The directory of the programs, unless they are the host's.
fn dir() -> Option<PathBuf> {
    env::var_os("WALNUT_TEST_CONTAINERD").map(PathBuf::from)
}

/// One of its programs. That it is not there is an error: no other one is meant.
pub(crate) fn program(name: &str) -> PathBuf {
    let Some(dir) = dir() else {
        return name.into();
    };
    let file = dir.join(name);
    assert!(
        file.exists(),
        "WALNUT_TEST_CONTAINERD: there is no {}",
        file.display()
    );
    file
}

/// A PATH with these directories first, then that of the programs.
pub(crate) fn path(first: &[&Path]) -> OsString {
    let all = first.iter().map(|dir| dir.to_path_buf()).chain(dir());
    let host = env::var_os("PATH").unwrap();
    env::join_paths(all.chain(env::split_paths(&host))).unwrap()
}

/// Name of the runtime whose shims make sandboxes, of containerd 2.x.
pub(crate) const BY_SANDBOX_API: &str = "walnut-sandboxes";

/// How a containerd writes its configuration, as it says itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// 1.x.
    Two,
    /// 2.x: the CRI plugin has become three.
    Three,
}

impl Format {
    /// That of the containerd under test.
    pub(crate) fn of_daemon() -> Self {
        static FORMAT: OnceLock<Format> = OnceLock::new();
        *FORMAT.get_or_init(|| {
            let mut command = Command::new(program("containerd"));
            let said = finish(command.args(["config", "default"]), b"").exits(0);
            let version = said
                .stdout
                .lines()
                .find_map(|line| line.strip_prefix("version = "));
            match version {
                Some("2") => Self::Two,
                Some("3") => Self::Three,
                other => panic!("a configuration of version {other:?}, which nobody knows"),
            }
        })
    }

    /// Version of the Task API that shims of pods speak to it.
    pub(crate) fn task_api_of_pods(self) -> i32 {
        match self {
            Self::Two => 2,
            Self::Three => 3,
        }
    }

    /// A configuration's first lines; without what is for Kubernetes, unless it is wanted.
    pub(crate) fn head(self, kubernetes: bool) -> String {
        let (version, all): (_, &[&str]) = match self {
            Self::Two => (2, &["io.containerd.grpc.v1.cri"]),
            Self::Three => (
                3,
                &[
                    "io.containerd.grpc.v1.cri",
                    "io.containerd.cri.v1.images",
                    "io.containerd.cri.v1.runtime",
                ],
            ),
        };
        let disabled = if kubernetes { &[] } else { all };
        format!("version = {version}\ndisabled_plugins = {disabled:?}\n")
    }

    /// What an administrator says of pods: their first container's image, the runtime of
    /// those that name none, CNI's plugins, and their networks. From 2.x on, shims of pods
    /// are to speak the newest Task API, which it does not ask for by itself.
    pub(crate) fn kubernetes(self, pause_image: &str, plugins: &Path, networks: &Path) -> String {
        let (plugins, networks) = (plugins.display(), networks.display());
        match self {
            Self::Two => format!(
                "[plugins.\"io.containerd.grpc.v1.cri\"]\n\
                 sandbox_image = \"{pause_image}\"\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n\
                 default_runtime_name = \"walnut\"\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".cni]\n\
                 bin_dir = \"{plugins}\"\n\
                 conf_dir = \"{networks}\"\n"
            ),
            Self::Three => format!(
                "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\n\
                 sandbox = \"{pause_image}\"\n\
                 [plugins.\"io.containerd.shim.v1.manager\"]\n\
                 env = [\"MAX_SHIM_VERSION=3\"]\n\
                 [plugins.\"io.containerd.cri.v1.runtime\"]\n\
                 netns_mounts_under_state_dir = true\n\
                 [plugins.\"io.containerd.cri.v1.runtime\".containerd]\n\
                 default_runtime_name = \"walnut\"\n\
                 [plugins.\"io.containerd.cri.v1.runtime\".cni]\n\
                 bin_dirs = [\"{plugins}\"]\n\
                 conf_dir = \"{networks}\"\n\
                 [plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.{BY_SANDBOX_API}]\n\
                 runtime_type = \"io.containerd.walnut.v2\"\n\
                 sandboxer = \"shim\"\n"
            ),
        }
    }

    /// Has `ctr` unpack an image: left to the daemon, as 2.x does it, only those snapshotters
    /// are used that its configuration names.
    pub(crate) fn import_by_ctr(self) -> &'static [&'static str] {
        match self {
            Self::Two => &[],
            Self::Three => &["--local"],
        }
    }

    /// What all of them need: several daemons run at a time, and NRI has one socket. `dir` is
    /// for what the block snapshotter begins with, an empty file system.
    pub(crate) fn tail(self, dir: &Path) -> String {
        if self == Self::Two {
            return String::new();
        }
        let scratch = dir.join("scratch.img");
        let mut make = Command::new("mkfs.ext4");
        make.arg("-q").arg(&scratch).arg("1G");
        finish(&mut make, b"").exits(0);
        format!(
            "[plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n\
             [plugins.\"io.containerd.snapshotter.v1.blockfile\"]\n\
             fs_type = \"ext4\"\nmount_options = []\nrecreate_scratch = false\n\
             scratch_file = \"{}\"\n",
            scratch.display()
        )
    }
}

/// Sets the runtime up in a configuration, as an administrator does.
pub(crate) fn install(prefix: &Path, config: &Path) {
    let mut command = Command::new(repository().join("out/bin/walnut"));
    command
        .arg("install")
        .args(["--no-podman", "--no-docker"])
        .arg("--prefix")
        .arg(prefix)
        .arg("--containerd-config")
        .arg(config)
        // It asks the containerd that it finds.
        .env("PATH", path(&[]))
        .env_remove("WALNUT_LIB");
    finish(&mut command, b"").exits(0);
}
