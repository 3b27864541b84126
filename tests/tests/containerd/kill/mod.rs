//! Each process killed, at each step of a pod's life, at random points.
//!
//! Two pods at a time are taken through their lives over Kubernetes' interface, and for
//! each of them one kill is drawn from a seed: a step, a moment in it, a process. After
//! each round containerd's two views must agree and be right, whatever is left of the pods
//! must let itself be removed, and nothing may stay. A third pod stands by through all of
//! it, and must never notice.
//!
//! `make kill` also has all shims become other programs again and again, all the while.
//!
//! `WALNUT_SEED=n` begins with the kill that the seed `n` draws, `WALNUT_KILLS` says how
//! many there are, `WALNUT_PODS` how many pods at a time. Each kill's line has its own
//! seed: `WALNUT_KILLS=1 WALNUT_PODS=1 WALNUT_SEED=<it> make kill` draws it again.

mod plan;
mod upgrades;
mod victims;
mod view;
mod walk;

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use walnut_tests::{cgroups, unique};

use self::{
    plan::{Kill, Step, Victim},
    victims::{Family, Process},
    walk::{Life, Walker},
};
use crate::{
    daemon::{Daemon, entries},
    kubelet::{Kubelet, container_config, pod_config},
};

/// What the pods' containers run.
const SERVE: &str = "trap 'exit 5' TERM; echo started; sleep 100000 & wait";

/// Longest containerd may take to know of an end, a pod to let itself be removed, and what
/// is left of one to go. Only a machine that is busy with other things comes near it.
const BOUND: Duration = Duration::from_secs(60);

/// Everything under test.
struct World {
    daemon: Daemon,
    kubelet: Kubelet,
    /// Odd while containerd is away.
    turns: AtomicU64,
    /// One restart at a time.
    restarting: Mutex<()>,
    /// What each step takes as a rule.
    usual: Mutex<[Duration; Step::ALL.len()]>,
    /// What has run for pods, and must be gone when they are.
    seen: Mutex<(BTreeSet<Process>, BTreeSet<PathBuf>)>,
}

impl World {
    fn new() -> Self {
        let daemon = Daemon::start_for_kubernetes();
        let kubelet = Kubelet::new(&daemon);
        Self {
            daemon,
            kubelet,
            turns: AtomicU64::new(0),
            restarting: Mutex::default(),
            usual: Mutex::default(),
            seen: Mutex::default(),
        }
    }

    /// Kills containerd, and starts it again after `away` and `meanwhile`.
    fn restart(&self, away: Duration, meanwhile: impl FnOnce()) {
        let _one = self.restarting.lock().unwrap_or_else(|e| e.into_inner());
        self.turns.fetch_add(1, Ordering::SeqCst);
        self.daemon.restart(|| {
            meanwhile();
            thread::sleep(away);
        });
        self.kubelet.until_it_answers();
        self.turns.fetch_add(1, Ordering::SeqCst);
    }

    /// What runs for a pod now; it is remembered.
    fn family(&self, name: &str) -> Family {
        let family = victims::family(self.daemon.scratch(), name);
        let mut seen = self.seen.lock().unwrap();
        seen.0.extend(family.all().cloned());
        seen.1.extend(family.dir.clone());
        family
    }

    /// Processes, mounts, sockets, cgroups, files: everything that there is of pods, and
    /// what containerd knows of them.
    fn traces(&self) -> BTreeSet<String> {
        let state = self.daemon.scratch();
        let mut found: BTreeSet<_> = self.daemon.traces().into_iter().collect();
        let seen = self.seen.lock().unwrap();
        let alive = seen.0.iter().filter(|process| process.is_there());
        found.extend(alive.map(|p| format!("process {} {}", p.pid, p.name)));
        for dir in &seen.1 {
            found.extend(cgroups(dir.file_name().unwrap().to_str().unwrap()));
        }
        drop(seen);
        let mark = state.to_str().unwrap();
        let sockets = fs::read_to_string("/proc/net/unix").unwrap();
        found.extend(sockets.lines().filter_map(|line| {
            let path = line.split_whitespace().nth(7)?;
            path.starts_with(mark).then(|| format!("socket {path}"))
        }));
        let root = self.daemon.root();
        let mut places = Vec::new();
        for base in [state, root] {
            let cri = base.join("containerd/io.containerd.grpc.v1.cri");
            places.extend([cri.join("sandboxes"), cri.join("containers")]);
            places.push(base.join("containerd/io.containerd.runtime.v2.task/k8s.io"));
        }
        places.push(state.join("w"));
        places.push(root.join("walnut/containers"));
        // A containerd that is killed between the two halves of removing its own record of a
        // container (a rename to this name, then the removal) never comes back to it.
        let containerds = |path: &String| path.ends_with(".del-status");
        for place in places {
            found.extend(
                entries(&place)
                    .into_iter()
                    .filter(|path| !containerds(path)),
            );
        }
        for what in [["container", "ls", "-q"], ["task", "ls", "-q"]] {
            let args = [&["--namespace", "k8s.io"], &what[..]].concat();
            let list = self.daemon.ctr(&args);
            let lines = list.stdout.lines();
            found.extend(lines.map(|id| format!("{} {id}", what[0])));
        }
        found
    }
}

