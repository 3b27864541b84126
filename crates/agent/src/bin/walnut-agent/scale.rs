//! What the guest has set up by the size of its memory: at boot, and again when its
//! machine has got more.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use nix::mount::{MsFlags, mount};
use walnut_agent::names::ContainerPaths;
use walnut_protocol::agent::GuestMemoryResponse;

use crate::memory;

/// For the guest itself, beyond what it uses when no container runs.
const MARGIN: u64 = 20 << 20;
/// Limits of the kernel's that it derives from the memory it boots with.
const LIMITS: [&str; 2] = ["/proc/sys/kernel/threads-max", "/proc/sys/fs/file-max"];

/// The memory that everything was set up for, and what of it is the containers'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Scale {
    total: u64,
    containers: u64,
}

static NOW: Mutex<Option<Scale>> = Mutex::new(None);

impl Scale {
    /// Of a guest in which no container runs; `None` if that cannot be told.
    fn of(memory: &GuestMemoryResponse) -> Option<Self> {
        let containers = memory.available.checked_sub(MARGIN)?;
        (containers > 0).then_some(Self {
            total: memory.total,
            containers,
        })
    }

    /// The same when there is as much memory as `total`: all that is new is the
    /// containers', all that is gone was.
    fn with(self, total: u64) -> Self {
        let containers = match total.checked_sub(self.total) {
            Some(more) => self.containers.saturating_add(more),
            None => self.containers.saturating_sub(self.total - total),
        };
        Self { total, containers }
    }
}

/// Keeps the containers together from using up the guest: what they want beyond
/// this meets an OOM killer that knows them, where the guest's own would find
/// the kernel without a page to work with, and grind.
pub(crate) fn bound(parent: &Path) -> io::Result<()> {
    if let Some(scale) = Scale::of(&memory::read()?) {
        limit(parent, scale)?;
        *NOW.lock().unwrap_or_else(PoisonError::into_inner) = Some(scale);
    }
    Ok(())
}

/// Lets everybody have what there is now; what that is.
pub(crate) fn adjust() -> io::Result<GuestMemoryResponse> {
    let memory = memory::read()?;
    let mut now = NOW.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(then) = *now else {
        return Ok(memory);
    };
    let scale = then.with(memory.total);
    if scale != then {
        let parent = Path::new(ContainerPaths::CGROUP_ROOT)
            .join(ContainerPaths::CGROUP_PARENT.trim_start_matches('/'));
        limit(&parent, scale)?;
        // Where containers write: its size in percent is of the memory at this moment.
        let none = None::<&str>;
        let flags = MsFlags::MS_REMOUNT;
        mount(
            none,
            "/run",
            none,
            flags,
            Some("mode=755,size=100%,nr_inodes=0"),
        )?;
        for file in LIMITS {
            raise(Path::new(file), then.total, scale.total)?;
        }
        *now = Some(scale);
    }
    Ok(memory)
}

fn limit(parent: &Path, scale: Scale) -> io::Result<()> {
    fs::write(parent.join("memory.max"), scale.containers.to_string())
}

/// Raises a limit as memory was, and never lowers it.
fn raise(file: &Path, from: u64, to: u64) -> io::Result<()> {
    let text = fs::read_to_string(file)?;
    match raised(text.trim(), from, to) {
        Some(value) => fs::write(file, value.to_string()),
        None => Ok(()),
    }
}

fn raised(text: &str, from: u64, to: u64) -> Option<u64> {
    let now: u64 = text.parse().ok()?;
    let value = u128::from(now) * u128::from(to) / u128::from(from.max(1));
    u64::try_from(value).ok().filter(|value| *value > now)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn memory(total: u64, available: u64) -> GuestMemoryResponse {
        GuestMemoryResponse {
            total,
            available,
            ..GuestMemoryResponse::default()
        }
    }

    #[test]
    fn the_guest_keeps_a_margin_and_what_it_used_whatever_comes() {
        let scale = Scale::of(&memory(120 << 20, 100 << 20)).unwrap();
        assert_eq!(scale.containers, 80 << 20);
        assert_eq!(scale.with(120 << 20), scale);
        let grown = scale.with(200 << 20);
        assert_eq!((grown.total, grown.containers), (200 << 20, 160 << 20));
        assert_eq!(grown.with(120 << 20), scale);
        assert_eq!(scale.with(0).containers, 0);
        assert_eq!(Scale::of(&memory(120 << 20, 20 << 20)), None);
        assert_eq!(Scale::of(&memory(0, 0)), None);
    }

    #[test]
    fn limits_go_up_as_memory_does() {
        assert_eq!(raised("4000", 512, 1024), Some(8000));
        assert_eq!(raised("4000", 1024, 512), None);
        assert_eq!(raised("9223372036854775807", 1, 1 << 40), None);
        assert_eq!(raised("4000", 0, 8), Some(32000));
        assert_eq!(raised("none", 1, 2), None);
    }
}
