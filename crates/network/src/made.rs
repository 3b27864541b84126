//! Network namespaces of our own making. One is held by its descriptor and by nothing
//! else: it has no name and no mount, and goes when its last holder does, with all of its
//! links, whoever is killed.

use std::{
    fs::File,
    io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use nix::sched::{CloneFlags, unshare};
use rtnetlink::{LinkBridge, LinkUnspec};

use crate::{Error, Result, links};

/// A network namespace.
#[derive(Debug)]
pub struct OwnNamespace(File);

impl OwnNamespace {
    /// A new one, with nothing but loopback.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new() -> Result<Self> {
        Self::make(|| async { Ok(()) })
    }

    /// A new one in which a link has the name and the addresses of one that was in a
    /// namespace which is no more. Plugins look at a link that they take away for what
    /// else they made, such as rules of a firewall for its addresses.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn stand_in(interface: &str, addresses: &[(IpAddr, u8)]) -> Result<Self> {
        let (interface, addresses) = (interface.to_owned(), addresses.to_vec());
        Self::make(move || async move {
            let what = || format!("make a stand-in for the link {interface}");
            let handle = links::open()?;
            // Of any kind: who uses networks has bridges.
            let link = LinkBridge::new(&interface).build();
            let made = handle.link().add(link).execute().await;
            made.map_err(Error::netlink(what()))?;
            let index = links::index(&handle, &interface).await?;
            for (ip, prefix) in addresses {
                let added = handle.address().add(index, ip, prefix).execute().await;
                added.map_err(Error::netlink(what()))?;
            }
            Ok(())
        })
    }

    fn make<W, F>(furnish: W) -> Result<Self>
    where
        W: FnOnce() -> F + Send + 'static,
        F: Future<Output = Result<()>>,
    {
        links::on_a_thread(move || async move {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|e| Error::system("make a network namespace")(e.into()))?;
            let handle = links::open()?;
            let up = LinkUnspec::new_with_index(LOOPBACK).up().build();
            let set = handle.link().set(up).execute().await;
            set.map_err(Error::netlink("bring up loopback"))?;
            furnish().await?;
            File::open("/proc/thread-self/ns/net")
                .map(Self)
                .map_err(Error::system("hold the network namespace"))
        })
    }

    /// A file that stands for it, for as long as this is held.
    pub fn path(&self) -> PathBuf {
        let (process, fd) = (std::process::id(), self.0.as_raw_fd());
        format!("/proc/{process}/fd/{fd}").into()
    }

    /// The calling thread's, which is the host's for most.
    ///
    /// # Errors
    /// If `/proc` is not there.
    pub fn current() -> io::Result<Self> {
        File::open("/proc/thread-self/ns/net").map(Self)
    }
}

impl From<OwnedFd> for OwnNamespace {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl AsFd for OwnNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The first link of every namespace.
const LOOPBACK: u32 = 1;
