//! A container's whole life, by the verbs that people know from Docker.

use std::{fs, os::unix::fs::MetadataExt, process::Command};

use serde_json::Value;
use walnut_tests::{
    Done, Terminal, assert_nothing_left, command, host, run, spawn_walnut, unique, until, walnut,
};

/// A container that is made, and removed with all that is its when this is dropped.
struct Made {
    name: String,
    id: String,
}

impl Made {
    /// `walnut create` with `args`; the image is named by `IMAGE`.
    #[track_caller]
    fn new(args: &[&str]) -> Self {
        let name = unique("v");
        let image = host().image.as_str();
        let args = args.iter().map(|&a| if a == "IMAGE" { image } else { a });
        let all: Vec<&str> = ["create", "--name", &name]
            .into_iter()
            .chain(args)
            .collect();
        let done = walnut(&all).exits(0);
        let id = done.text().to_owned();
        assert_eq!(id.len(), 32, "{done:#?}");
        Self { name, id }
    }

    #[track_caller]
    fn does(&self, verb: &str, args: &[&str]) -> Done {
        let all: Vec<&str> = [verb]
            .into_iter()
            .chain(args.iter().copied())
            .chain([self.name.as_str()])
            .collect();
        walnut(&all)
    }

    #[track_caller]
    fn exec(&self, args: &[&str]) -> Done {
        walnut(&[&["exec", &self.name], args].concat())
    }

    /// What a template says of it.
    #[track_caller]
    fn is(&self, template: &str) -> String {
        let done = self.does("inspect", &["--type", "container", "-f", template]);
        done.exits(0).text().to_owned()
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let done = walnut(&["rm", "-f", "-v", &self.name]);
        if !std::thread::panicking() {
            assert_eq!(done.code, 0, "{done:#?}");
            assert_nothing_left(&self.id);
        }
    }
}

