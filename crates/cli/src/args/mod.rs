//! The command line, in the words of Docker's.

mod container;
mod machine;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use container::{
    ContainerArgs, Containers, CreateArgs, ExecArgs, KeysArgs, PullWhen, RunArgs, Systemd,
};
pub(crate) use machine::{
    MachineArgs, PoolCommand, PoolLsArgs, PoolSetArgs, TemplateCommand, TemplateCreateArgs,
    TemplateLsArgs,
};

use crate::{
    attach::AttachArgs,
    completion::CompletionArgs,
    copy::CpArgs,
    events::EventsArgs,
    images::{ImagesArgs, RmiArgs, TagArgs},
    inspect::InspectArgs,
    install::{InstallArgs, UninstallArgs},
    list::PsArgs,
    load::{LoadArgs, SaveArgs},
    logs::LogsArgs,
    network::NetworkCommand,
    prune::{ContainerCommand, ImageCommand, SystemCommand},
    pull::{PullArgs, PushArgs},
    reclaim::ReclaimArgs,
    signal::{KillArgs, RestartArgs, RmArgs, StopArgs},
    start::StartArgs,
    stats::StatsArgs,
    top::{PortArgs, TopArgs},
    update::{RenameArgs, UpdateArgs},
    upgrade::UpgradeArgs,
    volume::VolumeCommand,
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
    /// Make a container, and do not start it
    Create(Box<CreateArgs>),
    /// Start containers that are made, or have ended
    Start(StartArgs),
    /// Run one more command in a running container
    Exec(ExecArgs),
    /// Connect to a running container's input and output
    Attach(AttachArgs),
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
    /// Stop containers, and start them again
    Restart(RestartArgs),
    /// Freeze containers' processes
    Pause(Containers),
    /// Let frozen containers go on
    Unpause(Containers),
    /// Wait until containers have ended, and print their exit codes
    Wait(Containers),
    /// Remove containers
    Rm(RmArgs),
    /// Show all that is known of containers, images, volumes and networks, as JSON
    Inspect(InspectArgs),
    /// List a container's processes
    Top(TopArgs),
    /// List a container's published ports
    Port(PortArgs),
    /// Give a container another name
    Rename(RenameArgs),
    /// Change containers' limits and restart policy
    Update(UpdateArgs),
    /// Copy files to or from a container
    Cp(CpArgs),
    /// Show what happens to containers, images, volumes and networks
    Events(EventsArgs),
    /// Fetch an image from a registry
    Pull(PullArgs),
    /// Send an image to a registry
    Push(PushArgs),
    /// List images
    Images(ImagesArgs),
    /// Remove images
    Rmi(RmiArgs),
    /// Give an image one more name
    Tag(TagArgs),
    /// Take images in from an archive
    Load(LoadArgs),
    /// Write images to an archive
    Save(SaveArgs),
    /// Volumes: directories that outlive containers
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Clean up containers
    #[command(subcommand)]
    Container(ContainerCommand),
    /// Clean up images
    #[command(subcommand)]
    Image(ImageCommand),
    /// What the node's disk is used for, and cleaning up
    #[command(subcommand)]
    System(SystemCommand),
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
    /// Print a shell's completions
    Completion(CompletionArgs),
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
