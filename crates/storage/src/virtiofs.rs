//! Volumes through a jailed virtiofsd.

use std::{
    fs, io,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use serde::{Deserialize, Serialize};
use walnut_machine::{
    Share,
    process::{Child, ChildState, Spawn, Status},
    takeover::{Giver, NoState, Taker},
};
use walnut_protocol::{GUEST_ROOT, agent::Storage};

use crate::{
    Error,
    flavor::{self, Flavor},
    staging::{Staging, denied},
    tree::{Tree, TreeState},
};

/// The share's tag and its directory's name in the guest.
const NAME: &str = "volumes";

/// A directory or file of the host that a guest sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Absolute path on the host. A symbolic link is followed once, at the start.
    /// What is mounted below a directory is shared with it.
    pub source: PathBuf,
    /// The host refuses writes.
    pub read_only: bool,
    /// What the host mounts below it later is shared too (mount propagation `rslave`).
    pub follows_host: bool,
}

/// A sandbox's volumes, served by one virtiofsd. More can come and some can go while it
/// serves. Dropping it kills virtiofsd.
///
/// Users and groups are the host's: what the guest's root writes, root owns.
#[derive(Debug)]
pub struct VirtioFs {
    child: Child,
    socket: PathBuf,
    mount_point: PathBuf,
    tree: Tree,
    /// It was told to go.
    dismissed: AtomicBool,
}

/// Volumes in a state ([`walnut_machine::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioFsState {
    child: ChildState,
    socket: PathBuf,
    mount_point: PathBuf,
    tree: TreeState,
}

impl VirtioFs {
    /// What the next program makes them its own from. They are served on meanwhile.
    pub fn state(&self, giver: &mut Giver) -> Result<VirtioFsState, NoState> {
        if self.dismissed.load(Ordering::Relaxed) {
            return Err(NoState::never("virtiofsd has been told to go"));
        }
        Ok(VirtioFsState {
            child: self.child.state(giver)?,
            socket: self.socket.clone(),
            mount_point: self.mount_point.clone(),
            tree: self.tree.state(giver),
        })
    }

    /// Those of the program before.
    pub fn take_over(state: VirtioFsState, taker: &mut Taker) -> Result<Self, Error> {
        let taken = |e: io::Error| Error::VirtioFs(format!("take virtiofsd over: {e}"));
        Ok(Self {
            child: Child::take_over("virtiofsd", state.child, taker).map_err(taken)?,
            socket: state.socket,
            mount_point: state.mount_point,
            tree: Tree::take_over(state.tree, taker).map_err(taken)?,
            dismissed: AtomicBool::new(false),
        })
    }

    /// Starts virtiofsd for `volumes` with its socket in `run_dir`, the
    /// sandbox's own directory (mode 0700). Spawn rules: see
    /// [`walnut_machine::process`].
    ///
    /// One machine can connect, once; virtiofsd ends when it hangs up.
    pub async fn start(volumes: &[Volume], run_dir: &Path) -> Result<Self, Error> {
        Self::start_with(&flavor::find()?, volumes, run_dir).await
    }

    /// As [`Self::start`], with a given virtiofsd.
    pub async fn start_with(
        program: &Path,
        volumes: &[Volume],
        run_dir: &Path,
    ) -> Result<Self, Error> {
        let mount_point = run_dir.join(NAME);
        let Some(root) = mount_point
            .to_str()
            .filter(|p| !p.contains([',', '\\', ':']))
        else {
            return Err(Error::VirtioFs(format!(
                "virtiofsd cannot be told of the directory {run_dir:?}: its name holds one of , \\ :"
            )));
        };
        let staging = Staging::new(volumes, &mount_point)?;
        let tree = staging
            .root()
            .and_then(|root| Tree::new(root, volumes.len()));
        let tree = tree.map_err(denied)?;
        let flavor = Flavor::of(program)?;
        let names = Names {
            socket: run_dir.join("virtiofs.sock"),
            mount_point: mount_point.clone(),
        };
        names.remove();
        fs::create_dir(&mount_point).map_err(in_run_dir("create", &mount_point))?;
        let listener =
            UnixListener::bind(&names.socket).map_err(in_run_dir("listen on", &names.socket))?;
        let mut spawn = Spawn::new("virtiofsd", program);
        let fd = spawn.inherit(listener);
        spawn.args(flavor.arguments(root, fd));
        // SAFETY: attach makes system calls on memory that it owns already.
        unsafe { spawn.before_exec(move || staging.attach()) };
        let child = spawn.spawn()?;
        let (socket, mount_point) = names.keep();
        Ok(Self {
            child,
            socket,
            mount_point,
            tree,
            dismissed: AtomicBool::new(false),
        })
    }

