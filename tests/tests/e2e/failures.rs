//! Whatever is killed or broken: one clear sentence, and nothing left.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use walnut_tests::{
    Detached, Running, assert_nothing_left, driver, host, kill_process, machine, run_with,
    spawn_run, until, walnut,
};

/// A container in front that has said that it runs.
fn running(args: &[&str]) -> (Running, String) {
    let command = ["IMAGE", "sh", "-c", "echo runs; exec sleep infinity"];
    let running = spawn_run(&[args, &command].concat(), |_| {});
    let id = running.id();
    until("the container runs", || {
        walnut(&["logs", &id]).stdout.starts_with(b"runs")
    });
    (running, id)
}

/// Kills `process` under a container in front.
fn killed(process: &str, args: &[&str], says: &str) {
    let (running, id) = running(&[&["--rm"], args].concat());
    kill_process(&id, process);
    running.wait().fails(125, says);
    assert_nothing_left(&id);
    assert!(!host().root.join("containers").join(&id).exists());
}

#[test]
fn the_machine_is_killed() {
    let (process, name) = machine();
    killed(
        process,
        &[],
        &format!("{name} was killed by signal 9 (SIGKILL)"),
    );
}

#[test]
fn the_vsock_device_is_killed() {
    if driver() == "vmm" {
        println!("skipped: walnut-vmm has its vsock device in process");
        return;
    }
    killed(
        "walnut-vsock",
        &[],
        "vsock was killed by signal 9 (SIGKILL)",
    );
}

#[test]
fn virtiofsd_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let volume = format!("{}:/data", dir.path().display());
    killed("virtiofsd", &["-v", &volume], "virtiofsd");
}

#[test]
fn the_supervisor_is_killed() {
    killed(
        "containerd-shim-walnut-v2",
        &[],
        "the sandbox's supervisor ended unexpectedly",
    );
}

#[test]
fn the_command_in_front_is_killed() {
    for rm in [true, false] {
        let (mut running, id) = running(if rm { &["--rm"] } else { &[] });
        running.child.kill().unwrap();
        running.child.wait().unwrap();
        assert_nothing_left(&id);
        let dir = host().root.join("containers").join(&id);
        if rm {
            until("the container is gone", || !dir.exists());
            continue;
        }
        until("its record says why it ended", || {
            let record = fs::read_to_string(dir.join("container.json")).unwrap();
            record.contains("the command that ran it is gone")
        });
        walnut(&["rm", &id]).exits(0);
    }
}

#[test]
fn the_command_is_killed_while_the_machine_boots() {
    for signal in [Signal::SIGKILL, Signal::SIGINT] {
        let running = spawn_run(
            &["--rm", "--no-template", "IMAGE", "sleep", "infinity"],
            |_| {},
        );
        let id = running.id();
        until("the machine starts", || {
            walnut_tests::processes(&id)
                .iter()
                .any(|(_, name)| name.starts_with(machine().0))
        });
        kill(
            Pid::from_raw(running.child.id().try_into().unwrap()),
            signal,
        )
        .unwrap();
        let code = running.wait().code;
        assert!([130, 137].contains(&code), "{code}");
        assert_nothing_left(&id);
        until("the container is gone", || {
            !host().root.join("containers").join(&id).exists()
        });
    }
}

#[test]
fn everything_is_killed_at_once() {
    let box_ = Detached::start(&["IMAGE", "sleep", "infinity"]);
    for (pid, _) in walnut_tests::processes(&box_.id) {
        // Some have died with others before their turn.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let record = box_.ended();
    assert_eq!(
        record["error"], "the sandbox's supervisor was killed",
        "{record:#}"
    );
    assert_nothing_left(&box_.id);
    walnut(&["exec", &box_.name, "true"]).fails(125, "not running");
}

#[test]
fn a_supervisor_killed_behind_is_reconciled() {
    let box_ = Detached::start(&["--rm", "IMAGE", "sleep", "infinity"]);
    kill_process(&box_.id, "containerd-shim-walnut-v2");
    until("it is gone", || box_.record().is_none());
    assert_nothing_left(&box_.id);
}

/// The product's directory with other files in place of some.
fn library(replace: &[(&str, &Path)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&host().lib).unwrap() {
        let name = entry.unwrap().file_name();
        let with = replace.iter().find(|(n, _)| name == *n);
        let target = with.map_or_else(|| host().lib.join(&name), |(_, path)| path.to_path_buf());
        symlink(target, dir.path().join(name)).unwrap();
    }
    // QEMU runs as a user of its own, who must be able to get here.
    fs::set_permissions(
        dir.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    dir
}

/// An initramfs whose init is this C program.
fn initramfs(dir: &Path, program: &str) -> std::path::PathBuf {
    let source = dir.join("init.c");
    fs::write(&source, program).unwrap();
    let init = dir.join("init");
    let built = Command::new("cc")
        .args(["-static", "-O1", "-o"])
        .arg(&init)
        .arg(&source)
        .status()
        .expect("cc, from build-essential");
    assert!(built.success());
    let file = dir.join("initramfs.cpio");
    let mut cpio = Command::new("cpio")
        .args(["-o", "-H", "newc", "--quiet"])
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(fs::File::create(&file).unwrap())
        .spawn()
        .expect("cpio");
    std::io::Write::write_all(cpio.stdin.as_mut().unwrap(), b"init\n").unwrap();
    drop(cpio.stdin.take());
    assert!(cpio.wait().unwrap().success());
    file
}

/// A run whose guest has another init.
fn with_init(program: &str, says: &str) {
    let dir = tempfile::tempdir().unwrap();
    let file = initramfs(dir.path(), program);
    let lib = library(&[("initramfs.cpio", &file)]);
    run_with(&["IMAGE", "true"], b"", |command| {
        command
            .env("WALNUT_LIB", lib.path())
            .env("WALNUT_BOOT_TIMEOUT", "10");
    })
    .fails(125, says);
}

#[test]
fn a_guest_that_panics() {
    with_init("int main(void) { return 3; }", "Attempted to kill init");
}

#[test]
fn an_agent_that_never_answers() {
    with_init(
        "#include <unistd.h>\nint main(void) { for (;;) pause(); }",
        "did not",
    );
}

#[test]
fn an_agent_that_lies() {
    let program = r#"
#include <string.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <unistd.h>
int main(void) {
    struct sockaddr_vm to = { .svm_family = AF_VSOCK, .svm_cid = 2, .svm_port = 1024 };
    int s = socket(AF_VSOCK, SOCK_STREAM, 0);
    connect(s, (struct sockaddr *)&to, sizeof to);
    write(s, "HTTP/1.1 200 OK\n", 16);
    for (;;) pause();
}"#;
    with_init(program, "HTTP/1.1 200 OK");
}

#[test]
fn a_missing_kernel_and_a_broken_one() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    run_with(&["IMAGE", "true"], b"", |command| {
        command.env("WALNUT_LIB", &empty);
    })
    .fails(125, "vmlinux");
    let torn = dir.path().join("vmlinux");
    let kernel = fs::read(host().lib.join("vmlinux")).unwrap();
    fs::write(&torn, &kernel[..4096]).unwrap();
    let lib = library(&[("vmlinux", &torn)]);
    run_with(&["IMAGE", "true"], b"", |command| {
        command
            .env("WALNUT_LIB", lib.path())
            .env("WALNUT_BOOT_TIMEOUT", "10");
    })
    .exits(125);
}
