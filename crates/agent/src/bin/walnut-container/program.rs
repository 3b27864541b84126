//! Which file a process's first argument names, decided where it counts:
//! inside the container's own mounts and with the process's own credentials.

use std::env;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use libcontainer::container::{ContainerStatus, State};
use libcontainer::hooks::{HookError, run_hooks};
use libcontainer::oci_spec::runtime::{Hook, Spec};
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{AccessFlags, execv, faccessat};

use crate::failure::chain;

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

/// PATH in an OCI environment: the last, which is the one that the process gets.
pub(crate) fn path_of(env: Option<&Vec<String>>) -> Option<&str> {
    env.into_iter()
        .flatten()
        .filter_map(|e| e.strip_prefix("PATH="))
        .next_back()
}

/// Finds the program `name` for this process as execvp would, but says why not. Without a
/// PATH there is none to find: runc and crun have no default.
pub(crate) fn resolve(name: &str, path: Option<&str>) -> Result<PathBuf, Errno> {
    if name.is_empty() {
        return Err(Errno::ENOENT);
    }
    if name.contains('/') {
        return check(Path::new(name)).map(|()| PathBuf::from(name));
    }
    let path = path.ok_or(Errno::ENOENT)?;
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

/// Replaces this process by the program in `file`. Returns only on failure.
fn replace(file: &Path, args: &[String]) -> Errno {
    let Ok(file) = CString::new(file.as_os_str().as_bytes()) else {
        return Errno::EINVAL;
    };
    let args: Result<Vec<CString>, _> = args.iter().map(|a| CString::new(a.as_str())).collect();
    let Ok(args) = args else {
        return Errno::EINVAL;
    };
    // Rust's programs ignore it, and what is ignored is inherited: whoever writes to a pipe
    // that nobody reads would not end.
    // SAFETY: the default action runs no code of this process.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
    match execv(&file, &args) {
        Ok(never) => match never {},
        Err(e) => e,
    }
}

/// Finds the program and replaces this process by it. Returns only on failure.
pub(crate) fn run(args: &[String], path: Option<&str>) -> Errno {
    let name = args.first().map_or("", String::as_str);
    match resolve(name, path) {
        Ok(file) => replace(&file, args),
        Err(e) => e,
    }
}

/// libcontainer's hook around the program: `validate` runs before the
/// container counts as created, so a program that is not there fails the
/// create, with the text above.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    /// `startContainer` hooks. Here and not in libcontainer, where one that fails is silent.
    hooks: Vec<Hook>,
    /// What they are told.
    state: State,
}

impl Program {
    pub(crate) fn new(id: &str, bundle: &Path, hooks: Vec<Hook>) -> Self {
        let state = State::new(id, ContainerStatus::Created, None, bundle.to_owned());
        Self { hooks, state }
    }

    /// In the container, before the program and with its environment.
    fn run_hooks(&self) -> Result<(), String> {
        let env = env::vars().collect();
        let state = State {
            pid: i32::try_from(std::process::id()).ok(),
            ..self.state.clone()
        };
        for hook in &self.hooks {
            let one = vec![hook.clone()];
            run_hooks(Some(&one), Some(&state), None, None, Some(&env)).map_err(|e| {
                let path = hook.path().display();
                match e {
                    HookError::NonZeroExitCode(code) => {
                        format!("error executing hook `{path}` (exit code: {code})")
                    }
                    other => format!("error executing hook `{path}`: {}", chain(&other)),
                }
            })?;
        }
        Ok(())
    }
}

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref();
        let args = process
            .and_then(|p| p.args().as_ref())
            .ok_or(ExecutorError::InvalidArg)?;
        if let Err(text) = self.run_hooks() {
            eprintln!("{text}");
            std::process::exit(1);
        }
        let path = path_of(process.and_then(|p| p.env().as_ref()));
        let name = args.first().map_or("", String::as_str);
        let (file, errno) = match resolve(name, path) {
            Ok(file) => (file.clone(), replace(&file, args)),
            Err(e) => (name.into(), e),
        };
        // Nobody listens any more: what is left are the container's own standard error and
        // the exit code, both as crun has them.
        let hint = match errno {
            Errno::ENOENT => " (missing dynamic library?)",
            _ => "",
        };
        eprintln!(
            "exec container process{hint} `{}`: {}",
            file.display(),
            errno.desc()
        );
        std::process::exit(1)
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
        assert_eq!(resolve("tool", Some(&path)), Err(Errno::EACCES));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(resolve("tool", Some(&path)), Ok(file));
        assert_eq!(resolve("other", Some(&path)), Err(Errno::ENOENT));
        assert_eq!(resolve("", Some(&path)), Err(Errno::ENOENT));
        assert_eq!(resolve("/", Some(&path)), Err(Errno::EISDIR));
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
    fn the_last_path_counts_and_there_is_no_default() {
        let env = ["PATH=/x", "A=b", "PATH=/y"].map(String::from).to_vec();
        assert_eq!(path_of(Some(&env)), Some("/y"));
        assert_eq!(path_of(None), None);
        assert_eq!(resolve("sh", None), Err(Errno::ENOENT));
        assert_eq!(resolve("/bin/sh", None), Ok("/bin/sh".into()));
    }
}