#[test]
fn from_create_to_rm() {
    let volume = unique("vol");
    let mount = format!("{volume}:/data");
    let script = "trap 'exit 7' TERM; n=$(cat /data/n 2>/dev/null || echo 0); echo $((n + 1)) > /data/n; \
                  echo line-1; until test -e /go; do sleep 0.05; done; echo line-2; \
                  until test -e /on; do sleep 0.05; done; echo line-3; while :; do sleep 0.05; done";
    let labels = ["-l", "tier=db", "-l", "nut"];
    let made = Made::new(&[&labels, &["-v", &mount, "IMAGE", "sh", "-c", script][..]].concat());
    let name = made.name.as_str();

    // Made, and no machine yet.
    let filters = [
        "-a",
        "--filter",
        "status=created",
        "--filter",
        "label=tier=db",
    ];
    let listed = walnut(
        &[
            &["ps"],
            &filters[..],
            &["--format", "{{.Names}} {{.State}}"],
        ]
        .concat(),
    );
    assert!(
        listed.text().contains(&format!("{name} created")),
        "{listed:#?}"
    );
    assert!(!walnut(&["ps", "-q"]).text().contains(&made.id[..12]));
    assert_nothing_left(&made.id);
    made.exec(&["true"]).fails(125, "not running");
    walnut(&["cp", &format!("{name}:/etc/hostname"), "-"]).fails(125, "is created");
    walnut(&["volume", "rm", &volume]).fails(1, "is in use by");

    // Started, asked about, frozen.
    made.does("start", &[]).exits(0);
    for (line, next) in [("line-1", "/go"), ("line-2", "/on"), ("line-3", "/end")] {
        until("it has printed", || {
            made.does("logs", &[]).text().contains(line)
        });
        made.exec(&["touch", next]).exits(0);
    }
    assert_eq!(
        made.is("{{.State.Status}} {{.HostConfig.RestartPolicy.Name}}"),
        "running no"
    );
    assert_eq!(
        made.is("{{(index .Mounts 0).Name}} {{.Config.Labels.tier}}"),
        format!("{volume} db")
    );
    let whole = made.does("inspect", &[]).exits(0);
    let whole: Vec<Value> = serde_json::from_slice(&whole.stdout).unwrap();
    assert_eq!(whole[0]["Id"], made.id.as_str());
    let top = made.does("top", &[]).exits(0);
    assert!(top.text().contains("sh -c trap"), "{top:#?}");
    made.does("pause", &[]).exits(0);
    made.does("pause", &[]).fails(1, "paused already");
    made.exec(&["true"]).fails(125, "unpause it first");
    assert!(
        walnut(&["ps", "--filter", "status=paused"])
            .text()
            .contains("(paused)")
    );
    made.does("unpause", &[]).exits(0);

    // Its log.
    assert_eq!(made.does("logs", &["--tail", "1"]).text(), "line-3");
    let stamped = made.does("logs", &["-t"]).exits(0);
    let second = stamped.text().lines().nth(1).unwrap();
    let time = second.split(' ').next().unwrap();
    let since = made.does("logs", &["--since", time]).exits(0);
    assert_eq!(since.text(), "line-2\nline-3");
    assert_eq!(made.does("logs", &["--until", time]).text(), "line-1");
    let both = made.does("logs", &["--since", "1h", "--tail", "2"]);
    assert_eq!(both.text(), "line-2\nline-3");

    // Other limits, which last.
    made.does(
        "update",
        &[
            "--memory",
            "96m",
            "--pids-limit",
            "40",
            "--restart",
            "on-failure:2",
        ],
    )
    .exits(0);
    let limits = [
        "cat",
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/pids.max",
    ];
    assert_eq!(made.exec(&limits).text(), "100663296\n40");
    made.does("update", &["--cpuset-cpus", "0"])
        .fails(125, "make the container anew");
    made.does("update", &[]).fails(125, "say what");

    // Anew: the volume has what was written, the root file system has not.
    made.does("restart", &["-t", "5"]).exits(0);
    until("it has counted", || {
        made.exec(&["cat", "/data/n"]).text() == "2"
    });
    assert_eq!(made.exec(&limits).text(), "100663296\n40");
    assert_eq!(
        made.is("{{.HostConfig.RestartPolicy.MaximumRetryCount}}"),
        "2"
    );

    // Another name, with a word for slips.
    let other = format!("{name}-renamed");
    walnut(&["rename", name, &other]).exits(0);
    let slip = other.replace("renamed", "renmaed");
    walnut(&["inspect", "--type", "container", &slip]).fails(1, &format!("did you mean {other}?"));
    walnut(&["rename", &other, name]).exits(0);

    // Its end is waited for, and told of.
    let waiting = spawn_walnut(&["wait", name]);
    made.does("stop", &["-t", "20"]).exits(0);
    assert_eq!(waiting.wait().exits(0).text(), "7");
    assert_eq!(made.is("{{.State.Status}} {{.State.ExitCode}}"), "exited 7");
    let filter = format!("container={name}");
    let events = [
        "events", "--since", "1h", "--until", "0s", "--filter", &filter,
    ];
    let events = walnut(&[&events[..], &["--format", "{{.Action}}"]].concat()).exits(0);
    let actions: Vec<_> = events.text().lines().collect();
    let wanted = [
        "create", "start", "pause", "unpause", "update", "die", "stop", "start", "restart",
        "rename",
    ];
    let mut left = actions.iter();
    for action in wanted {
        assert!(left.any(|a| *a == action), "{action} in {actions:?}");
    }
    let json = walnut(&[
        "events",
        "--since",
        "1h",
        "--until",
        "0s",
        "--filter",
        &filter,
        "--filter",
        "event=die",
        "--format",
        "json",
    ]);
    let last: Value = serde_json::from_str(json.text().lines().last().unwrap()).unwrap();
    assert_eq!(last["Actor"]["Attributes"]["exitCode"], "7");

    // In front this time; its exit code is here.
    let mut front = spawn_walnut(&["start", "-a", name]);
    front.prints("line-1");
    made.does("kill", &["-s", "TERM"]).exits(0);
    front.input(b"");
    front.wait().exits(7);
    drop(made);
    walnut(&["volume", "rm", &volume]).exits(0);
    walnut(&["volume", "inspect", &volume]).fails(1, "no such volume");
}

