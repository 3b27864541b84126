//! Who a program is, what it is given, and how it ends.

use serde_json::json;

use crate::case::{case, same};

#[test]
fn users_and_groups() {
    same(vec![
        case("root", "id; id -G"),
        case("another user", "id; echo $HOME")
            .set("/process/user", json!({"uid": 1000, "gid": 1000})),
        case("one without a name", "id; echo ~")
            .set("/process/user", json!({"uid": 4711, "gid": 4712})),
        case("more groups", "id -G; cat /proc/self/status | grep ^Groups").set(
            "/process/user",
            json!({"uid": 1000, "gid": 1000, "additionalGids": [2000, 5, 3000]}),
        ),
        case("root with more groups", "id -G").set(
            "/process/user",
            json!({"uid": 0, "gid": 0, "additionalGids": [7]}),
        ),
        case(
            "a umask",
            "umask; touch /tmp/a; mkdir /tmp/b; stat -c %a /tmp/a /tmp/b",
        )
        .set("/process/user", json!({"uid": 0, "gid": 0, "umask": 0o77})),
        case("the usual umask", "umask"),
        case(
            "a file of another's",
            "touch /tmp/a && chown 1000:2000 /tmp/a && stat -c '%u %g %a' /tmp/a",
        ),
        case(
            "what a user may not",
            "echo x >/etc/passwd; cat /etc/shadow; chown 0 /tmp; echo $?",
        )
        .set("/process/user", json!({"uid": 1000, "gid": 1000})),
        case(
            "IDs of a process",
            "grep -E '^(Uid|Gid|Umask|NoNewPrivs|NSpid|Threads)' /proc/self/status | grep -v NSpid",
        ),
    ]);
}

#[test]
fn environment_and_directory() {
    let dir = |path: &str| case("directories", "pwd; echo $PWD").set("/process/cwd", json!(path));
    same(vec![
        case("an environment", "env | sort"),
        case("odd values", "env | sort").set(
            "/process/env",
            json!([
                "PATH=/bin",
                "A=b=c",
                "B=",
                "C=a b",
                "D=\u{e4}\u{1f95c}",
                "E=a\nb"
            ]),
        ),
        case("one twice", "env").set("/process/env", json!(["PATH=/bin", "A=1", "A=2"])),
        case("HOME that is given", "echo $HOME")
            .set("/process/env", json!(["PATH=/bin", "HOME=/tmp"])),
        case("a long one", "echo ${#A}").with(|config| {
            config["process"]["env"] = json!(["PATH=/bin", format!("A={}", "x".repeat(100_000))])
        }),
        dir("/tmp"),
        dir("/home/../etc"),
        dir("/etc/passwd").only_code(),
    ]);
}