    /// One more volume, for a machine that runs. Returns its number.
    pub async fn add(&self, volume: &Volume) -> Result<usize, Error> {
        tokio::select! {
            added = self.tree.add(self.pid(), volume) => added,
            ended = self.ended() => Err(ended),
        }
    }

    /// Takes a volume away. What the guest still has open stays until it lets go.
    pub async fn remove(&self, n: usize) -> Result<(), Error> {
        tokio::select! {
            removed = self.tree.remove(self.pid(), n) => removed,
            ended = self.ended() => Err(ended),
        }
    }

    /// Comes when virtiofsd has ended: there is no tree to change any more, and none will
    /// come.
    async fn ended(&self) -> Error {
        let status = self.child.wait().await;
        Error::VirtioFs(format!("change what virtiofsd shares: it {status}"))
    }

    /// What the machine attaches.
    pub fn share(&self) -> Share {
        Share {
            tag: NAME.to_owned(),
            socket: self.socket.clone(),
        }
    }

    /// What the agent mounts, once per sandbox; containers name it again, and share it.
    pub fn storage(&self) -> Storage {
        Storage {
            driver: "virtio-fs".into(),
            source: NAME.into(),
            fstype: "virtiofs".into(),
            mount_point: format!("{GUEST_ROOT}/{NAME}"),
            ..Default::default()
        }
    }

    /// What takes volume number `n` from the guest's view with the container it is for.
    pub fn volume_storage(&self, n: usize) -> Storage {
        Storage {
            driver: "share".into(),
            source: NAME.into(),
            mount_point: self.guest_path(n).display().to_string(),
            ..Default::default()
        }
    }

    /// Guest path of volume number `n`, once the storage is mounted.
    pub fn guest_path(&self, n: usize) -> PathBuf {
        Path::new(GUEST_ROOT).join(NAME).join(n.to_string())
    }

    /// PID of virtiofsd. It serves from a child of its own.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Returns when virtiofsd has failed, with a sentence that says how.
    ///
    /// It does not return when virtiofsd ends in good order, which it does when
    /// the machine hangs up: then the machine's end is the one to tell.
    pub async fn wait(&self) -> String {
        match self.child.wait().await {
            Status::Exited(0) => std::future::pending().await,
            status => match self.child.stderr().await {
                Some(words) => format!("virtiofsd {status}: {words}"),
                None => format!("virtiofsd {status}"),
            },
        }
    }

    /// Returns when virtiofsd has ended, as it does when the machine hangs up: the sentence
    /// if a signal of somebody else's ended it, which then is why the machine went too.
    pub async fn killed(&self) -> Option<String> {
        let status = self.child.wait().await;
        if self.dismissed.load(Ordering::Relaxed) {
            return None;
        }
        matches!(status, Status::Signaled(_)).then(|| format!("virtiofsd {status}"))
    }

    /// Kills virtiofsd and returns when it is gone. Idempotent.
    pub async fn kill(&self) {
        self.dismissed.store(true, Ordering::Relaxed);
        self.child.kill();
        self.child.wait().await;
    }
}

impl Drop for VirtioFs {
    fn drop(&mut self) {
        self.child.kill();
        self.child.reap_blocking();
        remove(&self.socket, &self.mount_point);
    }
}

/// Names in the run directory, removed unless the start succeeds.
struct Names {
    socket: PathBuf,
    mount_point: PathBuf,
}

impl Names {
    fn remove(&self) {
        remove(&self.socket, &self.mount_point);
    }

    fn keep(mut self) -> (PathBuf, PathBuf) {
        (
            std::mem::take(&mut self.socket),
            std::mem::take(&mut self.mount_point),
        )
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Removes what may already be gone. The mount point is empty in this mount
/// namespace, so nothing of a volume is in reach.
fn remove(socket: &Path, mount_point: &Path) {
    let _ = fs::remove_file(socket);
    let _ = fs::remove_dir(mount_point);
}

fn in_run_dir(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Source { what, path, source }
}
