//! Warm pools: machines that stand by, so that a start is the attaching of a disk and the
//! building of a container.
//!
//! There is no daemon. A member is a supervisor without a container: a process with a
//! machine, a directory below `pool/` in the run directory, whose `lock` it holds for as
//! long as it lives, and, while it can be had, a socket there. Who starts a container
//! looks for a member of its size and hands it what a new supervisor would inherit
//! ([`handover`]): from then on the member *is* the container's supervisor. It sees to it
//! that another takes its place; how many there are to be says `pool.json`.

mod handover;

use std::{
    collections::BTreeMap,
    fs,
    os::{fd::BorrowedFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tracing::debug;

pub use handover::{Given, Handover, Joining, Post, Visit, Visitor, join};

use crate::{
    Error, Lock, Result, Wanted, cgroup,
    file::{read_json, write_json},
    layout::private_dir,
    machine::DriverChoice,
    record::{is_stale, now_ns, read_dir, remove_dir},
};

/// The members' directory in the run directory.
pub(crate) const RUN_DIR: &str = "pool";
/// What a directory's name begins with until it is locked.
const UNFINISHED: &str = "new-";
const MEMBER: &str = "member.json";
/// Largest file of a pool that is read.
const FILE_MAX: u64 = 64 << 10;
/// Members that a node may be told to keep, of all sizes together.
const MEMBERS_MAX: u32 = 1024;

/// How many machines of a size are to stand by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolSize {
    /// Which driver; `auto` is what containers without a choice ask for.
    pub driver: DriverChoice,
    /// Guest memory in bytes.
    pub memory: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// How many.
    pub size: u32,
}

impl PoolSize {
    /// What its members are made for.
    pub fn wanted(&self) -> Wanted {
        Wanted {
            driver: self.driver,
            memory: self.memory,
            vcpus: self.vcpus,
        }
    }
}

/// `pool.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    version: u32,
    pools: Vec<PoolSize>,
}

/// A machine that stands by, or is being started to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Name of its directory.
    pub id: String,
    /// What it is made for.
    pub driver: DriverChoice,
    /// Guest memory in bytes.
    pub memory: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// Directory of the kernel and the programs that it uses.
    pub lib: PathBuf,
    /// Its process.
    pub pid: u32,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    /// What it can grow to, guest memory in bytes, once it can be had.
    #[serde(default)]
    pub max_memory: u64,
    /// The same, vCPUs.
    #[serde(default)]
    pub max_vcpus: u32,
    /// The template that it began from, once it has.
    #[serde(default)]
    pub template: Option<String>,
    /// It can be had.
    #[serde(default)]
    pub ready: bool,
}

impl Member {
    fn is_for(&self, wanted: &Wanted) -> bool {
        (self.driver, self.memory, self.vcpus) == (wanted.driver, wanted.memory, wanted.vcpus)
    }

    /// It is of that size, or can grow to it.
    fn serves(&self, wanted: &Wanted) -> bool {
        let grows = (self.memory..=self.max_memory).contains(&wanted.memory)
            && (self.vcpus..=self.max_vcpus).contains(&wanted.vcpus);
        self.is_for(wanted) || self.driver == wanted.driver && grows
    }
}

/// A pool as a list shows it.
#[derive(Debug, Clone, Serialize)]
pub struct Pool {
    /// What is wanted of it.
    #[serde(flatten)]
    pub size: PoolSize,
    /// Those that can be had, or are being started.
    pub members: Vec<Member>,
}

impl Pool {
    /// Members that can be had.
    pub fn ready(&self) -> usize {
        self.members.iter().filter(|member| member.ready).count()
    }
}

/// The pools of a node, or of a user.
#[derive(Debug, Clone)]
pub struct Pools {
    config: PathBuf,
    run: PathBuf,
}

/// A member's place, held.
#[derive(Debug)]
pub struct Place {
    /// Its directory.
    pub dir: PathBuf,
    /// Its name.
    pub id: String,
    /// Keeps the directory from being swept.
    pub lock: Lock,
}

impl Pools {
    /// Configured in `state`; members live in `run`.
    pub fn new(state: &Path, run: &Path) -> Self {
        Self {
            config: state.join("pool.json"),
            run: run.join(RUN_DIR),
        }
    }

    /// Sizes of which there are to be members.
    pub fn sizes(&self) -> Result<Vec<PoolSize>> {
        Ok(self.load()?.pools)
    }

