//! The host memory of a sandbox, in parts that add up.
//!
//! The measure is PSS: a page that several processes map counts for each by its share,
//! so that the figures of all processes of a node add up to what they hold together. What
//! is not mapped counts apart: guest memory that nobody has touched since it was filled,
//! and the page cache of the sandbox's files, which all sandboxes of a node share.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::{
    Error, Processes, Relative, Result,
    cached::{cached, page},
    smaps::{self, Mapping, text},
};

/// Descriptors of one process that are looked at.
const MOST_DESCRIPTORS: usize = 4096;
/// A thread's stack in the kernel, bytes (x86-64, arm64: THREAD_SIZE).
const KERNEL_STACK: u64 = 16 << 10;
/// Anonymous memory above this, with nothing set aside for it, is a guest's: the C
/// library's arenas are smaller.
const ARENA: u64 = 64 << 20;
/// What the drivers call a guest's memory.
const GUEST_FILE: &str = "/memfd:walnut-guest";

/// Whose memory is to be read.
#[derive(Debug, Clone)]
pub struct Subject {
    /// PID of the supervisor.
    pub supervisor: u32,
    /// Files that the sandbox lives on, beyond those that its machine has open: the
    /// template, or the kernel and the initramfs.
    pub files: Vec<PathBuf>,
}

/// A sum of memory by what it is, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Part {
    /// The processes' own: heaps, stacks, data that was written.
    pub anonymous: u64,
    /// Of programs, libraries and other files, mapped by no other process.
    pub file_private: u64,
    /// The same, by share: others map it too.
    pub file_shared: u64,
    /// The guest's memory that is this sandbox's alone: touched, or copied from the
    /// template when it was written.
    pub guest_private: u64,
    /// The guest's memory that is still the template's, by share.
    pub guest_shared: u64,
    /// What the host's kernel keeps for the processes: page tables and stacks.
    pub kernel: u64,
}

impl Part {
    /// All of it.
    pub fn total(&self) -> u64 {
        [self.mapped(), self.kernel]
            .into_iter()
            .fold(0, u64::saturating_add)
    }

