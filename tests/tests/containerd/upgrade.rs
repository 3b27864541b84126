//! Shims that become other programs while their pods run on, and containerd knows nothing
//! of it.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use walnut_tests::{
    processes, unique, until,
    upgrade::{another_shim, counted, pretender, refused, upgrade, upgraded},
};

use crate::{daemon::Daemon, events::Events, kubelet::Kubelet, network::ECHO, pods::member};

/// Counts until it is told to stop.
const COUNTS: &str = "i=0; while [ ! -e /stop ]; do echo $i; i=$((i+1)); done; exit 7";

impl Daemon {
    /// Has the shim of a sandbox become `program`.
    #[track_caller]
    fn becomes(&self, name: &str, program: &Path) {
        upgraded(&self.root().join("walnut"), &self.file("w"), name, program);
    }
}

#[test]
fn containerd_notices_nothing() {
    let daemon = Daemon::start();
    let events = Events::listen(&daemon);
    let id = unique("c");
    // In front: what it prints comes through FIFOs, and its end as the answer to a request
    // that was there all the time.
    let mut front = daemon
        .command(&daemon.run_args(&["--rm"], &id, &["sh", "-c", COUNTS]))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(front.stdout.take().unwrap());
    let mut text = String::new();
    while !text.ends_with("\n1000\n") {
        stdout.read_line(&mut text).unwrap();
    }
    let reader = std::thread::spawn(move || {
        stdout.read_to_string(&mut text).unwrap();
        text
    });
    let script = "while read line; do echo got $line; done; exit 9";
    let exec = [
        "task",
        "exec",
        "--exec-id",
        "reads",
        &id,
        "sh",
        "-c",
        script,
    ];
    let mut exec = daemon
        .command(&exec)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut answers = BufReader::new(exec.stdout.take().unwrap());
    let mut say = |exec: &mut std::process::Child, word: &str| {
        writeln!(exec.stdin.as_ref().unwrap(), "{word}").unwrap();
        let mut answer = String::new();
        answers.read_line(&mut answer).unwrap();
        assert_eq!(answer, format!("got {word}\n"));
    };
    say(&mut exec, "one");
    let shim = || {
        let all = processes(daemon.scratch().to_str().unwrap());
        let mut all = all.into_iter();
        all.find(|(_, name)| name.starts_with("containerd-shim"))
    };
    // What makes a template is nobody's here.
    daemon.until_there_is_a_template();
    let before = (shim(), daemon.task(&id));
    // Twice in a row.
    for mark in ["a", "b"] {
        daemon.becomes(&id, &another_shim(daemon.scratch(), mark));
        say(&mut exec, mark);
        daemon.exec(&id, &["true"]).exits(0);
        let stats = daemon.ctr(&["task", "metrics", &id]).exits(0);
        assert!(stats.stdout.contains("memory"), "{stats:#?}");
    }
    let now = (shim(), daemon.task(&id));
    assert_eq!(now, before);
    drop(exec.stdin.take());
    assert_eq!(exec.wait().unwrap().code(), Some(9));
    // It may go with the container that it ends.
    daemon.exec(&id, &["touch", "/stop"]);
    assert_eq!(front.wait().unwrap().code(), Some(7));
    assert!(counted(&reader.join().unwrap()) > 1000);
    until("its end is told", || {
        events.of(&id).contains(&"delete".into())
    });
    // Of the container itself, each once. Those of exec'd processes name it too.
    let own = |topic: &str| events.lines(topic, &id).len();
    assert_eq!(
        (
            own("/tasks/create"),
            own("/tasks/start"),
            own("/tasks/delete")
        ),
        (1, 1, 1)
    );
    // Four processes of exec ended, and the container.
    assert_eq!((own("/tasks/exec-started"), own("/tasks/exit")), (4, 5));
    assert_eq!(events.lines("/tasks/exit", "reads").len(), 1);
    daemon.assert_nothing_left();
}

