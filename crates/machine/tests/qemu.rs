//! The QEMU driver with the real QEMU, the real sandbox kernel, the real
//! `walnut-vsock`, and an init of its own (`guest/init.c`) in the agent's place.

#![allow(clippy::unwrap_used)]

mod guest;

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use guest::{ask, initramfs, kernel, own};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use walnut_machine::{Disk, Driver, DriverChoice, Error, Exit, Machine, MachineSpec, Programs};

/// Two cores, emulation, and other tests beside: not a figure, a limit.
const BOOT: Duration = Duration::from_secs(60);

fn driver() -> Box<dyn Driver> {
    walnut_machine::driver(DriverChoice::QemuTcg, &Programs::new(&own())).unwrap()
}

fn spec(run_dir: &TempDir, test: &str) -> MachineSpec {
    MachineSpec {
        id: format!("test-{test}"),
        run_dir: run_dir.path().to_owned(),
        kernel: kernel(),
        initramfs: initramfs(),
        cmdline: vec![format!("test={test}")],
        vcpus: 1,
        max_vcpus: 1,
        memory: 128 << 20,
        max_memory: 128 << 20,
        disks: Vec::new(),
        spare_disks: 0,
        shares: Vec::new(),
        nics: Vec::new(),
    }
}

fn run_dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

async fn started(run: &TempDir, test: &str) -> Box<dyn Machine> {
    driver().start(spec(run, test)).await.unwrap()
}

fn pid(machine: &dyn Machine, role: &str) -> u32 {
    let processes = machine.processes();
    processes.iter().find(|(r, _)| *r == role).unwrap().1
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid.try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

fn alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// Nothing of the machine is left: no process, no file.
fn assert_gone(run: &TempDir, pids: &[(&str, u32)]) {
    for (role, pid) in pids {
        assert!(!alive(*pid), "{role} {pid} lives");
    }
    let left: Vec<_> = fs::read_dir(run.path())
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[tokio::test]
async fn starts_answers_and_stops() {
    let run = run_dir();
    let machine = started(&run, "serve").await;
    let pids = machine.processes();
    assert_eq!(pids.len(), 2);
    assert_eq!(machine.ready(BOOT).await.unwrap(), 1);
    assert_eq!(machine.ready(BOOT).await.unwrap(), 1, "again, at once");
    assert_eq!(ask(&*machine, b"hello").await, "hello");
    let refused = machine.connect(9999).await.unwrap_err();
    assert!(matches!(refused, Error::Connect(_)), "{refused}");

    // QEMU is nobody: no root, no capability, no network.
    let status = fs::read_to_string(format!("/proc/{}/status", pid(&*machine, "qemu"))).unwrap();
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("CapEff:\t0000000000000000"));
    assert!(status.contains("Seccomp:\t2"), "{status}");
    assert!(!status.contains("Uid:\t0"), "{status}");

    machine.stop().await;
    machine.stop().await;
    assert_eq!(machine.wait().await, Exit::Stopped);
    assert!(machine.processes().is_empty());
    let error = machine.connect(1024).await.unwrap_err().to_string();
    assert_eq!(error, "connect to the guest: the guest stopped");
    assert_gone(&run, &pids);
}

#[tokio::test]
async fn two_vcpus_pause_and_resume() {
    let run = run_dir();
    let mut spec = spec(&run, "serve");
    (spec.vcpus, spec.max_vcpus) = (2, 2);
    let machine = driver().start(spec).await.unwrap();
    if let Err(error) = machine.ready(BOOT).await {
        panic!("{error}\n{}", machine.console_tail());
    }
    assert_eq!(ask(&*machine, b"c").await, "2\n");
    let pause = machine.as_pause().unwrap();
    let mut stream = machine.connect(1024).await.unwrap();
    stream.write_all(b"1").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'1');
    pause.pause().await.unwrap();
    stream.write_all(b"2").await.unwrap();
    let in_vain = tokio::time::timeout(Duration::from_millis(300), stream.read_u8()).await;
    assert!(in_vain.is_err(), "a paused guest answered");
    pause.resume().await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'2');
    drop(stream);
    assert_eq!(ask(&*machine, b"y").await, "y");
    drop(machine);
    assert_gone(&run, &[]);
}