    /// What `/proc/PID/smaps` adds up to as `Pss`.
    pub fn mapped(&self) -> u64 {
        [
            self.anonymous,
            self.file_private,
            self.file_shared,
            self.guest_private,
            self.guest_shared,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }

    fn add(&mut self, other: &Self) {
        for (to, from) in [
            (&mut self.anonymous, other.anonymous),
            (&mut self.file_private, other.file_private),
            (&mut self.file_shared, other.file_shared),
            (&mut self.guest_private, other.guest_private),
            (&mut self.guest_shared, other.guest_shared),
            (&mut self.kernel, other.kernel),
        ] {
            *to = to.saturating_add(from);
        }
    }

    /// Puts one mapping where it belongs.
    fn count(&mut self, mapping: &Mapping, machine: bool) {
        let private = mapping.private.min(mapping.pss);
        let anonymous = mapping.anonymous.min(private);
        let rest = Self {
            anonymous,
            file_private: private - anonymous,
            file_shared: mapping.pss - private,
            ..Self::default()
        };
        self.add(&match memory_of(mapping, machine) {
            Owner::Guest => Self {
                guest_private: mapping.pss.saturating_add(mapping.hugetlb),
                ..Self::default()
            },
            Owner::Template => Self {
                guest_private: anonymous,
                guest_shared: mapping.pss - anonymous,
                ..Self::default()
            },
            Owner::Process if mapping.file.is_none() => Self {
                anonymous: mapping.pss.saturating_add(mapping.hugetlb),
                ..Self::default()
            },
            Owner::Process => rest,
        });
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Owner {
    Process,
    /// The guest's, and nobody else's.
    Guest,
    /// A saved guest's, copied when it is written.
    Template,
}

/// Whose memory a mapping is; `machine`: the process has guest memory of its own making.
fn memory_of(mapping: &Mapping, machine: bool) -> Owner {
    let name = Path::new(&mapping.name);
    match &mapping.file {
        Some(_) if mapping.name.starts_with(GUEST_FILE) => Owner::Guest,
        Some(_)
            if machine
                && mapping.writable
                && !mapping.shared
                && name.file_name().is_some_and(|name| name == "memory") =>
        {
            Owner::Template
        }
        None if machine && mapping.no_reserve && mapping.size > ARENA => Owner::Guest,
        _ => Owner::Process,
    }
}

/// One process of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProcessUsage {
    /// What it is to the sandbox.
    pub role: String,
    /// Its PID.
    pub pid: u32,
    /// Its memory.
    #[serde(flatten)]
    pub usage: Part,
    /// All of it.
    pub total: u64,
}

impl ProcessUsage {
    /// The memory of one process; of any, a sandbox's or not.
    pub fn of(relative: &Relative) -> io::Result<Self> {
        Ok(Self::sum(relative, &smaps::read(relative.pid)?))
    }

    fn sum(relative: &Relative, mappings: &[Mapping]) -> Self {
        let machine = relative.role == "walnut-vmm";
        let mut usage = Part::default();
        for mapping in mappings {
            usage.count(mapping, machine);
        }
        usage.kernel = kernel_memory(relative.pid);
        Self {
            role: relative.role.clone(),
            pid: relative.pid,
            usage,
            total: usage.total(),
        }
    }
}

/// A file of a sandbox in the host's page cache, in bytes. Other sandboxes use the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CachedFile {
    /// Where it is.
    pub path: PathBuf,
    /// How long it is.
    pub size: u64,
    /// Of it in the page cache, once for the whole node.
    pub cached: u64,
    /// Of that mapped by this sandbox's processes, and so counted with them.
    pub counted: u64,
    /// The rest.
    pub rest: u64,
}

/// The host memory of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Breakdown {
    /// Each process; the supervisor is the first.
    pub processes: Vec<ProcessUsage>,
    /// All processes together.
    pub together: Part,
    /// Guest memory that the host holds and no process has mapped: filled, and not
    /// touched since.
    pub guest_unmapped: u64,
    /// What the sandbox holds by itself, plus its share of what it shares by mapping: the
    /// processes and `guest_unmapped`.
    pub total: u64,
    /// Its files in the page cache.
    pub files: Vec<CachedFile>,
    /// What of these files no process of the sandbox has mapped, once for the whole node.
    pub page_cache: u64,
    /// `total` and `page_cache`: all that one sandbox alone on a node accounts for.
    pub with_page_cache: u64,
    /// Swapped out, by share; not in the sums above.
    pub swap: u64,
    /// Files whose page cache the kernel does not tell this user about.
    pub untold: Vec<PathBuf>,
}

impl Breakdown {
    /// Reads it. A process that ends meanwhile is left out.
    pub fn read(subject: &Subject, processes: &Processes) -> Result<Self> {
        let mut reading = Reading::default();
        for relative in processes.of(subject.supervisor) {
            match reading.process(&relative) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                    return Err(Error::Denied {
                        role: relative.role,
                        pid: relative.pid,
                    });
                }
                // It has ended: nothing is left to count.
                Err(e) if ended(&e) && relative.pid == subject.supervisor => {
                    return Err(Error::Gone(relative.pid));
                }
                Err(e) if ended(&e) => {}
                Err(source) => {
                    return Err(Error::Proc {
                        path: format!("/proc/{}/smaps", relative.pid).into(),
                        source,
                    });
                }
            }
        }
        reading.files.extend(subject.files.iter().cloned());
        Ok(reading.sum())
    }
}

fn ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// What has been read so far.
#[derive(Debug, Default)]
struct Reading {
    processes: Vec<ProcessUsage>,
    /// Guest memory files by inode: what the host holds of each.
    guest_files: BTreeMap<(u64, u64), u64>,
    /// Of guest memory files, mapped.
    guest_mapped: u64,
    files: Vec<PathBuf>,
    /// By inode: what of a file is mapped.
    mapped: BTreeMap<u64, u64>,
    swap: u64,
}

