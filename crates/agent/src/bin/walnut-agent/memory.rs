//! The whole guest's memory: what it is used for, and giving it back.
//!
//! What is free goes back to the host by itself (virtio-balloon's free-page
//! reporting). Page cache is in use, as the kernel counts, for as long as nobody
//! else wants the page: a guest that read much once keeps it. The host has the
//! same files in its own page cache, so when memory is short there, it asks.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use walnut_agent::names::ContainerPaths;
use walnut_protocol::agent::GuestMemoryResponse;

/// What the guest uses its memory for.
pub(crate) fn read() -> io::Result<GuestMemoryResponse> {
    Ok(parse(&fs::read_to_string("/proc/meminfo")?))
}

fn parse(meminfo: &str) -> GuestMemoryResponse {
    let get = |name: &str| {
        meminfo
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
            .map_or(0, |kib| kib.saturating_mul(1024))
    };
    let shmem = get("Shmem");
    GuestMemoryResponse {
        total: get("MemTotal"),
        free: get("MemFree"),
        available: get("MemAvailable"),
        shmem,
        cached: (get("Cached").saturating_add(get("Buffers"))).saturating_sub(shmem),
        anonymous: get("AnonPages"),
        slab: get("Slab"),
        stacks: get("KernelStack"),
        page_tables: get("PageTables"),
        per_cpu: get("Percpu"),
        ..GuestMemoryResponse::default()
    }
}

/// Frees up to `bytes` (0: all that there is) of what the guest can do without;
/// how many came free. The kernel's work takes a while, and a thread.
pub(crate) async fn reclaim(bytes: u64) -> io::Result<u64> {
    tokio::task::spawn_blocking(move || {
        let before = read()?.free;
        let parent = PathBuf::from(ContainerPaths::CGROUP_ROOT)
            .join(ContainerPaths::CGROUP_PARENT.trim_start_matches('/'));
        from_containers(&parent, bytes)?;
        if bytes == 0 {
            // What no container is charged for: the disks' own metadata, and
            // what was read for containers that have gone.
            knob("/proc/sys/vm/drop_caches", "3")?;
            // The host is told of free memory by the 2 MiB: make it whole.
            knob("/proc/sys/vm/compact_memory", "1")?;
        }
        Ok(read()?.free.saturating_sub(before))
    })
    .await
    .map_err(io::Error::other)?
}

/// From the containers' page cache, what was used longest ago first. (There is no
/// swap: their own memory stays.)
fn from_containers(parent: &Path, bytes: u64) -> io::Result<()> {
    let bytes = match bytes {
        0 => fs::read_to_string(parent.join("memory.current"))?
            .trim()
            .parse()
            .unwrap_or(0),
        bytes => bytes,
    };
    match fs::write(parent.join("memory.reclaim"), bytes.to_string()) {
        // There was less than that; or a kernel before 5.19, which drops all.
        Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Writes to a file that a kernel may lack.
fn knob(path: &str, value: &str) -> io::Result<()> {
    match fs::write(path, value) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_bytes() {
        let text = "MemTotal:         499276 kB\nMemFree:          473156 kB\n\
                    Buffers:             128 kB\nCached:             8360 kB\n\
                    Shmem:              5772 kB\nSlab: many kB\n";
        let memory = parse(text);
        assert_eq!(memory.total, 499_276 * 1024);
        assert_eq!(memory.cached, (8360 + 128 - 5772) * 1024);
        assert_eq!((memory.slab, memory.anonymous), (0, 0));
    }

    #[test]
    fn what_is_wanted_is_asked_of_the_containers() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("memory.current"), "8192\n").unwrap();
        let asked = || fs::read_to_string(dir.path().join("memory.reclaim")).unwrap();
        from_containers(dir.path(), 0).unwrap();
        assert_eq!(asked(), "8192");
        from_containers(dir.path(), 4096).unwrap();
        assert_eq!(asked(), "4096");
    }
}