#[test]
fn the_end_of_a_task_is_told_after_an_upgrade() {
    let daemon = Daemon::start();
    let events = Events::listen(&daemon);
    let id = unique("c");
    let file = daemon.scratch().join("logs/out");
    let uri = format!("file://{}", file.display());
    let program = ["sh", "-c", COUNTS];
    daemon
        .run(&["-d", "--log-uri", &uri], &id, &program)
        .exits(0);
    let lines = || counted(&fs::read_to_string(&file).unwrap_or_default());
    until("it counts", || lines() > 100);
    daemon.becomes(&id, &another_shim(daemon.scratch(), "a"));
    let then = lines();
    until("it counts on", || lines() > then);
    // containerd that comes back finds it under its address.
    daemon.restart(|| {});
    // It may go with the container that it ends.
    daemon.exec(&id, &["touch", "/stop"]);
    daemon.until_task_is(&id, "STOPPED");
    daemon.delete(&id, 7);
    counted(&fs::read_to_string(&file).unwrap());
    assert!(events.lines("/tasks/exit", &id).len() <= 2);
    daemon.ctr(&["container", "rm", &id]).exits(0);
    daemon.assert_nothing_left();
}

#[test]
fn a_program_takes_the_output_on() {
    let daemon = Daemon::start();
    let id = unique("c");
    let (logger, file) = (daemon.file("logger"), daemon.file("taken"));
    let script = format!("#!/bin/sh\nexec 5>&-\nexec cat <&3 >{}\n", file.display());
    fs::write(&logger, script).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&logger, mode).unwrap();
    let uri = format!("binary://{}", logger.display());
    daemon
        .run(&["-d", "--log-uri", &uri], &id, &["sh", "-c", COUNTS])
        .exits(0);
    let lines = || counted(&fs::read_to_string(&file).unwrap_or_default());
    until("it counts", || lines() > 100);
    daemon.becomes(&id, &another_shim(daemon.scratch(), "a"));
    let then = lines();
    until("it counts on", || lines() > then);
    // It may go with the container that it ends.
    daemon.exec(&id, &["touch", "/stop"]);
    daemon.until_task_is(&id, "STOPPED");
    daemon.remove(&id);
    counted(&fs::read_to_string(&file).unwrap());
    daemon.assert_nothing_left();
}

#[test]
fn a_pod_has_all_its_containers_afterwards() {
    let daemon = Daemon::start();
    let (pod, a, b) = (unique("pod"), unique("a"), unique("b"));
    let sleep = ["sleep", "1000"];
    member(&daemon, &pod, &pod, "sandbox", &sleep);
    member(&daemon, &pod, &a, "container", &sleep);
    daemon.ctr(&["task", "pause", &a]).exits(0);
    let (code, rows) = upgrade(
        &daemon.root().join("walnut"),
        &daemon.file("w"),
        &[
            "--all",
            "--program",
            another_shim(daemon.scratch(), "a").to_str().unwrap(),
        ],
    );
    assert_eq!((code, rows.len()), (0, 1), "{rows:#?}");
    assert_eq!(
        (
            &rows[0]["sandbox"],
            &rows[0]["front"],
            &rows[0]["namespace"]
        ),
        (
            &pod.as_str().into(),
            &"containerd".into(),
            &"walnut-test".into()
        )
    );
    daemon.until_task_is(&a, "PAUSED");
    daemon.ctr(&["task", "resume", &a]).exits(0);
    // Containers go, and others come.
    member(&daemon, &pod, &b, "container", &["sh", "-c", "exit 3"]);
    daemon.until_task_is(&b, "STOPPED");
    daemon.delete(&b, 3);
    daemon.ctr(&["container", "rm", &b]).exits(0);
    daemon.exec(&a, &["true"]).exits(0);
    daemon.remove(&a);
    daemon.exec(&pod, &["true"]).exits(0);
    daemon.remove(&pod);
    daemon.assert_nothing_left();
}

