//! What holds a container: capabilities, limits, paths, filters of system calls.

use serde_json::{Value, json};

use crate::case::{Case, case, same};

#[test]
fn capabilities() {
    let shown = "grep ^Cap /proc/self/status";
    let set =
        |name, script: &str, sets: Value| case(name, script).set("/process/capabilities", sets);
    let user = json!({"uid": 1000, "gid": 1000});
    let one = json!(["CAP_NET_BIND_SERVICE"]);
    same(vec![
        case("the usual", shown),
        set("none", shown, json!({})),
        set("one", shown, json!({"bounding": one, "effective": one, "permitted": one})),
        set("inherited", shown, json!({"bounding": one, "effective": one, "permitted": one, "inheritable": one})),
        set("ambient", shown, json!({"bounding": one, "effective": one, "permitted": one, "inheritable": one, "ambient": one}))
            .set("/process/user", user.clone()),
        case("another user has none", shown).set("/process/user", user),
        set("no chown", "touch /a; chown 1000 /a; echo $?", json!({})),
        set("no way past permissions", "echo a >/a; chmod 0 /a; cat /a; echo $?", json!({})),
        set("no mknod", "mknod /a c 1 3; echo $?", json!({})),
        case("no hostname", "hostname other; echo $?; hostname"),
        set("one that there is not", shown, json!({"bounding": ["CAP_NONSENSE", "CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_NONSENSE", "CAP_KILL"]})),
        set("all a program can have", "hostname other; hostname; mount -t tmpfs none /tmp; echo $?",
            json!({"bounding": ["CAP_SYS_ADMIN"], "effective": ["CAP_SYS_ADMIN"], "permitted": ["CAP_SYS_ADMIN"]})),
        case("no mount", "mount -t tmpfs none /tmp; echo $?"),
    ]);
}

#[test]
fn limits() {
    let limit = |kind: &str, row: &str, soft: u64, hard: u64| {
        let kind = format!("RLIMIT_{kind}");
        case("a limit", format!("grep '^Max {row} ' /proc/self/limits")).set(
            "/process/rlimits",
            json!([{"type": kind, "soft": soft, "hard": hard}]),
        )
    };
    same(vec![
        limit("NOFILE", "open files", 512, 1000),
        limit("CORE", "core file size", 0, 0),
        limit("NPROC", "processes", 50, 60),
        limit("FSIZE", "file size", 4096, 8192),
        limit("STACK", "stack size", 1 << 20, 8 << 20),
        limit("MEMLOCK", "locked memory", 65536, 65536),
        limit("CPU", "cpu time", 10, 20),
        limit("DATA", "data size", 1 << 30, 1 << 31),
        // No more than there is: a host may have taken the right to raise them from its root.
        limit("NICE", "nice priority", 0, 0),
        limit("RTPRIO", "realtime priority", 0, 0),
        limit("SIGPENDING", "pending signals", 100, 200),
        limit("MSGQUEUE", "msgqueue size", 1000, 2000),
        limit("AS", "address space", u64::MAX, u64::MAX),
        case("one that is kept", "head -c 8192 /dev/zero >/a; echo $?").set(
            "/process/rlimits",
            json!([{"type": "RLIMIT_FSIZE", "soft": 4096, "hard": 4096}]),
        ),
        case("one that is no limit", "true")
            .set(
                "/process/rlimits",
                json!([{"type": "RLIMIT_NONSENSE", "soft": 1, "hard": 1}]),
            )
            .only_code(),
        case(
            "processes",
            "for n in 1 2 3 4 5 6 7 8 9; do sleep 1000 & done; echo all",
        )
        .set("/linux/resources/pids", json!({"limit": 5})),
        case("memory", "head -c 100000000 /dev/zero | tail; echo $?").set(
            "/linux/resources/memory",
            json!({"limit": 20 << 20, "swap": 20 << 20}),
        ),
        case("memory of the first process", "")
            .args(&["tail", "/dev/zero"])
            .set(
                "/linux/resources/memory",
                json!({"limit": 20 << 20, "swap": 20 << 20}),
            ),
    ]);
}