#[tokio::test]
async fn disks_are_found_by_serial_and_read_only_ones_stay_so() {
    for count in [1, 7] {
        let (run, images) = (run_dir(), run_dir());
        let mut spec = spec(&run, "serve");
        for n in 0..count {
            let path = images.path().join(n.to_string());
            let first = b'A' + n;
            fs::write(&path, vec![first; 1 << 16]).unwrap();
            spec.disks.push(Disk {
                serial: format!("disk-{n}"),
                path,
                read_only: n % 2 == 0,
            });
        }
        let machine = driver().start(spec).await.unwrap();
        if let Err(error) = machine.ready(BOOT).await {
            panic!("{count} disks: {error}\n{}", machine.console_tail());
        }
        let answer = ask(&*machine, b"d").await;
        let mut lines: Vec<_> = answer.lines().collect();
        lines.sort_unstable();
        let expected: Vec<_> = (0..count)
            .map(|n| format!("disk-{n} {} {}", char::from(b'A' + n), n % 2))
            .collect();
        assert_eq!(lines, expected);
        machine.stop().await;
        for n in 0..count {
            let first = fs::read(images.path().join(n.to_string())).unwrap()[0];
            let expected = if n % 2 == 0 { b'A' + n } else { b'W' };
            assert_eq!(first, expected, "disk {n}");
        }
    }
}

