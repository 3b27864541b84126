//! The devices that other processes serve (vhost-user). These have guest memory mapped as
//! it was when they were told of it, and are told again when it comes or goes.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use walnut_devices::virtio::Port;

/// How long one of them is waited for: somewhat longer than a back end, whose device is
/// broken after that.
const PATIENCE: Duration = Duration::from_secs(12);

/// All of them.
#[derive(Debug, Clone, Default)]
pub(crate) struct BackEnds(Arc<Mutex<Vec<Port>>>);

impl BackEnds {
    /// Adds a device, if it is one of them: before it can be active, and when its thread is
    /// about to serve it.
    pub(crate) fn add(&self, port: &Port) {
        if port.maps_memory() {
            self.ports().push(port.clone());
        }
    }

    /// Forgets a device. By a thread that may close descriptors, for it drops what it can.
    pub(crate) fn remove(&self, port: &Port) {
        self.ports().retain(|other| !other.same(port));
    }

    fn ports(&self) -> MutexGuard<'_, Vec<Port>> {
        // A list is whole whoever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows them what guest memory is now. True if none of them uses what it was before
    /// any more. One thread at a time may call it.
    pub(crate) fn show(&self) -> bool {
        // Held meanwhile: this thread must not be the last that has one of them.
        let ports = self.ports();
        // Each of them, whatever the others say.
        let told = ports.iter().map(|port| port.remap(PATIENCE));
        told.fold(true, |all, this| all & this)
    }
}
