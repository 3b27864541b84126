//! Where things lie on the host.

use std::{
    env, fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use crate::{Error, Result, attachments};

/// Longest run directory: the longest socket below it must fit into the 107
/// bytes of a Unix socket's address.
const RUN_ROOT_MAX: usize = 55;

/// The two directories Walnut keeps: what must survive a reboot, and what must
/// not.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Images and containers.
    pub state: PathBuf,
    /// Sockets and pipes of running sandboxes.
    pub run: PathBuf,
}

impl Layout {
    /// `WALNUT_ROOT` and `WALNUT_RUN` where set; else `/var/lib/walnut` and
    /// `/run/walnut` for root, the XDG directories for others.
    pub fn from_env() -> Result<Self> {
        let root = nix::unistd::geteuid().is_root();
        let dir = |name: &str| {
            env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let state = match dir("WALNUT_ROOT") {
            Some(path) => path,
            None if root => PathBuf::from("/var/lib/walnut"),
            None => dir("XDG_DATA_HOME")
                .or_else(|| dir("HOME").map(|home| home.join(".local/share")))
                .ok_or_else(|| {
                    Error::Invalid("find the data directory: neither WALNUT_ROOT, XDG_DATA_HOME nor HOME is set".into())
                })?
                .join("walnut"),
        };
        let run = match dir("WALNUT_RUN") {
            Some(path) => path,
            None if root => PathBuf::from("/run/walnut"),
            None => dir("XDG_RUNTIME_DIR")
                .ok_or_else(|| {
                    Error::Invalid(
                        "find the run directory: neither WALNUT_RUN nor XDG_RUNTIME_DIR is set"
                            .into(),
                    )
                })?
                .join("walnut"),
        };
        Self::new(state, run)
    }

    /// The given directories, made if missing, with mode 0700.
    pub fn new(state: PathBuf, run: PathBuf) -> Result<Self> {
        if run.as_os_str().len() > RUN_ROOT_MAX {
            return Err(Error::Invalid(format!(
                "use {} as run directory: longer than {RUN_ROOT_MAX} bytes, so its sockets would have no valid address; set WALNUT_RUN to a shorter path",
                run.display()
            )));
        }
        for path in [&state, &run] {
            if !path.is_absolute() {
                return Err(Error::Invalid(format!(
                    "use {} as Walnut's directory: not an absolute path",
                    path.display()
                )));
            }
        }
        let layout = Self { state, run };
        private_dir(&layout.state)?;
        private_dir(&layout.run)?;
        private_dir(&layout.containers())?;
        Ok(layout)
    }

    /// Content and root file systems of images.
    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    /// Networks of containers.
    pub fn networks(&self) -> PathBuf {
        attachments::networks_dir(&self.state)
    }

    /// One directory per container.
    pub fn containers(&self) -> PathBuf {
        self.state.join("containers")
    }

    /// A container's record, bundle and log.
    pub fn container(&self, id: &str) -> PathBuf {
        self.containers().join(id)
    }

    /// A sandbox's sockets and pipes.
    pub fn sandbox(&self, id: &str) -> PathBuf {
        self.run.join(id)
    }

    /// Socket of a sandbox's Task API.
    pub fn task_socket(&self, id: &str) -> PathBuf {
        self.sandbox(id).join("task.sock")
    }
}

/// Makes a directory (and its parents) with mode 0700, and refuses one of
/// somebody else's.
pub(crate) fn private_dir(path: &Path) -> Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    let may_be = |path| match fs::symlink_metadata(path) {
        Ok(meta) => meta.is_dir(),
        Err(e) => e.kind() == io::ErrorKind::NotFound,
    };
    while let Err(e) = builder.create(path) {
        // It was there, and by the time that its kind was asked for it was not: somebody
        // sweeps.
        let went = e.kind() == io::ErrorKind::AlreadyExists && may_be(path);
        if !went {
            return Err(Error::io("create directory", path)(e));
        }
    }
    let meta = fs::symlink_metadata(path).map_err(Error::io("examine", path))?;
    if !meta.is_dir() || meta.uid() != nix::unistd::geteuid().as_raw() {
        return Err(Error::Invalid(format!(
            "use {} as Walnut's directory: it is not a directory of this user's",
            path.display()
        )));
    }
    if meta.permissions().mode() & 0o022 != 0 {
        return Err(Error::Invalid(format!(
            "use {} as Walnut's directory: others may write to it; chmod it to 0700",
            path.display()
        )));
    }
    Ok(())
}

/// The files a sandbox is started from.
#[derive(Debug, Clone)]
pub struct Assets {
    /// Directory they were found in.
    pub dir: PathBuf,
}

impl Assets {
    /// Looks in `WALNUT_LIB`, beside the running program (`../lib/walnut`, or
    /// its own directory for the programs that live there), then in the system's
    /// places.
    pub fn find() -> Result<Self> {
        let mut places = Vec::new();
        if let Some(dir) = env::var_os("WALNUT_LIB").filter(|v| !v.is_empty()) {
            places.push(PathBuf::from(dir));
        } else {
            if let Ok(exe) = env::current_exe()
                && let Some(dir) = exe.parent()
            {
                places.push(dir.to_path_buf());
                places.push(dir.join("../lib/walnut"));
            }
            places.push("/usr/local/lib/walnut".into());
            places.push("/usr/lib/walnut".into());
        }
        for dir in &places {
            if dir.join("vmlinux").exists() && dir.join("initramfs.cpio").exists() {
                let dir = fs::canonicalize(dir).map_err(Error::io("resolve", dir))?;
                return Ok(Self { dir });
            }
        }
        let places: Vec<_> = places.iter().map(|p| p.display().to_string()).collect();
        Err(Error::NotFound(format!(
            "find the sandbox kernel (vmlinux) and initramfs.cpio: not in {}; run `make` or set WALNUT_LIB",
            places.join(", ")
        )))
    }

    /// The sandbox kernel.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The initramfs that holds the agent.
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join("initramfs.cpio")
    }

    /// The image of the container that a machine which stands by has run before.
    pub fn rehearsal(&self) -> PathBuf {
        self.dir.join("rehearsal.erofs")
    }

    /// The supervisor.
    pub fn shim(&self) -> PathBuf {
        self.dir.join("containerd-shim-walnut-v2")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_long_and_foreign_directories() {
        let dir = tempfile::tempdir().unwrap();
        let long = PathBuf::from(format!("/{}", "x".repeat(RUN_ROOT_MAX)));
        assert!(matches!(
            Layout::new(dir.path().join("s"), long),
            Err(Error::Invalid(m)) if m.contains("WALNUT_RUN")
        ));
        let open = dir.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(private_dir(&open), Err(Error::Invalid(m)) if m.contains("0700")));
    }
}