#[test]
fn files_are_copied_in_and_out() {
    let made = Made::new(&[
        "--cap-drop",
        "ALL",
        "--cap-add",
        "CHOWN",
        "--cap-add",
        "FOWNER",
        "-v",
        "/anonymous",
        "IMAGE",
        "sleep",
        "infinity",
    ]);
    made.does("start", &[]).exits(0);
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join(path).display().to_string();
    let inside = |path: &str| format!("{}:{path}", made.name);
    fs::create_dir_all(dir.path().join("site/deep")).unwrap();
    fs::write(dir.path().join("site/deep/page"), "hello").unwrap();
    std::os::unix::fs::symlink("deep/page", dir.path().join("site/link")).unwrap();

    // Into a directory, as one that is not there, and what is in it.
    walnut(&["cp", &at("site"), &inside("/srv")]).exits(0);
    walnut(&["cp", &at("site"), &inside("/srv/other")]).exits(0);
    walnut(&["cp", &at("site/."), &inside("/anonymous")]).exits(0);
    walnut(&["cp", "-L", &at("site/link"), &inside("/srv/followed")]).exits(0);
    let script = "cat /srv/site/deep/page /srv/other/link /anonymous/deep/page /srv/followed; \
                  readlink /srv/site/link; stat -c %u:%g /srv/site";
    let shown = made.exec(&["sh", "-c", script]).exits(0);
    assert_eq!(shown.text(), "hellohellohellohellodeep/page\n0:0");
    walnut(&["cp", &at("none"), &inside("/srv")]).fails(125, "no such file");
    walnut(&["cp", &at("site"), &inside("/no/such/dir")]).fails(125, "no directory /no/such");
    walnut(&["cp", &at("site"), &inside("/etc/hostname")]).fails(125, "that is a file");

    // Out, with and without owners; devices and set-user-ID programs stay behind.
    let script = "mkdir /out; echo text > /out/file; chown 123:456 /out/file; chmod 4755 /out/file; \
                  ln -s /etc/shadow /out/link; seq 1 100000 > /out/big";
    made.exec(&["sh", "-c", script]).exits(0);
    walnut(&["cp", &inside("/out"), &at("out")]).exits(0);
    let meta = fs::symlink_metadata(dir.path().join("out/file")).unwrap();
    assert_eq!(
        (meta.uid(), meta.mode() & 0o7777),
        (nix::unistd::geteuid().as_raw(), 0o755)
    );
    assert!(dir.path().join("out/link").is_symlink());
    let big: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(fs::read_to_string(dir.path().join("out/big")).unwrap() == big);
    walnut(&["cp", "-a", &inside("/out/file"), &at("kept")]).exits(0);
    let meta = fs::metadata(dir.path().join("kept")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (123, 456));
    let devices = walnut(&["cp", &inside("/dev/null"), &at("null")]).exits(0);
    assert!(devices.stderr.contains("left out") && !dir.path().join("null").exists());
    walnut(&["cp", &inside("/none"), &at("x")]).fails(125, "no such file");

    // Streams, from here to there and back.
    let tar = walnut(&["cp", &inside("/out/file"), "-"]).exits(0);
    fs::write(dir.path().join("stream.tar"), &tar.stdout).unwrap();
    let listed = Command::new("tar")
        .args(["-tf", &at("stream.tar")])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&listed.stdout), "file\n");
    let mut sending = spawn_walnut(&["cp", "-", &inside("/tmp")]);
    sending.input(&tar.stdout);
    sending.wait().exits(0);
    assert_eq!(
        made.exec(&["stat", "-c", "%u %a", "/tmp/file"]).text(),
        "123 4755"
    );
    let mut sending = spawn_walnut(&["cp", "-", &inside("/tmp")]);
    sending.input(&[b'x'; 2000]);
    sending.wait().fails(125, "read the archive");
}

