//! The driver for `walnut-vmm` with the product's own kernel, agent and monitor, on
//! real KVM: `tests/lab/README.md`.

#![allow(clippy::unwrap_used)]

use std::{fs, path::PathBuf, time::Duration};

use tempfile::TempDir;
use ttrpc::asynchronous::{Client, transport::Socket};
use walnut_machine::{Disk, Driver, DriverChoice, Machine, MachineSpec, Programs, SnapshotFiles};
use walnut_protocol::{
    AGENT_PORT, PROTOCOL,
    agent::{ConfigureSandboxRequest, HelloRequest, HelloResponse},
    agent_ttrpc::AgentClient,
};

/// An emulated host on a busy one: not a figure, a limit.
const BOOT: Duration = Duration::from_secs(300);

fn product(name: &str) -> PathBuf {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    root.join("out/lib/walnut")
        .join(name)
        .canonicalize()
        .unwrap()
}

fn driver() -> Box<dyn Driver> {
    let directory = product("vmlinux").parent().unwrap().to_owned();
    walnut_machine::driver(DriverChoice::Vmm, &Programs::new(&directory)).unwrap()
}

fn spec(run_dir: &TempDir, disk: &str) -> MachineSpec {
    let path = run_dir.path().join(disk);
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    MachineSpec {
        id: "test".to_owned(),
        run_dir: run_dir.path().to_owned(),
        kernel: product("vmlinux"),
        initramfs: product("initramfs.cpio"),
        cmdline: Vec::new(),
        vcpus: 1,
        max_vcpus: 1,
        memory: 128 << 20,
        max_memory: 128 << 20,
        disks: vec![Disk {
            serial: "data".to_owned(),
            path,
            read_only: false,
        }],
        spare_disks: 0,
        shares: Vec::new(),
        nics: Vec::new(),
    }
}

async fn greet(machine: &dyn Machine) -> (AgentClient, HelloResponse) {
    let stream = machine.connect(AGENT_PORT).await.unwrap();
    let agent = AgentClient::new(Client::new(Socket::from(stream)));
    let hello = HelloRequest {
        protocol: PROTOCOL,
        ..Default::default()
    };
    let context = ttrpc::context::with_duration(BOOT);
    let said = agent.hello(context, &hello).await.unwrap();
    (agent, said)
}

#[tokio::test]
#[ignore = "needs KVM: runs in the lab"]
async fn a_saved_agent_serves_in_every_clone() {
    let files = tempfile::tempdir().unwrap();
    let snapshot = SnapshotFiles {
        state: files.path().join("state"),
        memory: files.path().join("memory"),
    };
    let driver = driver();
    let run = tempfile::tempdir().unwrap();
    let machine = driver.start(spec(&run, "disk")).await.unwrap();
    assert_eq!(machine.ready(BOOT).await.unwrap(), PROTOCOL);
    // A connection that the clones do not have any more.
    let (_agent, before) = greet(&*machine).await;
    let save = machine.as_snapshot().unwrap();
    let said = save.save(&snapshot).await.unwrap_err().to_string();
    assert!(said.contains("pause it"), "{said}");
    assert_eq!(
        fs::read_dir(files.path()).unwrap().count(),
        0,
        "left behind"
    );
    machine.as_pause().unwrap().pause().await.unwrap();
    save.save(&snapshot).await.unwrap();
    let said = save.save(&snapshot).await.unwrap_err().to_string();
    assert!(said.contains("File exists"), "{said}");
    machine.as_pause().unwrap().resume().await.unwrap();

    let restore = driver.as_restore().unwrap();
    let mut clones = Vec::new();
    for n in 0u8..3 {
        let run = tempfile::tempdir().unwrap();
        let clone = restore
            .restore(spec(&run, "disk"), &snapshot)
            .await
            .unwrap();
        clone.ready(BOOT).await.unwrap();
        let (agent, said) = greet(&*clone).await;
        assert_eq!(said.kernel_release, before.kernel_release);
        let own = ConfigureSandboxRequest {
            sandbox_id: format!("clone-{n}"),
            hostname: format!("clone-{n}"),
            realtime_ns: 1_800_000_000_000_000_000,
            entropy: vec![n; 32],
            ..Default::default()
        };
        let context = ttrpc::context::with_duration(BOOT);
        agent.configure_sandbox(context, &own).await.unwrap();
        clones.push((run, clone));
    }
    // All at once, the original too; and all end.
    greet(&*machine).await;
    for (run, clone) in &clones {
        greet(&**clone).await;
        clone.stop().await;
        assert!(clone.processes().is_empty());
        let left: Vec<_> = fs::read_dir(run.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "more than the disk: {left:?}");
    }
    machine.stop().await;

    // A damaged one is not used, and leaves nothing behind.
    let mut state = fs::read(&snapshot.state).unwrap();
    let middle = state.len() / 2;
    state[middle] ^= 1;
    fs::write(&snapshot.state, state).unwrap();
    let run = tempfile::tempdir().unwrap();
    let said = restore
        .restore(spec(&run, "disk"), &snapshot)
        .await
        .unwrap_err();
    assert!(said.to_string().contains("damaged"), "{said}");
    assert_eq!(fs::read_dir(run.path()).unwrap().count(), 1);
}
