//! What a container's bundle asks of its machine.

use std::path::PathBuf;

use oci_spec::runtime::Spec;
use walnut_storage::{Rootfs, Volume};

use crate::{
    ContainerRequest, Error, Result,
    guest_spec::{self, HostBind},
    host_kernel,
    pod::{self, Role},
};

/// The disk of the container that a machine is for.
pub(crate) const FIRST_DISK: u32 = 0;

/// What Linux's ext4 driver mounts.
const EXT: [&str; 3] = ["ext2", "ext3", "ext4"];

/// Where a root file system comes from.
pub(crate) enum Root {
    /// A disk of the machine's, with a writable layer of the guest's if it is read-only.
    Image(Rootfs),
    /// A directory of the host, which the container writes to.
    Directory(PathBuf),
}

/// What a container brings into its machine.
pub(crate) struct Plan {
    pub(crate) spec: Spec,
    pub(crate) root: Root,
    pub(crate) binds: Vec<HostBind>,
    /// The pod's shared memory, which is a bind of the host's.
    pub(crate) shm: Option<HostBind>,
    pub(crate) role: Role,
}

impl Plan {
    /// `disk` tells its disk from the machine's others.
    pub(crate) fn new(request: &ContainerRequest, disk: u32) -> Result<Self> {
        let mut spec = guest_spec::load(&request.bundle)?;
        let refuse =
            |why: String| Error::Invalid(format!("create container {}: {why}", request.id));
        let root = match request.rootfs.as_slice() {
            [] => {
                let path = spec.root().as_ref().map(|root| root.path().clone());
                // An absolute path stays what it is.
                Root::Directory(request.bundle.join(path.unwrap_or_default()))
            }
            [mount] if mount.kind == "erofs" => {
                Root::Image(Rootfs::erofs(&mount.source, &request.id, disk)?)
            }
            [mount] if EXT.contains(&mount.kind.as_str()) => Root::Image(Rootfs::ext4(
                &mount.source,
                mount.read_only,
                &request.id,
                disk,
            )?),
            [mount] if mount.kind == "bind" => Root::Directory(mount.source.clone()),
            [mount] => {
                return Err(refuse(format!(
                    "a root file system of type {:?} is not supported; give a directory (\"bind\"), an ext4 file system or an EROFS image",
                    mount.kind
                )));
            }
            several => {
                return Err(refuse(format!(
                    "its root file system must be one mount, {} were given",
                    several.len()
                )));
            }
        };
        guest_spec::check_hostname(&spec)?;
        host_kernel::leave(&mut spec).map_err(|e| refuse(e.to_string()))?;
        let role = Role::of(&spec);
        let mut binds = guest_spec::host_binds(&spec)?;
        let shm = pod::shm(&binds, &spec).filter(|_| role.in_pod());
        if let Some(shm) = &shm {
            binds.retain(|bind| bind != shm);
        }
        Ok(Self {
            root,
            binds,
            shm,
            role,
            spec,
        })
    }

    /// What of the host the guest must see: the root, if it is a directory, then the binds.
    pub(crate) fn volumes(&self) -> Vec<Volume> {
        let root = match &self.root {
            Root::Image(_) => None,
            Root::Directory(path) => Some(Volume {
                source: path.clone(),
                // Mount points are made in it before a read-only one is closed.
                read_only: false,
                follows_host: false,
            }),
        };
        let binds = self.binds.iter().map(|bind| Volume {
            source: bind.source.clone(),
            read_only: bind.read_only,
            follows_host: bind.follows_host,
        });
        root.into_iter().chain(binds).collect()
    }

    /// Its disk, if its root is one.
    pub(crate) fn image(&self) -> Option<&Rootfs> {
        match &self.root {
            Root::Image(rootfs) => Some(rootfs),
            Root::Directory(_) => None,
        }
    }

    /// Whether its machine must be able to show it directories of the host, or those of
    /// containers that come later.
    pub(crate) fn needs_sharing(&self) -> bool {
        self.role == Role::First || !self.volumes().is_empty()
    }
}
