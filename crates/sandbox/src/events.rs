//! What the guest tells unasked.

use tracing::warn;
use walnut_protocol::agent::{Empty, event::Event};

use crate::{
    Result, Sandbox,
    agent::{fault, patient},
    sandbox::lock,
};

impl Sandbox {
    /// Returns the name of a container when the guest's kernel has killed a process of
    /// it for want of memory. One caller at a time hears of each.
    pub async fn out_of_memory(&self) -> Result<String> {
        loop {
            let reply = self.agent.next_event(patient(), &Empty::default()).await;
            let event = reply.map_err(|e| fault("wait for the guest's events", e))?;
            match event.event {
                Some(Event::Oom(oom)) => {
                    let containers = lock(&self.containers);
                    let ours = containers
                        .iter()
                        .find(|(_, container)| container.guest_id == oom.container_id);
                    if let Some((id, _)) = ours {
                        return Ok(id.clone());
                    }
                }
                Some(Event::Dropped(count)) => warn!("{count} events of the guest are lost"),
                _ => {}
            }
        }
    }
}
