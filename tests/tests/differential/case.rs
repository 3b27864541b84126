//! A case, and how it is run.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use walnut_tests::{
    client::{Done, cache, finish, repository},
    unique,
};

/// The runtime to be like.
const REFERENCE: &str = "crun";

/// Runs a runtime on a terminal.
const TERMINAL: &str = r#"
cd $BUNDLE; touch seen
for word in "$@"; do command="$command '$word'"; done
{
    until grep -q ready seen || test -s code; do sleep 0.05; done
    cat
    until test -s code; do sleep 0.05; done
} | script -qc "stty rows 30 cols 90; $command; echo \$? >code" /dev/null | tee seen
exit $(cat code)
"#;

type Change = Box<dyn Fn(&mut Value, &Path)>;

/// Something that a container does.
pub(crate) struct Case {
    name: &'static str,
    script: String,
    change: Vec<Change>,
    input: Vec<u8>,
    by: Option<&'static str>,
    only_code: bool,
    differs: Option<&'static str>,
}

/// A case whose program is a script of busybox's shell.
pub(crate) fn case(name: &'static str, script: impl Into<String>) -> Case {
    Case {
        name,
        script: script.into(),
        change: Vec::new(),
        input: Vec::new(),
        by: None,
        only_code: false,
        differs: None,
    }
}

impl Case {
    /// Changes the bundle's configuration.
    pub(crate) fn with(mut self, change: impl Fn(&mut Value) + 'static) -> Self {
        self.change.push(Box::new(move |config, _| change(config)));
        self
    }

    /// The same, or what is in the bundle, whose directory it is given.
    pub(crate) fn with_files(mut self, change: impl Fn(&mut Value, &Path) + 'static) -> Self {
        self.change.push(Box::new(change));
        self
    }

    /// Sets a part of the configuration, by its JSON pointer.
    pub(crate) fn set(self, pointer: &'static str, value: Value) -> Self {
        self.with(move |config| {
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            let parent = config
                .pointer_mut(parent)
                .expect("a part of the configuration");
            parent[key] = value.clone();
        })
    }

    /// Adds to a list of the configuration.
    pub(crate) fn add(self, pointer: &'static str, value: Value) -> Self {
        self.with(move |config| {
            let list = config.pointer_mut(pointer).and_then(Value::as_array_mut);
            list.expect("a list of the configuration")
                .push(value.clone());
        })
    }

    /// A mount more.
    pub(crate) fn mount(self, at: &str, kind: &str, options: &[&str]) -> Self {
        let mount = json!({
            "destination": at, "type": kind, "source": kind, "options": options,
        });
        self.add("/mounts", mount)
    }

    /// The program itself, instead of a script.
    pub(crate) fn args(self, args: &[&str]) -> Self {
        self.set("/process/args", json!(args))
    }