#[test]
fn paths_and_settings() {
    let sysctl = |name, value: &str, file: &str| {
        let (key, value) = (
            file.trim_start_matches("/proc/sys/").replace('/', "."),
            value.to_owned(),
        );
        case(name, format!("cat {file}")).with(move |config| {
            config["linux"]["sysctl"] = json!({key.clone(): value});
        })
    };
    let hidden = |name, script: &str| {
        case(name, script)
            .add("/linux/maskedPaths", json!("/etc/passwd"))
            .add("/linux/maskedPaths", json!("/home"))
            .add("/linux/maskedPaths", json!("/no/such"))
    };
    same(vec![
        // Not every kernel has the first.
        case("hidden files of /proc", "[ -s /proc/kcore ] && echo seen; cat /proc/keys /proc/timer_list; echo $?"),
        case("hidden directories", "ls /sys/firmware; echo $?"),
        hidden("files", "cat /etc/passwd; echo $?; echo a >/etc/passwd; cat /etc/passwd"),
        hidden("directories", "ls /home; touch /home/a; echo $?"),
        case("paths to read", "echo a >/etc/group; touch /etc/a; echo $?").add("/linux/readonlyPaths", json!("/etc")),
        case("settings are to read", "echo 1 >/proc/sys/kernel/panic; echo $?"),
        case("and interrupts", "echo 1 >/proc/irq/default_smp_affinity; echo $?"),
        case("and /sys", "mkdir /sys/a; echo $?"),
        sysctl("of networks", "1", "/proc/sys/net/ipv4/ip_forward"),
        sysctl("of its queues", "777", "/proc/sys/net/core/somaxconn"),
        sysctl("of messages", "12345", "/proc/sys/kernel/msgmax"),
        sysctl("of shared memory", "1234567", "/proc/sys/kernel/shmmax"),
        sysctl("ports that all may have", "80", "/proc/sys/net/ipv4/ip_unprivileged_port_start"),
        sysctl("one that there is not", "1", "/proc/sys/net/ipv4/nonsense").only_code(),
        case("a name", "hostname; uname -n; cat /proc/sys/kernel/hostname"),
        case("another", "hostname").set("/hostname", json!("other.example")),
        case("a domain", "cat /proc/sys/kernel/domainname").set("/domainname", json!("example")),
        case("links", "ls /sys/class/net"),
        case("a loopback", "cat /sys/class/net/lo/mtu"),
        case("one processor", "nproc").set("/linux/resources/cpu", json!({"cpus": "0"})),
        case("the kernel", "uname -r").differs("`uname -r` is the guest's kernel"),
        case("memory of the machine", "grep MemTotal /proc/meminfo")
            .differs("`/proc/meminfo` and `/proc/cpuinfo` are the machine's, which is as large as the container needs"),
        case("up since", "cut -d. -f1 /proc/uptime")
            .differs("The kernel is up since the machine began"),
        sysctl("of removed shared memory", "1", "/proc/sys/kernel/shm_rmid_forced"),
        sysctl("of queues of messages", "20", "/proc/sys/fs/mqueue/msg_max"),
        sysctl("one of the kernel itself", "10", "/proc/sys/vm/swappiness").only_code(),
        sysctl("the name again", "x", "/proc/sys/kernel/hostname").only_code(),
    ]);
}