/// A pod that must never notice anything.
struct Bystander {
    container: String,
    boot: Vec<u8>,
}

impl Bystander {
    const BOOT: &str = "cat /proc/sys/kernel/random/boot_id";

    fn new(world: &World) -> Self {
        let name = unique("bystander");
        let config = pod_config(&name, &world.daemon.scratch().join("logs"));
        let id = world.kubelet.try_run_pod(&config).unwrap();
        let pod = crate::kubelet::Pod { id, config };
        let config = container_config("only", SERVE);
        let container = world.kubelet.run_with(&pod, config);
        let boot = world.kubelet.exec(&container, Self::BOOT).stdout;
        Self { container, boot }
    }

    fn assert_unharmed(&self, world: &World) {
        let done = world.kubelet.exec(&self.container, Self::BOOT);
        assert_eq!(done.stdout, self.boot, "the bystander's machine is another");
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect(variable))
}

/// Takes pods through their lives until so many kills have hit something.
fn kills(world: &World, wanted: u64, seed: u64, pods: u64) {
    let begun = Instant::now();
    let bystander = Bystander::new(world);
    let walkers: Vec<_> = (0..pods)
        .map(|n| Walker::new(world, &format!("walker-{n}")))
        .collect();
    let before = world.traces();
    // Nobody is killed: this is how long each step takes.
    let unharmed = walkers[0].live(world, None);
    assert!(unharmed.trouble.is_empty(), "{:#?}", unharmed.trouble);
    gone_soon(|| new_traces(world, &before));
    let (mut hit, mut next) = (0, seed);
    let mut slowest = Duration::ZERO;
    while hit < wanted {
        let round: Vec<_> = walkers.iter().zip(next..).collect();
        next += pods;
        let lives: Vec<Life> = thread::scope(|scope| {
            let threads: Vec<_> = round
                .iter()
                .map(|(walker, seed)| {
                    let kill = Kill::drawn(*seed);
                    scope.spawn(|| walker.live(world, Some(kill)))
                })
                .collect();
            let ends = threads.into_iter().map(|t| t.join().unwrap());
            ends.collect()
        });
        let mut trouble = Vec::new();
        for life in lives {
            hit += u64::from(life.hit);
            slowest = slowest.max(life.settled);
            println!("{hit:4} {life}");
            trouble.extend(life.trouble);
        }
        if trouble.is_empty() {
            bystander.assert_unharmed(world);
            gone_soon(|| new_traces(world, &before));
        }
        assert!(trouble.is_empty(), "{trouble:#?}");
    }
    println!(
        "{hit} kills, of {} drawn, seeds {seed} to {}; containerd knew of each end within {slowest:.1?}; {:.0?} in all",
        next - seed,
        next - 1,
        begun.elapsed()
    );
}

/// Panics unless all that `traces` finds goes away soon.
#[track_caller]
fn gone_soon(traces: impl Fn() -> Vec<String>) {
    let begun = Instant::now();
    loop {
        let left = traces();
        if left.is_empty() {
            return;
        }
        assert!(begun.elapsed() < BOUND, "left: {left:#?}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn new_traces(world: &World, before: &BTreeSet<String>) -> Vec<String> {
    world.traces().difference(before).cloned().collect()
}

impl World {
    /// Ends the bystander.
    fn end(self) {
        for pod in self.kubelet.pods().unwrap() {
            self.kubelet.stop_pod(&pod.id).unwrap();
            self.kubelet.remove_pod(&pod.id).unwrap();
        }
    }
}

#[test]
fn whatever_is_killed_containerd_knows_and_nothing_is_left() {
    let world = World::new();
    kills(&world, 10, number("WALNUT_SEED", 1), 2);
    world.end();
}

#[test]
#[ignore = "make kill: takes as long as it is told to"]
fn hundreds_of_kills() {
    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let (kills_wanted, pods) = (number("WALNUT_KILLS", 300), number("WALNUT_PODS", 2));
    let seed = number("WALNUT_SEED", seed.as_secs() * 1000);
    let world = World::new();
    upgrades::meanwhile(&world, seed, || kills(&world, kills_wanted, seed, pods));
    world.end();
}
