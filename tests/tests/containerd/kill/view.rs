//! What containerd says of a pod, over both of its interfaces.

use std::collections::BTreeMap;

use k8s_cri::v1::{ContainerState, PodSandboxState};

use super::World;

/// A pod and its containers, as one of the interfaces shows them; or as both do.
#[derive(Debug, Default)]
pub(crate) struct View {
    /// IDs of the sandboxes of the name, and whether they are ready.
    pub(crate) pods: BTreeMap<String, bool>,
    /// Their containers.
    pub(crate) containers: BTreeMap<String, ContainerState>,
    /// Tasks of either.
    pub(crate) tasks: BTreeMap<String, String>,
}

impl View {
    /// Asks for the pods called `name`.
    pub(crate) fn of(world: &World, name: &str) -> Result<Self, String> {
        let failed = |e: tonic::Status| format!("{:?}: {}", e.code(), e.message());
        let mut view = Self::default();
        for pod in world.kubelet.pods().map_err(failed)? {
            if pod.metadata.as_ref().is_some_and(|m| m.name == name) {
                let ready = pod.state() == PodSandboxState::SandboxReady;
                view.pods.insert(pod.id, ready);
            }
        }
        for container in world.kubelet.containers().map_err(failed)? {
            if view.pods.contains_key(&container.pod_sandbox_id) {
                let state = container.state();
                view.containers.insert(container.id, state);
            }
        }
        let list = ["--namespace", "k8s.io", "task", "ls"];
        let list = world.daemon.ctr(&list);
        if list.code != 0 {
            return Err(format!("ctr task ls: {}", list.stderr));
        }
        for line in list.stdout.lines().skip(1) {
            let words: Vec<_> = line.split_whitespace().collect();
            let [id, _, state] = words[..] else {
                return Err(format!("ctr task ls: {line:?}"));
            };
            if view.pods.contains_key(id) || view.containers.contains_key(id) {
                view.tasks.insert(id.into(), state.into());
            }
        }
        Ok(view)
    }

    /// Nothing runs.
    pub(crate) fn is_dead(&self) -> bool {
        let running = ContainerState::ContainerRunning;
        self.pods.values().all(|ready| !ready)
            && self.containers.values().all(|state| *state != running)
            && self.tasks.values().all(|state| state == "STOPPED")
    }

    /// Where the two interfaces say different things.
    pub(crate) fn disagreements(&self) -> Vec<String> {
        let mut found = Vec::new();
        let task = |id: &String| self.tasks.get(id).map_or("none", String::as_str);
        for (id, ready) in &self.pods {
            let fits = match task(id) {
                "RUNNING" => *ready,
                "none" | "STOPPED" => !ready,
                _ => false,
            };
            if !fits {
                found.push(format!(
                    "sandbox {id}: ready is {ready}, task is {}",
                    task(id)
                ));
            }
        }
        for (id, state) in &self.containers {
            let fits = match (state, task(id)) {
                (ContainerState::ContainerRunning, task) => task == "RUNNING",
                (ContainerState::ContainerExited, task) => ["none", "STOPPED"].contains(&task),
                (ContainerState::ContainerCreated, task) => ["none", "CREATED"].contains(&task),
                // What containerd itself does not know since it was killed.
                (ContainerState::ContainerUnknown, _) => true,
            };
            if !fits {
                found.push(format!("container {id}: {state:?}, task is {}", task(id)));
            }
        }
        found
    }
}
