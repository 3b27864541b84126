//! What init does before anything can run: mounts, console, loopback, cgroups.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{chdir, chroot};
use walnut_agent::names::ContainerPaths;
use walnut_protocol::GUEST_ROOT;

use crate::power::Fatal;
use crate::scale;

const NOTHING: MsFlags = MsFlags::empty();

/// Sets the guest up.
pub(crate) fn set_up() -> Result<(), Fatal> {
    for dir in ["/proc", "/sys", "/dev", "/run", "/tmp"] {
        make_dir(dir)?;
    }
    make_root_pivotable()?;
    mount_all()?;
    open_console()?;
    fs::write("/proc/self/oom_score_adj", "-1000")
        .map_err(|e| Fatal::new("exempt the agent from the OOM killer", e))?;
    setrlimit(Resource::RLIMIT_NOFILE, 1 << 16, 1 << 20)
        .map_err(|e| Fatal::new("set RLIMIT_NOFILE", e))?;
    // Namespaces and mounts come and go with containers; few CPUs make an
    // expedited grace period cheap. Missing in a kernel without the knob.
    let _ = fs::write("/sys/kernel/rcu_expedited", "1");
    let_it_sleep();
    enable_controllers(Path::new(ContainerPaths::CGROUP_ROOT))?;
    let parent = Path::new(ContainerPaths::CGROUP_ROOT).join("walnut");
    make_dir(&parent)?;
    enable_controllers(&parent)?;
    scale::bound(&parent).map_err(|e| Fatal::new("bound the containers' memory", e))?;
    bring_up_loopback().map_err(|e| Fatal::new("bring up the loopback interface", e))?;
    make_dir(GUEST_ROOT)?;
    make_dir(ContainerPaths::STATE_ROOT)
}

/// Ends the kernel's periodic work that an idle guest would wake up for: a thousand of
/// them share a host. A kernel may lack a knob.
fn let_it_sleep() {
    for (knob, value) in [
        // Compaction ahead of need looks around twice a second. Who needs a large page
        // still gets one: it compacts by itself.
        ("compaction_proactiveness", "0"),
        // Each second, counters that are kept for each processor are folded into the
        // totals, which they may be off by 125 pages from.
        ("stat_interval", "600"),
    ] {
        let _ = fs::write(Path::new("/proc/sys/vm").join(knob), value);
    }
}

fn make_dir(path: impl AsRef<Path>) -> Result<(), Fatal> {
    let path = path.as_ref();
    match fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(Fatal::new(format!("make {}", path.display()), e))
        }
        _ => Ok(()),
    }
}

/// pivot_root(2) refuses a caller whose root is the kernel's first mount. A
/// bind mount of it, moved on top, shows the same files, costs no memory, and
/// has a parent. It is read-only, so that a container which gets hold of the
/// helper's executable (/proc/self/exe) cannot change it.
fn make_root_pivotable() -> Result<(), Fatal> {
    let fail = |e: Errno| Fatal::new("make the root file system pivotable", e);
    let none = None::<&str>;
    mount(Some("/"), "/run", none, MsFlags::MS_BIND, none).map_err(fail)?;
    chdir("/run").map_err(fail)?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none).map_err(fail)?;
    chroot(".").map_err(fail)?;
    chdir("/").map_err(fail)?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(none, "/", none, read_only, none).map_err(fail)
}

fn mount_all() -> Result<(), Fatal> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let dev = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let memory = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_one("proc", "/proc", safe, "")?;
    mount_one("sysfs", "/sys", safe, "")?;
    mount_one("devtmpfs", "/dev", dev, "mode=755")?;
    for dir in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        make_dir(dir)?;
    }
    let pts = "newinstance,ptmxmode=0666,mode=620,gid=5";
    mount_one("devpts", "/dev/pts", dev, pts)?;
    mount_one("tmpfs", "/dev/shm", safe, "mode=1777")?;
    mount_one("mqueue", "/dev/mqueue", safe, "")?;
    // Overlays' upper folders live here: their programs run and may be setuid.
    mount_one("tmpfs", "/run", NOTHING, "mode=755,size=100%,nr_inodes=0")?;
    mount_one("tmpfs", "/tmp", memory, "mode=1777")?;
    // favordynmods: moving a process into a cgroup waits for no RCU grace
    // period, which is most of what it costs. Older kernels know fewer options.
    mount_one("cgroup2", "/sys/fs/cgroup", safe, "nsdelegate,favordynmods")
        .or_else(|_| mount_one("cgroup2", "/sys/fs/cgroup", safe, ""))?;
    // Wanted by some; missing in a kernel without LSMs.
    let _ = mount_one("securityfs", "/sys/kernel/security", safe, "");
    Ok(())
}

fn mount_one(fstype: &str, target: &str, flags: MsFlags, data: &str) -> Result<(), Fatal> {
    mount(Some(fstype), target, Some(fstype), flags, Some(data))
        .map_err(|e| Fatal::new(format!("mount {fstype} on {target}"), e))
}

/// Standard input is nothing, the other two are the console, whatever the
/// kernel found when there was no /dev yet.
fn open_console() -> Result<(), Fatal> {
    let console = File::options().read(true).write(true).open("/dev/console");
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(|e| Fatal::new("open /dev/null", e))?;
    // A machine may have no console at all.
    let out = console.as_ref().unwrap_or(&null);
    for (file, number) in [(&null, 0), (out, 1), (out, 2)] {
        // SAFETY: dup2 on live descriptors; 0 to 2 belong to no Rust owner.
        if unsafe { libc::dup2(file.as_raw_fd(), number) } < 0 {
            let e = io::Error::last_os_error();
            return Err(Fatal::new("open the console", e));
        }
    }
    Ok(())
}

/// Hands every controller down to the children of `cgroup`.
fn enable_controllers(cgroup: &Path) -> Result<(), Fatal> {
    let what = || format!("enable the controllers of {}", cgroup.display());
    let all =
        fs::read_to_string(cgroup.join("cgroup.controllers")).map_err(|e| Fatal::new(what(), e))?;
    let wanted: Vec<String> = all.split_whitespace().map(|c| format!("+{c}")).collect();
    fs::write(cgroup.join("cgroup.subtree_control"), wanted.join(" "))
        .map_err(|e| Fatal::new(what(), e))
}

/// Sets IFF_UP on `lo`; the kernel adds 127.0.0.1 and ::1 itself.
fn bring_up_loopback() -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: an ifreq of zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = (*from).cast_signed();
    }
    // SAFETY: the ioctl reads the name and writes the flags of `request`.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the ioctl above made the flags the union's live member.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let up = libc::c_short::try_from(libc::IFF_UP).map_err(io::Error::other)?;
    request.ifr_ifru.ifru_flags = flags | up;
    // SAFETY: the ioctl reads name and flags of `request`.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