#[test]
fn programs_and_arguments() {
    let program = |name: &'static str, args: &[&str]| case(name, "").args(args);
    let file = |name: &'static str, text: &'static str, mode: u32| {
        case(name, "")
            .args(&["/it", "a"])
            .with_files(move |_, bundle| {
                let path = bundle.join("rootfs/it");
                std::fs::write(&path, text).unwrap();
                let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
                std::fs::set_permissions(&path, mode).unwrap();
            })
    };
    let many: Vec<String> = (0..3000).map(|n| format!("argument-{n}")).collect();
    let mut many: Vec<&str> = many.iter().map(String::as_str).collect();
    many.splice(0..0, ["sh", "-c", "echo $# $0 ${2999}"]);
    let long = "x".repeat(100_000);
    same(vec![
        program("by its path", &["/bin/echo", "a", "b c", "", "'\"$`\\"]),
        program("by PATH", &["echo", "-n", "a"]),
        program("by a relative path", &["bin/echo", "a"]),
        program("many arguments", &many),
        program("a long one", &["sh", "-c", "echo ${#1}", "sh", &long]),
        program("none such", &["/no/such"]).only_code(),
        program("none such in PATH", &["nosuch"]).only_code(),
        program("a directory", &["/etc"]).only_code(),
        file("without leave to execute it", "#!/bin/sh\necho a\n", 0o644).only_code(),
        file("a script", "#!/bin/sh\necho $0 $1\n", 0o755),
        file(
            "with an argument to its interpreter",
            "#!/bin/sh -e\nfalse\necho no\n",
            0o755,
        ),
        file("whose interpreter is none", "#!/no/such\n", 0o755),
        file("what is no program", "\u{1}\u{2}\u{3}", 0o755),
        case("no PATH", "echo a")
            .set("/process/env", json!(["A=b"]))
            .only_code(),
        case("an empty PATH", "echo a")
            .set("/process/env", json!(["PATH="]))
            .only_code(),
        case("two", "echo $PATH").set("/process/env", json!(["PATH=/none", "PATH=/bin"])),
        case("the first in PATH", "")
            .args(&["it"])
            .set("/process/env", json!(["PATH=/none:/one:/bin"]))
            .with_files(|_, bundle| {
                let dir = bundle.join("rootfs/one");
                std::fs::create_dir(&dir).unwrap();
                std::os::unix::fs::symlink("/bin/busybox", dir.join("true")).unwrap();
                std::fs::write(dir.join("it"), "#!/bin/sh\necho one\n").unwrap();
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
                std::fs::set_permissions(dir.join("it"), mode).unwrap();
            }),
    ]);
}

#[test]
fn ends() {
    let exit = |code: u8| case("exit codes", format!("exit {code}"));
    same(vec![
        exit(0),
        exit(1),
        exit(42),
        exit(126),
        exit(127),
        exit(128),
        exit(255),
        case("killed", "kill -KILL 1; sh -c 'kill -KILL $$'; echo $?"),
        case("by SIGTERM", "sh -c 'kill -TERM $$'; echo $?"),
        case("by SIGSEGV", "sh -c 'kill -SEGV $$'; echo $?"),
        case("by SIGABRT", "sh -c 'kill -ABRT $$'; echo $?"),
        case(
            "the first process ignores what it has no handler for",
            "kill -TERM $$; kill -HUP $$; echo on; exit 5",
        ),
        case(
            "a handler",
            "trap 'echo caught; exit 9' TERM; kill -TERM $$; sleep 10",
        ),
        case("a pipe that nobody reads", "yes | head -n 1; echo $?"),
        case(
            "the last of a pipe",
            "false | true; echo $?; true | false; echo $?",
        ),
        case("a program that is not there", "nosuch; echo $?"),
        case("one that cannot be executed", "/etc/passwd; echo $?"),
        case("what runs on behind", "sleep 1000 & sleep 1000 & echo left"),
        case(
            "what has left its session",
            "setsid sleep 1000 >/dev/null 2>&1 </dev/null & echo left; exit 4",
        ),
        case(
            "signals that are blocked or ignored",
            "grep -E '^Sig(Blk|Ign)' /proc/1/status",
        ),
    ]);
}

