//! The PCI Express bus of a microVM and virtio's transport on it (virtio 1.3
//! §4.1), modern only.
//!
//! One bus, no firmware: functions sit in slots, their BARs are placed before the
//! guest runs, and stay where the guest leaves them. A hypervisor hands over
//! accesses to the configuration space and to BARs ([`Root::read`],
//! [`Root::write`]), raises messages ([`Messages`]) and may turn doorbells into
//! eventfds ([`Doorbells`]). Nothing here waits, and every access of every width
//! at every address is answered.

mod config;
mod msix;
mod root;
mod state;
mod transport;

pub use msix::{Message, Messages};
pub use root::{Root, RootError};
pub use state::{FunctionState, StateError};
pub use transport::{Doorbells, VirtioPci};
