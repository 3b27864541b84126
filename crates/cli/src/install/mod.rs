//! `walnut install` and `walnut uninstall`: a node that containerd, podman, docker and people
//! find Walnut on.
//!
//! What is to be there is a list of [`Step`]s. Each can be looked at, made and undone by
//! itself, so that a second `install` changes nothing, one that was cut off is finished by
//! the next, and `--dry-run` says the truth.

mod amendment;
mod containerd;
mod docker;
mod front;
mod json;
mod step;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use walnut_sandbox::Assets;

pub(crate) use self::front::front_ends;
use self::step::{State, Step};

/// What lies beside the kernel.
const LIBRARY: [(&str, u32); 6] = [
    ("containerd-shim-walnut-v2", 0o755),
    ("walnut-vmm", 0o755),
    ("walnut-vsock", 0o755),
    ("vmlinux", 0o644),
    ("initramfs.cpio", 0o644),
    ("rehearsal.erofs", 0o644),
];
const SHIM: &str = "containerd-shim-walnut-v2";
const OCI: &str = "walnut-oci";
/// Where podman looks for settings of packages.
const PODMAN_DIR: &str = "/etc/containers/containers.conf.d";
/// Where docker's daemon has its settings.
const DOCKER_CONFIG: &str = "/etc/docker/daemon.json";

/// Set up this node: programs, kernel, and the runtime in containerd, podman and docker
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut install --dry-run           # what it would do
  walnut install                     # below /usr/local; containerd's configuration is amended
  walnut install --prefix /usr --root ./image   # into a file system that is being made

Doing it again changes nothing that is right already. A containerd that runs must be restarted to
see a new runtime, a dockerd reloaded; containers that run are not touched by that.")]
pub(crate) struct InstallArgs {
    #[command(flatten)]
    places: Places,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

/// Take away what `walnut install` set up; images and containers stay
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut uninstall --dry-run
  walnut uninstall")]
pub(crate) struct UninstallArgs {
    #[command(flatten)]
    places: Places,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
struct Places {
    /// Programs go to bin and lib/walnut below it
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
    /// The file system that is set up
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// containerd's configuration file
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/containerd/config.toml"
    )]
    containerd_config: PathBuf,
    /// Version of containerd to write for, where it cannot be asked [default: it is asked]
    #[arg(long, value_name = "VERSION")]
    containerd_version: Option<String>,
    /// Leave containerd as it is
    #[arg(long)]
    no_containerd: bool,
    /// Leave podman as it is
    #[arg(long)]
    no_podman: bool,
    /// docker's configuration file
    #[arg(long, value_name = "FILE", default_value = DOCKER_CONFIG)]
    docker_config: PathBuf,
    /// Leave docker as it is
    #[arg(long)]
    no_docker: bool,
}

impl Places {
    /// `path` in the file system that is set up.
    fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn check(&self) -> Result<()> {
        for (option, path) in [
            ("--prefix", &self.prefix),
            ("--containerd-config", &self.containerd_config),
            ("--docker-config", &self.docker_config),
        ] {
            if !path.is_absolute() {
                bail!("{option} {}: must be an absolute path", path.display());
            }
        }
        Ok(())
    }

    fn bin(&self) -> PathBuf {
        self.at(self.prefix.join("bin"))
    }

    fn library(&self) -> PathBuf {
        self.at(self.prefix.join("lib/walnut"))
    }

    /// The programs and the links to them. `from` has the library's files.
    fn programs(&self, walnut: PathBuf, from: &Path) -> Vec<Step> {
        let mut steps: Vec<_> = LIBRARY
            .iter()
            .map(|&(name, mode)| Step::Copy {
                from: from.join(name),
                to: self.library().join(name),
                mode,
            })
            .collect();
        steps.push(Step::Copy {
            from: walnut,
            to: self.bin().join("walnut"),
            mode: 0o755,
        });
        steps.push(Step::Link {
            at: self.bin().join(OCI),
            to: "walnut".into(),
        });
        // containerd looks for it in its PATH.
        steps.push(Step::Link {
            at: self.bin().join(SHIM),
            to: Path::new("../lib/walnut").join(SHIM),
        });
        steps
    }