/// What programs look at to size themselves.
#[test]
fn sizes() {
    let processors = case(
        "processors of the machine",
        "nproc; grep -c ^processor /proc/cpuinfo",
    );
    // Of either version of cgroups: the reference's is the host's. Read without a process
    // of its own, which would count.
    let limit = |name, new: &str, old: &str| {
        let script = format!(
            "f=/sys/fs/cgroup/{new}; test -e $f || f=/sys/fs/cgroup/{old}; read -r n <$f; echo $n"
        );
        case(name, script)
            .mount(
                "/sys/fs/cgroup",
                "cgroup",
                &["ro", "nosuid", "noexec", "nodev"],
            )
            .add("/linux/namespaces", json!({"type": "cgroup"}))
            .set("/linux/resources/memory", json!({"limit": 64 << 20}))
            .set("/linux/resources/pids", json!({"limit": 77}))
    };
    same(vec![
        limit("memory", "memory.max", "memory/memory.limit_in_bytes"),
        limit("processes", "pids.max", "pids/pids.max"),
        limit("how many there are", "pids.current", "pids/pids.current"),
        case("its cgroup", "grep '^0:' /proc/self/cgroup || head -n 1 /proc/self/cgroup | sed 's/.*:/0::/'")
            .add("/linux/namespaces", json!({"type": "cgroup"})),
        case("processors to run on", "taskset -p $$ | sed 's/.*: //'; nproc")
            .set("/linux/resources/cpu", json!({"cpus": "0"})),
        case("a part of a processor", "nproc")
            .set("/linux/resources/cpu", json!({"quota": 50_000, "period": 100_000, "cpus": "0"})),
        match std::thread::available_parallelism().unwrap().get() {
            // As many as the container's machine has.
            1 => processors,
            _ => processors.differs("`/proc/meminfo` and `/proc/cpuinfo` are the machine's, which is as large as the container needs"),
        },
        case("pages", "grep -E '^(Hugepagesize|KernelPageSize)' /proc/meminfo /proc/self/smaps | sort -u"),
        case("files at most", "ulimit -n; ulimit -Hn"),
        case("kinds of things", "ls /proc/self | grep -E '^(cmdline|cwd|environ|exe|fd|limits|maps|mounts|root|stat|statm|status)$'"),
    ]);
}

#[test]
fn namespaces() {
    same(vec![
        case("names", "hostname; dnsdomainname; uname -n"),
        case(
            "messages of nobody else's",
            "ipcs -q | tail -n +3; ipcs -m | tail -n +3",
        ),
        case("those it has", "ls /proc/self/ns | grep -v time"),
        case("links", "tail -n +3 /proc/net/dev | cut -d: -f1"),
        case("sockets", "wc -l </proc/net/unix")
            .differs("`/proc/net/unix` has the agent's sockets too"),
        case("routes", "tail -n +2 /proc/net/route; echo none"),
        case("a clock of its own", "cut -d. -f1 /proc/uptime")
            .add("/linux/namespaces", json!({"type": "time"}))
            .set(
                "/linux/timeOffsets",
                json!({"boottime": {"secs": 1_000_000, "nanosecs": 0}}),
            )
            .differs("A time namespace is had here"),
        case(
            "the time of day",
            "test $(stat -c %Y /proc/self) -gt 1700000000; echo $?",
        ),
    ]);
}

