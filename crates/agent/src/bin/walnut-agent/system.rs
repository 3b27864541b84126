//! The guest's identity and figures: clock, entropy, host name, sysctls.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use walnut_agent::names::sysctl_path;

/// Bytes of entropy that a host gives.
pub(crate) const ENTROPY: std::ops::RangeInclusive<usize> = 32..=512;

/// Sets the wall clock, in nanoseconds since the epoch.
pub(crate) fn set_clock(realtime_ns: i64) -> io::Result<()> {
    let seconds = realtime_ns.div_euclid(1_000_000_000);
    let nanos = realtime_ns.rem_euclid(1_000_000_000);
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, nanos))?;
    Ok(())
}

/// The wall clock, in nanoseconds since the epoch.
pub(crate) fn now_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|d| i64::try_from(d.as_nanos()).ok())
        .unwrap_or_default()
}

/// `struct rand_pool_info` with room for the most that is taken.
#[repr(C)]
struct Pool {
    bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; *ENTROPY.end()],
}

/// Credits `bytes` to the kernel's pool and reseeds from it, so that guests
/// made from one template do not share their randomness.
pub(crate) fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let mut pool = Pool {
        bits: i32::try_from(bytes.len() * 8).map_err(io::Error::other)?,
        size: i32::try_from(bytes.len()).map_err(io::Error::other)?,
        bytes: [0; *ENTROPY.end()],
    };
    pool.bytes
        .get_mut(..bytes.len())
        .ok_or_else(|| io::Error::other("too many bytes"))?
        .copy_from_slice(bytes);
    let random = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: the ioctl reads `size` bytes after the head, which are there.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes no argument.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets the host name that the process `pid` sees.
pub(crate) fn set_hostname_of(pid: u32, name: &str) -> io::Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/uts"))?;
    let name = name.to_owned();
    // A thread of its own, for the change of namespace stays with it.
    let work = move || {
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWUTS)?;
        set_hostname(&name)
    };
    let thread = std::thread::Builder::new()
        .stack_size(64 << 10)
        .spawn(work)?;
    let done = thread.join();
    done.unwrap_or_else(|_| Err(io::Error::other("its thread died")))
}

/// Sets the guest's host name: 1-64 bytes of a DNS name.
pub(crate) fn set_hostname(name: &str) -> io::Result<()> {
    let good = !name.is_empty()
        && name.len() <= 64
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.' || b == b'_');
    if !good {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "want 1-64 of [A-Za-z0-9._-]",
        ));
    }
    nix::unistd::sethostname(name)?;
    Ok(())
}

/// Writes one sysctl of the guest.
pub(crate) fn set_sysctl(key: &str, value: &str) -> io::Result<()> {
    let path =
        sysctl_path(key).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e.to_string()))?;
    fs::write(path, value)
}

/// `uname -r`.
pub(crate) fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// MemTotal, in bytes.
pub(crate) fn memory_bytes() -> u64 {
    fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        })
        .map_or(0, |kib| kib * 1024)
}

/// CPUs online.
pub(crate) fn cpus_online() -> u32 {
    // SAFETY: sysconf takes an integer.
    let n = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    u32::try_from(n).unwrap_or(1)
}
