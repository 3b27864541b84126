//! Containers that have joined another one's machine, and with that its network
//! (`walnut run --network container:NAME`).
//!
//! Each has a record, a lock and a lease of its own, and ends by itself. The machine goes on
//! for as long as one of them, or the container that it was made for, has not ended.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use anyhow::Context as _;
use containerd_shim_protos::api::DeleteRequest;
use futures::FutureExt;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::{debug, warn};
use walnut_sandbox::{
    Joining, Lock, Post, Sandbox, Visit,
    machine::takeover::{Fd, Giver, NoState, Taker},
};

use super::{
    Owner, Phase,
    container::{After, End, OwnContainer, lock, remove},
};
use crate::{lease::Lease, service::TaskService};

/// Containers that a machine takes at most.
const MEMBERS_MAX: usize = 64;

/// A container in another one's machine.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) own: OwnContainer,
    /// Keeps its image from being removed.
    image: OwnedFd,
    stage: watch::Sender<Stage>,
}

/// Where it stands.
#[derive(Debug, Clone, Default)]
enum Stage {
    /// It is to be built.
    #[default]
    Waiting,
    /// It is in the machine.
    Built,
    /// It is to be ended now, for this reason if it is not the user's.
    Ending(Option<String>),
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Members {
    /// No more are taken.
    closed: bool,
    all: BTreeMap<String, Arc<Member>>,
}

/// One in a state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MemberState {
    id: String,
    container_dir: PathBuf,
    run_dir: PathBuf,
    lock: Fd,
    lease: Option<Fd>,
    image: Fd,
}

impl Member {
    fn new(joining: Joining) -> std::io::Result<Self> {
        let Joining {
            handover,
            lock,
            lease,
            image,
        } = joining;
        Ok(Self {
            own: OwnContainer {
                id: handover.id,
                dir: handover.container_dir,
                run_dir: handover.run_dir,
                lock: Mutex::new(Some(Lock::inherited(lock))),
                lease: Lease::new(lease)?,
            },
            image,
            stage: watch::Sender::default(),
        })
    }

    /// For the next program.
    fn state(&self, giver: &mut Giver) -> Result<MemberState, NoState> {
        if !matches!(*self.stage.borrow(), Stage::Built) {
            return Err(NoState::busy("a container joins it, or leaves it"));
        }
        let held = lock(&self.own.lock);
        let held = held
            .as_ref()
            .ok_or_else(|| NoState::busy("a container leaves it"))?;
        Ok(MemberState {
            id: self.own.id.clone(),
            container_dir: self.own.dir.clone(),
            run_dir: self.own.run_dir.clone(),
            lock: giver.give(held),
            lease: self.own.lease.state(giver),
            image: giver.give(&self.image),
        })
    }

    fn take_over(state: MemberState, taker: &mut Taker) -> std::io::Result<Self> {
        Ok(Self {
            own: OwnContainer {
                id: state.id,
                dir: state.container_dir,
                run_dir: state.run_dir,
                lock: Mutex::new(Some(Lock::inherited(taker.take(state.lock)?))),
                lease: Lease::take_over(state.lease, taker)?,
            },
            image: taker.take(state.image)?,
            stage: watch::Sender::new(Stage::Built),
        })
    }

    /// It is in the machine.
    pub(super) fn built(&self, sandbox: &Sandbox) {
        self.own.built(sandbox);
        self.stage.send_if_modified(|stage| {
            let waiting = matches!(stage, Stage::Waiting);
            if waiting {
                *stage = Stage::Built;
            }
            waiting
        });
    }

    /// Ends it.
    pub(super) fn end(&self, reason: Option<String>) {
        self.stage.send_if_modified(|stage| {
            let ending = matches!(stage, Stage::Ending(_));
            if !ending {
                *stage = Stage::Ending(reason);
            }
            !ending
        });
    }

    /// Returns when it is over.
    async fn over(&self, sandbox: &Arc<Sandbox>) -> End {
        let mut stage = self.stage.subscribe();
        let mut lease = std::pin::pin!(self.own.lease.broken());
        let mut leased = true;
        loop {
            let now = stage.borrow_and_update().clone();
            let built = match now {
                Stage::Waiting => None,
                Stage::Built => Some(sandbox),
                Stage::Ending(reason) => return End::Told(reason),
            };
            tokio::select! {
                biased;
                exit = self.own.ended(built) => return End::Exited(exit),
                changed = stage.changed() => if changed.is_err() {
                    return End::Told(None);
                },
                gone = &mut lease, if leased => {
                    leased = false;
                    if gone {
                        return End::Told(Some("the command that ran it is gone".into()));
                    }
                }
                _ = sandbox.ended(), if built.is_none() => return End::Told(None),
            }
        }
    }
}

impl Owner {
    /// The member with this ID.
    pub(super) fn member(&self, id: &str) -> Option<Arc<Member>> {
        self.members.borrow().all.get(id).cloned()
    }

