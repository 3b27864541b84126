//! From an image's configuration and the command line to an OCI runtime spec.

mod limits;
mod mounts;
mod security;
mod systemd;
mod terms;

use std::{collections::BTreeMap, path::Path};

use anyhow::{Result, bail};
use oci_spec::{image::Config, runtime::Spec};
use serde_json::{Value, json};
use walnut_sandbox::{NamedVolume, NamedVolumes};

pub(crate) use limits::{DeviceArg, SysctlArg, UlimitArg, check_swap, resources};
pub(crate) use mounts::{MountArg, TmpfsArg, VolumeArg};
pub(crate) use security::SecurityOpt;
pub(crate) use terms::{HealthArgs, LabelArg, LogOpt, terms, variables};

use crate::{
    args::ContainerArgs,
    values::{self, EnvVar},
};

/// Where a bundle says what its image said (OCI image-spec, "Conversion to OCI Runtime
/// Configuration").
const STOP_SIGNAL: &str = "org.opencontainers.image.stopSignal";

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const MASKED: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];

const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Program and arguments, by Docker's rules: `--entrypoint` drops the image's
/// command, arguments replace it.
pub(crate) fn command(args: &ContainerArgs, image: &Config) -> Result<Vec<String>> {
    let image_entry = image.entrypoint().clone().unwrap_or_default();
    let image_cmd = image.cmd().clone().unwrap_or_default();
    let (mut command, rest) = match &args.entrypoint {
        Some(entry) if entry.is_empty() => (Vec::new(), args.command.clone()),
        Some(entry) => (vec![entry.clone()], args.command.clone()),
        None if args.command.is_empty() => (image_entry, image_cmd),
        None => (image_entry, args.command.clone()),
    };
    command.extend(rest);
    if command.is_empty() {
        bail!(
            "the image names no command; give one: walnut run {} COMMAND",
            args.image
        );
    }
    Ok(command)
}

/// What a container has of its own, whatever it is made of.
pub(crate) struct Own<'a> {
    pub(crate) id: &'a str,
    pub(crate) hostname: &'a str,
    /// Where its output is kept, if it is.
    pub(crate) log: Option<&'a Path>,
    pub(crate) volumes: &'a NamedVolumes,
}

/// All that a container is to see beside its image.
fn extra(args: &ContainerArgs) -> impl Iterator<Item = &mounts::Mount> {
    let volumes = args.volume.iter().map(|VolumeArg(mount)| mount);
    let mounts = args.mount.iter().map(|MountArg(mount)| mount);
    let tmpfs = args.tmpfs.iter().map(|TmpfsArg(mount)| mount);
    volumes.chain(mounts).chain(tmpfs)
}

/// The spec of a new container, and the volumes that it names.
pub(crate) fn build(
    args: &ContainerArgs,
    image: &Config,
    own: &Own<'_>,
) -> Result<(Spec, Vec<NamedVolume>)> {
    if let Some((option, why)) = args.refused.given() {
        bail!("{option}: {why}");
    }
    let hostname = own.hostname;
    let cwd = args
        .workdir
        .clone()
        .or_else(|| image.working_dir().clone().filter(|d| !d.is_empty()))
        .unwrap_or_else(|| "/".into());
    if !cwd.starts_with('/') {
        bail!("--workdir {cwd}: must be an absolute path in the container");
    }
    let user = args.user.clone().or_else(|| image.user().clone());
    let mut env = vec![PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if args.tty {
        env.push("TERM=xterm".into());
    }
    let command = command(args, image)?;
    let systemd = systemd::wanted(args.systemd, &command);
    if systemd {
        env.extend(systemd::environment(own.id));
    }
    let given = variables(&args.env_file, &args.env)?;
    let env = merge_env(&env, image.env().iter().flatten(), &given);
    let stop = match (args.stop_signal, image.stop_signal()) {
        (Some(number), _) => Some(number.to_string()),
        (None, Some(name)) if !name.is_empty() => Some(name.clone()),
        _ => systemd.then(|| systemd::STOP_SIGNAL.to_owned()),
    };
    let (extra, volumes) = mounts::resolve(extra(args), own.volumes)?;
    let mut mounts = mounts();
    mounts.extend(extra);
    if systemd {
        systemd::mounts(&mut mounts);
    }
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "hostname": hostname,
        "root": { "path": "rootfs", "readonly": args.read_only },
        "process": {
            "terminal": args.tty,
            "user": user_value(user.as_deref()),
            "args": command,
            "env": env,
            "cwd": cwd,
            "noNewPrivileges": false,
            "oomScoreAdj": 0,
        },
        "mounts": mounts,
        "annotations": annotations(args, own.log, stop),
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" },
                { "type": "mount" }, { "type": "cgroup" },
            ],
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    });
    if !args.group_add.is_empty() {
        spec["process"]["user"]["additionalGids"] = json!(args.group_add);
    }
    security::apply(args, &mut spec)?;
    limits::apply(args, &mut spec)?;
    Ok((serde_json::from_value(spec)?, volumes))
}

