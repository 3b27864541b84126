//! What Kubernetes' validation of runtimes (critest) asks of containers, case by case: each
//! a container of one pod, and a program in it that tells. docs/conformance.md lists them.

use std::{fs, os::unix::fs::symlink, path::Path};

use k8s_cri::v1::{
    Capability, ContainerConfig, DnsConfig, Int64Value, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, Mount, NamespaceMode, NamespaceOption,
    SecurityProfile, security_profile::ProfileType,
};
use walnut_tests::until;

use crate::{
    daemon::Daemon,
    kubelet::{Kubelet, Pod, namespaces},
};

/// A case's own wishes.
type Wish = fn(&mut ContainerConfig, &Path);

/// Name, wish, program, and what it says on either stream; "!" before it if it is to fail.
type Case = (&'static str, Wish, &'static str, &'static str);

fn linux(config: &mut ContainerConfig) -> &mut LinuxContainerConfig {
    config.linux.get_or_insert_default()
}

fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    linux(config).security_context.get_or_insert_default()
}

fn user(config: &mut ContainerConfig, id: i64) {
    security(config).run_as_user = Some(Int64Value { value: id });
}

fn seccomp(config: &mut ContainerConfig, kind: ProfileType, file: &Path) {
    security(config).seccomp = Some(SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: match kind {
            ProfileType::Localhost => file.display().to_string(),
            _ => String::new(),
        },
    });
}

fn capabilities(config: &mut ContainerConfig, add: &[&str], drop: &[&str]) {
    let names = |all: &[&str]| all.iter().map(|name| (*name).to_owned()).collect();
    security(config).capabilities = Some(Capability {
        add_capabilities: names(add),
        drop_capabilities: names(drop),
        ..Default::default()
    });
}

fn pid(config: &mut ContainerConfig, mode: NamespaceMode) {
    security(config).namespace_options = Some(NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: mode.into(),
        ..Default::default()
    });
}

fn mount(config: &mut ContainerConfig, from: &Path, readonly: bool) {
    config.mounts.push(Mount {
        container_path: "/mnt".into(),
        host_path: from.display().to_string(),
        readonly,
        ..Default::default()
    });
}

/// Makes an interface: what needs the right to.
const ADDS_A_LINK: &str = r#"python3 -c '
import fcntl, os, socket
fcntl.ioctl(socket.socket(), 0x89a0, b"bridge%d\0" % os.getpid())
print("added")'"#;
const RENAMES: &str = "hostname another && hostname";