#[test]
fn a_terminal_is_left_and_come_back_to() {
    let name = unique("tty");
    let image = host().image.as_str();
    let shell = ["run", "-it", "--name", &name, image, "sh"];
    let mut terminal = Terminal::start(command(&shell), 80, 24);
    terminal.keys("echo one-$((1 + 1)); stty size\r");
    terminal.shows("one-2");
    terminal.keys("\u{10}\u{11}");
    assert_eq!(terminal.end(), 0);
    let attach = ["attach", "--detach-keys", "ctrl-],d", &name];
    let mut terminal = Terminal::start(command(&attach), 100, 30);
    terminal
        .keys("echo two-$((2 + 2)); until stty size | grep -q '30 100'; do :; done; stty size\r");
    terminal.shows("two-4");
    terminal.shows("30 100");
    // Two at once see the same.
    let mut other = Terminal::start(command(&["attach", &name]), 100, 30);
    other.keys("echo three-$((3 + 3))\r");
    other.shows("three-6");
    terminal.shows("three-6");
    other.keys("\u{10}\u{11}");
    assert_eq!(other.end(), 0);
    terminal.keys("\u{1d}d");
    assert_eq!(terminal.end(), 0);
    // A command in it is left as well, and goes on.
    let mut terminal = Terminal::start(command(&["exec", "-it", &name, "sh"]), 80, 24);
    terminal.keys("(read line; echo $line > /typed)& echo sub-$((4 + 4))\r");
    terminal.shows("sub-8");
    terminal.keys("\u{10}\u{11}");
    assert_eq!(terminal.end(), 0);
    let shells = walnut(&[
        "exec",
        &name,
        "sh",
        "-c",
        "grep -c ^ /proc/self/status; pidof sh | wc -w",
    ]);
    assert_eq!(shells.text().lines().last(), Some("4"), "{shells:#?}");
    let mut terminal = Terminal::start(command(&["attach", &name]), 80, 24);
    terminal.keys("exit 9\r");
    assert_eq!(terminal.end(), 9);
    walnut(&["attach", &name]).fails(125, "not running");
    walnut(&["rm", &name]).exits(0);
}

#[test]
fn input_that_was_kept_open_is_written_to_later() {
    let name = unique("in");
    let image = host().image.as_str();
    let script = "while read line; do echo got-$line; done; echo done";
    walnut(&[
        "run", "-d", "-i", "--name", &name, image, "sh", "-c", script,
    ])
    .exits(0);
    let mut one = spawn_walnut(&["attach", &name]);
    one.input(b"first\n");
    one.prints("got-first");
    let mut two = spawn_walnut(&["attach", "--no-stdin", &name]);
    let mut three = spawn_walnut(&["attach", &name]);
    three.input(b"second\n");
    three.prints("got-second");
    walnut(&["kill", &name]).exits(0);
    two.input(b"");
    for attached in [one, two, three] {
        attached.wait().exits(137);
    }
    assert_eq!(walnut(&["logs", &name]).text(), "got-first\ngot-second");
    walnut(&["rm", &name]).exits(0);
}

