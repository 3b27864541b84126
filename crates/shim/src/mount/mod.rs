//! Root file systems as containerd hands them over: mounts, which are made on the
//! bundle's `rootfs` and unmade when the container goes.

mod disk;
mod loopdev;
mod options;
mod overlay;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use tokio::sync::oneshot;
use tracing::debug;
use walnut_sandbox::{Error, Result, RootfsMount};

use self::{disk::Disk, loopdev::Loop, options::Options, overlay::fit};

/// An image: read-only, and mounted by every guest itself.
const IMAGE: &str = "erofs";
/// File systems on a disk or in a file which the guest can mount itself.
const DISKS: [&str; 3] = ["ext2", "ext3", "ext4"];

/// A mount as containerd describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) kind: String,
    pub(crate) source: PathBuf,
    pub(crate) options: Vec<String>,
}

impl Mount {
    /// Whether a guest can mount it itself, and write to it.
    pub(crate) fn is_disk(&self) -> bool {
        DISKS.contains(&self.kind.as_str())
    }
}

/// How a root file system gets into the sandbox.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// As it is; none is the directory that the bundle names.
    Direct(Option<RootfsMount>),
    /// Mounted here, and shared from there.
    Mounted(PathBuf),
}

impl Way {
    /// For these mounts in this bundle. A disk goes into a machine that takes disks; what
    /// is mounted here is never one that a guest could write to block by block.
    pub(crate) fn of(mounts: &[Mount], bundle: &Path, takes_disks: bool) -> Self {
        match mounts {
            [] => Self::Direct(None),
            [only] if only.kind == IMAGE || (takes_disks && only.is_disk()) => {
                let options = Options::parse(only.options.iter().map(String::as_str));
                Self::Direct(Some(RootfsMount {
                    kind: only.kind.clone(),
                    source: only.source.clone(),
                    read_only: only.kind == IMAGE || options.flags.contains(MsFlags::MS_RDONLY),
                }))
            }
            _ => Self::Mounted(bundle.join("rootfs")),
        }
    }
}

/// Mounts one above the other on `target`; all or none.
pub(crate) async fn mount_all(mounts: Vec<Mount>, target: PathBuf) -> Result<()> {
    let (done, result) = oneshot::channel();
    // A thread of its own: it may have to change its directory, and disks are slow.
    thread::Builder::new()
        .name("mount".into())
        .spawn(move || {
            let _ = done.send(all(&mounts, &target));
        })
        .map_err(|e| Error::Invalid(format!("start a thread to mount: {e}")))?;
    match result.await {
        Ok(result) => result,
        Err(_) => Err(Error::Invalid("mount: the thread ended early".into())),
    }
}

fn all(mounts: &[Mount], target: &Path) -> Result<()> {
    fs::create_dir_all(target)
        .map_err(|e| Error::Invalid(format!("create directory {}: {e}", target.display())))?;
    for each in mounts {
        if let Err(e) = one(each, target) {
            unmount(target);
            return Err(e);
        }
    }
    Ok(())
}

fn one(what: &Mount, target: &Path) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| {
        let (kind, source) = (&what.kind, what.source.display());
        Error::Invalid(format!(
            "mount {kind} {source} on {}: {e}",
            target.display()
        ))
    };
    let options = Options::parse(what.options.iter().map(String::as_str));
    if let Some(name) = ["uidmap", "gidmap"]
        .iter()
        .find(|n| options.value(n).is_some())
    {
        return Err(failed(&format!(
            "the option {name} (user namespaces on the host) is not supported"
        )));
    }
    let fitting =
        fit(&options.data).ok_or_else(|| failed(&"its options are longer than a page"))?;
    if let Some(directory) = &fitting.directory {
        // Other threads stay where they are.
        unshare(CloneFlags::CLONE_FS).map_err(|e| failed(&e))?;
        std::env::set_current_dir(directory).map_err(|e| failed(&e))?;
    }
    let read_only = options.flags.contains(MsFlags::MS_RDONLY);
    let device = match options.is_loop {
        true => Some(Loop::attach(&what.source, read_only).map_err(|e| failed(&e))?),
        false => None,
    };
    let source = device.as_ref().map_or(&what.source, |d| &d.path);
    // Snapshotters call a bind mount by its type or by its option.
    let flags = match what.kind.as_str() {
        "bind" => options.flags | MsFlags::MS_BIND,
        _ => options.flags,
    };
    let data = (!fitting.data.is_empty()).then_some(fitting.data.as_str());
    mount(Some(source), target, Some(what.kind.as_str()), flags, data).map_err(|e| failed(&e))?;
    let again = |flags| mount(None::<&str>, target, None::<&str>, flags, None::<&str>);
    // A bind mount takes its other flags only once it is there.
    if flags.contains(MsFlags::MS_BIND | MsFlags::MS_RDONLY) {
        again(flags | MsFlags::MS_REMOUNT).map_err(|e| failed(&e))?;
    }
    if let Some(how) = options.propagation {
        again(how).map_err(|e| failed(&e))?;
    }
    Ok(())
}