#[test]
fn hooks() {
    let host = |point: &'static str, script: &'static str| {
        case(point, "true").with_files(move |config, bundle| {
            let script = format!("cd {}; {script}", bundle.display());
            let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=b"]});
            config["hooks"] = json!({point: [hook]});
        })
    };
    let inside = |name, script: &'static str, program| {
        case(name, program).with(move |config| {
            let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
            config["hooks"] = json!({"startContainer": [hook]});
        })
    };
    let fails = "cat >/dev/null; exit 3";
    let order = "cat >/dev/null; echo $0 >>order";
    same(vec![
        host("prestart", fails).only_code(),
        host("createRuntime", fails).only_code(),
        host("poststart", fails),
        host("poststop", fails),
        host("poststop", "cat >state; echo $A >a").by(
            "\"$@\"; c=$?; cd $BUNDLE; cat a; grep -o '\"status\": *\"[a-z]*\"' state | tr -d ' '; exit $c",
        ),
        host("createRuntime", "cat >state")
            .by("\"$@\"; c=$?; grep -o '\"status\": *\"[a-z]*\"' $BUNDLE/state | tr -d ' '; exit $c")
            .differs("Before the container is created, hooks are told that it is `creating`"),
        case("in this order", "true")
            .with_files(move |config, bundle| {
                let script = format!("cd {}; {order}", bundle.display());
                for point in ["prestart", "createRuntime", "poststart", "poststop"] {
                    config["hooks"][point] =
                        json!([{"path": "/bin/sh", "args": ["sh", "-c", script, point]}]);
                }
            })
            .by("\"$@\"; c=$?; cat $BUNDLE/order; exit $c"),
        inside("in the container", "cat >/dev/null; id >/it; pwd >>/it", "cat /it"),
        inside("that fails there", fails, "echo never"),
        inside("that is not there", "exit 0", "echo never")
            .with(|config| {
                config["hooks"]["startContainer"][0]["path"] = json!("/no/such");
            })
            .only_code(),
    ]);
}

/// What is done about `mkdir`.
fn filtered(name: &'static str, action: Value) -> Case {
    let script = "mkdir /a; echo $?; sh -c 'mkdir /b'; echo $?; ls -d /a /b";
    case(name, script).with(move |config| {
        let mut rule = json!({"names": ["mkdir", "mkdirat"]});
        for (key, value) in action.as_object().unwrap() {
            rule[key] = value.clone();
        }
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [rule],
        });
    })
}

#[test]
fn filters() {
    let action = |name: &str| json!({"action": format!("SCMP_ACT_{name}")});
    same(vec![
        filtered("an error", action("ERRNO")),
        filtered("another", json!({"action": "SCMP_ACT_ERRNO", "errnoRet": 38})),
        filtered("killed", action("KILL")),
        filtered("its thread", action("KILL_THREAD")),
        filtered("all of it", action("KILL_PROCESS")),
        filtered("a trap", action("TRAP")),
        filtered("nobody traces it", action("TRACE")),
        filtered("a line in the log", action("LOG")),
        filtered("allowed", action("ALLOW")),
        case("by its arguments", "chmod 700 /etc; echo $?; chmod 711 /etc; echo $?").with(|config| {
            config["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [
                    {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 1, "value": 0o700, "op": "SCMP_CMP_EQ"}]},
                    {"names": ["fchmodat"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 2, "value": 0o700, "op": "SCMP_CMP_EQ"}]},
                ],
            });
        }),
        filtered("what is seen of it", action("ERRNO"))
            .set("/process/args", json!(["sh", "-c", "grep -E '^Seccomp:' /proc/self/status"])),
        filtered("somebody to be asked, who is not there", action("NOTIFY")),
        filtered("an action that there is not", action("NONSENSE")).only_code(),
        filtered("without no_new_privs", action("ERRNO"))
            .set("/process/noNewPrivileges", json!(false)),
        filtered("by another user", action("ERRNO"))
            .set("/process/user", json!({"uid": 1000, "gid": 1000})),
        filtered("what is no system call", action("ALLOW")).with(|config| {
            config["linux"]["seccomp"]["syscalls"][0]["names"] = json!(["nonsense", "mkdir"]);
        }),
        filtered("all but what is listed", action("ALLOW")).with(|config| {
            let seccomp = &mut config["linux"]["seccomp"];
            seccomp["defaultAction"] = json!("SCMP_ACT_ALLOW");
            seccomp["syscalls"] = json!([
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
                {"names": ["sethostname"], "action": "SCMP_ACT_KILL_PROCESS"},
            ]);
        }),
        filtered("a filter that logs", action("ERRNO"))
            .set("/linux/seccomp/flags", json!(["SECCOMP_FILTER_FLAG_LOG"])),
    ]);
}
