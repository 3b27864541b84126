//! What the guest uses its memory for, and asking it to do with less.

use walnut_protocol::agent::{Empty, GuestMemoryResponse, ReclaimMemoryRequest};

use crate::{Result, Sandbox, agent::soon};

impl Sandbox {
    /// What the guest says of its memory.
    pub async fn guest_memory(&self) -> Result<GuestMemoryResponse> {
        let nothing = Empty::default();
        self.call(
            "read the guest's memory",
            self.agent.guest_memory(soon(), &nothing).await,
        )
        .await
    }

    /// Asks the guest to let go of `bytes` (0: all) of memory that it can do without;
    /// how much of it came free. It goes back to the host some seconds later.
    pub async fn reclaim(&self, bytes: u64) -> Result<u64> {
        let request = ReclaimMemoryRequest {
            bytes,
            ..Default::default()
        };
        let reply = self
            .call(
                "reclaim memory",
                self.agent.reclaim_memory(soon(), &request).await,
            )
            .await?;
        Ok(reply.freed)
    }
}
