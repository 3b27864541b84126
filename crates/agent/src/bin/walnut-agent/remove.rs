//! Takes a container away: processes, mounts, cgroup, folders.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::container::{Container, Mount};
use crate::disk::Disk;

/// How long killed processes may take to go.
const DEATH_WITHIN: Duration = Duration::from_secs(10);

/// Removes everything of the container. What is already gone is no error, so
/// it also cleans up after a create that failed half-way; `unmount` says
/// whether the storages are mounted.
pub(crate) async fn remove(container: &Container, unmount: bool) -> Result<(), String> {
    let id = container.paths.id();
    let fail = |what: &str, e: io::Error| format!("remove container {id}: {what}: {e}");
    container
        .cgroup
        .kill()
        .map_err(|e| fail("kill its processes", e))?;
    container
        .cgroup
        .empty(DEATH_WITHIN)
        .await
        .map_err(|e| fail("wait for its processes to end", e))?;
    if let Some(first) = container.process("") {
        // The cgroup is empty a moment before the status is collected.
        let _ = tokio::time::timeout(DEATH_WITHIN, first.wait()).await;
    }
    let mounts = container.mounts.iter().rev();
    for Mount { point, disk } in mounts.filter(|_| unmount) {
        let disk = Some(Path::new(point)).filter(|_| *disk).and_then(Disk::at);
        match umount2(
            Path::new(point),
            MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
        ) {
            // Not a mount point, or not there: it was never mounted.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(e) => return Err(fail(&format!("unmount {point}"), e.into())),
        }
        if let Some(disk) = disk {
            disk.until_free().await;
        }
    }
    container
        .cgroup
        .remove()
        .map_err(|e| fail("remove its cgroup", e))?;
    for folder in [container.paths.state(), container.paths.bundle()] {
        remove_tree(&folder).map_err(|e| fail(&folder.display().to_string(), e))?;
    }
    Ok(())
}

/// Removes a folder, but nothing that is mounted in it. Depth is bounded by
/// the length of a path.
fn remove_tree(folder: &Path) -> io::Result<()> {
    match fs::symlink_metadata(folder) {
        Ok(meta) if meta.is_dir() => remove_folder(folder, meta.dev()),
        Ok(_) => fs::remove_file(folder),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

fn remove_folder(folder: &Path, device: u64) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        if !meta.is_dir() {
            fs::remove_file(entry.path())?;
        } else if meta.dev() == device {
            remove_folder(&entry.path(), device)?;
        } else {
            return Err(io::Error::other(format!(
                "{} is still mounted",
                entry.path().display()
            )));
        }
    }
    fs::remove_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_go_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "").unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(tree.join("a/file"), "").unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("a/link")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists() && outside.join("kept").exists());
        remove_tree(&tree).unwrap();
    }
}
