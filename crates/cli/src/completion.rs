//! `walnut completion`.

use std::io;

use anyhow::Result;
use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate};

use crate::args::Cli;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut completion bash > /etc/bash_completion.d/walnut
  walnut completion zsh > /usr/local/share/zsh/site-functions/_walnut
  walnut completion fish > ~/.config/fish/completions/walnut.fish")]
pub(crate) struct CompletionArgs {
    /// bash, zsh, fish, elvish or powershell
    shell: Shell,
}

#[expect(clippy::unnecessary_wraps, reason = "as all verbs")]
pub(crate) fn completion(args: &CompletionArgs) -> Result<u8> {
    generate(args.shell, &mut Cli::command(), "walnut", &mut io::stdout());
    Ok(0)
}