#[test]
fn what_restart_policies_want_is_done() {
    let name = unique("again");
    let image = host().image.as_str();
    let mount = format!("{name}:/data");
    let script = "echo x >> /data/starts; exit 3";
    let args = [
        "run",
        "-d",
        "--name",
        &name,
        "--restart",
        "on-failure:2",
        "-v",
        &mount,
    ];
    walnut(&[&args[..], &[image, "sh", "-c", script]].concat()).exits(0);
    let state = || {
        let of = "{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}";
        walnut(&["inspect", "-f", of, &name]).text().to_owned()
    };
    assert_eq!(walnut(&["wait", &name]).text(), "3");
    assert_eq!(state(), "exited 3 2");
    let volume = walnut(&["volume", "inspect", "-f", "{{.Mountpoint}}", &name]);
    let starts = || fs::read_to_string(format!("{}/starts", volume.text())).unwrap_or_default();
    assert_eq!(starts(), "x\nx\nx\n");
    // One that always comes back stays away when it is told to.
    walnut(&["update", "--restart", "always", &name]).exits(0);
    walnut(&["start", &name]).exits(0);
    until("it has been started again", || starts().len() >= 10);
    walnut(&["stop", "-t", "0", &name]).exits(0);
    let count = starts().len();
    assert!(state().starts_with("exited"));
    assert_nothing_left(walnut(&["inspect", "-f", "{{.Id}}", &name]).text());
    assert_eq!(starts().len(), count);
    // But when the node begins.
    assert!(walnut(&["start", "--boot"]).exits(0).text().contains(&name));
    until("it has been started again", || starts().len() > count);
    walnut(&["stop", "-t", "0", &name]).exits(0);
    walnut(&["rm", &name]).exits(0);
    walnut(&["volume", "rm", &name]).exits(0);
    let both = ["run", "--rm", "--restart", "always", image, "true"];
    walnut(&both).fails(125, "cannot be started again");
}

#[test]
fn health_is_looked_after() {
    let name = unique("health");
    let image = host().image.as_str();
    let check = [
        "--health-cmd",
        "echo looked; test -e /well",
        "--health-interval",
        "100ms",
        "--health-retries",
        "2",
    ];
    let start = ["run", "-d", "--name", &name];
    walnut(&[&start[..], &check, &[image, "sleep", "infinity"]].concat()).exits(0);
    let health = |of: &str| walnut(&["inspect", "-f", of, &name]).text().to_owned();
    until("it is ill", || {
        health("{{.State.Health.Status}}") == "unhealthy"
    });
    assert_eq!(
        health("{{(index .State.Health.Log 0).Output}}").trim(),
        "looked"
    );
    walnut(&["exec", &name, "touch", "/well"]).exits(0);
    until("it is well", || {
        health("{{.State.Health.Status}}") == "healthy"
    });
    let filter = [
        "ps",
        "--filter",
        "health=healthy",
        "--format",
        "{{.Names}} {{.Status}}",
    ];
    let listed = walnut(&filter).exits(0);
    let line = listed
        .text()
        .lines()
        .find(|line| line.starts_with(&name))
        .unwrap();
    assert!(line.ends_with("(healthy)"), "{line}");
    walnut(&["rm", "-f", &name]).exits(0);
}