#[rustfmt::skip]
const CASES: &[Case] = &[
    ("supplemental groups", |c, _| security(c).supplemental_groups = vec![1234, 5678],
        "id -G", "0 1234 5678"),
    ("run as user", |c, _| user(c, 1001), "id -u", "1001"),
    ("run as user name", |c, _| security(c).run_as_username = "nobody".into(), "id -nu", "nobody"),
    ("run as group", |c, _| { user(c, 1001); security(c).run_as_group = Some(Int64Value { value: 1002 }); },
        "echo $(id -u):$(id -g)", "1001:1002"),
    ("root file system can be written", |_, _| (), "echo Found >/file && cat /file", "Found"),
    ("root file system is read-only", |c, _| security(c).readonly_rootfs = true,
        "touch /file", "!Read-only file system"),
    ("not privileged", |_, _| (), ADDS_A_LINK, "!Operation not permitted"),
    ("capability added", |c, _| capabilities(c, &["NET_ADMIN"], &[]), ADDS_A_LINK, "added"),
    ("all capabilities added", |c, _| capabilities(c, &["ALL"], &[]), ADDS_A_LINK, "added"),
    ("capability dropped", |c, _| capabilities(c, &[], &["CHOWN"]), "chown 5 /tmp", "!Operation not permitted"),
    ("masked paths", |c, _| security(c).masked_paths = vec!["/bin/ls".into()], "ls", "!Permission denied"),
    ("read-only paths", |c, _| security(c).readonly_paths = vec!["/tmp".into()],
        "touch /tmp/test", "!Read-only file system"),
    ("seccomp by default unconfined", |_, _| (), "grep Seccomp: /proc/self/status", "0"),
    ("seccomp unconfined", |c, p| seccomp(c, ProfileType::Unconfined, p), "grep Seccomp: /proc/self/status", "0"),
    ("seccomp of the runtime", |c, p| seccomp(c, ProfileType::RuntimeDefault, p),
        "grep Seccomp: /proc/self/status", "2"),
    ("seccomp of a profile", |c, p| { seccomp(c, ProfileType::Localhost, p); capabilities(c, &["SYS_ADMIN"], &[]); },
        RENAMES, "!"),
    ("host name is not a container's to set", |_, _| (), "hostname another", "!"),
    ("no new privileges", |c, _| { security(c).no_new_privs = true; user(c, 1000); },
        "grep NoNewPrivs /proc/self/status", "1"),
    ("new privileges", |c, _| user(c, 1000), "grep NoNewPrivs /proc/self/status", "0"),
    ("PIDs of its own", |c, _| pid(c, NamespaceMode::Container), "cat /proc/1/cmdline", "sleep"),
    ("the pod's PIDs", |c, _| pid(c, NamespaceMode::Pod), "tr '\\0' ' ' </proc/1/cmdline", "/bin/sleep infinity"),
    ("volume", |c, p| mount(c, &p.with_file_name("volume"), false), "cat /mnt/file", "content"),
    ("volume through a symbolic link", |c, p| mount(c, &p.with_file_name("link"), false), "cat /mnt/file", "content"),
    ("read-only volume", |c, p| mount(c, &p.with_file_name("volume"), true), "touch /mnt/new", "!Read-only file system"),
    ("host's mount in a volume", |c, p| mount(c, &p.with_file_name("volume"), false), "cat /mnt/tmpfs/below", "below"),
];

/// What is not as it should be, if anything.
fn check(
    kubelet: &Kubelet,
    pod: &Pod,
    profile: &Path,
    case: &Case,
    number: usize,
) -> Option<String> {
    let (name, wish, program, wanted) = case;
    let id = match kubelet.try_run(pod, &format!("case{number}"), "exec sleep 1000", |c| {
        wish(c, profile)
    }) {
        Ok(id) => id,
        Err(e) => return Some(format!("{name}: {e}")),
    };
    let done = kubelet.exec(&id, program);
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
    kubelet.remove(&id).unwrap();
    let fails = wanted.starts_with('!');
    let right = (done.exit_code != 0) == fails && said.contains(wanted.trim_start_matches('!'));
    (!right).then(|| format!("{name}: exit code {}, {said:?}", done.exit_code))
}

#[test]
fn containers_are_what_kubernetes_asks_for() {
    let daemon = Daemon::start_with_pod_network();
    let profile = daemon.scratch().join("profile.json");
    let denies = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["sethostname"],"action":"SCMP_ACT_ERRNO"}]}"#;
    fs::write(&profile, denies).unwrap();
    let volume = daemon.scratch().join("volume");
    fs::create_dir_all(volume.join("tmpfs")).unwrap();
    fs::write(volume.join("file"), "content").unwrap();
    fs::write(volume.join("tmpfs/below"), "below").unwrap();
    symlink(&volume, daemon.scratch().join("link")).unwrap();

    let kubelet = Kubelet::new(&daemon);
    let pod = kubelet.run_networked_pod(&daemon, vec![]);
    let failed: Vec<String> = CASES
        .iter()
        .enumerate()
        .filter_map(|(number, case)| check(&kubelet, &pod, &profile, case, number))
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");

    // What has more memory than it may is killed, and Kubernetes hears why.
    let greedy = kubelet.try_run(&pod, "greedy", "exec tail /dev/zero", |config| {
        linux(config).resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: 16 << 20,
            memory_swap_limit_in_bytes: 16 << 20,
            ..Default::default()
        });
    });
    let greedy = greedy.unwrap();
    until("it is killed", || kubelet.status(&greedy).1 == 137);
    assert_eq!(kubelet.status(&greedy).2, "OOMKilled");

    // A program that takes too long is ended.
    let patient = kubelet.run(&pod, "patient", "exec sleep 1000");
    let late = kubelet
        .exec_within(&patient, "exec sleep 4321", 2)
        .unwrap_err();
    assert!(
        late.to_string().contains("timed out") || late.to_string().contains("exceeded"),
        "{late}"
    );
    let left = kubelet.exec(&patient, "grep -l '[4]321' /proc/[0-9]*/cmdline");
    assert_ne!(left.exit_code, 0, "{left:?}");
    kubelet.end_pod(&pod);
    daemon.assert_nothing_left();
}

