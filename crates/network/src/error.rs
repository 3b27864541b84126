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

    pub(crate) fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let what = what.into();
        move |source| Self::Netlink { what, source }
    }
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
