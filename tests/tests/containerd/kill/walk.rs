//! One pod's life, and one kill in it.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use k8s_cri::v1::{
    ContainerConfig, LinuxContainerConfig, LinuxContainerResources, PodSandboxConfig,
};
use tonic::{Code, Status};

use super::{
    BOUND, Kill, SERVE, Step, Victim, World,
    plan::Random,
    victims::{Family, Process},
    view::View,
};
use crate::kubelet::{Pod, container_config, pod_config};

const PAUSE: Duration = Duration::from_millis(50);
/// Longest a machine takes to end whose kernel has panicked.
const PANICS: Duration = Duration::from_secs(5);
/// What a command of containerd's takes, about.
const COMMAND: Duration = Duration::from_millis(20);
/// More memory than a container may have, where its kernel panics for want of it.
const PANIC: &str = "exec cat /dev/zero >/dev/shm/full";
/// Bytes.
const CONTAINER_MEMORY: i64 = 24 << 20;

/// A pod that lives again and again, under one name.
pub(crate) struct Walker {
    name: String,
    config: PodSandboxConfig,
}

/// How a life went.
#[derive(Debug, Default)]
pub(crate) struct Life {
    name: String,
    kill: Option<Kill>,
    /// A process was killed.
    pub(crate) hit: bool,
    /// What that was, and when.
    struck: String,
    /// What the step said.
    said: String,
    /// Until containerd knew of the end.
    pub(crate) settled: Duration,
    /// What went wrong.
    pub(crate) trouble: Vec<String>,
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(kill) = &self.kill else {
            return write!(f, "{}: nobody was killed", self.name);
        };
        write!(
            f,
            "{} seed {}: {:?} at {} %: {:?}: {}; the step: {}; settled in {:.1?}",
            self.name,
            kill.seed,
            kill.step,
            kill.at,
            kill.victim,
            self.struck,
            self.said,
            self.settled
        )
    }
}

/// What a kill did.
#[derive(Debug, Default)]
struct Struck {
    hit: bool,
    /// The pod cannot live on.
    doomed: bool,
    what: String,
}

