//! What containerd hears, in order, and once.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use walnut_tests::{unique, until};

use crate::daemon::Daemon;

/// `ctr events`, as it goes.
pub(crate) struct Events {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Events {
    pub(crate) fn listen(daemon: &Daemon) -> Self {
        let mut child = daemon
            .command(&["events"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (sink, from) = (lines.clone(), child.stdout.take().unwrap());
        thread::spawn(move || {
            for line in BufReader::new(from).lines().map_while(Result::ok) {
                sink.lock().unwrap().push(line);
            }
        });
        let events = Self { child, lines };
        // It does not say when it begins to listen: things happen until it has heard one.
        until("events are heard", || {
            daemon.ctr(&["namespace", "label", "default", &unique("l=")]);
            !events.lines.lock().unwrap().is_empty()
        });
        events
    }

    /// Topics of the tasks' events that name `word`, with what `pick` makes of the line.
    pub(crate) fn of(&self, word: &str) -> Vec<String> {
        let lines = self.lines.lock().unwrap();
        let ours = lines.iter().filter(|l| l.contains(word));
        let topics = ours.filter_map(|l| l.split_whitespace().find(|w| w.starts_with("/tasks/")));
        topics
            .map(|topic| topic["/tasks/".len()..].to_owned())
            .collect()
    }

    /// The lines of a topic that name `word`.
    pub(crate) fn lines(&self, topic: &str, word: &str) -> Vec<String> {
        let lines = self.lines.lock().unwrap();
        let ours = lines
            .iter()
            .filter(|l| l.contains(topic) && l.contains(word));
        ours.cloned().collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_life_is_told_in_order_and_once() {
    let daemon = Daemon::start();
    let events = Events::listen(&daemon);
    let id = unique("c");
    daemon.detached(&id, &["sleep", "1000"]);
    daemon.exec(&id, &["sh", "-c", "exit 4"]).exits(4);
    daemon.ctr(&["task", "pause", &id]).exits(0);
    daemon.ctr(&["task", "resume", &id]).exits(0);
    daemon.remove(&id);
    let want = [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "paused",
        "resumed",
        "exit",
        "delete",
    ];
    until("all events are heard", || {
        events.of(&id).len() >= want.len()
    });
    // containerd asks for the dead shim's end too; nothing more may come of it.
    daemon.assert_nothing_left();
    assert_eq!(events.of(&id), want);
    let exits = events.lines("/tasks/exit", &id);
    assert!(exits[0].contains("\"exit_status\":4"), "{exits:#?}");
    assert!(exits[1].contains("\"exit_status\":137"), "{exits:#?}");
}

#[test]
fn a_container_that_needs_too_much_memory_is_told_of() {
    let daemon = Daemon::start();
    let events = Events::listen(&daemon);
    let id = unique("c");
    let limit = (48_u64 << 20).to_string();
    let eat = "x = []\nwhile True: x.append(bytearray(1 << 20))";
    let options = ["--rm", "--memory-limit", &limit];
    let done = daemon
        .run(&options, &id, &["python3", "-c", eat])
        .exits(137);
    assert_eq!(done.stdout, "");
    until("all events are heard", || {
        events.of(&id).contains(&"delete".into())
    });
    assert_eq!(events.of(&id), ["create", "start", "oom", "exit", "delete"]);
}

#[test]
fn events_of_containerd_s_absence_come_when_it_is_back() {
    let daemon = Daemon::start();
    let id = unique("c");
    let mount = format!(
        "type=bind,src={},dst=/host,options=rbind:rw",
        daemon.scratch().join("shared").display()
    );
    std::fs::create_dir(daemon.scratch().join("shared")).unwrap();
    let program = "until test -e /host/go; do sleep 0.05; done; exit 9";
    daemon
        .run(&["-d", "--mount", &mount], &id, &["sh", "-c", program])
        .exits(0);
    let shared = daemon.scratch().join("shared");
    daemon.restart(|| std::fs::write(shared.join("go"), "").unwrap());
    daemon.until_task_is(&id, "STOPPED");
    daemon.delete(&id, 9);
    daemon.ctr(&["container", "rm", &id]).exits(0);
}