impl Reading {
    fn process(&mut self, relative: &Relative) -> io::Result<()> {
        let mappings = smaps::read(relative.pid)?;
        for mapping in &mappings {
            self.swap = self.swap.saturating_add(mapping.swap);
            if mapping.name.starts_with(GUEST_FILE) {
                self.guest_mapped = self.guest_mapped.saturating_add(mapping.pss);
            } else if let Some((_, inode)) = &mapping.file {
                let resident = mapping.rss.saturating_sub(mapping.anonymous);
                let of_file = self.mapped.entry(*inode).or_default();
                *of_file = of_file.saturating_add(resident);
            }
        }
        self.descriptors(relative.pid);
        self.processes.push(ProcessUsage::sum(relative, &mappings));
        Ok(())
    }

    /// Files that a process has open: the guest's memory, disks.
    fn descriptors(&mut self, pid: u32) {
        let Ok(all) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            return;
        };
        for fd in all.flatten().take(MOST_DESCRIPTORS) {
            let Ok(target) = fs::read_link(fd.path()) else {
                continue;
            };
            let Some(name) = target.to_str() else {
                continue;
            };
            if name.starts_with(GUEST_FILE) {
                if let Ok(meta) = fs::metadata(fd.path()) {
                    let held = meta.blocks().saturating_mul(512);
                    self.guest_files.insert((meta.dev(), meta.ino()), held);
                }
            } else if name.starts_with('/') && is_disk(name) {
                self.files.push(target);
            }
        }
    }

    fn sum(self) -> Breakdown {
        let mut together = Part::default();
        for process in &self.processes {
            together.add(&process.usage);
        }
        let held = self
            .guest_files
            .values()
            .copied()
            .fold(0, u64::saturating_add);
        let guest_unmapped = held.saturating_sub(self.guest_mapped);
        let total = together.total().saturating_add(guest_unmapped);
        let mut seen = HashSet::new();
        let (mut files, mut untold) = (Vec::new(), Vec::new());
        for path in self.files {
            let Ok(meta) = fs::metadata(&path) else {
                continue;
            };
            if !seen.insert((meta.dev(), meta.ino())) {
                continue;
            }
            match cached(&path) {
                Ok((size, cached)) => {
                    let mapped = self.mapped.get(&meta.ino()).copied().unwrap_or(0);
                    let counted = mapped.min(cached);
                    files.push(CachedFile {
                        path,
                        size,
                        cached,
                        counted,
                        rest: cached - counted,
                    });
                }
                Err(_) => untold.push(path),
            }
        }
        let page_cache = files.iter().map(|f| f.rest).fold(0, u64::saturating_add);
        Breakdown {
            processes: self.processes,
            together,
            guest_unmapped,
            total,
            page_cache,
            with_page_cache: total.saturating_add(page_cache),
            files,
            swap: self.swap,
            untold,
        }
    }
}

/// Whether an open file is one that a machine reads its guest's disks, kernel or memory
/// from, and not a log or a lock.
fn is_disk(name: &str) -> bool {
    !name.starts_with("/memfd:")
        && ["/dev/", "/proc/", "/sys/"]
            .iter()
            .all(|dir| !name.starts_with(dir))
        && fs::metadata(name).is_ok_and(|meta| meta.is_file() && meta.len() >= page())
        && [".log", "/lock"].iter().all(|end| !name.ends_with(end))
}

