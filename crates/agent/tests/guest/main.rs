//! The agent in a real guest: the sandbox kernel under QEMU's emulation, our
//! vsock device, an EROFS of busybox. Nothing is mocked.
//!
//! ```text
//! cargo test --release -p walnut-agent --features guest-tests --test guest
//! ```
//!
//! Needs QEMU, busybox-static, erofs-utils, and what the build puts into
//! `out/lib/walnut` (or `WALNUT_KERNEL`, `WALNUT_INITRAMFS`) and `target`
//! (or `WALNUT_VSOCK`). What is missing fails the test with a sentence.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says so by panicking"
)]

mod adopt;
mod footprint;
mod vm;

use std::collections::HashMap;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;
use vm::{Vm, container, context, merge, process, process_of, read_until, sh, size, type_in};
use walnut_protocol::agent::{
    Empty, ExecProcessRequest, HelloRequest, OnlineCpusRequest, ResizeTerminalRequest,
    SignalProcessRequest, UpdateContainerRequest,
};

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other}"),
    }
}

fn signal(id: &str, exec_id: &str, signal: i32, all: bool) -> SignalProcessRequest {
    SignalProcessRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        signal: signal.try_into().unwrap(),
        all,
        ..SignalProcessRequest::default()
    }
}

#[tokio::test]
async fn a_sandbox_gets_its_identity_and_ends() {
    let mut vm = Vm::boot().await;
    let hello = vm
        .agent
        .hello(context(), &HelloRequest::new())
        .await
        .unwrap();
    assert_eq!(hello.protocol, walnut_protocol::PROTOCOL);
    assert!(hello.memory_bytes > 200 << 20 && hello.cpus_online >= 1);
    vm.configure(HashMap::from([("net.ipv4.ip_forward".into(), "1".into())]))
        .await
        .unwrap();
    let bad = HashMap::from([("../../etc/passwd".into(), "x".into())]);
    assert_eq!(code(vm.configure(bad).await).0, Code::INVALID_ARGUMENT);
    let script =
        "date +%s; cat /proc/sys/net/ipv4/ip_forward; hostname; readlink /proc/self/ns/net";
    let (text, end) = vm.output(Vm::request("c", sh(script), &json!({}))).await;
    let mut lines = text.lines();
    let seconds: u64 = lines.next().unwrap().parse().unwrap();
    assert!((1_800_000_000..1_800_000_060).contains(&seconds), "{text}");
    assert_eq!(lines.next(), Some("1"));
    assert_eq!(lines.next(), Some("container"));
    assert_eq!(end.exit_code, 0);
    vm.agent.shutdown(context(), &Empty::new()).await.unwrap();
    vm.gone().await;
}

#[tokio::test]
async fn processors_come_online_when_asked() {
    let vm = Vm::boot_with("3", "maxcpus=1").await;
    let online = |count: u32| {
        let request = OnlineCpusRequest {
            count,
            ..OnlineCpusRequest::default()
        };
        let agent = &vm.agent;
        async move { agent.online_cpus(context(), &request).await }
    };
    assert_eq!(online(1).await.unwrap().online, 1);
    assert_eq!(online(2).await.unwrap().online, 2);
    // None is taken away.
    assert_eq!(online(1).await.unwrap().online, 2);
    assert_eq!(code(online(0).await).0, Code::INVALID_ARGUMENT);
    let (refusal, why) = code(online(4).await);
    assert_eq!(refusal, Code::FAILED_PRECONDITION, "{why}");
    let hello = vm.agent.hello(context(), &HelloRequest::new()).await;
    assert_eq!(hello.unwrap().cpus_online, 3);
}