#[tokio::test]
async fn a_guest_that_panics_or_gives_up_says_why() {
    let killed = "Attempted to kill init! exitcode=0x00000700";
    for (test, words) in [("panic", killed), ("fatal", "the test wants it so")] {
        let run = run_dir();
        let machine = started(&run, test).await;
        let pids = machine.processes();
        let error = machine.ready(BOOT).await.unwrap_err();
        let Error::Ended { exit, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(
            exit,
            &Exit::Panicked(words.into()),
            "{}",
            machine.console_tail()
        );
        assert_eq!(&machine.wait().await, exit);
        assert_eq!(
            error.to_string(),
            format!("wait for the agent: the guest's kernel panicked: {words}")
        );
        assert_gone(&run, &pids);
    }
}

#[tokio::test]
async fn a_guest_that_restarts_has_stopped() {
    let run = run_dir();
    let machine = started(&run, "serve").await;
    machine.ready(BOOT).await.unwrap();
    let mut stream = machine.connect(1024).await.unwrap();
    stream.write_all(b"r").await.unwrap();
    assert_eq!(machine.wait().await, Exit::Stopped);
    assert_gone(&run, &[]);
}

#[tokio::test]
async fn a_guest_that_restarts_before_it_serves_has_failed() {
    let run = run_dir();
    let machine = started(&run, "restart").await;
    let error = machine.ready(BOOT).await.unwrap_err().to_string();
    assert!(
        error.starts_with("wait for the agent: the guest restarted while it booted; its console"),
        "{error}"
    );
    assert_gone(&run, &[]);
}

#[tokio::test]
async fn a_guest_that_never_answers_meets_the_deadline() {
    let run = run_dir();
    let machine = started(&run, "silent").await;
    let deadline = Duration::from_secs(2);
    let start = Instant::now();
    let error = machine.ready(deadline).await.unwrap_err().to_string();
    assert!(start.elapsed() >= deadline);
    assert!(
        error.starts_with("the agent did not answer within 2s; its console"),
        "{error}"
    );
    let pids = machine.processes();
    assert_eq!(pids.len(), 2);
    drop(machine);
    assert_gone(&run, &pids);
}

#[tokio::test]
async fn a_guest_that_says_something_else_is_refused() {
    let run = run_dir();
    let machine = started(&run, "liar").await;
    let error = machine.ready(BOOT).await.unwrap_err().to_string();
    assert!(
        error.contains("not an agent's: \"HTTP/1.1 200 OK"),
        "{error}"
    );
    let run = run_dir();
    let machine = started(&run, "mute").await;
    let error = machine.ready(Duration::from_secs(20)).await.unwrap_err();
    assert!(
        matches!(error, Error::NotReady { .. } | Error::BadReady { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn an_endless_console_is_bounded() {
    let run = run_dir();
    let machine = started(&run, "flood").await;
    let start = Instant::now();
    while machine.console_tail().len() < 64 * 1024 {
        assert!(
            start.elapsed() < BOOT,
            "console: {}",
            machine.console_tail().len()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(machine.console_tail().len(), 64 * 1024);
}

#[tokio::test]
async fn a_killed_process_ends_the_machine_and_is_named() {
    for (role, sentence) in [
        ("qemu", "qemu was killed by signal 9 (SIGKILL)"),
        ("vsock", "walnut-vsock was killed by signal 9 (SIGKILL)"),
    ] {
        for booted in [false, true] {
            let run = run_dir();
            let machine = started(&run, "serve").await;
            let pids = machine.processes();
            if booted {
                machine.ready(BOOT).await.unwrap();
            }
            kill(pid(&*machine, role));
            assert_eq!(machine.wait().await, Exit::Failed(sentence.into()));
            if !booted {
                let error = machine.ready(BOOT).await.unwrap_err().to_string();
                assert_eq!(error, format!("wait for the agent: {sentence}"));
            }
            assert_gone(&run, &pids);
        }
    }
}

#[tokio::test]
async fn what_cannot_start_says_why_and_leaves_nothing() {
    let run = run_dir();
    let failed = async |change: &dyn Fn(&mut MachineSpec)| {
        let mut spec = spec(&run, "serve");
        change(&mut spec);
        let error = driver().start(spec).await.unwrap_err().to_string();
        assert_gone(&run, &[]);
        error
    };
    let error = failed(&|s| s.kernel = "/nowhere/vmlinux".into()).await;
    assert!(
        error.starts_with("open kernel /nowhere/vmlinux: No such file"),
        "{error}"
    );
    let error = failed(&|s| s.kernel = "/etc/hostname".into()).await;
    assert!(
        error.starts_with("start the machine: qemu exited with code 1: "),
        "{error}"
    );
    let error = failed(&|s| {
        s.disks.push(Disk {
            serial: "d".into(),
            path: "/dev/null".into(),
            read_only: true,
        });
    })
    .await;
    assert!(
        error.contains("neither a file nor a block device"),
        "{error}"
    );
    let programs = Programs {
        vsock: "/bin/false".into(),
        ..Programs::new(&own())
    };
    let driver = walnut_machine::driver(DriverChoice::QemuTcg, &programs).unwrap();
    let error = driver
        .start(spec(&run, "serve"))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("walnut-vsock exited with code 1"), "{error}");
    assert_gone(&run, &[]);
}

/// What `a_killed_supervisor_takes_its_machine_along` runs in a process of its own.
#[tokio::test]
async fn helper_supervisor() {
    let Some(run) = std::env::var_os("WALNUT_TEST_RUN_DIR") else {
        return;
    };
    let run = PathBuf::from(run);
    let machine_dir = tempfile::tempdir_in(&run).unwrap();
    let machine = started(&machine_dir, "serve").await;
    machine.ready(BOOT).await.unwrap();
    let pids: Vec<_> = machine
        .processes()
        .iter()
        .map(|(_, pid)| pid.to_string())
        .collect();
    fs::write(run.join("pids.tmp"), pids.join(" ")).unwrap();
    fs::rename(run.join("pids.tmp"), run.join("pids")).unwrap();
    std::future::pending::<()>().await;
}

#[test]
fn a_killed_supervisor_takes_its_machine_along() {
    let run = run_dir();
    let mut supervisor = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper_supervisor"])
        .env("WALNUT_TEST_RUN_DIR", run.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let pids = loop {
        if let Ok(pids) = fs::read_to_string(run.path().join("pids")) {
            break pids;
        }
        assert!(
            start.elapsed() < BOOT * 2,
            "the helper's machine never got ready"
        );
        std::thread::sleep(Duration::from_millis(10));
    };
    let pids: Vec<u32> = pids.split(' ').map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(pids.len(), 2);
    supervisor.kill().unwrap();
    supervisor.wait().unwrap();
    let start = Instant::now();
    while pids.iter().any(|&pid| alive(pid)) {
        assert!(start.elapsed() < Duration::from_secs(10), "still alive");
        std::thread::sleep(Duration::from_millis(5));
    }
}
