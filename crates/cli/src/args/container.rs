//! The command line of a new container: `run`, `create`, and what `exec` has in common
//! with them.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use walnut_sandbox::RestartPolicy;

use crate::{
    detach::DetachKeys,
    network::NetworkArgs,
    spec::{
        DeviceArg, HealthArgs, LabelArg, LogOpt, MountArg, SecurityOpt, SysctlArg, TmpfsArg,
        UlimitArg, VolumeArg,
    },
    values::{self, Cpus, Cpuset, EnvVar, Size},
};

#[derive(Debug, Default, Args)]
#[command(after_help = "Examples:
  walnut run --rm -it debian bash
  walnut run -d --name web -m 256m -p 8080:80 nginx
  echo hello | walnut run --rm -i debian sha256sum
  walnut run --rm -v ./data:/data:ro -w /data debian ls -l
  walnut run -d -v db:/var/lib/data --restart on-failure:3 redis   # a volume by name
  walnut run -d --name node my-debian /sbin/init   # systemd; it is stopped as it wants to be
  walnut run -d warm-redis                   # go on where `walnut checkpoint` saved it
  walnut run -d --network shop --name db redis && walnut run --rm --network shop debian getent hosts db
  walnut run --rm --network none debian ls   # loopback alone

Exit codes: the command's own; 125 Walnut failed, 126 the command cannot be executed, 127 it does
not exist. With -it, ctrl-p ctrl-q leaves the container behind (--detach-keys); `walnut attach` comes
back to it. What is on no network starts soonest: from a pool, if there is one, and can be saved by
`walnut checkpoint`.")]
pub(crate) struct RunArgs {
    /// Give the prompt back at once and print the container's ID
    #[arg(short, long)]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) keys: KeysArgs,
    #[command(flatten)]
    pub(crate) container: ContainerArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut create --name job -v results:/out debian make all
  walnut start -a job                        # its output here, and its exit code

`start` boots its machine: until then a container is a directory, and takes no memory.")]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    pub(crate) container: ContainerArgs,
}

/// How a terminal is left.
#[derive(Debug, Default, Args)]
pub(crate) struct KeysArgs {
    /// Keys that leave the container behind, as ctrl-p,ctrl-q; none for no keys
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub(crate) detach_keys: DetachKeys,
}

