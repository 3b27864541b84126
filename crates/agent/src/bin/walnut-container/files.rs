//! Small files the host gives a container: its hosts, its hostname.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use walnut_agent::names::{ContainerPaths, below_guest_root};
use walnut_protocol::{GUEST_ROOT, agent::GuestFile};

use crate::failure::Failure;

/// Most files of one container.
const COUNT_MAX: usize = 64;
/// Largest file, in bytes.
const SIZE_MAX: usize = 1 << 20;

/// Writes `files`; the spec binds them where they belong.
pub(crate) fn write_all(files: &[GuestFile], paths: &ContainerPaths) -> Result<(), Failure> {
    if files.len() > COUNT_MAX {
        return Err(Failure::invalid(format!(
            "{} files for {}: at most {COUNT_MAX} are taken",
            files.len(),
            paths.id()
        )));
    }
    files.iter().try_for_each(|file| write(file, paths))
}

fn write(file: &GuestFile, paths: &ContainerPaths) -> Result<(), Failure> {
    let refused = |why: &str| Failure::invalid(format!("file {:?}: {why}", file.path));
    below_guest_root(&file.path).map_err(|e| refused(&e.to_string()))?;
    let path = Path::new(&file.path);
    if !path.starts_with(Path::new(GUEST_ROOT).join(paths.id())) {
        return Err(refused("not in the container's own folder"));
    }
    if file.data.len() > SIZE_MAX {
        return Err(refused("larger than 1 MiB"));
    }
    let fail = |e| Failure::internal(format!("write {}", file.path), e);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(fail)?;
    }
    let mut out = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(fail)?;
    out.write_all(&file.data).map_err(fail)?;
    out.set_permissions(Permissions::from_mode(file.mode & 0o7777))
        .map_err(fail)
}