#[tokio::test]
async fn processes_end_with_their_codes_and_signals() {
    let mut vm = Vm::boot().await;
    let (text, end) = vm
        .output(Vm::request(
            "code",
            sh("echo out; echo err >&2; exit 7"),
            &json!({}),
        ))
        .await;
    assert_eq!(
        (text.as_str(), end.exit_code, end.oom_killed),
        ("out\nerr\n", 7, false)
    );

    let [_in, mut stdout, _err] = vm
        .run(Vm::request(
            "sig",
            sh("trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done"),
            &json!({}),
        ))
        .await;
    read_until(&mut stdout, "up").await;
    vm.agent
        .signal_process(context(), &signal("sig", "", libc::SIGTERM, false))
        .await
        .unwrap();
    assert_eq!(vm.wait("sig", "").await.exit_code, 9);
    assert_eq!(vm.wait("sig", "").await.exit_code, 9, "the status is kept");
    assert_eq!(
        code(
            vm.agent
                .signal_process(context(), &signal("sig", "", 15, false))
                .await
        )
        .0,
        Code::FAILED_PRECONDITION
    );
    vm.agent
        .remove_container(context(), &container("sig"))
        .await
        .unwrap();
    assert_eq!(
        code(
            vm.agent
                .remove_container(context(), &container("sig"))
                .await
        )
        .0,
        Code::NOT_FOUND
    );

    // Everything, by one word, even when it is paused.
    let [_in, mut stdout, _err] = vm
        .run(Vm::request(
            "all",
            sh("sleep 1000 & sleep 1000 & echo up; wait"),
            &json!({}),
        ))
        .await;
    read_until(&mut stdout, "up").await;
    let pids = vm
        .agent
        .list_processes(context(), &container("all"))
        .await
        .unwrap()
        .pids;
    assert_eq!(pids.len(), 3);
    vm.agent
        .pause_container(context(), &container("all"))
        .await
        .unwrap();
    vm.agent
        .signal_process(context(), &signal("all", "", libc::SIGKILL, true))
        .await
        .unwrap();
    assert_eq!(vm.wait("all", "").await.exit_code, 137);
    vm.agent
        .remove_container(context(), &container("all"))
        .await
        .unwrap();
}