    /// Those of the program before.
    pub(super) fn take_members(
        states: Vec<MemberState>,
        taker: &mut Taker,
    ) -> std::io::Result<Members> {
        let mut members = Members::default();
        for state in states {
            let member = Member::take_over(state, taker)?;
            members.all.insert(member.own.id.clone(), Arc::new(member));
        }
        Ok(members)
    }

    /// For the next program.
    pub(super) fn members_state(&self, giver: &mut Giver) -> Result<Vec<MemberState>, NoState> {
        let members = self.members.borrow();
        members.all.values().map(|m| m.state(giver)).collect()
    }

    /// Those that are there go on to be supervised, and others may come, for as long as this
    /// is supervised at all.
    pub(super) async fn keep_house(self: Arc<Self>, service: Arc<TaskService>) {
        if let Phase::Serving { sandbox, .. } = self.phase.borrow().clone() {
            let there: Vec<_> = self.members.borrow().all.values().cloned().collect();
            for member in there {
                member.own.look_after(&sandbox);
                self.supervise_member(member, sandbox.clone(), service.clone());
            }
        }
        let post = match Post::open(&self.own.run_dir) {
            Ok(post) => post,
            Err(e) => {
                warn!("no container can join this one: {e}");
                return;
            }
        };
        loop {
            let (visit, visitor) = match post.visit().await {
                Ok(visit) => visit,
                Err(e) => {
                    warn!("no container can join this one any more: {e}");
                    return;
                }
            };
            let Visit::Joins(joining) = visit else {
                visitor.refuse("it is no member of a pool").await;
                continue;
            };
            match self.admit(*joining) {
                Err(why) => visitor.refuse(&format!("{why:#}")).await,
                Ok((member, sandbox)) => {
                    if !visitor.accept().await {
                        self.forget(&member.own.id);
                        continue;
                    }
                    debug!(id = member.own.id, "joins");
                    self.supervise_member(member, sandbox, service.clone());
                }
            }
        }
    }

    /// Takes one in, if there is a machine for it.
    fn admit(&self, joining: Joining) -> anyhow::Result<(Arc<Member>, Arc<Sandbox>)> {
        let phase = self.phase.borrow().clone();
        let Phase::Serving { sandbox, .. } = phase else {
            anyhow::bail!("its machine is being started or ended; try again");
        };
        let member = Arc::new(Member::new(joining).context("take the container")?);
        let id = member.own.id.clone();
        let mut refusal = None;
        self.members.send_if_modified(|members| {
            refusal = match members {
                _ if members.closed => Some("its machine is being ended".to_owned()),
                _ if members.all.len() >= MEMBERS_MAX => Some(format!(
                    "{MEMBERS_MAX} containers have joined it, as many as may"
                )),
                _ if members.all.contains_key(&id) => Some("it has joined already".to_owned()),
                _ => None,
            };
            if refusal.is_none() {
                members.all.insert(id, member.clone());
            }
            refusal.is_none()
        });
        match refusal {
            Some(why) => Err(anyhow::anyhow!(why)),
            None => Ok((member, sandbox)),
        }
    }

    fn forget(&self, id: &str) {
        self.members
            .send_modify(|members| drop(members.all.remove(id)));
    }

    /// From its beginning to its end.
    fn supervise_member(
        self: &Arc<Self>,
        member: Arc<Member>,
        sandbox: Arc<Sandbox>,
        service: Arc<TaskService>,
    ) {
        let owner = self.clone();
        tokio::spawn(async move {
            let own = &member.own;
            let end = member.over(&sandbox).await;
            // Nothing of it is handed to another program from here on.
            member.end(None);
            if matches!(end, End::Told(_)) {
                own.kill(&sandbox).await;
            }
            own.record_end(&end, After::Nothing);
            if sandbox.ended().now_or_never().is_none() {
                leave(&service, &own.id).await;
            }
            remove(&own.run_dir);
            own.clean_up();
            // Whoever waits for it finds nothing left.
            drop(lock(&own.lock).take());
            owner.forget(&own.id);
        });
    }

    /// True if no others are in the machine; from then on none are taken.
    pub(super) fn close_if_alone(&self) -> bool {
        let mut alone = false;
        self.members.send_if_modified(|members| {
            alone = members.all.is_empty();
            members.closed |= alone;
            false
        });
        alone
    }

    /// Returns when no others are in the machine, and none are taken any more.
    pub(super) async fn left_alone(&self) {
        let mut members = self.members.subscribe();
        while !self.close_if_alone() {
            if members.changed().await.is_err() {
                return;
            }
        }
    }
}

/// Takes a container that has ended out of the machine.
pub(super) async fn leave(service: &TaskService, id: &str) {
    let delete = DeleteRequest {
        id: id.into(),
        ..Default::default()
    };
    if let Err(e) = service.delete(delete).await {
        // It may never have been built.
        debug!(id, "take a container out of the machine: {e}");
    }
}
