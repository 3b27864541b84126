//! The command line of what machines begin from.

use clap::{Args, Subcommand};

use super::Format;
use crate::format::ListFormat;
use crate::values::{Cpus, Size};

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
    /// How to show them: table, json, a Go template, or a table of one
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    pub(crate) format: ListFormat,
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
