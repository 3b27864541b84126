//! A guest's links follow those of its namespace while it runs: a link that comes becomes an
//! interface, one that goes takes its interface with it, and what a link's addresses, routes
//! and state become, the interface's do.

use std::{
    collections::HashSet,
    sync::{Arc, Weak},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{sync::Mutex, task::JoinHandle};
use tracing::{debug, info, warn};
use walnut_machine::takeover::{Fd, Giver, NoState, Taker};
use walnut_network::{Found, Interface, Mac, Routing, Seen, Watch};
use walnut_protocol::agent::{
    ConfigureNetworkRequest, Interface as AgentInterface, ReleaseInterfaceRequest,
};

use super::{Links, diff, nic, queues, told};
use crate::{Error, Result, Sandbox, agent::soon, sandbox::lock, takeover::taken};

/// How long a guest may take to let go of a device, whose driver has done so before.
const LET_GO: Duration = Duration::from_secs(5);
/// Links that a guest has at most, as an agent takes them.
const LINKS_MAX: usize = 64;

/// A link that the guest has.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Known {
    /// Its number in the namespace, and its tap's.
    pub(super) index: u32,
    pub(super) tap: u32,
    /// The largest MTU that its device has.
    pub(super) mtu_max: u16,
    /// What the guest was told of it.
    pub(super) interface: Interface,
}

impl Known {
    /// It as the agent is told.
    pub(super) fn told(&self) -> AgentInterface {
        let mut told = told::interface(&self.interface);
        told.mtu = told.mtu.min(self.mtu_max.into());
        told
    }

    fn is(&self, index: u32, mac: Mac) -> bool {
        (self.index, self.interface.mac) == (index, mac)
    }
}

/// Follows a namespace, until it is dropped.
#[derive(Debug)]
pub(crate) struct Watching {
    held: Arc<Held>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Held {
    watch: Watch,
    /// Held while the guest's links are being changed.
    guest: Mutex<Guest>,
}

/// What the guest has.
#[derive(Debug, Default)]
struct Guest {
    links: Vec<Known>,
    routing: Routing,
    /// Devices whose links have gone, and that it has not let go of.
    lingering: Vec<Mac>,
    /// Links that it cannot have, of which that has been said.
    refused: HashSet<u32>,
}

/// It in a state ([`walnut_machine::takeover`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WatchingState {
    namespace: Fd,
    links: Vec<Known>,
    routing: Routing,
    lingering: Vec<Mac>,
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watching {
    fn begin(sandbox: &Arc<Sandbox>, watch: Watch, guest: Guest) -> Self {
        let guest = Mutex::new(guest);
        let held = Arc::new(Held { watch, guest });
        let task = tokio::spawn(follow(Arc::downgrade(sandbox), Arc::clone(&held)));
        Self { held, task }
    }

    pub(crate) fn state(&self, giver: &mut Giver) -> std::result::Result<WatchingState, NoState> {
        let changing = |_| NoState::busy("its network is being changed");
        let guest = self.held.guest.try_lock().map_err(changing)?;
        Ok(WatchingState {
            namespace: giver.give(&self.held.watch),
            links: guest.links.clone(),
            routing: guest.routing.clone(),
            lingering: guest.lingering.clone(),
        })
    }

    pub(crate) async fn take_over(
        state: WatchingState,
        sandbox: &Arc<Sandbox>,
        taker: &mut Taker,
    ) -> Result<Self> {
        let namespace = taker.take(state.namespace).map_err(taken)?;
        let (_, vcpus) = sandbox.size();
        let egress = sandbox.settings.egress();
        let watch = Watch::resume(namespace, queues(vcpus), egress).await?;
        let guest = Guest {
            links: state.links,
            routing: state.routing,
            lingering: state.lingering,
            ..Guest::default()
        };
        Ok(Self::begin(sandbox, watch, guest))
    }
}

/// Makes the guest's links what the namespace's are, whenever those have changed. It begins
/// with what has changed before.
async fn follow(sandbox: Weak<Sandbox>, held: Arc<Held>) {
    loop {
        let Some(sandbox) = sandbox.upgrade() else {
            return;
        };
        tokio::select! {
            biased;
            _ = sandbox.ended() => return,
            () = sandbox.follow_links(&held) => {}
        }
        drop(sandbox);
        if let Err(e) = held.watch.changed().await {
            warn!(
                "listen for changes of the pod's network: {e}; its guest keeps the links that it has"
            );
            return;
        }
    }
}

impl Sandbox {
    /// Has the guest's links follow the namespace's from now on.
    pub(crate) fn watch_links(self: &Arc<Self>, links: Links) {
        let Some(watch) = links.watch else { return };
        let guest = Guest {
            links: links.known,
            routing: links.routing,
            ..Guest::default()
        };
        *lock(&self.watching) = Some(Watching::begin(self, watch, guest));
    }

