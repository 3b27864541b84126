//! Work in another network namespace.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::Path,
    pin::Pin,
    sync::Arc,
};

use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;

use crate::{Error, Namespace, Result};

/// Where a thread finds its own.
const OWN: &str = "/proc/thread-self/ns/net";
/// That of the host's first process, for those who may look.
const FIRST: &str = "/proc/1/ns/net";

/// Whether both files stand for one namespace. If that cannot be told, they do not.
pub(crate) fn same(a: &Path, b: &Path) -> bool {
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// What `work` leads to on a thread of its own in `namespace`: entering it changes a
/// thread, and no other of the caller's.
pub(crate) async fn within<T, W>(namespace: Namespace, work: W) -> Result<T>
where
    T: Send + 'static,
    W: FnOnce() -> Pin<Box<dyn Future<Output = Result<T>>>> + Send + 'static,
{
    on_a_thread(move || enter(&namespace), work).await
}

/// The same in the namespace that a file stands for, whatever has become of its names.
pub(crate) async fn within_held<T, W>(namespace: Arc<File>, work: W) -> Result<T>
where
    T: Send + 'static,
    W: FnOnce() -> Pin<Box<dyn Future<Output = Result<T>>>> + Send + 'static,
{
    let enter = move || {
        let entered = setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET);
        entered.map_err(|e| Error::system("enter the pod's network namespace")(e.into()))
    };
    on_a_thread(enter, work).await
}

/// The calling thread's namespace.
pub(crate) fn hold() -> Result<File> {
    File::open(OWN).map_err(Error::system("hold the pod's network namespace"))
}

async fn on_a_thread<T, W>(
    enter: impl FnOnce() -> Result<()> + Send + 'static,
    work: W,
) -> Result<T>
where
    T: Send + 'static,
    W: FnOnce() -> Pin<Box<dyn Future<Output = Result<T>>>> + Send + 'static,
{
    let (tell, told) = oneshot::channel();
    let thread = move || {
        let result = enter().and_then(|()| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_io()
                .build()
                .map_err(Error::system("start a runtime"))?;
            runtime.block_on(work())
        });
        // Whoever asked may be gone.
        let _ = tell.send(result);
    };
    std::thread::Builder::new()
        .name("network".into())
        .spawn(thread)
        .map_err(Error::system("start a thread"))?;
    match told.await {
        Ok(result) => result,
        Err(_) => Err(Error::system("work in a network namespace")(
            io::Error::other("its thread died"),
        )),
    }
}

fn enter(namespace: &Namespace) -> Result<()> {
    let own = Path::new(OWN);
    let (path, hosts) = match namespace {
        Namespace::Own => (own, same(own, FIRST.as_ref())),
        // Who lives in the host's is given the names of others.
        Namespace::At(path) => (
            path.as_path(),
            same(path, own) || same(path, FIRST.as_ref()),
        ),
    };
    if hosts {
        return Err(Error::Host(path.to_owned()));
    }
    if *namespace == Namespace::Own {
        return Ok(());
    }
    let error = |source| Error::Enter {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(error)?;
    setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|e| error(e.into()))
}
