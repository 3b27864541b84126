//! `walnut`: what a person types.
//!
//! A client of the supervisor's Task API, and of the image store: it holds no
//! state and runs no daemon. Each verb has a file of its own. Called `walnut-oci` it is
//! another command line, that of an OCI runtime ([`oci`]).

mod args;
mod attach;
mod breakdown;
mod check;
mod checkpoint;
mod client;
mod completion;
mod config;
mod copy;
mod create;
mod detach;
mod events;
mod exec;
mod fail;
mod filter;
mod format;
mod images;
mod inspect;
mod install;
mod io;
mod list;
mod load;
mod logs;
mod network;
mod oci;
mod output;
mod pool;
mod prune;
mod pull;
mod reclaim;
mod run;
mod saved;
mod signal;
mod spec;
mod start;
mod stats;
mod supervisor;
mod template;
mod terminal;
mod top;
mod update;
mod upgrade;
mod values;
mod volume;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    if oci::is_meant() {
        return oci::main();
    }
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("WALNUT_LOG")
                .unwrap_or_else(|_| "error".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    // A closed pipe ends the output, not the program with a panic.
    // SAFETY: restores the default disposition before any thread exists.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let result = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| {
            let result = runtime.block_on(dispatch(cli.command));
            // A thread that reads a terminal cannot be interrupted.
            runtime.shutdown_background();
            result
        });
    match result {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            let fail = fail::classify(&e);
            eprintln!("walnut: {}", fail.message);
            ExitCode::from(fail.code)
        }
    }
}

async fn dispatch(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Run(args) => run::run(*args).await,
        Command::Create(args) => run::create(*args).await,
        Command::Start(args) => start::start(args).await,
        Command::Attach(args) => attach::attach(args).await,
        Command::Exec(args) => exec::exec(args).await,
        Command::Ps(args) => list::ps(&args),
        Command::Logs(args) => logs::logs(&args).await,
        Command::Stats(args) => stats::stats(args).await,
        Command::Reclaim(args) => reclaim::reclaim(args).await,
        Command::Kill(args) => signal::kill(args).await,
        Command::Stop(args) => signal::stop(args).await,
        Command::Rm(args) => signal::rm(args).await,
        Command::Restart(args) => signal::restart(args).await,
        Command::Pause(args) => signal::pause(args).await,
        Command::Unpause(args) => signal::unpause(args).await,
        Command::Wait(args) => signal::wait(args).await,
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Top(args) => top::top(args).await,
        Command::Port(args) => top::port(&args),
        Command::Rename(args) => update::rename(&args),
        Command::Update(args) => update::update(args).await,
        Command::Cp(args) => copy::cp(args).await,
        Command::Events(args) => events::events(args).await,
        Command::Tag(args) => images::tag(&args),
        Command::Load(args) => load::load(args).await,
        Command::Save(args) => load::save(&args),
        Command::Volume(command) => volume::volume(command),
        Command::Container(command) => prune::container(command).await,
        Command::Image(command) => prune::image(command),
        Command::System(command) => prune::system(command).await,
        Command::Completion(args) => completion::completion(&args),
        Command::Pull(args) => pull::pull(args).await,
        Command::Push(args) => pull::push(args).await,
        Command::Images(args) => images::images(&args),
        Command::Rmi(args) => images::rmi(&args),
        Command::Checkpoint(args) => checkpoint::checkpoint(args).await,
        Command::Fork(args) => checkpoint::fork(args).await,
        Command::Template(command) => template::template(command).await,
        Command::Pool(command) => pool::pool(command),
        Command::Network(command) => network::network(command).await,
        Command::Check(args) => check::check(&args),
        Command::Config(args) => config::config(&args),
        Command::Install(args) => install::install(&args),
        Command::Uninstall(args) => install::uninstall(&args),
        Command::Upgrade(args) => upgrade::upgrade(args).await,
        Command::Version(args) => list::version(&args),
    }
}