/// Page tables and stacks of a process in the kernel; 0 if it has ended.
fn kernel_memory(pid: u32) -> u64 {
    let status = text(Path::new(&format!("/proc/{pid}/status")), 1 << 16).unwrap_or_default();
    let number = |key: &str| {
        let rest = status.lines().find_map(|line| line.strip_prefix(key))?;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    };
    let tables = number("VmPTE:").unwrap_or(0).saturating_mul(1024);
    let threads = number("Threads:").unwrap_or(0);
    tables.saturating_add(threads.saturating_mul(KERNEL_STACK))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn mapping(name: &str, pss: u64, private: u64, anonymous: u64) -> Mapping {
        Mapping {
            name: name.into(),
            file: name.starts_with('/').then(|| ("08:01".into(), 7)),
            writable: true,
            size: 512 * MIB,
            pss: pss * MIB,
            private: private * MIB,
            anonymous: anonymous * MIB,
            ..Mapping::default()
        }
    }

    fn counted(mapping: &Mapping, machine: bool) -> Part {
        let mut part = Part::default();
        part.count(mapping, machine);
        assert_eq!(part.mapped(), mapping.pss + mapping.hugetlb, "{mapping:?}");
        part
    }

    #[test]
    fn every_page_is_in_one_part() {
        let library = counted(&mapping("/lib/x.so", 10, 6, 2), true);
        let parts = (library.anonymous, library.file_private, library.file_shared);
        assert_eq!(parts, (2 * MIB, 4 * MIB, 4 * MIB));
        assert_eq!(
            counted(&mapping("[heap]", 9, 8, 9), true).anonymous,
            9 * MIB
        );
        let memfd = mapping("/memfd:walnut-guest", 30, 29, 0);
        assert_eq!(counted(&memfd, false).guest_private, 30 * MIB);
        let template = mapping("/t/templates/0a/memory", 30, 12, 11);
        let clone = counted(&template, true);
        assert_eq!(
            (clone.guest_private, clone.guest_shared),
            (11 * MIB, 19 * MIB)
        );
        assert_eq!(counted(&template, false).guest_shared, 0, "a supervisor's");
        let booted = Mapping {
            no_reserve: true,
            ..mapping("", 40, 40, 40)
        };
        assert_eq!(counted(&booted, true).guest_private, 40 * MIB);
        let arena = Mapping {
            size: ARENA,
            ..booted.clone()
        };
        assert_eq!(counted(&arena, true).anonymous, 40 * MIB);
        let huge = Mapping {
            hugetlb: 64 * MIB,
            ..memfd
        };
        assert_eq!(counted(&huge, true).guest_private, 94 * MIB);
    }

    #[test]
    fn figures_that_contradict_each_other_still_add_up() {
        for (pss, private, anonymous) in [(1, 2, 3), (0, 5, 5), (5, 0, 5)] {
            counted(&mapping("/lib/x.so", pss, private, anonymous), true);
            counted(&mapping("/t/memory", pss, private, anonymous), true);
        }
    }

    #[test]
    fn a_supervisor_that_is_gone_is_told() {
        let subject = Subject {
            supervisor: u32::MAX,
            files: Vec::new(),
        };
        let processes = Processes::scan().unwrap();
        let error = Breakdown::read(&subject, &processes).unwrap_err();
        assert!(matches!(error, Error::Gone(u32::MAX)), "{error}");
    }

    #[test]
    fn the_memory_of_a_process_adds_up() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        io::Write::write_all(&mut file, &vec![1; 1 << 20]).unwrap();
        let subject = Subject {
            supervisor: std::process::id(),
            files: vec![file.path().to_owned(), file.path().to_owned()],
        };
        let processes = Processes::scan().unwrap();
        let all = Breakdown::read(&subject, &processes).unwrap();
        let of_processes: u64 = all.processes.iter().map(|p| p.total).sum();
        assert_eq!(all.total, of_processes + all.guest_unmapped);
        assert_eq!(all.together.total(), of_processes);
        let one = all.files.iter().filter(|f| f.path == file.path()).count();
        assert_eq!(one, 1, "{:?}", all.files);
        assert_eq!(all.with_page_cache, all.total + all.page_cache);
        assert!(all.page_cache >= 1 << 20);
        assert!(all.processes[0].usage.kernel > 0);
    }
}
