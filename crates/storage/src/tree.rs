//! The served tree while virtiofsd serves it: volumes that come later, and those that go.
//!
//! virtiofsd has moved into a mount namespace of its own by then, with the tree as its
//! root. A thread of ours steps into that namespace for as long as one system call takes,
//! with the volume's mounts in its hand; it ends there, so that nothing else of this
//! process ever sees that root, and virtiofsd gains no way out of it.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    sync::Mutex,
    time::{Duration, Instant},
};

use rustix::{
    fs::AtFlags,
    mount::{UnmountFlags, unmount},
};
use serde::{Deserialize, Serialize};
use walnut_machine::takeover::{Fd, Giver, Taker};

use crate::{
    Error, Volume,
    staging::{Detached, VOLUMES_MAX},
};

/// Longest virtiofsd may take to have jailed itself.
const JAILED_WITHIN: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(5);
/// What a thread needs that makes three system calls.
const STACK: usize = 64 << 10;

/// The tmpfs whose entries are the volumes.
#[derive(Debug)]
pub(crate) struct Tree {
    root: OwnedFd,
    device: u64,
    numbers: Mutex<Numbers>,
}

/// The tree in a state ([`walnut_machine::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TreeState {
    root: Fd,
    next: usize,
    in_use: usize,
}

/// A number is never used again: the guest may remember for a moment what a name led to.
#[derive(Debug)]
struct Numbers {
    next: usize,
    in_use: usize,
}

impl Tree {
    /// `root` can be written; the first `volumes` numbers are taken.
    pub(crate) fn new(root: OwnedFd, volumes: usize) -> io::Result<Self> {
        Ok(Self {
            device: rustix::fs::fstat(&root)?.st_dev,
            root,
            numbers: Mutex::new(Numbers {
                next: volumes,
                in_use: volumes,
            }),
        })
    }

    /// For the next program.
    pub(crate) fn state(&self, giver: &mut Giver) -> TreeState {
        let numbers = self.numbers.lock().unwrap_or_else(|e| e.into_inner());
        TreeState {
            root: giver.give(&self.root),
            next: numbers.next,
            in_use: numbers.in_use,
        }
    }

    /// That of the program before.
    pub(crate) fn take_over(state: TreeState, taker: &mut Taker) -> io::Result<Self> {
        let tree = Self::new(taker.take(state.root)?, state.next)?;
        let mut numbers = tree.numbers.lock().unwrap_or_else(|e| e.into_inner());
        numbers.in_use = state.in_use;
        drop(numbers);
        Ok(tree)
    }

    /// Shares a volume; `virtiofsd` is the process that was started.
    pub(crate) async fn add(&self, virtiofsd: u32, volume: &Volume) -> Result<usize, Error> {
        let source = Detached::open(volume)?;
        let n = self.reserve()?;
        let place = async {
            let name = source.name(&self.root, n)?;
            let attach = |name: &CStr| source.attach(name);
            self.inside(virtiofsd, || attach(&name)).await
        };
        match place.await {
            Ok(()) => Ok(n),
            Err(e) => {
                self.forget(n);
                Err(Error::Source {
                    what: "share",
                    path: volume.source.clone(),
                    source: e,
                })
            }
        }
    }

    /// Ends the sharing of volume `n`.
    pub(crate) async fn remove(&self, virtiofsd: u32, n: usize) -> Result<(), Error> {
        let name = n.to_string();
        let gone = self
            .inside(virtiofsd, || {
                let how = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
                Ok(unmount(&name, how)?)
            })
            .await;
        if let Err(e) = gone {
            return Err(Error::VirtioFs(format!("stop sharing volume {n}: {e}")));
        }
        self.forget(n);
        Ok(())
    }

    fn reserve(&self) -> Result<usize, Error> {
        let mut numbers = self.numbers.lock().unwrap_or_else(|e| e.into_inner());
        if numbers.in_use >= VOLUMES_MAX {
            return Err(Error::VirtioFs(format!(
                "share one more directory: the sandbox has {VOLUMES_MAX} already"
            )));
        }
        numbers.in_use += 1;
        let n = numbers.next;
        numbers.next += 1;
        Ok(n)
    }

    /// Removes a name.
    fn forget(&self, n: usize) {
        let name = n.to_string();
        let _ = rustix::fs::unlinkat(&self.root, &name, AtFlags::REMOVEDIR)
            .or_else(|_| rustix::fs::unlinkat(&self.root, &name, AtFlags::empty()));
        let mut numbers = self.numbers.lock().unwrap_or_else(|e| e.into_inner());
        numbers.in_use = numbers.in_use.saturating_sub(1);
    }

    /// Runs `work` with the served tree as root and working directory.
    async fn inside(
        &self,
        virtiofsd: u32,
        work: impl Fn() -> io::Result<()> + Sync,
    ) -> io::Result<()> {
        let deadline = Instant::now() + JAILED_WITHIN;
        loop {
            // It serves from its child; there is none before a machine has connected.
            for pid in children(virtiofsd)? {
                if self.enter(pid, &work)? {
                    return Ok(());
                }
            }
            if Instant::now() > deadline {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "virtiofsd does not serve: no machine has connected to it",
                ));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// `false` if `pid` does not have the tree as its root, yet.
    fn enter(&self, pid: u32, work: &(impl Fn() -> io::Result<()> + Sync)) -> io::Result<bool> {
        let namespace = match File::open(format!("/proc/{pid}/ns/mnt")) {
            Ok(namespace) => namespace,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e),
        };
        let step_in = || {
            // SAFETY: takes a flag; a thread that shares its root with others may not
            // change namespaces.
            if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the descriptor is open.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) } < 0 {
                return Err(io::Error::last_os_error());
            }
            if rustix::fs::stat("/")?.st_dev != self.device {
                return Ok(false);
            }
            work().map(|()| true)
        };
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .stack_size(STACK)
                .spawn_scoped(scope, step_in)?
                .join()
                .map_err(|_| io::Error::other("the thread that enters its namespace failed"))?
        })
    }
}

fn children(pid: u32) -> io::Result<Vec<u32>> {
    let file = PathBuf::from(format!("/proc/{pid}/task/{pid}/children"));
    let text = std::fs::read_to_string(file)?;
    Ok(text
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect())
}