fn text(status: &Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

impl Walker {
    pub(crate) fn new(world: &World, name: &str) -> Self {
        let mut config = pod_config(name, &world.daemon.scratch().join("logs"));
        let linux = config.linux.as_mut().unwrap();
        // So that a container can bring its guest down.
        let panic = ("vm.panic_on_oom".to_owned(), "2".to_owned());
        linux.sysctls.extend([panic]);
        Self {
            name: name.into(),
            config,
        }
    }

    fn container(name: &str) -> ContainerConfig {
        let mut config = container_config(name, SERVE);
        config.linux = Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources {
                memory_limit_in_bytes: CONTAINER_MEMORY,
                ..Default::default()
            }),
            ..Default::default()
        });
        config
    }

    /// Lives once, with a kill in it or without one.
    pub(crate) fn live(&self, world: &World, kill: Option<Kill>) -> Life {
        let mut life = Life {
            name: self.name.clone(),
            ..Default::default()
        };
        let mut pod = Pod {
            id: String::new(),
            config: self.config.clone(),
        };
        let mut ids = [String::new(), String::new()];
        for step in Step::ALL {
            let now = kill.as_ref().filter(|kill| kill.step == step);
            let turn = world.turns.load(Ordering::SeqCst);
            let (result, struck) = self.step(world, step, now, &mut pod, &mut ids);
            let interrupted = !turn.is_multiple_of(2) || world.turns.load(Ordering::SeqCst) != turn;
            let said = match &result {
                Ok(()) => "done".to_owned(),
                Err(e) => text(e),
            };
            if let Some(struck) = struck {
                life.hit = struck.hit;
                life.struck.clone_from(&struck.what);
                life.said.clone_from(&said);
                if struck.doomed || struck.hit && result.is_err() {
                    self.settle(world, &mut life, struck.doomed);
                    break;
                }
            }
            if result.is_err() {
                if !interrupted {
                    life.trouble.push(format!("{step:?}: {said}"));
                }
                self.settle(world, &mut life, false);
                break;
            }
        }
        life.kill = kill;
        if let Some(kill) = &life.kill
            && life.struck.is_empty()
        {
            life.struck = format!("another's kill came before {:?}", kill.step);
        }
        self.take_away(world, &mut life);
        if !life.trouble.is_empty() {
            let line = life.to_string();
            life.trouble.insert(0, line);
        }
        life
    }

    /// One step, and meanwhile the kill, if it is now.
    fn step(
        &self,
        world: &World,
        step: Step,
        kill: Option<&Kill>,
        pod: &mut Pod,
        ids: &mut [String; 2],
    ) -> (Result<(), Status>, Option<Struck>) {
        let index = Step::ALL.iter().position(|s| *s == step).unwrap();
        let done = AtomicBool::new(false);
        // In it a program can be run that ends the guest.
        let there = match step {
            Step::RemoveFirst | Step::StopPod => ids[1].clone(),
            _ => ids[0].clone(),
        };
        thread::scope(|scope| {
            let striking = kill.map(|kill| {
                let usual = world.usual.lock().unwrap()[index];
                let (done, there) = (&done, &there);
                scope.spawn(move || {
                    if kill.victim != Victim::Command {
                        thread::sleep(usual * kill.at / 100);
                    }
                    self.strike(world, kill, there, done)
                })
            });
            let begun = Instant::now();
            let result = self.act(world, step, pod, ids);
            done.store(true, Ordering::SeqCst);
            if striking.is_none() && result.is_ok() {
                world.usual.lock().unwrap()[index] = begun.elapsed();
            }
            // What runs for it is remembered.
            world.family(&self.name);
            (result, striking.map(|thread| thread.join().unwrap()))
        })
    }

    fn act(
        &self,
        world: &World,
        step: Step,
        pod: &mut Pod,
        ids: &mut [String; 2],
    ) -> Result<(), Status> {
        let kubelet = &world.kubelet;
        let [first, second] = ids;
        match step {
            Step::RunPod => pod.id = kubelet.try_run_pod(&pod.config)?,
            Step::CreateFirst => *first = kubelet.create(pod, Self::container("first"))?,
            Step::CreateSecond => *second = kubelet.create(pod, Self::container("second"))?,
            Step::StartFirst => kubelet.start(first)?,
            Step::StartSecond => kubelet.start(second)?,
            Step::Exec => {
                let done = kubelet.try_exec(first, "echo here")?;
                if done.exit_code != 0 || done.stdout != b"here\n" {
                    return Err(Status::unknown(format!("it answered {done:?}")));
                }
            }
            Step::StopFirst => kubelet.stop(first)?,
            Step::RemoveFirst => kubelet.remove(first)?,
            Step::StopPod => kubelet.stop_pod(&pod.id)?,
            Step::RemovePod => kubelet.remove_pod(&pod.id)?,
        }
        Ok(())
    }

    /// Kills; `done` is set when the step is over. A container that runs is `there`.
    fn strike(&self, world: &World, kill: &Kill, there: &str, done: &AtomicBool) -> Struck {
        let mut random = Random::new(kill.seed);
        match kill.victim {
            Victim::Containerd => {
                world.restart(kill.away, || {});
                return Struck {
                    hit: true,
                    doomed: false,
                    what: format!("containerd, away for {:?}", kill.away),
                };
            }
            Victim::ShimUnseen | Victim::MachineUnseen => {
                let mut killed = None;
                world.restart(kill.away, || {
                    killed = self.kill_one(world, kill, &mut random)
                });
                let also = match &killed {
                    Some(p) => format!("{} {} without it", p.name, p.pid),
                    None => "nothing else was there".into(),
                };
                return Struck {
                    hit: true,
                    doomed: killed.is_some(),
                    what: format!("containerd, away for {:?}, {also}", kill.away),
                };
            }
            Victim::Guest => {
                let machines = world.family(&self.name);
                let machines = machines.named(walnut_tests::machine().0);
                let result = world.kubelet.try_exec(there, PANIC);
                // Its container may have ended before; then nothing was executed in it.
                let executed = match &result {
                    Ok(_) => true,
                    Err(e) => {
                        let refusals = [Code::NotFound, Code::FailedPrecondition];
                        !refusals.contains(&e.code()) && !e.message().contains("EXITED")
                    }
                };
                let begun = Instant::now();
                let alive = || machines.iter().any(|machine| machine.is_there());
                while executed && alive() && begun.elapsed() < PANICS {
                    thread::sleep(PAUSE);
                }
                // What executes something has a machine, seen or not.
                let hit = executed && !alive();
                let said = match result {
                    Ok(done) => format!("exit code {}", done.exit_code),
                    Err(e) => text(&e),
                };
                return Struck {
                    hit,
                    doomed: hit,
                    what: format!("the guest's kernel: {said}"),
                };
            }
            _ => {}
        }
        loop {
            let last = done.load(Ordering::SeqCst);
            if let Some(killed) = self.kill_one(world, kill, &mut random) {
                return Struck {
                    hit: true,
                    doomed: kill.victim != Victim::Command,
                    what: format!("{} {}", killed.name, killed.pid),
                };
            }
            if last {
                return Struck {
                    what: "nothing was there to kill".into(),
                    ..Default::default()
                };
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Kills a process that fits.
    fn kill_one(&self, world: &World, kill: &Kill, random: &mut Random) -> Option<Process> {
        let family = world.family(&self.name);
        let fitting = fitting(&family, kill.victim);
        let victim = fitting.get(random.below(fitting.len().max(1)))?;
        if kill.victim == Victim::Command {
            thread::sleep(COMMAND * kill.at / 100);
        }
        victim.kill().then(|| (*victim).clone())
    }

    /// Waits until containerd's views agree; and, where the pod is doomed, know it.
    fn settle(&self, world: &World, life: &mut Life, doomed: bool) {
        let begun = Instant::now();
        loop {
            let turn = world.turns.load(Ordering::SeqCst);
            let wrong = match View::of(world, &self.name) {
                Ok(view) => {
                    let mut wrong = view.disagreements();
                    if doomed && !view.is_dead() {
                        wrong.push(format!("what was killed is alive: {view:#?}"));
                    }
                    wrong
                }
                Err(e) => vec![e],
            };
            life.settled = begun.elapsed();
            if wrong.is_empty() {
                return;
            }
            if life.settled > BOUND && turn.is_multiple_of(2) {
                return life.trouble.extend(wrong);
            }
            thread::sleep(PAUSE);
        }
    }

    /// Removes what is there, as kubelet does: containers, then the pod, each twice.
    fn take_away(&self, world: &World, life: &mut Life) {
        let begun = Instant::now();
        loop {
            let turn = world.turns.load(Ordering::SeqCst);
            let wrong = match self.attempt(world) {
                Ok(()) => return,
                Err(wrong) => wrong,
            };
            let interrupted = !turn.is_multiple_of(2) || world.turns.load(Ordering::SeqCst) != turn;
            if !interrupted {
                // kubelet would ask again, and we do; but it should not have to.
                life.trouble.push(format!("take it away: {wrong}"));
                return;
            }
            if begun.elapsed() > BOUND * 2 {
                life.trouble.push(format!("take it away: {wrong}"));
                return;
            }
            thread::sleep(PAUSE);
        }
    }

    fn attempt(&self, world: &World) -> Result<(), String> {
        let kubelet = &world.kubelet;
        let view = View::of(world, &self.name)?;
        let did = |what: &str, id: &str, result: Result<(), Status>| {
            result.map_err(|e| format!("{what} {id}: {}", text(&e)))
        };
        for id in view.containers.keys() {
            for _ in 0..2 {
                did("stop", id, kubelet.stop(id))?;
            }
            for _ in 0..2 {
                did("remove", id, kubelet.remove(id))?;
            }
        }
        for id in view.pods.keys() {
            for _ in 0..2 {
                did("stop pod", id, kubelet.stop_pod(id))?;
            }
            for _ in 0..2 {
                did("remove pod", id, kubelet.remove_pod(id))?;
            }
        }
        Ok(())
    }
}

fn fitting(family: &Family, victim: Victim) -> Vec<&Process> {
    match victim {
        Victim::Shim | Victim::ShimUnseen => family.shim.iter().collect(),
        Victim::Machine | Victim::MachineUnseen => family.named(walnut_tests::machine().0),
        Victim::Vsock => family.named("walnut-vsock"),
        Victim::FileServer => family.named("virtiofsd"),
        Victim::Command => family.commands.iter().collect(),
        Victim::Containerd | Victim::Guest => Vec::new(),
    }
}
