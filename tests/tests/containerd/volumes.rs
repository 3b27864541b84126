//! Volumes as Kubernetes makes them: directories and files of the host, some of which change
//! while a container sees them.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use k8s_cri::v1::{ContainerConfig, Mount, MountPropagation};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use walnut_tests::until;

use crate::{
    daemon::Daemon,
    kubelet::{Kubelet, Pod, container_config},
};

const SERVE: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

/// A mount of the host's, gone when it is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(source: &Path, target: &Path, kind: &str, flags: MsFlags, data: &str) -> Self {
        mount(Some(source), target, Some(kind), flags, Some(data)).unwrap();
        Self(target.into())
    }

    fn tmpfs(target: &Path, data: &str) -> Self {
        Self::new("tmpfs".as_ref(), target, "tmpfs", MsFlags::empty(), data)
    }

    fn bind(source: &Path, target: &Path) -> Self {
        Self::new(source, target, "", MsFlags::MS_BIND, "")
    }

    /// As kubelet does, which does not detach what is in use.
    #[track_caller]
    fn unmount(self) {
        umount2(&self.0, MntFlags::empty()).unwrap();
        std::mem::forget(self);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn volume(host: &Path, container: &str, read_only: bool) -> Mount {
    Mount {
        host_path: host.display().to_string(),
        container_path: container.into(),
        readonly: read_only,
        ..Default::default()
    }
}

fn with(name: &str, mounts: Vec<Mount>) -> ContainerConfig {
    ContainerConfig {
        mounts,
        ..container_config(name, SERVE)
    }
}

/// What a script prints in a container; it is to succeed.
#[track_caller]
fn prints(kubelet: &Kubelet, container: &str, script: &str) -> String {
    let done = kubelet.exec(container, script);
    assert_eq!(done.exit_code, 0, "{script}: {done:?}");
    String::from_utf8(done.stdout).unwrap()
}

/// Whether a script fails, with this in its message.
#[track_caller]
fn fails(kubelet: &Kubelet, container: &str, script: &str, message: &str) {
    let done = kubelet.exec(container, script);
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(
        done.exit_code != 0 && said.contains(message),
        "{script}: {done:?}"
    );
}

fn ends(kubelet: &Kubelet, container: &str) {
    kubelet.stop(container).unwrap();
    kubelet.remove(container).unwrap();
}

/// Writes version `n` as kubelet's atomic writer does: a directory of its own, put in place
/// by renaming a symbolic link.
fn publish(dir: &Path, n: u32) {
    let old = fs::read_link(dir.join("..data"));
    let new = format!("..version_{n}");
    fs::create_dir(dir.join(&new)).unwrap();
    fs::write(dir.join(&new).join("key"), format!("value {n}")).unwrap();
    symlink(&new, dir.join("..data_tmp")).unwrap();
    fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    match old {
        Ok(old) => fs::remove_dir_all(dir.join(old)).unwrap(),
        Err(_) => symlink("..data/key", dir.join("key")).unwrap(),
    }
}

fn config_maps_are_updated_in_a_running_container(kubelet: &Kubelet, pod: &Pod, dir: &Path) {
    let map = dir.join("map");
    fs::create_dir(&map).unwrap();
    publish(&map, 0);
    let container = kubelet.run_with(pod, with("map", vec![volume(&map, "/etc/map", true)]));
    for n in 1..4 {
        let read = prints(kubelet, &container, "cat /etc/map/key");
        assert_eq!(read, format!("value {}", n - 1));
        publish(&map, n);
        until("the container sees the update", || {
            let done = kubelet.exec(&container, "cat /etc/map/key");
            done.stdout == format!("value {n}").as_bytes()
        });
        // What was there is gone.
        let names = prints(kubelet, &container, "ls -A /etc/map | sort | xargs");
        assert_eq!(names, format!("..data ..version_{n} key\n"));
    }
    fails(
        kubelet,
        &container,
        "echo x >/etc/map/key",
        "Read-only file system",
    );
    ends(kubelet, &container);
}

fn memory_of_the_host_is_a_volume(kubelet: &Kubelet, pod: &Pod, dir: &Path) {
    let empty = dir.join("empty");
    fs::create_dir(&empty).unwrap();
    let memory = Mounted::tmpfs(&empty, "size=1m,mode=0777");
    let mounts = || vec![volume(&empty, "/cache", false)];
    let first = kubelet.run_with(pod, with("cache-a", mounts()));
    let second = kubelet.run_with(pod, with("cache-b", mounts()));
    prints(kubelet, &first, "echo shared >/cache/file");
    assert_eq!(prints(kubelet, &second, "cat /cache/file"), "shared\n");
    assert_eq!(
        fs::read_to_string(empty.join("file")).unwrap(),
        "shared\n",
        "it is the host's"
    );
    fails(
        kubelet,
        &second,
        "head -c 2000000 /dev/zero >/cache/large",
        "No space left",
    );
    ends(kubelet, &first);
    ends(kubelet, &second);
    memory.unmount();
}

fn parts_of_a_volume_are_mounted(kubelet: &Kubelet, pod: &Pod, dir: &Path) {
    let volume_dir = dir.join("volume");
    let sub = dir.join("subpaths");
    fs::create_dir_all(volume_dir.join("deep/tree")).unwrap();
    fs::create_dir_all(sub.join("1")).unwrap();
    fs::write(volume_dir.join("deep/app.conf"), "before").unwrap();
    fs::write(volume_dir.join("deep/tree/leaf"), "leaf").unwrap();
    fs::write(sub.join("0"), "").unwrap();
    let mounts = [
        Mounted::bind(&volume_dir.join("deep/app.conf"), &sub.join("0")),
        Mounted::bind(&volume_dir.join("deep/tree"), &sub.join("1")),
    ];
    let mounted = vec![
        volume(&sub.join("0"), "/etc/app.conf", false),
        volume(&sub.join("1"), "/tree", false),
    ];
    let container = kubelet.run_with(pod, with("parts", mounted));
    assert_eq!(prints(kubelet, &container, "cat /etc/app.conf"), "before");
    assert_eq!(
        prints(kubelet, &container, "ls -A /tree; cat /tree/leaf"),
        "leaf\nleaf"
    );
    fails(
        kubelet,
        &container,
        "cat /tree/../deep/app.conf",
        "No such file",
    );
    // Both ways.
    prints(
        kubelet,
        &container,
        "printf inside >/etc/app.conf; touch /tree/new",
    );
    assert_eq!(
        fs::read_to_string(volume_dir.join("deep/app.conf")).unwrap(),
        "inside"
    );
    assert!(volume_dir.join("deep/tree/new").exists());
    fs::write(volume_dir.join("deep/app.conf"), "outside").unwrap();
    until("the container sees what the host wrote", || {
        kubelet.exec(&container, "cat /etc/app.conf").stdout == b"outside"
    });
    ends(kubelet, &container);
    mounts.into_iter().for_each(Mounted::unmount);
}

fn mounts_of_the_host_appear_below_a_propagated_path(kubelet: &Kubelet, pod: &Pod, dir: &Path) {
    let shared = dir.join("shared");
    fs::create_dir(&shared).unwrap();
    let base = Mounted::tmpfs(&shared, "");
    let none = None::<&str>;
    mount(none, &shared, none, MsFlags::MS_SHARED, none).unwrap();
    fs::create_dir(shared.join("disk")).unwrap();
    let mut follows = volume(&shared, "/follows", true);
    follows.set_propagation(MountPropagation::PropagationHostToContainer);
    let mounts = vec![follows, volume(&shared, "/still", true)];
    let container = kubelet.run_with(pod, with("propagation", mounts));
    assert_eq!(prints(kubelet, &container, "ls -A /follows/disk"), "");

    let disk = Mounted::tmpfs(&shared.join("disk"), "");
    fs::write(shared.join("disk/file"), "on it").unwrap();
    until("what the host mounted is seen", || {
        kubelet.exec(&container, "cat /follows/disk/file").stdout == b"on it"
    });
    assert_eq!(prints(kubelet, &container, "ls -A /still/disk"), "");
    // The host's refusal holds for what came later as well.
    let write = "touch /follows/new; touch /follows/disk/new; ls -A /follows /follows/disk";
    let names = prints(kubelet, &container, write);
    assert!(!names.contains("new"), "{names}");
    // What the guest has looked into it keeps open, so that the host can only detach it;
    // docs/containerd.md says so. It is free when the container has gone.
    assert_eq!(umount2(&disk.0, MntFlags::empty()), Err(Errno::EBUSY));
    ends(kubelet, &container);
    disk.unmount();
    base.unmount();
}

#[test]
fn volumes_are_what_kubernetes_makes_them() {
    let daemon = Daemon::start_for_kubernetes();
    let kubelet = Kubelet::new(&daemon);
    let pod = kubelet.run_pod(&daemon);
    let dir = daemon.scratch().join("volumes");
    fs::create_dir(&dir).unwrap();
    config_maps_are_updated_in_a_running_container(&kubelet, &pod, &dir);
    memory_of_the_host_is_a_volume(&kubelet, &pod, &dir);
    parts_of_a_volume_are_mounted(&kubelet, &pod, &dir);
    mounts_of_the_host_appear_below_a_propagated_path(&kubelet, &pod, &dir);
    kubelet.end_pod(&pod);
    daemon.assert_nothing_left();
}