    fn load(&self) -> Result<Config> {
        match read_json::<Config>(&self.config, FILE_MAX) {
            Ok(config) if config.version == 1 => Ok(config),
            Ok(config) => Err(Error::Invalid(format!(
                "read {}: of format {}; this Walnut knows 1",
                self.config.display(),
                config.version
            ))),
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Ok(Config::default())
            }
            Err(e) => Err(e),
        }
    }

    /// Says how many machines of `wanted` are to stand by: none makes the pool go.
    pub fn set(&self, wanted: &Wanted, size: u32) -> Result<()> {
        let _lock = Lock::take(&self.config.with_extension("lock"))?;
        let mut config = self.load()?;
        config.version = 1;
        config.pools.retain(|pool| pool.wanted() != *wanted);
        if size > 0 {
            config.pools.push(PoolSize {
                driver: wanted.driver,
                memory: wanted.memory,
                vcpus: wanted.vcpus,
                size,
            });
        }
        let all = config.pools.iter().map(|pool| u64::from(pool.size)).sum();
        if u64::from(MEMBERS_MAX) < all {
            return Err(Error::Invalid(format!(
                "keep {all} machines ready: a node keeps {MEMBERS_MAX} at most"
            )));
        }
        if config.pools.is_empty() {
            // That it is there says that somebody wants a pool.
            return match fs::remove_file(&self.config) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    Err(Error::io("remove", &self.config)(e))
                }
                _ => Ok(()),
            };
        }
        write_json(&self.config, &config)
    }

    /// Whether somebody wants machines to stand by. Cheap.
    pub fn is_wanted(&self) -> bool {
        self.config.exists()
    }

    /// All pools, with their members; those that nobody wants any more, too.
    pub fn list(&self) -> Result<Vec<Pool>> {
        let mut pools: Vec<Pool> = self
            .sizes()?
            .into_iter()
            .map(|size| Pool {
                size,
                members: Vec::new(),
            })
            .collect();
        for member in self.members()? {
            let own = pools.iter_mut().find(|p| member.is_for(&p.size.wanted()));
            match own {
                Some(pool) => pool.members.push(member),
                None => pools.push(Pool {
                    size: PoolSize {
                        driver: member.driver,
                        memory: member.memory,
                        vcpus: member.vcpus,
                        size: 0,
                    },
                    members: vec![member],
                }),
            }
        }
        Ok(pools)
    }

    /// Members of all sizes, oldest first.
    pub fn members(&self) -> Result<Vec<Member>> {
        self.sweep()?;
        let mut members: Vec<Member> = self
            .names()?
            .iter()
            .filter_map(|name| {
                let dir = self.run.join(name);
                let member: Member = read_json(&dir.join(MEMBER), FILE_MAX).ok()?;
                let ready = handover::socket(&dir).exists();
                (member.id == *name).then_some(Member { ready, ..member })
            })
            .collect();
        members.sort_by_key(|member| member.created_at);
        Ok(members)
    }

    fn names(&self) -> Result<Vec<String>> {
        match self.run.exists() {
            true => read_dir(&self.run),
            false => Ok(Vec::new()),
        }
    }

    /// Removes what killed members left, whose processes have died with them.
    pub fn sweep(&self) -> Result<()> {
        for name in self.names()? {
            let dir = self.run.join(&name);
            if name.starts_with(UNFINISHED) {
                if is_stale(&dir) {
                    remove_dir(&dir)?;
                }
                continue;
            }
            let lock = match Lock::try_take(&dir.join("lock")) {
                Ok(lock) => lock,
                // It has gone this moment.
                Err(_) if !dir.exists() => continue,
                Err(e) => return Err(e),
            };
            if lock.is_some() {
                cgroup::sweep(&dir);
                remove_dir(&dir)?;
            }
        }
        Ok(())
    }

    /// The right to start members; one process at a time has it.
    pub fn filler(&self) -> Result<Option<Lock>> {
        private_dir(&self.run)?;
        Lock::try_take(&self.filler_lock())
    }

    fn filler_lock(&self) -> PathBuf {
        self.run.join("fill.lock")
    }

    /// Returns when nobody starts members any more. Blocks its thread.
    pub fn wait_for_filler(&self) -> Result<()> {
        Lock::wait_free(&self.filler_lock())
    }

    /// Makes a place for a member of this process.
    pub fn place(&self, wanted: &Wanted, lib: &Path) -> Result<Place> {
        private_dir(&self.run)?;
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes).map_err(|e| Error::Machine(format!("make a name: {e}")))?;
        let id: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let new = self.run.join(format!("{UNFINISHED}{id}"));
        let dir = self.run.join(&id);
        let member = Member {
            id: id.clone(),
            driver: wanted.driver,
            memory: wanted.memory,
            vcpus: wanted.vcpus,
            lib: lib.to_owned(),
            pid: std::process::id(),
            created_at: now_ns(),
            max_memory: 0,
            max_vcpus: 0,
            template: None,
            ready: false,
        };
        let made = (|| {
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&new)
                .map_err(Error::io("create directory", &new))?;
            let lock = Lock::try_take(&new.join("lock"))?
                .ok_or_else(|| Error::Machine("somebody holds the new member's lock".into()))?;
            write_json(&new.join(MEMBER), &member)?;
            fs::rename(&new, &dir).map_err(Error::io("put in place", &new))?;
            Ok(lock)
        })();
        match made {
            Ok(lock) => Ok(Place { dir, id, lock }),
            Err(e) => {
                let _ = remove_dir(&new);
                Err(e)
            }
        }
    }

    /// Says that the member of this process stands by. `max` is what its machine can
    /// grow to: guest memory in bytes, and vCPUs.
    pub fn offer(&self, place: &Place, template: &str, max: (u64, u32)) -> Result<Post> {
        let path = place.dir.join(MEMBER);
        let member: Member = read_json(&path, FILE_MAX)?;
        let member = Member {
            template: Some(template.to_owned()),
            max_memory: max.0,
            max_vcpus: max.1,
            ..member
        };
        write_json(&path, &member)?;
        Post::open(&place.dir)
    }

    /// Hands a container to a member that stands by for its size, or else for a smaller
    /// one if its machine can grow. `None` if there is none; then nobody has it. The descriptors are the ones of [`Given`], in its order.
    pub fn take(
        &self,
        wanted: &Wanted,
        lib: &Path,
        handover: &Handover,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Option<u32>> {
        // Who has no pool pays for no search.
        if !self.run.exists() {
            return Ok(None);
        }
        let mut members = self.members()?;
        members.retain(|it| it.ready && it.serves(wanted) && it.lib == lib);
        // Oldest first, as they were.
        members.sort_by_key(|it| !it.is_for(wanted));
        for member in members {
            match handover::give(&self.run.join(&member.id), handover, fds) {
                Ok(pid) => return Ok(Some(pid)),
                Err(why) => debug!(member = member.id, "not taken: {why}"),
            }
        }
        Ok(None)
    }

    /// Tells a member to go. One that does not listen is taken, or gone.
    pub fn retire(&self, member: &Member) {
        if let Err(why) = handover::retire(&self.run.join(&member.id)) {
            debug!(member = member.id, "not retired: {why}");
        }
    }

    /// The members that are missing, and those that are too many: their pool has gone or
    /// become smaller, or they did not begin from the template that `current` names.
    pub fn balance(
        &self,
        mut current: impl FnMut(&Wanted) -> Option<String>,
    ) -> Result<(Vec<Wanted>, Vec<Member>)> {
        let mut missing = Vec::new();
        let mut excess = Vec::new();
        for mut pool in self.list()? {
            if pool.size.size > 0 {
                let current = current(&pool.size.wanted());
                let stale = |m: &mut Member| m.template.is_some() && m.template != current;
                excess.extend(pool.members.extract_if(.., stale));
            }
            let size = usize::try_from(pool.size.size).unwrap_or(usize::MAX);
            match size.checked_sub(pool.members.len()) {
                Some(few) => missing.extend(std::iter::repeat_n(pool.size.wanted(), few)),
                None => excess.extend(pool.members.into_iter().skip(size)),
            }
        }
        Ok((missing, excess))
    }
}

/// A member has been handed a container: it is none of the pool any more.
pub fn leave(dir: &Path) {
    let _ = fs::remove_file(dir.join(MEMBER));
}

/// Bytes of memory that the host could give, and has in all.
pub fn host_memory() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let fields: BTreeMap<&str, u64> = text
        .lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once(':')?;
            let kb: u64 = rest.trim().strip_suffix(" kB")?.trim().parse().ok()?;
            Some((name, kb * 1024))
        })
        .collect();
    Some((*fields.get("MemAvailable")?, *fields.get("MemTotal")?))
}

#[cfg(test)]
mod tests;
