//! What can go wrong on the way to a network.

use std::{io, path::PathBuf};

/// Result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a network could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The namespace could not be entered.
    #[error("enter the network namespace {}: {source}", path.display())]
    Enter {
        /// The file that stands for it.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The namespace is the host's.
    #[error(
        "connect a machine to the network namespace {}: it is the host's own, whose links no guest takes over; ask for no network namespace to have none",
        .0.display()
    )]
    Host(PathBuf),
    /// A link is of a kind that cannot be passed on.
    #[error("connect the link {name} to a machine: it is not an Ethernet link but {kind}")]
    Kind {
        /// The link.
        name: String,
        /// What it is.
        kind: String,
    },
    /// Frames of such a link cannot be had.
    #[error(
        "connect the link {0} to a machine: it is an ipvlan in mode l3s, whose packets the host's own stack takes before anybody else sees them; use mode l3 or l2"
    )]
    L3s(String),
    /// A guest knows its links by their addresses.
    #[error(
        "connect the links {0} and {1} to a machine: they have one Ethernet address, as ipvlans of one parent do; give the pod one of them, or use macvlan"
    )]
    SameMac(String, String),
    /// A plugin of CNI's is not there.
    #[error(
        "look for the network plugin {name}: it is not in {}; install the package containernetworking-plugins, or say in the settings where it is ([network] plugins), or use --network none",
        shown(places)
    )]
    Plugin {
        /// Its program.
        name: String,
        /// Where it was looked for.
        places: Vec<PathBuf>,
    },
    /// A program that plugins execute is not there.
    #[error(
        "look for {0}, which the network's plugins execute: it is nowhere in PATH; install the package {0}, or use --network none"
    )]
    Program(&'static str),
    /// A plugin of CNI's failed.
    #[error(
        "{attempt} the network {network}: the plugin {plugin}: {why}{}",
        what_to_do(why)
    )]
    Refused {
        /// The network.
        network: String,
        /// The plugin.
        plugin: String,
        /// "add to", "take from" or "check on".
        attempt: &'static str,
        /// What it said.
        why: String,
    },
    /// A description of a network, or what is asked of one, is not what it must be.
    #[error("{0}")]
    Config(String),
    /// There is a network of this name.
    #[error("{0}")]
    Taken(String),
    /// There is no such network.
    #[error("{0}")]
    Unknown(String),
    /// A file could not be handled.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// The attempt.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A request of the kernel's failed.
    #[error("{what}: {source}")]
    System {
        /// The attempt, with its object.
        what: String,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The kernel refused, over netlink.
    #[error("{what}: {source}{}", hint(source))]
    Netlink {
        /// The attempt, with its object.
        what: String,
        /// The kernel's reason.
        source: rtnetlink::Error,
    },
}

impl Error {
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }

    pub(crate) fn file(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { what, path, source }
    }

    pub(crate) fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let what = what.into();
        move |source| Self::Netlink { what, source }
    }
}

fn shown(places: &[PathBuf]) -> String {
    let places: Vec<_> = places.iter().map(|p| p.display().to_string()).collect();
    match places.as_slice() {
        [] => "any directory".into(),
        places => places.join(" or "),
    }
}

/// What to do about those of a plugin's reasons that users meet.
fn what_to_do(why: &str) -> &'static str {
    if why.contains("no IP addresses available") {
        return "; every address of the network is in use: remove containers of it, or make a network with a larger --subnet";
    }
    if why.contains("is not available in range set") {
        return "; it is in use, or not an address of the network's for containers: choose another --ip";
    }
    ""
}

/// What the kernel wants to be told to do, for those of its errors that say little.
fn hint(error: &rtnetlink::Error) -> &'static str {
    match code(error) {
        Some(libc::ENOENT | libc::EOPNOTSUPP) => {
            "; the kernel needs sch_ingress, cls_u32 and act_mirred: load these modules"
        }
        Some(libc::EPERM) => "; CAP_NET_ADMIN in the namespace is needed",
        _ => "",
    }
}

/// The errno of a refusal.
pub(crate) fn code(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            message.code.map(|code| code.get().wrapping_neg())
        }
        _ => None,
    }
}