#[test]
fn flags_of_run_reach_the_container() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let env = file("env", "# comment\nFROM_FILE=a b\nBOTH=file\n");
    let profile = file(
        "seccomp.json",
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":38}]}"#,
    );
    let seccomp = format!("seccomp={profile}");
    let script = "echo $FROM_FILE,$BOTH; id -G; stat -fc %T /t /m /data; stat -c %a /t; df -k /dev/shm | tail -1 | cut -d' ' -f1-20 | tr -s ' ' | cut -d' ' -f2; \
                  ulimit -n; cat /proc/sys/net/core/somaxconn; grep -E 'CapBnd|NoNewPrivs' /proc/self/status; \
                  cat /sys/fs/cgroup/pids.max; head -c 1 /dev/nil | wc -c; cat /proc/1/comm; mkdir /tmp/x 2>&1; touch /data/x 2>&1; true";
    let volume = format!(
        "type=bind,source={},target=/data,readonly",
        dir.path().display()
    );
    let done = run(&[
        "--env-file",
        &env,
        "-e",
        "BOTH=line",
        "--group-add",
        "777",
        "--mount",
        &volume,
        "--tmpfs",
        "/t:size=1m,mode=711",
        "--mount",
        "type=tmpfs,target=/m",
        "--shm-size",
        "2m",
        "--ulimit",
        "nofile=100:200",
        "--sysctl",
        "net.core.somaxconn=77",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "CHOWN",
        "--security-opt",
        "no-new-privileges",
        "--security-opt",
        &seccomp,
        "--pids-limit",
        "33",
        "--device",
        "/dev/null:/dev/nil:rw",
        "--init",
        "--quiet",
        "--memory",
        "128m",
        "--memory-swap",
        "128m",
        "--platform",
        "linux",
        "--cpuset-cpus",
        "0",
        "--stop-timeout",
        "1",
        "IMAGE",
        "sh",
        "-c",
        script,
    ])
    .exits(0);
    let lines: Vec<_> = done.text().lines().collect();
    assert_eq!(lines[0], "a b,line", "{done:#?}");
    assert!(lines[1].split(' ').any(|g| g == "777"), "{done:#?}");
    assert_eq!(
        &lines[2..5],
        ["tmpfs", "tmpfs", "fuseblk"].as_slice(),
        "{done:#?}"
    );
    assert_eq!(
        &lines[5..9],
        ["711", "2048", "100", "77"].as_slice(),
        "{done:#?}"
    );
    assert_eq!(
        lines[9].split('\t').nth(1),
        Some("0000000000000001"),
        "{done:#?}"
    );
    assert_eq!(lines[10].split('\t').nth(1), Some("1"), "{done:#?}");
    assert_eq!(&lines[11..14], ["33", "0", "init"].as_slice(), "{done:#?}");
    assert!(lines[14].contains("Function not implemented"), "{done:#?}");
    assert!(lines[15].contains("Read-only file system"), "{done:#?}");
    // A first process of ours ends as the command does.
    run(&["--init", "IMAGE", "sh", "-c", "exit 5"]).exits(5);
}

#[test]
fn what_a_machine_cannot_have_is_refused_with_the_reason() {
    for (args, why) in [
        (["--privileged", "IMAGE", "true"], "--cap-add ALL"),
        (
            ["--pid=host", "IMAGE", "true"],
            "does not know the processes",
        ),
        (["--gpus=all", "IMAGE", "true"], "no driver"),
        (["--memory-swap=1g", "IMAGE", "true"], "give --memory too"),
        (["--cpuset-cpus=1023", "IMAGE", "true"], "no processor 1023"),
        (
            ["--platform=linux/s390x", "IMAGE", "true"],
            "kernel and processor are",
        ),
        (["--device=/dev/kmsg-none", "IMAGE", "true"], "No such file"),
        (
            ["--cap-add=NET_ADMNI", "IMAGE", "true"],
            "did you mean CAP_NET_ADMIN?",
        ),
        (
            [
                "--mount=type=bind,source=/no/such,target=/x",
                "IMAGE",
                "true",
            ],
            "is not there",
        ),
        (
            ["--env-file=/no/such", "IMAGE", "true"],
            "--env-file /no/such",
        ),
        (["--health-interval=1s", "IMAGE", "true"], "--health-cmd"),
    ] {
        run(&args).fails(125, why);
    }
    let labels = tempfile::NamedTempFile::new().unwrap();
    fs::write(labels.path(), format!("long={}", "x".repeat(600 << 10))).unwrap();
    let file = labels.path().to_str().unwrap();
    run(&["--label-file", file, "IMAGE", "true"]).fails(125, "more than 524288");
    for (option, why) in [
        ("--restart=sometimes", "restart policy"),
        ("--ulimit=files=1", "unknown limit"),
        ("--security-opt=apparmor=x", "without AppArmor"),
        ("--log-driver=syslog", "json-file"),
        ("--log-opt=tag=x", "max-size"),
        ("--tmpfs=/x:huge=always", "unknown option"),
        ("--detach-keys=xy", "is no key"),
        ("--mount=type=npipe,target=/x", "use bind, volume or tmpfs"),
    ] {
        let done = run(&[option, "IMAGE", "true"]).exits(2);
        assert!(done.stderr.contains(why), "{why}: {done:#?}");
    }
}