#[test]
fn processes() {
    same(vec![
        case(
            "its place",
            "echo $$ $PPID; cut -d' ' -f1,4,5,6 /proc/1/stat",
        ),
        case(
            "its name",
            "tr '\\0' ' ' </proc/1/cmdline; cat /proc/1/comm",
        ),
        case("who there is", "set -- /proc/[0-9]*; echo $#"),
        case("what it has open", "ls /proc/1/fd"),
        case(
            "orphans are its children",
            "sh -c 'sleep 1000 & echo done'; until grep -q sleep /proc/[0-9]*/comm; do :; done; for p in /proc/[0-9]*; do grep -q sleep $p/comm && awk '{print $4}' $p/stat; done",
        ),
        case(
            "zombies",
            // Whose parent is no shell: that would wait for it.
            "(sh -c 'exit 3' & exec sleep 1000) & until grep -q 'State:.Z' /proc/[0-9]*/status; do :; done; echo one",
        ),
        case(
            "daemons",
            "(setsid sh -c 'until [ $(cut -d\" \" -f4 /proc/$$/stat) = 1 ]; do :; done; echo mine >/tmp/it' &); until [ -s /tmp/it ]; do :; done; cat /tmp/it",
        ),
        case(
            "process groups",
            "setsid sh -c 'sleep 1000 & sleep 1000 & kill -TERM 0'; echo $?",
        ),
        case(
            "all at once",
            "sleep 1000 & sleep 1000 & until [ $(grep -l sleep /proc/[0-9]*/comm | wc -l) = 2 ]; do :; done; kill -TERM -1; wait; echo $?",
        ),
        case(
            "limits of who starts it",
            "cut -c1-26 /proc/self/limits | sort | md5sum; ulimit -n; ulimit -c",
        ),
        case("how exact its timers are", "cat /proc/self/timerslack_ns"),
        case("no new privileges", "grep NoNewPrivs /proc/self/status"),
        case("or some", "grep NoNewPrivs /proc/self/status")
            .set("/process/noNewPrivileges", json!(false)),
        case("a program with set-user-ID", "/bin/who; echo $?").with_files(|config, bundle| {
            let who = bundle.join("rootfs/bin/who");
            std::fs::write(&who, "#!/bin/sh\nid -u\n").unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o4755);
            std::fs::set_permissions(&who, mode).unwrap();
            config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        }),
        case("OOM score", "cat /proc/self/oom_score_adj").set("/process/oomScoreAdj", json!(123)),
        case("nice", "cut -d' ' -f19 /proc/self/stat"),
        case("personality", "uname -m"),
        case("of 32 bits", "uname -m").set("/linux/personality", json!({"domain": "LINUX32"})),
        case(
            "how it is scheduled",
            "cut -d' ' -f18,40,41 /proc/self/stat",
        ),
    ]);
}

#[test]
fn directories_that_are_not_there() {
    let made = "pwd; stat -c '%a %u' /made /made/it";
    same(vec![
        case("none", "/bin/env")
            .args(&["/bin/env"])
            .set("/process/env", json!([])),
        case("one that is made", "pwd").set("/process/cwd", json!("/made/for/it")),
        case("a directory that a user may not enter", "pwd").with_files(|config, bundle| {
            let closed = bundle.join("rootfs/closed");
            std::fs::create_dir(&closed).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            std::fs::set_permissions(&closed, mode).unwrap();
            config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
            config["process"]["cwd"] = json!("/closed");
        }),
        case("one below it", "pwd; stat -c '%a %u' .").with_files(|config, bundle| {
            let closed = bundle.join("rootfs/closed");
            std::fs::create_dir(&closed).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            std::fs::set_permissions(&closed, mode).unwrap();
            config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
            config["process"]["cwd"] = json!("/closed/new");
        }),
        case("whose it is", made)
            .set("/process/cwd", json!("/made/it"))
            .set("/process/user", json!({"uid": 1000, "gid": 1000})),
        case("in a root to read", made)
            .set("/process/cwd", json!("/made/it"))
            .set("/root/readonly", json!(true)),
        case("in a mount", "pwd; stat -c '%a %u' /tmp/it")
            .set("/process/cwd", json!("/tmp/it"))
            .mount("/tmp", "tmpfs", &["mode=1777"]),
        case("that is a mount", "pwd")
            .set("/process/cwd", json!("/new"))
            .mount("/new", "tmpfs", &[]),
        case("on a way with dots", "pwd; ls /etc").set("/process/cwd", json!("/etc/no/../it")),
        case("through a link", "pwd; ls -d /real/it")
            .set("/process/cwd", json!("/link/it"))
            .with_files(|_, bundle| {
                std::fs::create_dir(bundle.join("rootfs/real")).unwrap();
                std::os::unix::fs::symlink("/real", bundle.join("rootfs/link")).unwrap();
            }),
        case("below a file", "pwd")
            .set("/process/cwd", json!("/etc/passwd/it"))
            .only_code(),
    ]);
}