/// What a container is made with.
#[derive(Debug, Default, Args)]
pub(crate) struct ContainerArgs {
    /// Keep standard input open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Remove the container when it ends
    #[arg(long)]
    pub(crate) rm: bool,
    /// Name of the container [default: a random one]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Set a variable (NAME=VALUE), or pass one on (NAME)
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<EnvVar>,
    /// Set the variables of a file, a line each
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Directory the command starts in
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Another group to be in, by number
    #[arg(long, value_name = "GROUP")]
    pub(crate) group_add: Vec<u32>,
    /// Share a directory or file of the host, or a volume by its name (made if there is none)
    #[arg(short, long, value_name = "[HOST|NAME:]CONTAINER[:ro]")]
    pub(crate) volume: Vec<VolumeArg>,
    /// The same, and memory, word by word: type=bind|volume|tmpfs,source=…,target=…[,readonly]
    #[arg(long, value_name = "MOUNT")]
    pub(crate) mount: Vec<MountArg>,
    /// A directory in memory, with options as size=64m,mode=1777
    #[arg(long, value_name = "CONTAINER[:OPTIONS]")]
    pub(crate) tmpfs: Vec<TmpfsArg>,
    /// Host name in the container [default: the start of its ID]
    #[arg(long)]
    pub(crate) hostname: Option<String>,
    /// Make the root file system read-only
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Replace the image's entry point
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// Run the command below a small first process that passes signals on and reaps orphans
    #[arg(long)]
    pub(crate) init: bool,
    /// Signal that `walnut stop` asks with [default: the image's, or SIGTERM]
    #[arg(long, value_name = "SIGNAL", value_parser = values::signal)]
    pub(crate) stop_signal: Option<u32>,
    /// Seconds that `walnut stop` waits before it kills [default: 10]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) stop_timeout: Option<u64>,
    /// Start it again when it ends: no, on-failure[:NUMBER], always, unless-stopped
    #[arg(long, value_name = "POLICY", default_value = "no")]
    pub(crate) restart: RestartPolicy,
    /// Put a word on the container
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) label: Vec<LabelArg>,
    /// Put the words of a file on it, a line each
    #[arg(long, value_name = "FILE")]
    pub(crate) label_file: Vec<PathBuf>,
    /// Give the container what systemd wants as its first process: writable cgroups, and memory
    /// for its run-time files. `true`: where the command is an init system
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    pub(crate) systemd: Systemd,
    /// Write the container's ID to a new file
    #[arg(long, value_name = "FILE")]
    pub(crate) cidfile: Option<PathBuf>,
    /// What becomes of its output: json-file (`walnut logs` shows it), none
    #[arg(long, value_name = "DRIVER", value_parser = ["json-file", "none"], default_value = "json-file")]
    pub(crate) log_driver: String,
    /// How much is kept of it: max-size=16m (of a file), max-file=2
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) log_opt: Vec<LogOpt>,
    /// When to ask the registry for the image
    #[arg(long, value_enum, default_value_t)]
    pub(crate) pull: PullWhen,
    /// Platform of the image, as linux/amd64 [default: this host's]
    #[arg(long, value_name = "OS/ARCH")]
    pub(crate) platform: Option<String>,
    /// Do not show how the image is fetched
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Machine driver (auto, vmm, qemu-kvm, qemu-tcg)
    #[arg(long, value_name = "DRIVER", value_parser = ["auto", "vmm", "qemu-kvm", "qemu-tcg"])]
    pub(crate) driver: Option<String>,
    /// Boot the machine, even where a template could spare it that
    #[arg(long)]
    pub(crate) no_template: bool,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    #[command(flatten)]
    pub(crate) security: SecurityArgs,
    #[command(flatten)]
    pub(crate) health: HealthArgs,
    #[command(flatten)]
    pub(crate) net: NetworkArgs,
    #[command(flatten)]
    pub(crate) refused: RefusedArgs,
    /// Image, by name or ID
    pub(crate) image: String,
    /// Command and arguments [default: the image's]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// How much a container may use.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Limits")]
pub(crate) struct LimitArgs {
    /// Memory the container may use (b, k, m, g)
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) memory: Option<Size>,
    /// Memory and swap together: the machine has no swap, so it is the same as --memory, or -1
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) memory_swap: Option<String>,
    /// CPUs the container may use, as 1.5
    #[arg(long, value_name = "NUMBER")]
    pub(crate) cpus: Option<Cpus>,
    /// Processors of the host that its machine runs on, as 0-3,6
    #[arg(long, value_name = "LIST")]
    pub(crate) cpuset_cpus: Option<Cpuset>,
    /// Processes and threads it may have; -1 for any number
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pub(crate) pids_limit: Option<i64>,
    /// A limit of each process, as nofile=1024:4096
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub(crate) ulimit: Vec<UlimitArg>,
    /// Size of /dev/shm [default: 64m]
    #[arg(long, value_name = "SIZE")]
    pub(crate) shm_size: Option<walnut_sandbox::Bytes>,
    /// A parameter of the container's kernel, as net.core.somaxconn=1024
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) sysctl: Vec<SysctlArg>,
}

/// What a container's processes may do, in a kernel of their own.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Security")]
pub(crate) struct SecurityArgs {
    /// Add a capability, or ALL
    #[arg(long, value_name = "CAPABILITY")]
    pub(crate) cap_add: Vec<String>,
    /// Take a capability away, or ALL
    #[arg(long, value_name = "CAPABILITY")]
    pub(crate) cap_drop: Vec<String>,
    /// no-new-privileges, seccomp=FILE, seccomp=unconfined, systempaths=unconfined
    #[arg(long, value_name = "OPTION")]
    pub(crate) security_opt: Vec<SecurityOpt>,
    /// A device of the container's kernel, as /dev/fuse or /dev/net/tun
    #[arg(long, value_name = "DEVICE[:CONTAINER[:rwm]]")]
    pub(crate) device: Vec<DeviceArg>,
}