    /// What tells containerd, podman and docker of the runtime; sentences on what is left alone.
    fn settings(&self) -> Result<(Vec<Step>, Vec<String>)> {
        let (mut steps, mut notes) = (Vec::new(), Vec::new());
        if !self.no_containerd {
            let version = match &self.containerd_version {
                Some(version) => Some(containerd::Version::parse(version)?),
                None => containerd::installed()?,
            };
            match version {
                Some(version) => {
                    let at = |path: &Path| self.at(path);
                    steps.extend(containerd::steps(version, &self.containerd_config, at)?);
                }
                None => notes.push("containerd is not installed: not set up".into()),
            }
        }
        if !self.no_podman {
            let setting = self.at(PODMAN_DIR).join("walnut.conf");
            // What was set up goes, if podman went first.
            if self.at("/usr/bin/podman").exists() || setting.exists() {
                let program = self.prefix.join("bin").join(OCI);
                steps.push(Step::Text {
                    to: setting,
                    text: format!(
                        "# Made by `walnut install`.\n[engine.runtimes]\n{OCI} = [{program:?}]\n"
                    ),
                });
            } else {
                notes.push("podman is not installed: not set up".into());
            }
        }
        if !self.no_docker {
            let config = self.at(&self.docker_config);
            let there = ["/usr/bin/dockerd", "/usr/sbin/dockerd"];
            let told = fs::read_to_string(&config).is_ok_and(|text| docker::has(&text));
            if told || there.iter().any(|program| self.at(program).exists()) {
                let program = self.prefix.join("bin").join(OCI);
                match docker::step(&config, program, |path| self.at(path)) {
                    Ok(step) => steps.push(step),
                    Err(note) => notes.push(note),
                }
            } else {
                notes.push("docker is not installed: not set up".into());
            }
        }
        Ok((steps, notes))
    }
}

pub(crate) fn install(args: &InstallArgs) -> Result<u8> {
    args.places.check()?;
    let walnut = env::current_exe().context("find this program's own file")?;
    let library = Assets::find()?.dir;
    let mut steps = args.places.programs(walnut, &library);
    let (settings, notes) = args.places.settings()?;
    steps.extend(settings);
    let mut changed = false;
    for step in &steps {
        let state = step.state()?;
        let says = match (&state, args.dry_run) {
            (State::Done, _) => "is there",
            (State::Absent, true) => "would be made",
            (State::Other, true) => "would be changed",
            (State::Absent, false) => "made",
            (State::Other, false) => "changed",
        };
        if !matches!(state, State::Done) {
            changed = true;
            if !args.dry_run {
                step.make()?;
            }
        }
        println!("{says:>16}  {step}");
    }
    for note in notes {
        println!("{:>16}  {note}", "note");
    }
    if changed && !args.dry_run {
        println!(
            "\nRestart containerd if it runs, and reload docker, so that they see the runtime; `walnut check` says what this node can do. \
             Sandboxes that run are of the version that they were started with: `walnut upgrade --all` changes that."
        );
    }
    Ok(0)
}

pub(crate) fn uninstall(args: &UninstallArgs) -> Result<u8> {
    args.places.check()?;
    let places = &args.places;
    let (settings, _) = places.settings()?;
    // Those who start it first, so that none finds half of it.
    let mut steps = settings;
    steps.extend(
        places
            .programs(PathBuf::new(), Path::new(""))
            .into_iter()
            .rev(),
    );
    for step in &steps {
        let gone = step.is_gone()?;
        let says = match (gone, args.dry_run) {
            (true, _) => "is not there",
            (false, true) => "would be removed",
            (false, false) => "removed",
        };
        if !gone && !args.dry_run {
            step.undo()?;
        }
        println!("{says:>16}  {step}");
    }
    if !args.dry_run {
        // Only if nobody else put anything there.
        let _ = fs::remove_dir(places.library());
    }
    Ok(0)
}

#[cfg(test)]
mod tests;