    async fn follow_links(self: &Arc<Self>, held: &Held) {
        // No machine is saved while it changes.
        let _whole = self.saving.read().await;
        let mut guest = held.guest.lock().await;
        let Found {
            links: seen,
            routing,
        } = match held.watch.look().await {
            Ok(found) => found,
            Err(e) => return warn!("look at the pod's network, which has changed: {e}"),
        };
        for mac in std::mem::take(&mut guest.lingering) {
            self.detach_link(&mut guest, mac).await;
        }
        self.take_away(&mut guest, &seen).await;
        guest.refused.retain(|index| {
            let there = seen.iter().find(|it| it.index == *index);
            there.is_some_and(|it| it.interface.as_ref().map_or(true, |it| it.up))
        });
        let mut request = ConfigureNetworkRequest::default();
        for Seen { index, interface } in seen {
            let refused = guest.refused.contains(&index);
            let added = match interface {
                Ok(now) => {
                    let mut links = guest.links.iter_mut();
                    if let Some(known) = links.find(|it| it.is(index, now.mac)) {
                        change(known, now, held, &mut request).await;
                        continue;
                    }
                    if refused || !now.up {
                        continue;
                    }
                    self.add_link(&mut guest, held, index, now).await
                }
                Err(_) if refused => continue,
                Err(e) => Err(e.into()),
            };
            match added {
                Ok(told) => request.interfaces.push(told),
                Err(e) => {
                    guest.refused.insert(index);
                    warn!("a link has come to the pod, and its guest goes on without it: {e}");
                }
            }
        }
        if request.interfaces.is_empty() && routing == guest.routing {
            return;
        }
        let gone = diff::gone_routing(&guest.routing, &routing);
        request.routes_gone = gone.routes.iter().map(told::wide_route).collect();
        request.rules_gone = gone.rules.iter().map(told::rule).collect();
        // All of them: with an interface's state go routes over it.
        request.routes = routing.routes.iter().map(told::wide_route).collect();
        request.rules = routing.rules.iter().map(told::rule).collect();
        guest.routing = routing;
        if let Err(e) = self.tell_network(&request).await {
            warn!("the pod's network has changed, and its guest's not entirely: {e}");
        }
    }

    /// Takes interfaces away whose links are not there any more.
    async fn take_away(&self, guest: &mut Guest, seen: &[Seen]) {
        let there = |known: &Known| {
            seen.iter().any(|it| match &it.interface {
                Ok(now) => known.is(it.index, now.mac),
                Err(_) => false,
            })
        };
        let (stay, go): (Vec<_>, Vec<_>) = std::mem::take(&mut guest.links)
            .into_iter()
            .partition(there);
        guest.links = stay;
        for Known { interface, .. } in go {
            let request = ReleaseInterfaceRequest {
                mac: interface.mac.to_vec(),
                ..Default::default()
            };
            let reply = self.agent.release_interface(soon(), &request).await;
            match self.call("release an interface", reply).await {
                Ok(_) => info!(link = interface.name, "a link has gone from the pod"),
                // The machine is told all the same.
                Err(e) => debug!(link = interface.name, "{e}"),
            }
            self.detach_link(guest, interface.mac).await;
        }
    }

    async fn detach_link(&self, guest: &mut Guest, mac: Mac) {
        let Some(plug) = self.machine.as_plug_nics() else {
            return;
        };
        if let Err(e) = plug.detach_nic(mac, LET_GO).await {
            warn!("a link has gone from the pod, and its machine keeps a device of it: {e}");
            guest.lingering.push(mac);
        }
    }

    /// Gives the machine a link that has come. What its guest is to be told of it.
    async fn add_link(
        self: &Arc<Self>,
        guest: &mut Guest,
        held: &Held,
        index: u32,
        interface: Interface,
    ) -> Result<AgentInterface> {
        let (name, mac) = (interface.name.clone(), interface.mac);
        let refuse = |why: String| {
            Err(Error::Invalid(format!(
                "connect the link {name} to a machine: {why}"
            )))
        };
        let plug = self.machine.as_plug_nics();
        let Some(plug) = plug.filter(|plug| plug.takes_more()) else {
            let driver = self.driver();
            return refuse(format!(
                "machines of the driver {driver} take none while they run; restart the pod"
            ));
        };
        if let Some(other) = guest.links.iter().find(|it| it.interface.mac == mac) {
            let other = &other.interface.name;
            return refuse(format!("it has the same address as {other}"));
        }
        if guest.links.len() >= LINKS_MAX {
            return refuse(format!("it has {LINKS_MAX} already"));
        }
        let (nic, known) = nic(held.watch.connect(index, &interface).await?)?;
        if let Err(e) = plug.attach_nic(&nic).await {
            held.watch.disconnect(index, &name).await;
            return Err(e.into());
        }
        self.networked
            .store(true, std::sync::atomic::Ordering::Relaxed);
        if lock(&self.carrying).is_none()
            && let Some(inlet) = held.watch.inlet().await
        {
            self.carry_ports(inlet)?;
        }
        info!(link = name, "a link has come to the pod");
        let told = known.told();
        guest.links.push(known);
        Ok(told)
    }
}

/// Notes what a link is now, and what its guest is to be told.
async fn change(
    known: &mut Known,
    now: Interface,
    held: &Held,
    request: &mut ConfigureNetworkRequest,
) {
    let before = std::mem::replace(&mut known.interface, now);
    let now = &known.interface;
    if before == *now {
        return;
    }
    if before.mtu != now.mtu {
        if let Err(e) = held.watch.set_mtu(known.tap, now.mtu).await {
            warn!(link = now.name, "{e}");
        }
        if now.mtu > known.mtu_max.into() {
            warn!(
                link = now.name,
                mtu = now.mtu,
                "the guest's device has an MTU of {} at most, as the link had; restart the pod to have more",
                known.mtu_max
            );
        }
    }
    debug!(
        link = now.name,
        up = now.up,
        "a link of the pod's has changed"
    );
    request
        .gone
        .extend(diff::gone(&before, now).as_ref().map(told::interface));
    request.interfaces.push(known.told());
}