#[test]
fn a_shim_that_stays_and_one_that_is_killed() {
    let daemon = Daemon::start();
    let events = Events::listen(&daemon);
    let id = unique("c");
    daemon.detached(&id, &["sleep", "1000"]);
    let (root, run) = (daemon.root().join("walnut"), daemon.file("w"));
    let older = r#"{"version":"0.0.9","format":0}"#;
    let older = pretender(daemon.scratch(), "older", older, "exit 0");
    let why = refused(&root, &run, &id, &older);
    assert!(why.contains("states of format 0"), "{why}");
    let about = r#"{"version":"0.1.0","format":1}"#;
    let strict = pretender(daemon.scratch(), "strict", about, "echo no >&2; exit 1");
    let why = refused(&root, &run, &id, &strict);
    assert!(why.contains("cannot go on"), "{why}");
    daemon.exec(&id, &["true"]).exits(0);
    daemon.becomes(&id, &another_shim(daemon.scratch(), "a"));
    let mark = daemon.scratch().to_str().unwrap().to_owned();
    let shim = processes(&mark)
        .into_iter()
        .find(|(_, name)| name.starts_with("containerd-shim"));
    kill(Pid::from_raw(shim.unwrap().0), Signal::SIGKILL).unwrap();
    until("the task is gone", || daemon.task(&id).is_none());
    daemon.assert_nothing_left();
    until("its end is told", || {
        events.of(&id).contains(&"delete".into())
    });
    let own = format!("\"id\":\"{id}\"");
    let mut exits = events.lines("/tasks/exit", &id);
    exits.retain(|line| line.contains(&own));
    assert_eq!(exits.len(), 1, "{exits:#?}");
    assert!(exits[0].contains("\"exit_status\":137"), "{exits:#?}");
    daemon.ctr(&["container", "rm", &id]).exits(0);
}

/// Sends numbers to an echo, one after the other, until its input ends; how many came back.
const ASKS: &str = r#"
import select, socket, sys
with socket.create_connection(("127.0.0.1", 7000), 60) as stream:
    back, count = stream.makefile("rb"), 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        word = b"%d" % count * 5000 + b"\n"
        stream.sendall(word)
        assert back.readline() == word, count
        count += 1
        if count == 10:
            print("runs", flush=True)
print(count)
"#;

#[test]
fn a_connection_to_a_pods_loopback_is_carried_on() {
    let daemon = Daemon::start_with_pod_network();
    let kubelet = Kubelet::new(&daemon);
    let pod = kubelet.run_networked_pod(&daemon, vec![]);
    let echo = kubelet.run(&pod, "echo", ECHO);
    until("the echo listens", || {
        let listens = "grep -q :1B58 /proc/net/tcp6";
        kubelet.exec(&echo, listens).exit_code == 0
    });
    let namespace = format!("--net={}", kubelet.namespace(&pod));
    let mut client = Command::new("nsenter")
        .args(["--target", &daemon.pid().to_string(), "--net"])
        .args(["nsenter", &namespace, "python3", "-c", ASKS])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut says = BufReader::new(client.stdout.take().unwrap()).lines();
    assert_eq!(says.next().unwrap().unwrap(), "runs");
    let (root, run) = (daemon.root().join("walnut"), daemon.file("w"));
    for mark in ["a", "b"] {
        let program = another_shim(daemon.scratch(), mark);
        let args = ["--all", "--program", program.to_str().unwrap()];
        let (code, rows) = upgrade(&root, &run, &args);
        assert_eq!((code, rows.len()), (0, 1), "{rows:#?}");
        assert_eq!(kubelet.exec(&echo, "true").exit_code, 0);
    }
    drop(client.stdin.take());
    let count: u32 = says.next().unwrap().unwrap().parse().unwrap();
    assert!(client.wait().unwrap().success() && count > 10);
    // Others come.
    let ask = "import socket; s = socket.create_connection(('127.0.0.1', 7000), 60); \
               s.sendall(b'x'); print(s.recv(1))";
    let done = daemon.on_the_node(&["nsenter", &namespace, "python3", "-c", ask]);
    assert_eq!(done.exits(0).stdout, "b'x'\n");
    kubelet.end_pod(&pod);
    daemon.assert_nothing_left();
}