fn annotations(args: &ContainerArgs, log: Option<&Path>, stop_signal: Option<String>) -> Value {
    let mut annotations = json!({});
    if let Some(log) = log {
        annotations[walnut_sandbox::ANNOTATION_LOG] = json!(log);
    }
    if args.init {
        annotations[walnut_sandbox::ANNOTATION_INIT] = json!("true");
    }
    if let Some(signal) = stop_signal {
        annotations[STOP_SIGNAL] = json!(signal);
    }
    if args.no_template {
        annotations[walnut_sandbox::ANNOTATION_TEMPLATE] = json!("off");
    }
    if !args.net.egress.is_empty() {
        annotations[walnut_sandbox::ANNOTATION_EGRESS] = json!(args.net.egress.join(";"));
    }
    annotations
}

/// The signal that a container is to be asked to end with.
pub(crate) fn stop_signal(spec: &Spec) -> Result<Option<u32>> {
    let annotations = spec.annotations().as_ref();
    let Some(text) = annotations.and_then(|all| all.get(STOP_SIGNAL)) else {
        return Ok(None);
    };
    match values::signal(text) {
        Ok(signal) => Ok(Some(signal)),
        Err(e) => bail!("the image's stop signal: {e}; give one with --stop-signal"),
    }
}

/// Another one than the container was made with.
pub(crate) fn set_stop_signal(spec: &mut Spec, signal: u32) {
    let mut annotations = spec.annotations().clone().unwrap_or_default();
    annotations.insert(STOP_SIGNAL.into(), signal.to_string());
    spec.set_annotations(Some(annotations));
}

/// The `user` object. Names are resolved by the agent, in the container's own
/// `/etc/passwd`; `username` carries what was asked for.
pub(crate) fn user_value(user: Option<&str>) -> Value {
    match user.filter(|u| !u.is_empty()) {
        Some(user) => json!({ "uid": 0, "gid": 0, "username": user }),
        None => json!({ "uid": 0, "gid": 0 }),
    }
}

/// Later settings win; the order of first appearance is kept.
pub(crate) fn merge_env<'a>(
    base: &'a [String],
    image: impl Iterator<Item = &'a String>,
    user: &[EnvVar],
) -> Vec<String> {
    let mut order = Vec::new();
    let mut values = BTreeMap::new();
    let mut set = |pair: &str| {
        let name = pair.split('=').next().unwrap_or_default().to_owned();
        if values.insert(name.clone(), pair.to_owned()).is_none() {
            order.push(name);
        }
    };
    base.iter().chain(image).for_each(|pair| set(pair));
    for var in user {
        if let Some(value) = &var.value {
            set(&format!("{}={value}", var.name));
        }
    }
    order
        .iter()
        .filter_map(|name| values.remove(name))
        .collect()
}

fn mounts() -> Vec<Value> {
    vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        ),
    ]
}

