//! What a pull or a push tells its caller while it works.

use crate::Digest;

/// One step of a pull, or of a push, for which to fetch is to send. Sizes are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// The manifest is known; layers follow. `layers` and `bytes` count what
    /// has to be fetched, not what the store already holds.
    Resolved {
        /// Digest of the manifest the name stands for.
        digest: &'a Digest,
        /// Layers to fetch.
        layers: usize,
        /// Their compressed bytes.
        bytes: u64,
    },
    /// A layer that the store already holds.
    LayerExists {
        /// The layer's blob.
        digest: &'a Digest,
        /// Its compressed size.
        total: u64,
    },
    /// Bytes of a layer have arrived. `done` falls back to 0 when a transfer
    /// is tried again.
    LayerBytes {
        /// The layer's blob.
        digest: &'a Digest,
        /// Bytes so far.
        done: u64,
        /// Its compressed size.
        total: u64,
    },
    /// A layer is complete and verified.
    LayerDone {
        /// The layer's blob.
        digest: &'a Digest,
        /// Its compressed size.
        total: u64,
    },
    /// A transfer failed and is tried again.
    Retry {
        /// What was being fetched.
        digest: &'a Digest,
        /// 1 for the first retry.
        attempt: u32,
        /// Why the last try failed.
        reason: &'a str,
    },
    /// Layers are being converted; compressed bytes read of all layers' bytes.
    Converting {
        /// Compressed bytes read so far.
        done: u64,
        /// Compressed bytes of all layers.
        total: u64,
    },
    /// The root file system is in place.
    Converted {
        /// Bytes of the EROFS file.
        size: u64,
    },
}

/// Receives [`Event`]s, from several threads. Must not block for long.
pub trait Progress: Send + Sync {
    /// Called for each step.
    fn event(&self, event: Event<'_>);
}

/// Ignores every event.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn event(&self, _: Event<'_>) {}
}
