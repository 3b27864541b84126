//! The command line, in the words of Docker's.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    install::{InstallArgs, UninstallArgs},
    network::{NetworkArgs, NetworkCommand},
    reclaim::ReclaimArgs,
    stats::StatsArgs,
    upgrade::UpgradeArgs,
    values::{self, Cpus, EnvVar, Size, VolumeArg},
};

/// Containers, each with a kernel of its own
#[derive(Debug, Parser)]
#[command(
    name = "walnut",
    version,
    max_term_width = 100,
    after_help = "Environment: WALNUT_ROOT (images and containers), WALNUT_RUN (sockets), WALNUT_LIB \
                  (kernel and helpers), WALNUT_CONFIG (the settings' file, /etc/walnut/config.toml), WALNUT_DRIVER (auto, vmm, qemu-kvm, qemu-tcg), WALNUT_BOOT_TIMEOUT (seconds, \
                  60), WALNUT_TEMPLATES (off: every machine boots), WALNUT_NETWORK (of containers that name none: a network, or none), WALNUT_PRESSURE (off, or a \
                  memory.pressure to watch instead of the host's), WALNUT_LOG (debug, info, …)."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new container
    Run(Box<RunArgs>),
    /// Run one more command in a running container
    Exec(ExecArgs),
    /// List containers
    Ps(PsArgs),
    /// Show what a container has printed
    Logs(LogsArgs),
    /// Show what containers use of their processors and memory
    Stats(StatsArgs),
    /// Ask containers to give memory that they can do without back to the host
    Reclaim(ReclaimArgs),
    /// Send a signal to a container's first process
    Kill(KillArgs),
    /// Stop containers: SIGTERM or what they want instead, then SIGKILL
    Stop(StopArgs),
    /// Remove containers
    Rm(RmArgs),
    /// Fetch an image from a registry
    Pull(PullArgs),
    /// List images
    Images(ImagesArgs),
    /// Remove images
    Rmi(RmiArgs),
    /// Save a running container with its processes, as an image to run more of it from
    Checkpoint(CheckpointArgs),
    /// Start another container where a running one stands
    Fork(ForkArgs),
    /// Machines that have booted once, for others to begin from
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Keep machines ready, so that containers start at once
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Networks that containers are on
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Say what this host can do, and what Walnut will use
    Check(CheckArgs),
    /// Show the settings of this node, and the files that they are from
    #[command(after_help = "Examples:\n  walnut config\n  \
                            walnut config --file ./config.toml   # is it good?")]
    Config(ConfigArgs),
    /// Set up this node: programs, kernel, and the runtime in containerd and podman
    Install(InstallArgs),
    /// Take away what `walnut install` set up; images and containers stay
    Uninstall(UninstallArgs),
    /// Have the supervisors of running sandboxes replaced by what is installed now
    Upgrade(UpgradeArgs),
    /// Show versions
    Version(FormatArgs),
}

/// How a list is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Format {
    /// For people
    #[default]
    Table,
    /// For programs: one JSON array
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct FormatArgs {
    /// How to show it
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: Format,
}

#[derive(Debug, Default, Args)]
#[command(after_help = "Examples:
  walnut run --rm -it debian bash
  walnut run -d --name web -m 256m -p 8080:80 nginx
  echo hello | walnut run --rm -i debian sha256sum
  walnut run --rm -v ./data:/data:ro -w /data debian ls -l
  walnut run -d --name node my-debian /sbin/init   # systemd; it is stopped as it wants to be
  walnut run -d warm-redis                   # go on where `walnut checkpoint` saved it
  walnut run -d --network shop --name db redis && walnut run --rm --network shop debian getent hosts db
  walnut run --rm --network none debian ls   # loopback alone

Exit codes: the command's own; 125 Walnut failed, 126 the command cannot be executed, 127 it does
not exist. What is on no network starts soonest: from a pool, if there is one, and can be saved by
`walnut checkpoint`.")]
pub(crate) struct RunArgs {
    /// Give the prompt back at once and print the container's ID
    #[arg(short, long)]
    pub(crate) detach: bool,
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
    /// Directory the command starts in
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Share a directory or file of the host
    #[arg(short, long, value_name = "HOST:CONTAINER[:ro]")]
    pub(crate) volume: Vec<VolumeArg>,
    /// Memory the container may use (b, k, m, g)
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) memory: Option<Size>,
    /// CPUs the container may use, as 1.5
    #[arg(long, value_name = "NUMBER")]
    pub(crate) cpus: Option<Cpus>,
    /// Host name in the container [default: the start of its ID]
    #[arg(long)]
    pub(crate) hostname: Option<String>,
    /// Make the root file system read-only
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Replace the image's entry point
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// Signal that `walnut stop` asks with [default: the image's, or SIGTERM]
    #[arg(long, value_name = "SIGNAL", value_parser = values::signal)]
    pub(crate) stop_signal: Option<u32>,
    /// Give the container what systemd wants as its first process: writable cgroups, and memory
    /// for its run-time files. `true`: where the command is an init system
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    pub(crate) systemd: Systemd,
    /// Write the container's ID to a new file
    #[arg(long, value_name = "FILE")]
    pub(crate) cidfile: Option<PathBuf>,
    /// When to ask the registry for the image
    #[arg(long, value_enum, default_value_t)]
    pub(crate) pull: PullWhen,
    /// Machine driver (auto, vmm, qemu-kvm, qemu-tcg)
    #[arg(long, value_name = "DRIVER", value_parser = ["auto", "vmm", "qemu-kvm", "qemu-tcg"])]
    pub(crate) driver: Option<String>,
    /// Boot the machine, even where a template could spare it that
    #[arg(long)]
    pub(crate) no_template: bool,
    #[command(flatten)]
    pub(crate) net: NetworkArgs,
    /// Image, by name or ID
    pub(crate) image: String,
    /// Command and arguments [default: the image's]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
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
  walnut exec -it web sh")]