fn mount(destination: &str, kind: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": kind, "options": options })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use oci_spec::image::ConfigBuilder;

    fn run(line: &str) -> ContainerArgs {
        let words = ["walnut", "run"].into_iter().chain(line.split_whitespace());
        match crate::args::Cli::parse_from(words).command {
            crate::args::Command::Run(args) => args.container,
            _ => unreachable!(),
        }
    }

    fn build(args: &ContainerArgs, image: &Config) -> Result<Spec> {
        let dir = tempfile::tempdir().unwrap();
        let layout =
            walnut_sandbox::Layout::new(dir.path().join("s"), dir.path().join("r")).unwrap();
        let own = Own {
            id: "0123",
            hostname: "h",
            log: Some(Path::new("/log")),
            volumes: &NamedVolumes::new(&layout),
        };
        super::build(args, image, &own).map(|(spec, _)| spec)
    }

    fn image() -> Config {
        ConfigBuilder::default()
            .entrypoint(["entry".to_owned()])
            .cmd(["cmd".to_owned()])
            .env(["PATH=/image".to_owned(), "A=1".to_owned()])
            .build()
            .unwrap()
    }

    #[test]
    fn commands_follow_docker() {
        let got = |line: &str| command(&run(line), &image()).unwrap().join(" ");
        assert_eq!(got("img"), "entry cmd");
        assert_eq!(got("img a -b"), "entry a -b");
        assert_eq!(got("--entrypoint e img"), "e");
        assert_eq!(got("--entrypoint e img x"), "e x");
        assert!(command(&run("img"), &Config::default()).is_err());
    }

    #[test]
    fn the_last_setting_wins() {
        let args = run("-e A=2 -e B=x=y img");
        let spec = build(&args, &image()).unwrap();
        let process = spec.process().clone().unwrap();
        let env = process.env().clone().unwrap();
        assert_eq!(env, ["PATH=/image", "HOSTNAME=h", "A=2", "B=x=y"]);
    }

    #[test]
    fn the_stop_signal_is_ones_own_the_images_or_the_init_systems() {
        let signal = |line: &str, image: &str| {
            let image = ConfigBuilder::default().stop_signal(image).build().unwrap();
            stop_signal(&build(&run(line), &image).unwrap())
        };
        assert_eq!(signal("img true", "").unwrap(), None);
        assert_eq!(signal("img true", "SIGQUIT").unwrap(), Some(3));
        assert_eq!(
            signal("--stop-signal HUP img true", "QUIT").unwrap(),
            Some(1)
        );
        assert_eq!(signal("img /sbin/init", "").unwrap(), Some(37));
        assert_eq!(signal("img /sbin/init", "15").unwrap(), Some(15));
        let odd = signal("img true", "SIGNOTHING").unwrap_err().to_string();
        assert!(odd.contains("--stop-signal"), "{odd}");
    }

    #[test]
    fn limits_reach_the_spec() {
        let args = run("-m 64m --cpus 0.5 -u app:1 -v /srv:/data:ro img");
        let spec = build(&args, &image()).unwrap();
        let text = serde_json::to_string(&spec).unwrap();
        for part in ["67108864", "50000", "\"app:1\"", "\"/data\""] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn all_that_is_asked_for_reaches_the_spec() {
        let args = run(
            "--group-add 7 --tmpfs /t:size=1m --mount type=tmpfs,target=/m --pids-limit 9 \
             --ulimit nofile=5:6 --shm-size 1m --cap-drop ALL --cap-add CHOWN --sysctl a.b=c \
             --security-opt no-new-privileges --device /dev/null:/dev/nil:r --cpuset-cpus 0,1 \
             --init img true",
        );
        let spec = serde_json::to_value(build(&args, &image()).unwrap()).unwrap();
        let process = &spec["process"];
        assert_eq!(process["user"]["additionalGids"], json!([7]));
        assert_eq!(process["capabilities"]["bounding"], json!(["CAP_CHOWN"]));
        assert_eq!(process["noNewPrivileges"], true);
        assert_eq!(process["rlimits"][0]["type"], "RLIMIT_NOFILE");
        let linux = &spec["linux"];
        assert_eq!(linux["sysctl"]["a.b"], "c");
        assert_eq!(linux["resources"]["pids"]["limit"], 9);
        assert_eq!(linux["resources"]["cpu"]["quota"], 200_000);
        assert_eq!(linux["devices"][0]["path"], "/dev/nil");
        let mounts = spec["mounts"].as_array().unwrap();
        let at = |path: &str| mounts.iter().find(|m| m["destination"] == path).unwrap();
        assert!(
            at("/dev/shm")["options"]
                .to_string()
                .contains("size=1048576")
        );
        assert!(at("/t")["type"] == "tmpfs" && at("/m")["type"] == "tmpfs");
    }

    #[test]
    fn what_cannot_be_had_is_refused_with_the_reason() {
        for (line, why) in [
            ("--privileged img", "--cap-add ALL"),
            ("--pid host img", "does not know the processes"),
            ("--gpus all img", "no driver"),
            ("-m 64m --memory-swap 128m img", "no swap"),
            ("--device /dev/none img", "No such file"),
            ("--cap-add NOTHING img", "is not known"),
        ] {
            let said = format!("{:#}", build(&run(line), &image()).unwrap_err());
            assert!(said.contains(why), "{line}: {said}");
        }
    }
}
