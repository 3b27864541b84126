//! Network interfaces that go while a guest runs.
//!
//! None can come. A microvm has no hot-plug, and what does for disks ([`super::plug`]) does
//! not for these: of a network device that is taken out and put back QEMU (7.2) counts the
//! queues twice, and dies of it.

use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;

use super::machine::QemuMachine;
use crate::{Error, Nic, PlugNics};

/// The network of a machine's `n`th interface.
pub(super) fn network(n: usize) -> String {
    format!("net{n}")
}

/// An address as QEMU has it.
pub(super) fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[async_trait]
impl PlugNics for QemuMachine {
    fn takes_more(&self) -> bool {
        false
    }

    async fn attach_nic(&self, _: &Nic) -> Result<(), Error> {
        Err(Error::Other(
            "attach a network interface: QEMU's machines take none while they run; restart the \
             machine, or use the driver vmm"
                .into(),
        ))
    }

    /// Its network goes, and the tap with it. The device stays, without a link.
    async fn detach_nic(&self, mac: [u8; 6], _: Duration) -> Result<(), Error> {
        const WHAT: &str = "detach a network interface";
        let shared = &self.shared;
        // Nobody else changes the machine meanwhile.
        let _whole = shared.registers.lock().await;
        let Some(n) = shared.spec.nics.iter().position(|nic| nic.mac == mac) else {
            let mac = text(mac);
            return Err(Error::Other(format!(
                "{WHAT}: the machine began with none that has the address {mac}"
            )));
        };
        let qmp = shared.monitor("netdev_del")?;
        let close = async {
            let close = json!({ "id": network(n) });
            qmp.execute_with("netdev_del", close).await.map(drop)
        };
        shared.or_end(WHAT, close).await
    }
}