#[tokio::test]
async fn programs_that_cannot_run_are_named() {
    let mut vm = Vm::boot().await;
    let create = |args: &[&str]| Vm::request("c", process(args), &json!({}));
    for (args, wanted) in [
        (
            &["foo"][..],
            "exec: \"foo\": executable file not found in $PATH",
        ),
        (
            &["/bin/none"],
            "exec: \"/bin/none\": stat /bin/none: no such file or directory",
        ),
        (
            &["/etc/not-executable"],
            "exec: \"/etc/not-executable\": permission denied",
        ),
        (&["/etc"], "exec: \"/etc\": permission denied"),
    ] {
        let got = code(vm.agent.create_container(context(), &create(args)).await);
        assert_eq!(got, (Code::INVALID_ARGUMENT, wanted.to_owned()));
    }
    // Nothing was left: the name is free.
    let [_in, _out, _err] = vm.run(create(&["sleep", "1000"])).await;
    for (n, (args, wanted)) in [
        (
            &["foo"][..],
            "exec: \"foo\": executable file not found in $PATH",
        ),
        (
            &["/etc/not-executable"],
            "exec: \"/etc/not-executable\": permission denied",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let request = ExecProcessRequest {
            container_id: "c".into(),
            exec_id: format!("e{n}"),
            process: serde_json::to_vec(&process(args)).unwrap(),
            ..ExecProcessRequest::default()
        };
        let got = code(vm.agent.exec_process(context(), &request).await);
        assert_eq!(got, (Code::INVALID_ARGUMENT, wanted.to_owned()));
    }
    let again = code(
        vm.agent
            .create_container(context(), &create(&["true"]))
            .await,
    );
    assert_eq!(again.0, Code::ALREADY_EXISTS);
    let mut bad = create(&["true"]);
    bad.container_id = "../x".into();
    assert_eq!(
        code(vm.agent.create_container(context(), &bad).await).0,
        Code::INVALID_ARGUMENT
    );
    let mut missing = create(&["true"]);
    missing.container_id = "m".into();
    missing.storages[0].source = "no-such-disk".into();
    assert_eq!(
        code(vm.agent.create_container(context(), &missing).await).0,
        Code::DEADLINE_EXCEEDED
    );
}

#[tokio::test]
async fn a_hundred_megabytes_of_stdin_arrive() {
    let mut vm = Vm::boot().await;
    let [mut stdin, mut stdout, _err] = vm
        .run(Vm::request("c", sh("wc -c; echo rest"), &json!({})))
        .await;
    let writer = tokio::spawn(async move {
        let block: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
        for _ in 0..100 {
            stdin.write_all(&block).await.unwrap();
        }
        stdin.shutdown().await.unwrap();
        stdin
    });
    let mut text = String::new();
    stdout.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, format!("{}\nrest\n", 100 << 20));
    let mut stdin = writer.await.unwrap();
    assert_eq!(vm.wait("c", "").await.exit_code, 0);
    assert_eq!(stdin.read(&mut [0]).await.unwrap_or(0), 0);
    vm.agent
        .remove_container(context(), &container("c"))
        .await
        .unwrap();

    // The same bytes come back, and what was written last is not lost.
    let [mut stdin, mut stdout, _err] = vm
        .run(Vm::request("echo", process(&["cat"]), &json!({})))
        .await;
    let sent: Vec<u8> = (0..=255).cycle().take(3 << 20).collect();
    let copy = sent.clone();
    tokio::spawn(async move {
        stdin.write_all(&copy).await.unwrap();
        stdin.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    stdout.read_to_end(&mut got).await.unwrap();
    assert!(got == sent);
}

#[tokio::test]
async fn a_terminal_resizes_and_ends() {
    let mut vm = Vm::boot().await;
    let mut shell = process(&["sh"]);
    merge(
        &mut shell,
        &json!({"terminal": true, "user": {"uid": 1000, "gid": 1000}}),
    );
    let mut request = Vm::request("tty", shell.clone(), &json!({}));
    request.terminal = Some(size(91, 33)).into();
    let (mut stdio, [mut keys, mut screen, _]) = vm.stdio().await;
    stdio.stderr = 0;
    request.stdio = Some(stdio).into();
    vm.agent
        .create_container(context(), &request)
        .await
        .unwrap();
    vm.agent
        .start_container(context(), &container("tty"))
        .await
        .unwrap();
    type_in(
        &mut keys,
        "stty size; tty; echo own > /dev/tty; echo done-$((1+1))\n",
    )
    .await;
    let text = read_until(&mut screen, "done-2").await;
    assert!(text.contains("33 91") && text.contains("own\r\n"), "{text}");
    let resize = ResizeTerminalRequest {
        container_id: "tty".into(),
        size: Some(size(120, 40)).into(),
        ..ResizeTerminalRequest::default()
    };
    vm.agent.resize_terminal(context(), &resize).await.unwrap();
    type_in(&mut keys, "stty size; echo done-$((1+2))\n").await;
    assert!(read_until(&mut screen, "done-3").await.contains("40 120"));

    // A terminal for an exec, too.
    let (mut stdio, [mut keys2, mut screen2, _]) = vm.stdio().await;
    stdio.stderr = 0;
    let exec = ExecProcessRequest {
        container_id: "tty".into(),
        exec_id: "second".into(),
        process: serde_json::to_vec(&shell).unwrap(),
        stdio: Some(stdio).into(),
        terminal: Some(size(50, 20)).into(),
        ..ExecProcessRequest::default()
    };
    vm.agent.exec_process(context(), &exec).await.unwrap();
    type_in(&mut keys2, "stty size; tty; exit 4\n").await;
    let mut text = String::new();
    screen2.read_to_string(&mut text).await.unwrap();
    assert!(
        text.contains("20 50") && text.contains("/dev/pts/"),
        "{text}"
    );
    assert_eq!(vm.wait("tty", "second").await.exit_code, 4);

    type_in(&mut keys, "exit 3\n").await;
    screen.read_to_string(&mut String::new()).await.unwrap();
    assert_eq!(vm.wait("tty", "").await.exit_code, 3);
    let late = vm.agent.resize_terminal(context(), &resize).await;
    drop(late);
    vm.agent
        .remove_container(context(), &container("tty"))
        .await
        .unwrap();
}

#[tokio::test]
async fn an_exec_joins_its_container() {
    let mut vm = Vm::boot().await;
    let seccomp = json!({"linux": {"seccomp": {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
    }}});
    let script = "busybox mkdir /tmp/x && echo made; echo up; sleep 1000";
    let [_in, mut stdout, _err] = vm.run(Vm::request("c", sh(script), &seccomp)).await;
    assert!(!read_until(&mut stdout, "up").await.contains("made"));
    let script = "id -u; id -G; pwd; cat /proc/1/cmdline; echo; busybox mkdir /tmp/x || echo refused; \
                  grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; cat /proc/self/cgroup; \
                  echo $HOME; cat /proc/self/oom_score_adj";
    let mut process = sh(script);
    merge(
        &mut process,
        &json!({
            "cwd": "/tmp", "user": {"uid": 1000, "gid": 1000, "additionalGids": [7, 8]},
            "capabilities": {"effective": [], "permitted": []},
        }),
    );
    let (text, code_) = vm.exec("c", "e", process.clone()).await;
    assert_eq!(code_, 0, "{text}");
    for wanted in [
        "1000\n1000 7 8\n/tmp\n",
        "refused",
        "CapEff:\t0000000000000000",
        "NoNewPrivs:\t0",
        "Seccomp:\t2",
        "0::/\n",
        "\n/tmp\n",
        "\n0",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in {text}");
    }
    merge(&mut process, &json!({"noNewPrivileges": true}));
    let (text, _) = vm.exec("c", "nnp", process).await;
    assert!(
        text.contains("NoNewPrivs:\t1") && text.contains("Seccomp:\t2"),
        "{text}"
    );

    // One that outlives its parent and holds its output does not hold the wait.
    let request = ExecProcessRequest {
        container_id: "c".into(),
        exec_id: "bg".into(),
        process: serde_json::to_vec(&sh("sleep 1000 & exit 5")).unwrap(),
        ..ExecProcessRequest::default()
    };
    let (stdio, streams) = vm.stdio().await;
    let request = ExecProcessRequest {
        stdio: Some(stdio).into(),
        ..request
    };
    vm.agent.exec_process(context(), &request).await.unwrap();
    assert_eq!(vm.wait("c", "bg").await.exit_code, 5);
    vm.agent
        .remove_process(context(), &process_of("c", "bg"))
        .await
        .unwrap();
    assert_eq!(
        code(
            vm.agent
                .wait_process(context(), &process_of("c", "bg"))
                .await
        )
        .0,
        Code::NOT_FOUND
    );
    drop(streams);

    // The first process ends the others.
    let (stdio, [_a, mut out, _b]) = vm.stdio().await;
    let request = ExecProcessRequest {
        container_id: "c".into(),
        exec_id: "long".into(),
        process: serde_json::to_vec(&process_long()).unwrap(),
        stdio: Some(stdio).into(),
        ..ExecProcessRequest::default()
    };
    vm.agent.exec_process(context(), &request).await.unwrap();
    vm.agent
        .signal_process(context(), &signal("c", "", libc::SIGKILL, false))
        .await
        .unwrap();
    assert_eq!(vm.wait("c", "long").await.exit_code, 137);
    assert_eq!(out.read(&mut [0]).await.unwrap(), 0);
    // The first process ends last: the kernel ends the others of its namespace, then
    // it. Until then the container runs.
    assert_eq!(vm.wait("c", "").await.exit_code, 137);
    assert_eq!(
        code(vm.agent.exec_process(context(), &request).await).0,
        Code::FAILED_PRECONDITION
    );
}

fn process_long() -> serde_json::Value {
    process(&["sleep", "1000"])
}

#[tokio::test]
async fn a_container_is_confined() {
    let mut vm = Vm::boot().await;
    let script = "mknod /tmp/disk b 254 0 && (head -c 1 /tmp/disk >/dev/null 2>&1 || echo no-disk); \
                  mknod /tmp/n c 1 3 && echo ok > /tmp/n && echo null; \
                  cat /proc/1/cgroup; ls /; readlink /proc/1/exe; \
                  (echo x > /proc/sys/kernel/hostname) 2>/dev/null || echo ro-sys; \
                  grep -c . /proc/mounts; ls /run /walnut-container 2>&1 | grep -c walnut";
    let (text, end) = vm.output(Vm::request("c", sh(script), &json!({}))).await;
    assert_eq!(end.exit_code, 0, "{text}");
    for wanted in ["no-disk", "null", "0::/\n", "/bin/busybox", "ro-sys"] {
        assert!(text.contains(wanted), "{wanted:?} is not in {text}");
    }
    assert!(!text.contains("/run/walnut"), "{text}");
}

#[tokio::test]
async fn limits_hold_and_are_reported() {
    let mut vm = Vm::boot().await;
    let limited = json!({"linux": {"resources": {
        "memory": {"limit": 16 << 20, "swap": 16 << 20}, "pids": {"limit": 20},
        "cpu": {"quota": 50000, "period": 100_000, "shares": 512},
    }}});
    let script = "echo up; sleep 1000";
    let [_in, mut stdout, _err] = vm.run(Vm::request("c", sh(script), &limited)).await;
    read_until(&mut stdout, "up").await;
    let stats = vm
        .agent
        .container_stats(context(), &container("c"))
        .await
        .unwrap();
    assert_eq!(
        (stats.memory_limit, stats.pids_limit, stats.oom_kills),
        (16 << 20, 20, 0)
    );
    assert!(stats.pids_current >= 1 && stats.cpu_usage_us > 0 && stats.memory_current > 0);
    let update = UpdateContainerRequest {
        container_id: "c".into(),
        resources: serde_json::to_vec(
            &json!({"pids": {"limit": 30}, "memory": {"limit": 24 << 20, "swap": 24 << 20}}),
        )
        .unwrap(),
        ..UpdateContainerRequest::default()
    };
    vm.agent.update_container(context(), &update).await.unwrap();
    let stats = vm
        .agent
        .container_stats(context(), &container("c"))
        .await
        .unwrap();
    assert_eq!((stats.memory_limit, stats.pids_limit), (24 << 20, 30));
    // dd's buffer is one block: more than the container may have.
    let agent = vm.agent.clone();
    let event = tokio::spawn(async move { agent.next_event(context(), &Empty::new()).await });
    let (_, code_) = vm
        .exec(
            "c",
            "hog",
            process(&["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"]),
        )
        .await;
    assert_eq!(code_, 137);
    assert!(vm.wait("c", "hog").await.oom_killed);
    assert_eq!(event.await.unwrap().unwrap().oom().container_id, "c");
    assert_eq!(
        vm.agent
            .container_stats(context(), &container("c"))
            .await
            .unwrap()
            .oom_kills,
        1
    );
}

#[tokio::test]
async fn paused_means_paused() {
    let mut vm = Vm::boot().await;
    let script = "n=0; while :; do n=$((n+1)); echo $n > /tmp/n; done";
    let [_in, _out, _err] = vm.run(Vm::request("c", sh(script), &json!({}))).await;
    vm.agent
        .pause_container(context(), &container("c"))
        .await
        .unwrap();
    let usage = |vm: &Vm| {
        let agent = vm.agent.clone();
        async move {
            agent
                .container_stats(context(), &container("c"))
                .await
                .unwrap()
                .cpu_usage_us
        }
    };
    let before = usage(&vm).await;
    let (text, _) = vm
        .output(Vm::request("other", sh("echo runs"), &json!({})))
        .await;
    assert_eq!(text, "runs\n");
    assert_eq!(usage(&vm).await, before, "the others run, it does not");
    let exec = ExecProcessRequest {
        container_id: "c".into(),
        exec_id: "e".into(),
        process: serde_json::to_vec(&sh("true")).unwrap(),
        ..ExecProcessRequest::default()
    };
    assert_eq!(
        code(vm.agent.exec_process(context(), &exec).await).0,
        Code::FAILED_PRECONDITION
    );
    vm.agent
        .resume_container(context(), &container("c"))
        .await
        .unwrap();
    let deadline = std::time::Instant::now() + vm::PATIENCE;
    while usage(&vm).await <= before {
        assert!(
            std::time::Instant::now() < deadline,
            "it does not run again"
        );
    }
    vm.agent
        .remove_container(context(), &container("c"))
        .await
        .unwrap();
}

#[tokio::test]
async fn figures() {
    let mut vm = Vm::boot().await;
    vm.configure(HashMap::new()).await.unwrap();
    let watch = json!({
        "process": {"capabilities": {"bounding": ["CAP_SYS_PTRACE"], "effective": ["CAP_SYS_PTRACE"], "permitted": ["CAP_SYS_PTRACE"]}},
        "linux": {"namespaces": [{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}], "maskedPaths": [], "readonlyPaths": []},
    });
    for round in 0..5 {
        let mut request = Vm::request(
            "c",
            sh(
                "grep -E 'Name|Rss' /proc/1/status; grep -E '^(Pss|Rss|Private|Anon)' /proc/1/smaps_rollup; cat /proc/meminfo | head -3",
            ),
            &watch,
        );
        let (stdio, [_in, mut stdout, mut err]) = vm.stdio().await;
        request.stdio = Some(stdio).into();
        let t0 = std::time::Instant::now();
        vm.agent
            .create_container(context(), &request)
            .await
            .unwrap();
        let created = t0.elapsed();
        vm.agent
            .start_container(context(), &container("c"))
            .await
            .unwrap();
        let started = t0.elapsed();
        let first = stdout.read_u8().await.ok();
        let output = t0.elapsed();
        let mut text = String::from_utf8(first.into_iter().collect()).unwrap();
        stdout.read_to_string(&mut text).await.unwrap();
        err.read_to_string(&mut text).await.unwrap();
        let t1 = std::time::Instant::now();
        vm.agent
            .remove_container(context(), &container("c"))
            .await
            .unwrap();
        println!(
            "round {round}: created {created:?} started {started:?} first byte {output:?} removed {:?}",
            t1.elapsed()
        );
        if round == 0 || round == 4 {
            println!("{text}");
        }
    }
    let t2 = std::time::Instant::now();
    vm.agent.shutdown(context(), &Empty::new()).await.unwrap();
    vm.gone().await;
    println!("shutdown {:?}", t2.elapsed());
}

/// What wakes in a guest that has nothing to do: the agent must not.
#[tokio::test]
async fn an_idle_guest_sleeps() {
    let mut vm = Vm::boot().await;
    vm.configure(HashMap::new()).await.unwrap();
    let watch = json!({
        "linux": {"namespaces": [{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}], "maskedPaths": [], "readonlyPaths": []},
    });
    let look = "grep -E '^(Name|voluntary)' /proc/[0-9]*/status; cat /proc/sys/vm/stat_interval; grep timer /proc/interrupts";
    // What it prints wakes the agent, so it prints when all is over.
    let script = format!(
        "sleep 3; before=$({look}); sleep 10; after=$({look}); echo \"$before\"; echo later; echo \"$after\""
    );
    let mut request = Vm::request("c", sh(&script), &watch);
    let (stdio, [_in, mut stdout, _err]) = vm.stdio().await;
    request.stdio = Some(stdio).into();
    let (agent, c) = (&vm.agent, container("c"));
    agent.create_container(context(), &request).await.unwrap();
    agent.start_container(context(), &c).await.unwrap();
    let mut text = String::new();
    stdout.read_to_string(&mut text).await.unwrap();
    let (before, after) = text.split_once("later").unwrap();
    let (before, after) = (switches(before), switches(after));
    for (file, (name, count)) in &after {
        let (_, then) = before.get(file).cloned().unwrap_or_default();
        if *count > then {
            println!("{name}: {} in 10 s", count - then);
        }
    }
    println!(
        "{}",
        text.lines()
            .filter(|l| l.contains("timer"))
            .collect::<Vec<_>>()
            .join("\n")
    );
    let init = "/proc/1/status";
    assert_eq!(before[init], after[init]);
}

/// Each process by its file: its name, and how often it has gone to sleep.
fn switches(text: &str) -> HashMap<String, (String, u64)> {
    let mut all: HashMap<String, (String, u64)> = HashMap::new();
    for line in text.lines() {
        let Some((file, rest)) = line.split_once(':').filter(|(f, _)| f.starts_with("/proc"))
        else {
            continue;
        };
        let entry = all.entry(file.to_owned()).or_default();
        match rest.split_once(":\t") {
            Some(("Name", name)) => entry.0 = name.to_owned(),
            Some((_, count)) => entry.1 = count.parse().unwrap(),
            None => {}
        }
    }
    all
}