#[test]
fn logs_are_bounded_or_not_kept() {
    let name = unique("log");
    let image = host().image.as_str();
    let log = ["--log-opt", "max-size=8k", "--log-opt", "max-file=3"];
    let start = ["run", "-d", "--name", &name];
    walnut(&[&start[..], &log, &[image, "seq", "1", "2000"]].concat()).exits(0);
    walnut(&["wait", &name]).exits(0);
    let id = walnut(&["inspect", "-f", "{{.Id}}", &name])
        .text()
        .to_owned();
    let dir = host().root.join("containers").join(&id);
    let sizes = ["container.log", "container.log.1", "container.log.2"]
        .map(|file| fs::metadata(dir.join(file)).unwrap().len());
    assert!(sizes.iter().all(|size| *size <= 8 << 10), "{sizes:?}");
    assert!(!dir.join("container.log.3").exists());
    let kept = walnut(&["logs", &name]);
    let lines: Vec<u32> = kept.text().lines().map(|l| l.parse().unwrap()).collect();
    assert!(lines[0] > 1 && *lines.last().unwrap() == 2000);
    assert!(lines.windows(2).all(|two| two[0] + 1 == two[1]));
    walnut(&["rm", &name]).exits(0);
    walnut(&[
        "create",
        "--name",
        &name,
        "--log-driver",
        "none",
        image,
        "true",
    ])
    .exits(0);
    walnut(&["logs", &name]).fails(125, "keeps no log");
    walnut(&["rm", &name]).exits(0);
}

#[test]
fn images_go_out_come_back_and_are_cleaned_up() {
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("image.tar").display().to_string();
    walnut(&["save", "-o", &archive, &host().image]).exits(0);
    // A store of this test alone: it cleans up all that there is.
    let root = dir.path().join("root");
    let own = |args: &[&str]| {
        let mut command = command(args);
        command
            .env("WALNUT_ROOT", &root)
            .env("WALNUT_RUN", dir.path().join("run"));
        let out = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        (out.status.code(), text(&out.stdout), text(&out.stderr))
    };
    let good = |args: &[&str]| {
        let (code, out, err) = own(args);
        assert_eq!(code, Some(0), "{args:?}: {err}");
        out
    };
    let refused = |args: &[&str], why: &str| {
        let (code, _, err) = own(args);
        assert!(code != Some(0) && err.contains(why), "{args:?}: {err}");
    };
    assert!(good(&["load", "-q", "-i", &archive]).ends_with(&host().image));
    // An OCI layout's directory is the same, unpacked.
    let layout = dir.path().join("layout");
    fs::create_dir(&layout).unwrap();
    let unpacked = Command::new("tar")
        .arg("-xf")
        .arg(&archive)
        .arg("-C")
        .arg(&layout)
        .status();
    assert!(unpacked.unwrap().success());
    assert!(good(&["load", "-q", "-i", layout.to_str().unwrap()]).ends_with(&host().image));
    let id = good(&["images", "-q"]);
    assert_eq!(id.len(), 12);
    good(&["tag", &id, "other:1"]);
    let names = good(&["images", "--format", "{{.Repository}}:{{.Tag}}"]);
    assert!(
        names.contains("other:1") && names.lines().count() == 2,
        "{names}"
    );
    assert_eq!(good(&["images", "--format", "{{.Tag}}", "oth*"]), "1");
    assert_eq!(good(&["images", "-q", "--filter", "reference=none"]), "");
    refused(&["tag", "othr:1", "x"], "did you mean other:1?");
    refused(&["save", "none"], "no image");
    refused(&["load", "-i", "/dev/null"], "neither an index.json");

    // What is in use stays.
    let container = good(&["create", "--name", "user", "-v", "/data", "other:1", "true"]);
    refused(&["rmi", &id], "is what user is made of");
    refused(&["image", "prune", "-a"], "add -f");
    good(&["image", "prune", "-a", "-f"]);
    assert_eq!(good(&["images", "-q"]), id);
    let df: Value = serde_json::from_str(&good(&["system", "df", "--format", "json"])).unwrap();
    assert_eq!(
        (&df[0]["active"], &df[2]["count"]),
        (&1.into(), &1.into()),
        "{df}"
    );
    assert!(df[0]["size"].as_u64().unwrap() > 10 << 20);
    assert!(good(&["system", "df"]).contains("RECLAIMABLE"));
    good(&["volume", "create", "--label", "a=b", "named"]);
    assert_eq!(
        good(&["volume", "ls", "-q", "--filter", "label=a"]),
        "named"
    );
    assert_eq!(
        good(&[
            "volume",
            "ls",
            "--filter",
            "dangling=true",
            "--format",
            "{{.Name}}"
        ]),
        "named"
    );
    assert!(good(&["container", "prune", "-f"]).contains(&container));
    good(&["volume", "prune", "-f"]);
    assert_eq!(good(&["volume", "ls", "-q"]), "named", "it has a name");
    let freed = good(&["system", "prune", "-a", "--volumes", "-f"]);
    assert!(
        freed.contains("Total reclaimed space: ") && !freed.ends_with(" 0 B"),
        "{freed}"
    );
    assert_eq!(good(&["images", "-q"]), "");
}

