//! What is done when all is mounted, and the root is not yet the container's: a working
//! directory that is not there is made, and a tmpfs gets what it hides if it is to begin
//! with it (`tmpcopyup`), as runc and crun have it.
//!
//! Both may concern what is mounted only when the container is built, and the container's
//! user may not be the one who can do it. libcontainer lets nothing in between but
//! programs: a `createContainer` hook, which is this program by another name, runs as root
//! and with the guest's paths. It costs a process; whoever needs neither does without.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;
use std::{ffi::CString, ffi::OsString, thread};

use libcontainer::oci_spec::runtime::{Hook, Spec};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use walnut_agent::HELPER;
use walnut_archive::{Ownership, Rules, pack, unpack};
use walnut_protocol::ANNOTATION_COPY_UP;

use crate::failure::Failure;

/// What the hook is called.
const NAME: &str = "when-mounted";

/// Gives the container the hook, if there is anything to do.
pub(crate) fn prepare(spec: &mut Spec) -> Result<(), Failure> {
    let annotation = spec.annotations().iter().flatten();
    let copied = annotation
        .filter(|(name, _)| *name == ANNOTATION_COPY_UP)
        .map(|(_, list)| serde_json::from_str::<Vec<String>>(list))
        .next()
        .unwrap_or_else(|| Ok(Vec::new()))
        .map_err(|e| Failure::invalid(format!("annotation {ANNOTATION_COPY_UP}: {e}")))?;
    let (Some(process), Some(root)) = (spec.process(), spec.root()) else {
        return Ok(());
    };
    let cwd = process.cwd();
    let made = may_be_missing(spec, root.path(), cwd);
    if !made && copied.is_empty() {
        return Ok(());
    }
    let cwd = if made { cwd } else { Path::new("/") };
    let args = [Path::new(NAME), root.path(), cwd].map(|arg| arg.display().to_string());
    let mut hook = Hook::default();
    hook.set_path(HELPER.into())
        .set_args(Some(args.into_iter().chain(copied).collect()));
    let mut hooks = spec.hooks().clone().unwrap_or_default();
    hooks.set_create_container(Some(vec![hook]));
    spec.set_hooks(Some(hooks));
    Ok(())
}

fn may_be_missing(spec: &Spec, root: &Path, cwd: &Path) -> bool {
    let mounts = spec.mounts().iter().flatten();
    let mut mounts = mounts.map(|m| m.destination().as_path());
    if mounts.clone().any(|at| at.starts_with(cwd)) {
        return false;
    }
    // What lies in the root tells nothing of what is mounted over it.
    mounts.any(|at| cwd.starts_with(at)) || !is_below(root, cwd)
}

fn is_below(root: &Path, dir: &Path) -> bool {
    File::open(root).is_ok_and(|root| open(&root, dir).is_some())
}

/// A directory below `root`, out of which no link leads.
fn open(root: &impl AsFd, dir: &Path) -> Option<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, dir, how).ok()
}

/// What the hook is asked to do.
pub(crate) struct Wanted {
    root: PathBuf,
    cwd: PathBuf,
    copied: Vec<PathBuf>,
}

/// What is wanted, if this process is the hook.
pub(crate) fn is_meant() -> Option<Wanted> {
    let mut args = std::env::args_os();
    if args.next()? != NAME {
        return None;
    }
    let (root, cwd) = (args.next()?.into(), args.next()?.into());
    let copied = args.map(PathBuf::from).collect();
    Some(Wanted { root, cwd, copied })
}

