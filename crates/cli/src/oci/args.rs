//! The command line, as runc and crun have it.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

/// What `--version` prints after the name; podman and others look for these lines.
const VERSION: &str = concat!(
    "version ",
    env!("CARGO_PKG_VERSION"),
    "\ncommit: v",
    env!("CARGO_PKG_VERSION"),
    "\nspec: 1.0.2-dev"
);

/// OCI runtime that gives each container a kernel of its own.
#[derive(Debug, Parser)]
#[command(
    name = "walnut-oci",
    version = VERSION,
    disable_version_flag = true,
    max_term_width = 100,
    after_help = "The options are runc's and crun's; docs/oci.md tells what differs."
)]
pub(super) struct Oci {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Args)]
pub(super) struct Global {
    /// Where the state of containers is kept [default: /run/walnut-oci, or walnut-oci in
    /// XDG_RUNTIME_DIR for other users than root]
    #[arg(long, value_name = "DIR")]
    pub(super) root: Option<PathBuf>,
    /// File that errors are written to, besides the standard error
    #[arg(long, value_name = "FILE")]
    pub(super) log: Option<PathBuf>,
    /// Format of that file
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub(super) log_format: LogFormat,
    /// Accepted as crun has it: only errors are logged
    #[arg(long, value_name = "LEVEL", hide = true)]
    pub(super) log_level: Option<String>,
    /// Say more
    #[arg(long)]
    pub(super) debug: bool,
    /// Accepted: containers have their cgroups in their own kernels
    #[arg(long)]
    pub(super) systemd_cgroup: bool,
    /// Accepted, as --systemd-cgroup is
    #[arg(long, value_name = "MANAGER", hide = true)]
    pub(super) cgroup_manager: Option<String>,
    /// Accepted: nothing depends on it
    #[arg(long, value_name = "VALUE", hide = true)]
    pub(super) rootless: Option<String>,
    /// Accepted: nothing uses it
    #[arg(long, value_name = "PATH", hide = true)]
    pub(super) criu: Option<PathBuf>,
    /// Print the version
    #[arg(short = 'v', short_alias = 'V', long, action = ArgAction::Version)]
    version: Option<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Create a container from a bundle
    Create(Create),
    /// Start the program of a created container
    Start(Name),
    /// Create a container and start its program
    Run(Run),
    /// Print a container's state as JSON
    State(Name),
    /// Send a signal to a container's first process
    Kill(Kill),
    /// Remove a container that has stopped
    Delete(Delete),
    /// Run another program in a container
    Exec(Box<Exec>),
    /// List the processes of a container, by their numbers in its kernel; as JSON that of the
    /// process which stands for it
    Ps(Ps),
    /// Freeze a container's processes
    Pause(Name),
    /// Let a frozen container's processes go on
    Resume(Name),
    /// Change a container's limits
    Update(Box<Update>),
    /// Print a container's figures, once or again and again
    Events(Events),
    /// Write a config.json to begin with
    Spec(Spec),
    /// Print what this runtime can do, as JSON
    Features,
    /// List the containers below the root
    #[command(visible_alias = "ls")]
    List(List),
}

#[derive(Debug, Args)]
pub(super) struct Name {
    /// The container
    pub(super) id: String,
}

/// Where a container comes from, and what is told of it.
#[derive(Debug, Args)]
pub(super) struct Source {
    /// The container's name
    pub(super) id: String,
    /// The bundle's directory
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub(super) bundle: PathBuf,
    /// Socket that gets the terminal's outer side
    #[arg(long, value_name = "SOCKET")]
    pub(super) console_socket: Option<PathBuf>,
    /// File that gets the PID of the process that stands for the container
    #[arg(long, value_name = "FILE")]
    pub(super) pid_file: Option<PathBuf>,
    /// Refused unless 0: descriptors cannot be passed into another kernel
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) preserve_fds: u32,
    /// Accepted: the root file system is another kernel's
    #[arg(long)]
    pub(super) no_pivot: bool,
    /// Accepted: the keyring is another kernel's
    #[arg(long)]
    pub(super) no_new_keyring: bool,
    /// Accepted: there is no subreaper
    #[arg(long)]
    pub(super) no_subreaper: bool,
}

#[derive(Debug, Args)]
pub(super) struct Create {
    #[command(flatten)]
    pub(super) source: Source,
}

#[derive(Debug, Args)]
pub(super) struct Run {
    #[command(flatten)]
    pub(super) source: Source,
    /// Do not wait for the program's end
    #[arg(short, long)]
    pub(super) detach: bool,
    /// Do not delete the container when it has ended
    #[arg(long)]
    pub(super) keep: bool,
}