    pub(crate) fn input(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// The runtime is run by a script of the host's, whose arguments are the command and
    /// whose `$BUNDLE` is the bundle.
    pub(crate) fn by(mut self, script: &'static str) -> Self {
        self.by = Some(script);
        self
    }

    /// On a terminal. The input is typed when the program has said "ready": what comes
    /// before may be the outer terminal's to echo.
    pub(crate) fn on_a_terminal(self) -> Self {
        self.set("/process/terminal", json!(true)).by(TERMINAL)
    }

    /// The runtime itself says what is wrong, each in its words: only the code counts, and
    /// that there are words.
    pub(crate) fn only_code(mut self) -> Self {
        self.only_code = true;
        self
    }

    /// It cannot be the same, for this reason.
    pub(crate) fn differs(mut self, why: &'static str) -> Self {
        self.differs = Some(why);
        self
    }
}

/// Runs all, and says of all what is not as it should be.
#[track_caller]
pub(crate) fn same(cases: Vec<Case>) {
    let place = Place::new();
    let documented = fs::read_to_string(repository().join("docs/compatibility.md")).unwrap();
    let documented = words(&documented);
    let mut wrong = Vec::new();
    for case in &cases {
        // Who looks on sees which one hangs.
        println!("{}", case.name);
        let theirs = place.run(case, REFERENCE);
        let ours = place.run(case, "walnut-oci");
        let same = match case.only_code {
            true => theirs.code == ours.code && !ours.stderr.is_empty(),
            false => theirs == ours,
        };
        match case.differs {
            None if !same => wrong.push(format!(
                "{}:\n  {REFERENCE}: {theirs:?}\n  walnut-oci: {ours:?}",
                case.name
            )),
            Some(_) if same => wrong.push(format!("{}: it does not differ: {ours:#?}", case.name)),
            Some(why) if !documented.contains(&words(why)) => {
                wrong.push(format!("docs/compatibility.md does not say: {why}"));
            }
            _ => {}
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {} cases:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}

/// Text without its line breaks.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Debian's crun refuses a host with both versions of cgroups: there it gets a view
/// without the second.
fn reference() -> Command {
    const BOTH: &str = "/sys/fs/cgroup/unified";
    const HIDE: &str = "umount /sys/fs/cgroup/unified && exec \"$@\"";
    let mut command = match Path::new(BOTH).exists() {
        true => {
            let mut command = Command::new("unshare");
            command.args(["-m", "sh", "-c", HIDE, "sh", REFERENCE]);
            command
        }
        false => Command::new(REFERENCE),
    };
    command.arg("--cgroup-manager=cgroupfs");
    command
}

struct Place {
    dir: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = Path::new("/tmp").join(unique("diff"));
        fs::create_dir_all(dir.join("bin")).unwrap();
        fs::copy("/bin/busybox", dir.join("bin/busybox")).expect("install busybox-static");
        Self { dir }
    }

    fn run(&self, case: &Case, runtime: &str) -> Done {
        let bundle = self.bundle(case);
        let id = unique("diff");
        let mut runtime_command = match runtime {
            REFERENCE => reference(),
            other => Command::new(repository().join("out/bin").join(other)),
        };
        if case.by == Some(TERMINAL) {
            // It would come between what is shown.
            runtime_command.arg("--log").arg(bundle.join("log"));
        }
        runtime_command
            .arg("--root")
            .arg(self.dir.join(runtime))
            .args(["run", "--bundle"])
            .arg(&bundle)
            .arg(&id);
        let mut command = match case.by {
            Some(script) => {
                let mut command = Command::new("sh");
                command.args(["-c", script, "sh"]);
                command.arg(runtime_command.get_program());
                command.args(runtime_command.get_args());
                command
            }
            None => runtime_command,
        };
        command
            .env("BUNDLE", &bundle)
            .env("WALNUT_RUN", self.dir.join("w"))
            // One for all tests, and the next run: a template is made once.
            .env("WALNUT_ROOT", cache().join("differential"))
            .env_remove("WALNUT_LIB")
            .env_remove("WALNUT_LOG")
            .env_remove("WALNUT_DRIVER");
        let done = finish(&mut command, &case.input);
        fs::remove_dir_all(&bundle).unwrap();
        done
    }

    /// A bundle of its own: containers write to their root.
    fn bundle(&self, case: &Case) -> PathBuf {
        let dir = self.dir.join(unique("b"));
        let root = dir.join("rootfs");
        for below in ["bin", "etc", "tmp", "home", "proc", "sys", "dev"] {
            fs::create_dir_all(root.join(below)).unwrap();
        }
        fs::hard_link(self.dir.join("bin/busybox"), root.join("bin/busybox")).unwrap();
        for name in APPLETS {
            symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/:/bin/sh\nme:x:1000:1000::/home:/bin/sh\n",
        )
        .unwrap();
        fs::write(
            root.join("etc/group"),
            "root:x:0:\nme:x:1000:\nmore:x:2000:me\n",
        )
        .unwrap();
        let mut config = configuration();
        config["process"]["args"] = json!(["sh", "-c", case.script]);
        for change in &case.change {
            change(&mut config, &dir);
        }
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
        dir
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

const APPLETS: &[&str] = &[
    "sh",
    "cat",
    "chmod",
    "chown",
    "cp",
    "cut",
    "dd",
    "echo",
    "env",
    "expr",
    "false",
    "find",
    "grep",
    "head",
    "hostname",
    "id",
    "kill",
    "ln",
    "ls",
    "mkdir",
    "mknod",
    "mount",
    "nproc",
    "od",
    "ps",
    "printf",
    "pwd",
    "readlink",
    "rm",
    "sed",
    "seq",
    "setsid",
    "sleep",
    "sort",
    "stat",
    "stty",
    "sync",
    "tail",
    "tee",
    "test",
    "touch",
    "tr",
    "true",
    "tty",
    "umount",
    "uname",
    "wc",
    "xargs",
    "yes",
    "df",
    "dnsdomainname",
    "truncate",
    "ipcs",
    "awk",
    "md5sum",
    "mkfifo",
    "taskset",
    "free",
];

/// What `crun spec` makes, with the capabilities that containers usually have.
fn configuration() -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": [],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "inside",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "mount"},
            ],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list",
                "/proc/scsi", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys",
                "/proc/sysrq-trigger"],
        },
    })
}
