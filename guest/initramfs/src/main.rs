//! `walnut-initramfs`: writes the sandbox's initramfs.
//!
//! ```text
//! walnut-initramfs --output out/lib/walnut/initramfs init=target/walnut-agent /etc/motd=motd:644
//! ```

use std::fs::Permissions;
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use clap::Parser;
use walnut_initramfs::Archive;

/// Write an initramfs: files, the directories above them, /dev/console, and the mount
/// points /dev, /proc, /sys, /run and /tmp. The same input gives the same bytes.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where the archive goes; it appears complete or not at all
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,

    /// A file: GUEST_PATH=HOST_FILE[:MODE]. `init=FILE` stands for /init. MODE is octal;
    /// without it, 755 if the host file is executable, else 644
    #[arg(value_name = "GUEST_PATH=HOST_FILE[:MODE]", required = true)]
    files: Vec<String>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("walnut-initramfs: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let mut archive = Archive::with_init_nodes()?;
    for argument in &arguments.files {
        let file = FileArgument::parse(argument)?;
        let mode = match file.mode {
            Some(mode) => mode,
            None => default_mode(file.host)?,
        };
        archive.file(&file.guest, file.host, mode)?;
    }
    write(archive, &arguments.output)
        .with_context(|| format!("cannot write `{}`", arguments.output.display()))
}

#[derive(Debug, PartialEq, Eq)]
struct FileArgument<'a> {
    guest: String,
    host: &'a Path,
    mode: Option<u32>,
}

impl<'a> FileArgument<'a> {
    fn parse(argument: &'a str) -> Result<Self> {
        let (guest, rest) = argument.split_once('=').ok_or_else(|| {
            anyhow!("`{argument}` is not of the form GUEST_PATH=HOST_FILE[:MODE]")
        })?;
        let (host, mode) = match rest.rsplit_once(':') {
            Some((host, digits)) => {
                let mode = u32::from_str_radix(digits, 8).map_err(|_| {
                    anyhow!("`{digits}` in `{argument}` is not an octal mode such as 755")
                })?;
                (host, Some(mode))
            }
            None => (rest, None),
        };
        if host.is_empty() {
            bail!("`{argument}` names no host file");
        }
        let guest = if guest == "init" { "/init" } else { guest }.to_owned();
        let host = Path::new(host);
        Ok(Self { guest, host, mode })
    }
}

/// 755 or 644, by whether anyone may execute the file: the host's umask must not
/// change the archive.
fn default_mode(host: &Path) -> Result<u32> {
    let metadata = host
        .metadata()
        .with_context(|| format!("cannot read `{}`", host.display()))?;
    let executable = metadata.permissions().mode() & 0o111 != 0;
    Ok(if executable { 0o755 } else { 0o644 })
}

/// Writes beside the target, then renames over it.
fn write(archive: Archive, path: &Path) -> Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(directory)?;
    let mut file = tempfile::Builder::new()
        .prefix(".initramfs-")
        .permissions(Permissions::from_mode(0o644))
        .tempfile_in(directory)?;
    let mut output = BufWriter::new(file.as_file_mut());
    archive.write_to(&mut output)?;
    output.flush()?;
    drop(output);
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_name_guest_host_and_mode() {
        let parsed = FileArgument::parse("/etc/a=dir/b:600").unwrap();
        assert_eq!(parsed.guest, "/etc/a");
        assert_eq!(parsed.host, Path::new("dir/b"));
        assert_eq!(parsed.mode, Some(0o600));
        let parsed = FileArgument::parse("init=agent").unwrap();
        assert_eq!((parsed.guest.as_str(), parsed.mode), ("/init", None));
        for bad in ["init", "/a=", "/a=:644", "/a=b:rwx", "/a=b:"] {
            assert!(FileArgument::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn output_replaces_what_was_there_and_leaves_no_other_file() {
        let directory = tempfile::tempdir().unwrap();
        let host = directory.path().join("agent");
        std::fs::write(&host, b"agent").unwrap();
        let output = directory.path().join("new/initramfs");
        let argument = |name: &str| Arguments {
            output: output.clone(),
            files: vec![format!("init={}", directory.path().join(name).display())],
        };
        run(&argument("agent")).unwrap();
        let first = std::fs::read(&output).unwrap();
        run(&argument("agent")).unwrap();
        assert_eq!(first, std::fs::read(&output).unwrap());

        // A run that fails keeps the last good archive.
        let error = run(&argument("absent")).unwrap_err();
        assert!(format!("{error:#}").contains("absent"), "{error:#}");
        assert_eq!(first, std::fs::read(&output).unwrap());
        let names = std::fs::read_dir(output.parent().unwrap()).unwrap().count();
        assert_eq!(names, 1);
    }
}
