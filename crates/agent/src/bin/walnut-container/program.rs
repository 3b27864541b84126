//! Which file a process's first argument names, decided where it counts:
//! inside the container's own mounts and with the process's own credentials.

use std::env;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::unistd::{AccessFlags, execv, faccessat};

/// What a process without PATH gets, as Docker has it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Every message about a program that cannot run starts with this; the text is
/// runc's, which front ends match to tell exit codes 126 and 127 apart.
pub(crate) const MARK: &str = "exec: \"";

/// Why `name` cannot be run.
pub(crate) fn complaint(name: &str, errno: Errno) -> String {
    match errno {
        Errno::ENOENT if !name.contains('/') => {
            format!("{MARK}{name}\": executable file not found in $PATH")
        }
        Errno::ENOENT | Errno::ENOTDIR => {
            format!("{MARK}{name}\": stat {name}: no such file or directory")
        }
        Errno::EACCES | Errno::EISDIR => format!("{MARK}{name}\": permission denied"),
        Errno::ENOEXEC => format!("{MARK}{name}\": exec format error"),
        other => format!("{MARK}{name}\": {}", other.desc()),
    }
}

/// The part of a longer message that starts at [`MARK`].
pub(crate) fn marked(text: &str) -> Option<&str> {
    text.find(MARK).and_then(|at| text.get(at..))
}

/// PATH in an OCI environment.
pub(crate) fn path_of(env: Option<&Vec<String>>) -> &str {
    env.into_iter()
        .flatten()
        .find_map(|e| e.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH)
}

/// Finds the program `name` for this process as execvp would, but says why not.
pub(crate) fn resolve(name: &str, path: &str) -> Result<PathBuf, Errno> {
    if name.is_empty() {
        return Err(Errno::ENOENT);
    }
    if name.contains('/') {
        return check(Path::new(name)).map(|()| PathBuf::from(name));
    }
    let mut worst = Errno::ENOENT;
    for dir in path.split(':') {
        let candidate = Path::new(if dir.is_empty() { "." } else { dir }).join(name);
        match check(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::EACCES | Errno::EISDIR) => worst = Errno::EACCES,
            Err(_) => {}
        }
    }
    Err(worst)
}

fn check(path: &Path) -> Result<(), Errno> {
    let meta =
        fs::metadata(path).map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    if !meta.is_file() {
        return Err(Errno::EISDIR);
    }
    faccessat(
        nix::fcntl::AT_FDCWD,
        path,
        AccessFlags::X_OK,
        AtFlags::AT_EACCESS,
    )
}

/// Replaces this process. Returns only on failure.
pub(crate) fn run(args: &[String], path: &str) -> Errno {
    let Some(name) = args.first() else {
        return Errno::EINVAL;
    };
    let file = match resolve(name, path) {
        Ok(file) => file,
        Err(e) => return e,
    };
    let Ok(file) = CString::new(file.as_os_str().as_bytes()) else {
        return Errno::EINVAL;
    };
    let args: Result<Vec<CString>, _> = args.iter().map(|a| CString::new(a.as_str())).collect();
    let Ok(args) = args else {
        return Errno::EINVAL;
    };
    match execv(&file, &args) {
        Ok(never) => match never {},
        Err(e) => e,
    }
}

/// libcontainer's hook around the program: `validate` runs before the
/// container counts as created, so a program that is not there fails the
/// create, with the text above.
#[derive(Debug, Clone)]
pub(crate) struct Program;

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref();
        let args = process
            .and_then(|p| p.args().as_ref())
            .ok_or(ExecutorError::InvalidArg)?;
        let path = path_of(process.and_then(|p| p.env().as_ref())).to_owned();
        let errno = run(args, &path);
        // Nobody listens any more; the exit code is what is left to say, and
        // it is a shell's.
        std::process::exit(match errno {
            Errno::ENOENT => 127,
            _ => 126,
        })
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = spec.process().as_ref();
        let name = process
            .and_then(|p| p.args().as_ref())
            .and_then(|a| a.first())
            .ok_or_else(|| {
                ExecutorValidationError::ArgValidationError("process.args is empty".into())
            })?;
        let path = path_of(process.and_then(|p| p.env().as_ref()));
        resolve(name, path)
            .map(drop)
            .map_err(|e| ExecutorValidationError::ArgValidationError(complaint(name, e)))
    }
}

/// Makes `vars` the whole environment of this process.
pub(crate) fn set_environment(vars: &[String]) {
    let old: Vec<_> = env::vars_os().map(|(name, _)| name).collect();
    for name in old {
        // SAFETY: the helper has one thread.
        unsafe { env::remove_var(name) };
    }
    for var in vars {
        if let Some((name, value)) = var.split_once('=')
            && !name.is_empty()
            && !var.contains('\0')
        {
            // SAFETY: the helper has one thread.
            unsafe { env::set_var(name, value) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn finds_what_path_offers() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tool");
        fs::write(&file, "#!/bin/sh\n").unwrap();
        let path = format!("/nonexistent:{}", dir.path().display());
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(resolve("tool", &path), Err(Errno::EACCES));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(resolve("tool", &path), Ok(file));
        assert_eq!(resolve("other", &path), Err(Errno::ENOENT));
        assert_eq!(resolve("", &path), Err(Errno::ENOENT));
        assert_eq!(resolve("/", &path), Err(Errno::EISDIR));
    }

    #[test]
    fn complaints_are_runcs() {
        assert_eq!(
            complaint("foo", Errno::ENOENT),
            "exec: \"foo\": executable file not found in $PATH"
        );
        assert_eq!(
            complaint("/foo", Errno::ENOENT),
            "exec: \"/foo\": stat /foo: no such file or directory"
        );
        assert_eq!(
            marked("failed: error in executing process : exec: \"x\": permission denied"),
            Some("exec: \"x\": permission denied")
        );
    }

    #[test]
    fn path_has_a_default() {
        assert_eq!(path_of(None), DEFAULT_PATH);
        assert_eq!(path_of(Some(&vec!["A=b".into(), "PATH=/x".into()])), "/x");
    }
}