#[test]
fn an_image_is_pushed_and_pulled_back() {
    let dir = tempfile::tempdir().unwrap();
    let sh = |script: &str| {
        let out = Command::new("sh")
            .args(["-ec", script])
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(out.status.success(), "{out:#?}");
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    };
    // As `docker save` of old wrote them: a layer, a configuration, and no name.
    let script = "mkdir layer; date +%N > layer/fresh; tar -C layer -cf layer.tar .; sha256sum layer.tar | cut -d' ' -f1";
    let layer = sh(script);
    let arch = if cfg!(target_arch = "x86_64") {
        "amd64"
    } else {
        "arm64"
    };
    let config = format!(
        r#"{{"architecture":"{arch}","os":"linux","config":{{"Cmd":["/x"]}},"rootfs":{{"type":"layers","diff_ids":["sha256:{layer}"]}}}}"#
    );
    fs::write(dir.path().join("config.json"), config).unwrap();
    let manifest = r#"[{"Config":"config.json","RepoTags":null,"Layers":["layer.tar"]}]"#;
    fs::write(dir.path().join("manifest.json"), manifest).unwrap();
    sh("tar -czf archive.tgz layer.tar config.json manifest.json");
    let own = |args: &[&str]| {
        let mut command = command(args);
        command.env("WALNUT_ROOT", dir.path().join("root"));
        command.env("WALNUT_RUN", dir.path().join("run"));
        let out = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        (out.status.code(), text(&out.stdout), text(&out.stderr))
    };
    let archive = dir.path().join("archive.tgz").display().to_string();
    let (code, _, err) = own(&["load", "-q", "-i", &archive]);
    assert!(code == Some(125) && err.contains("--name NAME"), "{err}");
    let registry = host().image.split('/').next().unwrap();
    let name = format!("{registry}/walnut/pushed:latest");
    assert_eq!(
        own(&["load", "-q", "-i", &archive, "--name", &name]).0,
        Some(0)
    );
    let (code, digest, err) = own(&["push", "-q", &name]);
    assert!(code == Some(0) && digest.starts_with("sha256:"), "{err}");
    assert_eq!(own(&["rmi", &name]).0, Some(0));
    let (code, pulled, err) = own(&["pull", "-q", &name]);
    assert!(code == Some(0) && pulled == digest, "{pulled} {err}");
    let (code, _, err) = own(&["push", "nosuch:1"]);
    assert!(code == Some(125) && err.contains("no image"), "{err}");
}

#[test]
fn shells_complete_every_verb() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = walnut(&["completion", shell]).exits(0);
        for verb in ["attach", "unpause", "volume", "completion"] {
            assert!(script.text().contains(verb), "{verb} for {shell}");
        }
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), walnut(&["completion", "bash"]).stdout).unwrap();
    let checked = Command::new("bash").arg("-n").arg(file.path()).status();
    assert!(checked.unwrap().success());
}