#[test]
fn pods_are_what_kubernetes_asks_for() {
    let daemon = Daemon::start_with_pod_network();
    let kubelet = Kubelet::new(&daemon);
    let pod = kubelet
        .run_pod_with(&daemon, |config| {
            namespaces(config).network = NamespaceMode::Pod.into();
            config.dns_config = Some(DnsConfig {
                servers: vec!["10.10.10.10".into()],
                searches: vec!["example.com".into()],
                options: vec!["ndots:8".into()],
            });
            let linux = config.linux.get_or_insert_default();
            let sysctls = [
                ("kernel.shm_rmid_forced", "1"),
                ("net.ipv4.ip_forward", "1"),
            ];
            linux.sysctls = sysctls.map(|(k, v)| (k.into(), v.into())).into();
            let security = linux.security_context.get_or_insert_default();
            security.privileged = true;
        })
        .unwrap();
    let plain = kubelet.run(&pod, "plain", "exec sleep 1000");
    let told = kubelet.exec(
        &plain,
        "cat /etc/resolv.conf /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_forward",
    );
    assert_eq!(
        String::from_utf8_lossy(&told.stdout),
        "search example.com\nnameserver 10.10.10.10\noptions ndots:8\n1\n1\n"
    );

    // All of the machine's devices and rights, and nothing of the host's.
    let privileged = kubelet.try_run(&pod, "privileged", "exec sleep 1000", |config| {
        security(config).privileged = true;
    });
    let privileged = privileged.unwrap();
    let done = kubelet.exec(&privileged, ADDS_A_LINK);
    assert_eq!(done.stdout, b"added\n", "{done:?}");
    let done = kubelet.exec(&privileged, "mount -t tmpfs none /mnt && echo mounted");
    assert_eq!(done.stdout, b"mounted\n", "{done:?}");

    // A log that was moved away goes on in a new file.
    let ticks = "while :; do echo tick; sleep 0.2; done";
    let writer = kubelet.run(&pod, "writer", ticks);
    let log = daemon.scratch().join("logs/writer.log");
    let lines = || fs::read_to_string(&log).unwrap_or_default().lines().count();
    until("it has written", || lines() > 2);
    fs::rename(&log, log.with_extension("old")).unwrap();
    kubelet.reopen_log(&writer);
    until("it has written to the new one", || lines() > 2);
    kubelet.end_pod(&pod);

    // The host's network is not a guest's, but its name is; another one is refused.
    let unnamed = kubelet.run_pod_with(&daemon, |c| c.hostname.clear());
    let pod = unnamed.unwrap();
    let named = kubelet.run(&pod, "named", "exec sleep 1000");
    let done = kubelet.exec(&named, "hostname");
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(String::from_utf8_lossy(&done.stdout), host);
    kubelet.end_pod(&pod);
    let refused = kubelet.run_pod_with(&daemon, |c| {
        c.hostname = "another".into();
    });
    let refused = refused.err().unwrap().to_string();
    assert!(refused.contains("give it a UTS namespace"), "{refused}");
    daemon.assert_nothing_left();
}