#[derive(Debug, Args)]
pub(super) struct Kill {
    /// The container
    pub(super) id: String,
    /// A name or a number
    #[arg(default_value = "SIGTERM")]
    pub(super) signal: String,
    /// Send it to every process of the container
    #[arg(short, long)]
    pub(super) all: bool,
}

#[derive(Debug, Args)]
pub(super) struct Delete {
    /// The container
    pub(super) id: String,
    /// Kill it first, if it runs; it is no error that there is none
    #[arg(short, long)]
    pub(super) force: bool,
}

#[derive(Debug, Args)]
pub(super) struct Exec {
    /// The container
    pub(super) id: String,
    /// The program and its arguments
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    pub(super) command: Vec<String>,
    /// File with the process as JSON (OCI runtime-spec "process"); the other options but
    /// --tty do not count then
    #[arg(short, long, value_name = "FILE")]
    pub(super) process: Option<PathBuf>,
    /// Give it a terminal
    #[arg(short, long)]
    pub(super) tty: bool,
    /// Do not wait for its end
    #[arg(short, long)]
    pub(super) detach: bool,
    /// Socket that gets the terminal's outer side
    #[arg(long, value_name = "SOCKET")]
    pub(super) console_socket: Option<PathBuf>,
    /// File that gets the PID of the process that stands for it
    #[arg(long, value_name = "FILE")]
    pub(super) pid_file: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    pub(super) cwd: Option<String>,
    /// Variable of its environment, NAME=VALUE
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(super) env: Vec<String>,
    /// UID[:GID]
    #[arg(short, long, value_name = "UID[:GID]")]
    pub(super) user: Option<String>,
    /// Group of its, besides the first
    #[arg(short = 'g', long, value_name = "GID")]
    pub(super) additional_gids: Vec<u32>,
    /// Capability of its, besides the container's
    #[arg(short, long, value_name = "CAP")]
    pub(super) cap: Vec<String>,
    /// It may not gain privileges by what it executes
    #[arg(long)]
    pub(super) no_new_privs: bool,
    /// Refused: the container's kernel has no security modules
    #[arg(long, value_name = "PROFILE")]
    pub(super) apparmor: Option<String>,
    /// Refused, as --apparmor is
    #[arg(long, value_name = "LABEL")]
    pub(super) process_label: Option<String>,
    /// Refused: it is in the container's cgroup
    #[arg(long, value_name = "PATH")]
    pub(super) cgroup: Option<String>,
    /// Refused unless 0: descriptors cannot be passed into another kernel
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) preserve_fds: u32,
}

#[derive(Debug, Args)]
pub(super) struct Ps {
    /// The container
    pub(super) id: String,
    #[arg(short, long, default_value = "table")]
    pub(super) format: Format,
    /// Accepted as runc has it: only numbers are known
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub(super) options: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct Update {
    /// The container
    pub(super) id: String,
    /// File with the limits as JSON (OCI runtime-spec "linux.resources"), or - for the
    /// standard input; the other options do not count then
    #[arg(short, long, value_name = "FILE")]
    pub(super) resources: Option<PathBuf>,
    /// Weight of its block I/O, 10 to 1000
    #[arg(long, value_name = "N")]
    pub(super) blkio_weight: Option<u16>,
    /// Microseconds of a period
    #[arg(long, value_name = "N")]
    pub(super) cpu_period: Option<u64>,
    /// Microseconds of CPU time in a period
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(super) cpu_quota: Option<i64>,
    /// Relative share of CPU time
    #[arg(long, visible_alias = "cpu-shares", value_name = "N")]
    pub(super) cpu_share: Option<u64>,
    /// Bytes of memory
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub(super) memory: Option<i64>,
    /// Bytes of memory that are not taken from it
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub(super) memory_reservation: Option<i64>,
    /// Bytes of memory and swap together
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub(super) memory_swap: Option<i64>,
    /// Most processes
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(super) pids_limit: Option<i64>,
}

#[derive(Debug, Args)]
pub(super) struct Events {
    /// The container
    pub(super) id: String,
    /// Between two figures: 5s, 500ms
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub(super) interval: String,
    /// Once
    #[arg(long)]
    pub(super) stats: bool,
}

#[derive(Debug, Args)]
pub(super) struct Spec {
    /// The bundle's directory
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub(super) bundle: PathBuf,
    /// Refused: no users are mapped on the host
    #[arg(long)]
    pub(super) rootless: bool,
}

#[derive(Debug, Args)]
pub(super) struct List {
    #[arg(short, long, default_value = "table")]
    pub(super) format: Format,
    /// Names alone
    #[arg(short, long)]
    pub(super) quiet: bool,
}