/// Unmounts everything that is mounted on `target`; what somebody still uses goes when
/// they are done.
pub(crate) fn unmount(target: &Path) {
    loop {
        let flags = MntFlags::UMOUNT_NOFOLLOW;
        let gone = match umount2(target, flags) {
            Err(Errno::EBUSY) => umount2(target, flags | MntFlags::MNT_DETACH),
            other => other,
        };
        match gone {
            Ok(()) => {}
            // Nothing is mounted there any more.
            Err(Errno::EINVAL | Errno::ENOENT) => return,
            Err(e) => return debug!("unmount {}: {e}", target.display()),
        }
    }
}

/// A mounted root file system; unmounted when this is dropped.
#[derive(Debug)]
pub(crate) struct Mounted(pub(crate) Arc<Path>);

impl Mounted {
    /// Unmounts it. Of a file system on a disk, returns when everything is on the disk and
    /// nobody has it mounted any more: its server has it open for as long as the guest
    /// remembers its root, so `forget` has the guest do without what it need not remember.
    pub(crate) async fn end(self, forget: impl Future<Output = ()>) {
        let Some(disk) = Disk::at(&self.0) else {
            return;
        };
        forget.await;
        let _ = tokio::task::spawn_blocking(move || {
            disk.sync(&self.0);
            drop(self);
            disk.until_free();
        })
        .await;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount_of(kind: &str, source: &Path, options: &[&str]) -> Mount {
        Mount {
            kind: kind.into(),
            source: source.into(),
            options: options.iter().map(|&o| o.into()).collect(),
        }
    }

    #[test]
    fn disks_go_into_the_guest_and_the_rest_is_mounted() {
        let bundle = Path::new("/b");
        assert_eq!(Way::of(&[], bundle, true), Way::Direct(None));
        let mounted = Way::Mounted("/b/rootfs".into());
        for (kind, options, takes_disks, read_only) in [
            ("erofs", "loop", false, true),
            ("erofs", "ro", true, true),
            ("ext4", "ro", true, true),
            ("ext4", "loop", true, false),
        ] {
            let mounts = [mount_of(kind, "/disk".as_ref(), &[options])];
            let direct = RootfsMount {
                kind: kind.into(),
                source: "/disk".into(),
                read_only,
            };
            let way = Way::of(&mounts, bundle, takes_disks);
            assert_eq!(way, Way::Direct(Some(direct)));
        }
        for kind in ["bind", "overlay", "btrfs", "xfs", "squashfs"] {
            let mounts = [mount_of(kind, "/x".as_ref(), &[])];
            assert_eq!(Way::of(&mounts, bundle, true), mounted);
        }
        let mounts = [mount_of("ext4", "/x".as_ref(), &["loop"])];
        assert_eq!(Way::of(&mounts, bundle, false), mounted);
    }

    /// Mounting takes root.
    fn may_mount() -> bool {
        nix::unistd::geteuid().is_root()
    }

    #[tokio::test]
    async fn a_read_only_bind_mount_is_read_only() {
        if !may_mount() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("source"), dir.path().join("rootfs"));
        fs::create_dir(&source).unwrap();
        fs::write(source.join("file"), "text").unwrap();
        let bind = mount_of("bind", &source, &["rbind", "ro", "rprivate"]);
        mount_all(vec![bind], target.clone()).await.unwrap();
        let mounted = Mounted(target.as_path().into());
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "text");
        let error = fs::write(target.join("new"), "").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        drop(mounted);
        assert!(!target.join("file").exists());
    }

    #[tokio::test]
    async fn a_failure_leaves_nothing_mounted() {
        if !may_mount() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("rootfs");
        let good = mount_of("bind", dir.path(), &["rbind"]);
        let bad = mount_of("bind", "/nowhere/at/all".as_ref(), &["rbind"]);
        let error = mount_all(vec![good, bad], target.clone())
            .await
            .unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
        assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
        let mapped = mount_of("overlay", "overlay".as_ref(), &["uidmap=0:1:2"]);
        let error = mount_all(vec![mapped], target).await.unwrap_err();
        assert!(error.to_string().contains("not supported"), "{error}");
    }

    #[tokio::test]
    async fn an_overlay_of_many_layers_is_mounted() {
        if !may_mount() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(100));
        let layers: Vec<_> = (0..60)
            .map(|n| {
                let layer = long.join(n.to_string()).join("fs");
                fs::create_dir_all(&layer).unwrap();
                fs::write(layer.join(format!("file-{n}")), "").unwrap();
                layer.display().to_string()
            })
            .collect();
        let option = format!("lowerdir={}", layers.join(":"));
        assert!(option.len() > 4096);
        let target = dir.path().join("rootfs");
        let here = std::env::current_dir().unwrap();
        let overlay = mount_of("overlay", "overlay".as_ref(), &[&option]);
        match mount_all(vec![overlay], target.clone()).await {
            // On an overlay itself, as in containers.
            Err(e) if e.to_string().contains("EINVAL") => return,
            other => other.unwrap(),
        }
        let mounted = Mounted(target.as_path().into());
        assert_eq!(fs::read_dir(&target).unwrap().count(), 60);
        assert_eq!(std::env::current_dir().unwrap(), here);
        drop(mounted);
    }
}