pub(crate) struct ExecArgs {
    /// Keep standard input open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Set a variable (NAME=VALUE), or pass one on (NAME)
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<EnvVar>,
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

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Show ended containers too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Show IDs alone
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// How to show them
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Go on until the container ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Put the time before each line
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// Container, by name or ID
    pub(crate) container: String,
}

#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Signal, by name or number
    #[arg(short, long, default_value = "KILL")]
    pub(crate) signal: String,
    /// Containers, by name or ID
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Seconds between the container's stop signal and SIGKILL
    #[arg(short, long, default_value_t = 10)]
    pub(crate) time: u64,
    /// Containers, by name or ID
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Kill running ones first
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Containers, by name or ID
    #[arg(required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Show nothing but the digest
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Image name
    pub(crate) image: String,
}

#[derive(Debug, Args)]
pub(crate) struct ImagesArgs {
    /// Show IDs alone
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// How to show them
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct RmiArgs {
    /// Images, by name or ID
    #[arg(required = true)]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut checkpoint redis --as warm-redis    # it runs on
  walnut run -d warm-redis                   # another one goes on from there, with its data
  walnut checkpoint --stop job --as job:half # it ends here, and can be continued

The image holds the container's memory, its processes and what they wrote to their root file system,
and works on this host alone, with the Walnut and the driver that made it. Containers with volumes
cannot be saved. Programs hold the random numbers and keys that they had before: so does every
container that is run from the image.")]
pub(crate) struct CheckpointArgs {
    /// Name of the image
    #[arg(long = "as", value_name = "IMAGE[:TAG]")]
    pub(crate) image: String,
    /// End the container when it has been saved
    #[arg(long)]
    pub(crate) stop: bool,
    /// Container, by name or ID
    pub(crate) container: String,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut fork -d --name redis-2 redis
  walnut fork --rm -i shell                  # its input and output are here

The fork has its own memory, files, host name and randomness from then on; commands that
`walnut exec` runs go on in it without input and output.")]
pub(crate) struct ForkArgs {
    /// Give the prompt back at once and print the fork's ID
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Connect standard input, if the container has one
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Remove the fork when it ends
    #[arg(long)]
    pub(crate) rm: bool,
    /// Name of the fork [default: a random one]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Host name in the fork [default: the container's, or the start of its ID]
    #[arg(long)]
    pub(crate) hostname: Option<String>,
    /// Write the fork's ID to a new file
    #[arg(long, value_name = "FILE")]
    pub(crate) cidfile: Option<PathBuf>,
    /// Container, by name or ID
    pub(crate) container: String,
}

/// Templates are made by themselves: the first machine of a size leaves one behind, and the
/// next ones of that size begin from it.
#[derive(Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// List templates
    Ls(TemplateLsArgs),
    /// Make a template now, and print its ID
    Create(TemplateCreateArgs),
    /// Remove templates; what was started from them runs on
    Rm(TemplateRmArgs),
    /// Show all that is known of templates, as JSON
    Inspect(TemplateNames),
}

#[derive(Debug, Args)]
pub(crate) struct TemplateLsArgs {
    /// Show IDs alone
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// How to show them
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut template create
  walnut template create -m 1g --cpus 2      # for `walnut run -m 1g --cpus 2`")]
pub(crate) struct TemplateCreateArgs {
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// The machine that containers with these limits get.
#[derive(Debug, Args)]
pub(crate) struct MachineArgs {
    /// Memory that its containers may use (b, k, m, g)
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) memory: Option<Size>,
    /// CPUs that its containers may use, as 1.5
    #[arg(long, value_name = "NUMBER")]
    pub(crate) cpus: Option<Cpus>,
    /// Machine driver (auto, vmm, qemu-kvm, qemu-tcg)
    #[arg(long, value_name = "DRIVER", value_parser = ["auto", "vmm", "qemu-kvm", "qemu-tcg"])]
    pub(crate) driver: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct TemplateNames {
    /// Templates, by ID or the start of one
    #[arg(required = true)]
    pub(crate) templates: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct TemplateRmArgs {
    /// Remove all
    #[arg(short, long, conflicts_with = "templates")]
    pub(crate) all: bool,
    /// Templates, by ID or the start of one
    #[arg(required_unless_present = "all")]
    pub(crate) templates: Vec<String>,
}

/// Machines that stand by have booted and built a container before: what is left of a start
/// is to attach the image and to build the container asked for. They hold memory.
#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// List pools
    Ls(PoolLsArgs),
    /// Say how many machines of a size stand by, and wait until they do; 0 ends the pool
    Set(PoolSetArgs),
}

#[derive(Debug, Args)]
pub(crate) struct PoolLsArgs {
    /// How to show them
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut pool set 4
  walnut pool set 2 -m 1g --cpus 2      # for `walnut run -m 1g --cpus 2`
  walnut pool set 0                     # none any more")]
pub(crate) struct PoolSetArgs {
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    /// Do not wait
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// How many
    pub(crate) size: u32,
}

#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    /// Another file (with its drop-ins), instead of the node's
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// How to show it
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// How to show it
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: Format,
    /// Where the kernel and the helpers are [default: beside this program]
    #[arg(long, value_name = "DIR", env = "WALNUT_LIB")]
    pub(crate) lib: Option<PathBuf>,
}