pub(crate) fn main(wanted: &Wanted) -> ExitCode {
    match act(wanted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn act(wanted: &Wanted) -> Result<(), String> {
    let root = File::open(&wanted.root).map_err(|e| format!("open the root: {e}"))?;
    if !wanted.copied.is_empty() {
        let bare = without_mounts(&wanted.root).map_err(|e| format!("look below mounts: {e}"))?;
        for path in &wanted.copied {
            copy_up(&bare, &root, path)
                .map_err(|e| format!("copy to the tmpfs on {}: {e}", path.display()))?;
        }
    }
    make(&root, &wanted.cwd);
    Ok(())
}

/// The root file system alone.
fn without_mounts(root: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(OsString::from(root).into_vec())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path ends with a zero byte and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn copy_up(bare: &OwnedFd, root: &File, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let (Some(from), Some(to)) = (open(bare, path), open(root, path)) else {
        return Ok(());
    };
    if fstatfs(&to)?.filesystem_type() != TMPFS_MAGIC {
        return Ok(());
    }
    let (mut write, read) = UnixStream::pair()?;
    let packer = thread::spawn(move || {
        let dir = format!("/proc/self/fd/{}", from.as_raw_fd());
        pack(Path::new(&dir), ".", true, Ownership::Kept, &mut write).map_err(|e| e.to_string())
    });
    let rules = Rules {
        within: None,
        ownership: Some(Ownership::Kept),
        // It comes from the container's own image.
        trusted: true,
        follow: false,
    };
    let unpacked = unpack(io::BufReader::new(read), to.as_fd(), &rules);
    packer
        .join()
        .map_err(|_| "the copy was given up".to_owned())??;
    Ok(unpacked.map(drop)?)
}

/// It never fails: that the directory is not there is said when it is entered.
fn make(root: &File, cwd: &Path) {
    let mut path = PathBuf::from("/");
    for part in cwd.components() {
        let parent = open(root, &path);
        path.push(part);
        if let (Component::Normal(name), Some(parent)) = (part, parent)
            && open(root, &path).is_none()
        {
            let _ = mkdirat(&parent, name.as_bytes(), Mode::from_bits_truncate(0o755));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn wanted(root: &Path, cwd: &str, mounts: &[&str]) -> bool {
        let mounts: Vec<_> = mounts.iter().map(|at| json!({"destination": at})).collect();
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0", "root": {"path": root}, "mounts": mounts,
            "process": {"args": ["sh"], "cwd": cwd, "user": {"uid": 0, "gid": 0}},
        }))
        .unwrap();
        prepare(&mut spec).unwrap();
        let hooks = spec.hooks().as_ref();
        assert!(hooks.is_none_or(|h| h.poststop().is_none() && h.start_container().is_none()));
        hooks.is_some_and(|h| h.create_container().is_some())
    }

    #[test]
    fn the_hook_is_there_when_the_directory_may_not_be() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir_all(root.join("data/there")).unwrap();
        assert!(!wanted(root, "/", &["/proc"]));
        assert!(!wanted(root, "/data/there", &["/proc"]));
        assert!(!wanted(root, "/new", &["/new"]));
        assert!(!wanted(root, "/new", &["/new/below"]));
        assert!(wanted(root, "/new", &["/proc"]));
        assert!(wanted(root, "/data/there", &["/data"]));
    }

    #[test]
    fn what_a_tmpfs_hides_is_copied_by_the_hook() {
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0", "root": {"path": "/nowhere"},
            "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "mounts": [{"destination": "/proc"}],
            "annotations": {ANNOTATION_COPY_UP: r#"["/run","/var/tmp"]"#},
        }))
        .unwrap();
        prepare(&mut spec).unwrap();
        let hooks = spec.hooks().clone().unwrap();
        let hook = hooks.create_container().as_ref().unwrap()[0].clone();
        let args = hook.args().clone().unwrap();
        assert_eq!(args, [NAME, "/nowhere", "/", "/run", "/var/tmp"]);
        let broken = [(ANNOTATION_COPY_UP.to_owned(), "/run".to_owned())].into();
        spec.set_annotations(Some(broken));
        assert!(prepare(&mut spec).is_err());
    }

    #[test]
    fn directories_are_made_and_links_lead_nowhere_else() {
        let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let root = root.path();
        symlink(outside.path(), root.join("out")).unwrap();
        symlink("/real", root.join("link")).unwrap();
        fs::create_dir(root.join("real")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        let opened = File::open(root).unwrap();
        for cwd in ["/a/b/c", "/link/d", "/../e/../f", "/out/g", "/file/h"] {
            make(&opened, Path::new(cwd));
        }
        for made in ["a/b/c", "real/d", "e", "f"] {
            assert!(root.join(made).is_dir(), "{made}");
        }
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        assert!(root.join("file").is_file());
    }
}
