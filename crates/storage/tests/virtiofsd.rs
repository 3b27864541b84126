//! Volumes with the real virtiofsd. Needs root.

#![allow(clippy::unwrap_used)]

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use walnut_storage::{VirtioFs, Volume};

/// Waits for a condition; three minutes are a failure, on a busy machine too.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(180), "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn volume(source: &Path, read_only: bool) -> Volume {
    Volume {
        source: source.to_owned(),
        read_only,
        follows_host: false,
    }
}

/// The file `name` of volume `n`, as virtiofsd sees it.
fn inside(fs: &VirtioFs, run_dir: &Path, n: usize, name: &str) -> PathBuf {
    let root = PathBuf::from(format!("/proc/{}/root", fs.pid()));
    let run_dir = run_dir.strip_prefix("/").unwrap();
    root.join(run_dir).join(format!("volumes/{n}")).join(name)
}

fn errno(result: io::Result<impl Sized>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

fn alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

fn children(pid: u32) -> Vec<u32> {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .unwrap_or_default()
        .split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect()
}

#[tokio::test]
async fn the_host_enforces_read_only_and_sees_no_mount() {
    let (run, a, b) = (dir(), dir(), dir());
    fs::write(a.path().join("file"), "a").unwrap();
    fs::write(b.path().join("file"), "b").unwrap();
    let volumes = [
        volume(a.path(), true),
        volume(b.path(), false),
        volume(&b.path().join("file"), true),
    ];
    let vfs = VirtioFs::start(&volumes, run.path()).await.unwrap();

    assert_eq!(
        fs::read_to_string(inside(&vfs, run.path(), 0, "file")).unwrap(),
        "a"
    );
    let ro = inside(&vfs, run.path(), 0, "new");
    assert_eq!(errno(fs::write(&ro, "x")), Some(libc::EROFS));
    let ro = inside(&vfs, run.path(), 0, "file");
    let mode = fs::Permissions::from_mode(0o600);
    assert_eq!(errno(fs::set_permissions(ro, mode)), Some(libc::EROFS));

    fs::write(inside(&vfs, run.path(), 1, "new"), "x").unwrap();
    assert_eq!(fs::read_to_string(b.path().join("new")).unwrap(), "x");

    let mut file = inside(&vfs, run.path(), 2, "");
    file = file.to_str().unwrap().trim_end_matches('/').into();
    assert_eq!(fs::read_to_string(&file).unwrap(), "b");
    assert_eq!(errno(fs::write(&file, "x")), Some(libc::EROFS));

    // Nothing to write beside the volumes either.
    let beside = inside(&vfs, run.path(), 0, "../new");
    assert_eq!(errno(fs::write(beside, "x")), Some(libc::EROFS));

    // Other tests mount, too: only ours must not be there.
    let host = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for dir in [&run, &a, &b] {
        assert!(!host.contains(dir.path().to_str().unwrap()), "{host}");
    }
    assert_eq!(vfs.guest_path(2), Path::new("/run/walnut/volumes/2"));
    let pid = vfs.pid();
    drop(vfs);
    assert!(!alive(pid));
    assert_eq!(fs::read_dir(run.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn mounts_below_a_read_only_volume_are_read_only_too() {
    let (run, top) = (dir(), dir());
    let below = top.path().join("below");
    fs::create_dir(&below).unwrap();
    let script = format!("mount -t tmpfs tmpfs {}", below.display());
    assert!(
        Command::new("sh")
            .args(["-c", &script])
            .status()
            .unwrap()
            .success()
    );
    struct Unmount(PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(&self.0).status();
        }
    }
    let unmount = Unmount(below.clone());
    fs::write(below.join("file"), "deep").unwrap();
    let vfs = VirtioFs::start(&[volume(top.path(), true)], run.path())
        .await
        .unwrap();
    let deep = inside(&vfs, run.path(), 0, "below/file");
    assert_eq!(fs::read_to_string(&deep).unwrap(), "deep");
    assert_eq!(errno(fs::write(&deep, "x")), Some(libc::EROFS));
    assert!(below.join("file").exists());
    fs::write(below.join("file"), "the host still may").unwrap();
    drop(unmount);
    drop(vfs);
}

#[tokio::test]
async fn volumes_come_and_go_while_it_serves() {
    let (run, a) = (dir(), dir());
    fs::write(a.path().join("file"), "a").unwrap();
    let vfs = VirtioFs::start(&[], run.path()).await.unwrap();
    let _machine = UnixStream::connect(vfs.share().socket).unwrap();
    let first = vfs.add(&volume(a.path(), true)).await.unwrap();
    let second = vfs
        .add(&volume(&a.path().join("file"), false))
        .await
        .unwrap();
    let server = children(vfs.pid())[0];
    let root = PathBuf::from(format!("/proc/{server}/root"));
    let first_file = root.join(first.to_string()).join("file");
    assert_eq!(fs::read_to_string(&first_file).unwrap(), "a");
    assert_eq!(errno(fs::write(&first_file, "x")), Some(libc::EROFS));
    fs::write(root.join(second.to_string()), "b").unwrap();
    assert_eq!(fs::read_to_string(a.path().join("file")).unwrap(), "b");
    // Beside the volumes the guest can write nothing, and the host sees no mount.
    assert_eq!(errno(fs::create_dir(root.join("x"))), Some(libc::EROFS));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(run.path().to_str().unwrap()));

    vfs.remove(first).await.unwrap();
    assert_eq!(fs::read_dir(&root).unwrap().count(), 1);
    assert!(a.path().join("file").exists());
    assert!(vfs.remove(first).await.is_err(), "it is gone");
    let third = vfs.add(&volume(a.path(), false)).await.unwrap();
    assert!(third > second, "a number is never used again");
    let error = vfs.add(&volume(Path::new("/no/where"), true)).await;
    assert!(error.unwrap_err().to_string().contains("/no/where"));
    assert_eq!(fs::read_dir(&root).unwrap().count(), 2);
}

#[tokio::test]
async fn what_the_host_mounts_later_is_shared_if_asked_for() {
    let (run, top) = (dir(), dir());
    let script = "mount --bind $0 $0 && mount --make-shared $0";
    let mut shared = Command::new("sh");
    shared.args(["-c", script]).arg(top.path());
    assert!(shared.status().unwrap().success());
    let vfs = VirtioFs::start(&[], run.path()).await.unwrap();
    let _machine = UnixStream::connect(vfs.share().socket).unwrap();
    let mut shown = Vec::new();
    for follows_host in [false, true] {
        let volume = Volume {
            follows_host,
            ..volume(top.path(), false)
        };
        shown.push(vfs.add(&volume).await.unwrap());
    }
    let below = top.path().join("below");
    fs::create_dir(&below).unwrap();
    let status = Command::new("mount")
        .args(["-t", "tmpfs", "tmpfs"])
        .arg(&below)
        .status();
    assert!(status.unwrap().success());
    fs::write(below.join("new"), "x").unwrap();
    let server = children(vfs.pid())[0];
    let seen: Vec<bool> = shown
        .iter()
        .map(|n| Path::new(&format!("/proc/{server}/root/{n}/below/new")).exists())
        .collect();
    for mount in [&below, top.path()] {
        let _ = Command::new("umount").arg(mount).status();
    }
    assert_eq!(seen, [false, true]);
}

#[tokio::test]
async fn wrong_sources_are_named_and_leave_nothing() {
    let run = dir();
    let refused = async |path: &str| {
        let error = VirtioFs::start(&[volume(Path::new(path), true)], run.path()).await;
        error.unwrap_err().to_string()
    };
    assert_eq!(
        refused("/no/where").await,
        "bind source path does not exist: /no/where"
    );
    assert!(refused("relative").await.contains("absolute"));
    assert!(
        refused("/dev/null")
            .await
            .contains("neither a directory nor a file")
    );
    let error = VirtioFs::start_with(Path::new("/bin/false"), &[], run.path()).await;
    assert!(error.unwrap_err().to_string().contains("no virtiofsd"));
    assert_eq!(fs::read_dir(run.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_killed_virtiofsd_is_noticed() {
    let run = dir();
    let vfs = VirtioFs::start(&[volume(Path::new("/usr"), true)], run.path())
        .await
        .unwrap();
    let _machine = UnixStream::connect(vfs.share().socket).unwrap();
    until("virtiofsd jails itself", || !children(vfs.pid()).is_empty());
    let server = children(vfs.pid());
    kill(vfs.pid());
    assert_eq!(
        vfs.wait().await,
        "virtiofsd was killed by signal 9 (SIGKILL)"
    );
    until("its server is gone", || {
        server.iter().all(|&pid| !alive(pid))
    });
}

#[tokio::test]
async fn killing_takes_the_jailed_server_along() {
    let run = dir();
    let vfs = VirtioFs::start(&[volume(Path::new("/usr"), true)], run.path())
        .await
        .unwrap();
    let _machine = UnixStream::connect(vfs.share().socket).unwrap();
    until("virtiofsd jails itself", || !children(vfs.pid()).is_empty());
    let server = children(vfs.pid());
    vfs.kill().await;
    vfs.kill().await;
    until("its server is gone", || {
        server.iter().all(|&pid| !alive(pid))
    });
}

/// What `a_killed_supervisor_takes_virtiofsd_along` runs in a process of its own.
#[tokio::test]
async fn helper_supervisor() {
    let Some(run) = std::env::var_os("WALNUT_TEST_RUN_DIR") else {
        return;
    };
    let run = PathBuf::from(run);
    let vfs = VirtioFs::start(&[volume(Path::new("/usr"), true)], &run)
        .await
        .unwrap();
    fs::write(run.join("pid.tmp"), vfs.pid().to_string()).unwrap();
    fs::rename(run.join("pid.tmp"), run.join("pid")).unwrap();
    std::future::pending::<()>().await;
}

#[test]
fn a_killed_supervisor_takes_virtiofsd_along() {
    for connected in [false, true] {
        let run = dir();
        let mut supervisor = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "helper_supervisor"])
            .env("WALNUT_TEST_RUN_DIR", run.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid_file = run.path().join("pid");
        until("virtiofsd runs", || pid_file.exists());
        let pid: u32 = fs::read_to_string(pid_file).unwrap().parse().unwrap();
        // Held by this process: the server does not see its machine hang up.
        let _machine = connected.then(|| {
            let machine = UnixStream::connect(run.path().join("virtiofs.sock")).unwrap();
            until("virtiofsd jails itself", || !children(pid).is_empty());
            machine
        });
        let server = children(pid);
        supervisor.kill().unwrap();
        supervisor.wait().unwrap();
        until("virtiofsd is gone", || !alive(pid));
        until("its server is gone", || {
            server.iter().all(|&pid| !alive(pid))
        });
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(run.path().to_str().unwrap()));
    }
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid.try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}