/// What Docker has and a container with a kernel of its own has not: known, so that the
/// reason can be told.
#[derive(Debug, Default, Args)]
pub(crate) struct RefusedArgs {
    #[arg(long, hide = true)]
    privileged: bool,
    #[arg(long, hide = true)]
    pid: Option<String>,
    #[arg(long, hide = true)]
    ipc: Option<String>,
    #[arg(long, hide = true)]
    uts: Option<String>,
    #[arg(long, hide = true)]
    userns: Option<String>,
    #[arg(long, hide = true)]
    gpus: Option<String>,
    #[arg(long, hide = true)]
    volumes_from: Option<String>,
    #[arg(long, hide = true)]
    link: Option<String>,
    #[arg(long, hide = true)]
    cgroup_parent: Option<String>,
    #[arg(long, hide = true)]
    oom_kill_disable: bool,
}

impl RefusedArgs {
    /// An option that was given, and why it cannot be had.
    pub(crate) fn given(&self) -> Option<(&'static str, &'static str)> {
        let given = Option::is_some;
        let own = |word: &Option<String>| word.as_deref().is_some_and(|w| w != "private");
        let all = [
            (
                self.privileged,
                "--privileged",
                "the container's kernel is its own, and none of the host's devices are in it; give what its program needs: --cap-add ALL, --security-opt systempaths=unconfined, --device",
            ),
            (
                own(&self.pid),
                "--pid",
                "the container's kernel does not know the processes of the host or of other containers",
            ),
            (
                own(&self.ipc),
                "--ipc",
                "shared memory and queues are the container's kernel's own",
            ),
            (
                own(&self.uts),
                "--uts",
                "the container's kernel has a host name of its own; give one with --hostname",
            ),
            (
                own(&self.userns),
                "--userns",
                "users of the container are its kernel's; the host's are not among them",
            ),
            (
                given(&self.gpus),
                "--gpus",
                "the container's kernel has no driver for the host's devices",
            ),
            (
                given(&self.volumes_from),
                "--volumes-from",
                "name the volumes: -v NAME:/path",
            ),
            (
                given(&self.link),
                "--link",
                "put both containers on one network (walnut network create), where they find each other by name",
            ),
            (
                given(&self.cgroup_parent),
                "--cgroup-parent",
                "its cgroups are its kernel's; the machine's are below those of the command that starts it",
            ),
            (
                self.oom_kill_disable,
                "--oom-kill-disable",
                "its kernel has to free memory somehow when it has no more",
            ),
        ];
        let mut all = all.into_iter();
        let (_, option, why) = all.find(|(given, ..)| *given)?;
        Some((option, why))
    }
}

/// When a container is set up for an init system, as podman has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Systemd {
    /// Where its command is one
    #[default]
    True,
    /// Never
    False,
    /// Whatever its command is
    Always,
}

/// When to ask the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum PullWhen {
    /// Each time
    Always,
    /// If the image is not here
    #[default]
    Missing,
    /// Not at all
    Never,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut exec web nginx -t
  walnut exec -it web sh
  walnut exec -d web sh -c 'sleep 60 && nginx -s reload'")]
pub(crate) struct ExecArgs {
    /// Give the prompt back at once
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    pub(crate) detach: bool,
    /// Keep standard input open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    #[command(flatten)]
    pub(crate) keys: KeysArgs,
    /// Set a variable (NAME=VALUE), or pass one on (NAME)
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<EnvVar>,
    /// Set the variables of a file, a line each
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Directory the command starts in [default: the container's]
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User and group, by name or number [default: the container's]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Container, by name or ID
    pub(crate) container: String,
    /// Command and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// The containers that a verb is for.
#[derive(Debug, Args)]
pub(crate) struct Containers {
    /// Containers, by name or ID
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}
