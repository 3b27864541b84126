//! The jail: what each thread of a real machine calls, beside the lists that its
//! filters are made of; and what is left to the process.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "jail/machine.rs"]
mod machine;
#[path = "jail/trace.rs"]
mod trace;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Command,
    time::{Duration, Instant},
};

use walnut_vmm_api::{Reply, Request};

use machine::{Machine, USER, repository};
use trace::Trace;

/// For each kind of thread its calls, each with what an argument is held to.
type Lists = BTreeMap<String, BTreeMap<String, Vec<String>>>;

fn lists() -> Lists {
    let output = Command::new(env!("CARGO_BIN_EXE_walnut-vmm"))
        .args(["--system-calls", "--format", "json"])
        .output()
        .unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_threat_model_quotes_the_lists() {
    let output = Command::new(env!("CARGO_BIN_EXE_walnut-vmm"))
        .arg("--system-calls")
        .output()
        .unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    let document = repository().join("docs/threat-model.md");
    let document = fs::read_to_string(document).unwrap();
    assert!(
        document.contains(&table),
        "docs/threat-model.md has another table than `walnut-vmm --system-calls`:\n{table}"
    );
}

/// The kind of a thread of [`Machine::start`], by its name.
fn kind(thread: &str) -> &str {
    match thread {
        "walnut-vmm" => "control",
        "uring" => "block, io_uring",
        "plain" => "block, plain",
        "shared" => "fs, vhost-user",
        _ if thread.starts_with("vcpu") => "vCPU",
        other => other,
    }
}

/// Made only when a back end's answer is not there yet, which is the scheduler's choice.
const LATE: &str = "fs, vhost-user: ppoll";

/// What is on a list and was not called; panics if something else was.
fn missing(lists: &Lists, trace: &Trace) -> BTreeSet<String> {
    let mut missing = BTreeSet::new();
    for (kind_name, list) in lists {
        let threads: Vec<_> = trace
            .threads()
            .filter(|thread| kind(&thread.name) == kind_name)
            .collect();
        for thread in &threads {
            for call in thread.calls.keys() {
                assert!(
                    list.contains_key(call),
                    "{call} of {kind_name} is not on its list"
                );
            }
        }
        for (call, values) in list {
            let arguments: Vec<&str> = threads
                .iter()
                .filter_map(|thread| thread.calls.get(call))
                .flatten()
                .map(String::as_str)
                .collect();
            if arguments.is_empty() {
                missing.insert(format!("{kind_name}: {call}"));
            }
            // A request of ioctl is a call of its own.
            for value in values.iter().filter(|_| call == "ioctl") {
                if !arguments.iter().any(|seen| seen.contains(value.as_str())) {
                    missing.insert(format!("{kind_name}: {call} {value}"));
                }
            }
        }
    }
    missing
}

/// Each call on each list is made by a machine with every device; nothing else is,
/// or its filter would have ended it.
#[test]
#[ignore = "needs KVM and strace: runs in the lab"]
fn every_call_is_made_and_no_other() {
    let lists = lists();
    // A clock that the vDSO cannot read, so that reading it is a call.
    let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    for name in ["hpet", "acpi_pm"] {
        let _ = fs::write(clock, name);
    }
    let now = fs::read_to_string(clock).unwrap();
    assert!(["hpet", "acpi_pm"].contains(&now.trim()), "{now}");

    let mut machine = Machine::traced();
    let started = Instant::now();
    let mut trace = Trace::default();
    let file = machine.trace();
    loop {
        trace.read(&file);
        let mut missing = missing(&lists, &trace);
        missing.remove("control: exit_group");
        // A machine with a shared file system cannot be saved nor grow: the next ones do.
        missing.retain(|call| !call.starts_with("snapshot") && !call.starts_with("memory"));
        // What the nursery calls depends on the device that comes and on the C
        // library; tests/hotplug.rs brings one of each kind. That it calls nothing
        // else is seen here as for all.
        missing.retain(|call| !call.starts_with("nursery"));
        missing.remove(LATE);
        if missing.is_empty() {
            break;
        }
        assert!(
            started.elapsed() < Duration::from_secs(1200),
            "nobody makes these calls: {missing:#?}"
        );
        eprintln!("still missing: {missing:?}");
        machine.stir();
    }
    assert_eq!(machine.ask(&Request::Stop), Ok(Reply::Done));
    assert!(machine.wait().success());
    trace.read(&file);
    drop(machine);
    let mut missing_still = missing(&lists, &trace);

    let machine = Machine::traced_to_be_saved();
    machine.save();
    let mut trace = Trace::default();
    trace.read(&machine.trace());
    let missing_there = missing(&lists, &trace);
    missing_still.retain(|call| missing_there.contains(call));
    missing_still.retain(|call| !call.starts_with("nursery"));
    missing_still.remove(LATE);
    drop(machine);

    for (kind, shared) in [("memory, private", false), ("memory, shared", true)] {
        let machine = Machine::traced_and_growing(shared);
        let mut trace = Trace::default();
        loop {
            // Again and again: a block that goes waits only if another thread is looking at
            // memory that moment, and it is that wait which reads the clock.
            machine.resize(256 << 20);
            // A guest may never give all of it back; some of it is enough here.
            let less = Request::Resize { memory: 128 << 20 };
            assert_eq!(machine.ask(&less), Ok(Reply::Done));
            std::thread::sleep(Duration::from_millis(200));
            trace.read(&machine.trace());
            trace.call("memory", kind);
            let mut missing_there = missing(&lists, &trace);
            missing_there.retain(|call| call.starts_with(kind));
            if missing_there.is_empty() {
                break;
            }
            assert!(
                started.elapsed() < Duration::from_secs(1800),
                "nobody makes these calls: {missing_there:#?}"
            );
            eprintln!("still missing: {missing_there:?}");
        }
        missing_still.retain(|call| !call.starts_with(kind));
    }
    assert_eq!(missing_still, BTreeSet::new());
}

/// What the kernel says of the process and its threads.
#[test]
#[ignore = "needs KVM: runs in the lab"]
fn nothing_is_left_to_the_process() {
    let machine = Machine::plain();
    let pid = machine.pid();
    let read = |path: &str| fs::read_to_string(format!("/proc/{pid}/{path}")).unwrap();
    let words = |text: &str| {
        let words: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
        words.join(" ")
    };
    for map in ["uid_map", "gid_map"] {
        assert_eq!(words(&read(map)), format!("{USER} {USER} 1"));
    }
    for space in ["user", "mnt", "net", "ipc", "uts", "cgroup"] {
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{space}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{space}");
    }
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        threads += 1;
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            words(line.split_once(':').unwrap().1)
        };
        // Of io_uring the kernel has threads here, which run no code of ours.
        if field("Name").starts_with("iou-") {
            continue;
        }
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{set}: {status}");
        }
        let user = format!("{USER} {USER} {USER} {USER}");
        assert_eq!((field("Uid"), field("Gid")), (user.clone(), user));
        assert_eq!(field("Groups"), "");
        assert_eq!(field("NoNewPrivs"), "1");
        assert_eq!(
            (field("Seccomp"), field("Seccomp_filters")),
            ("2".into(), "1".into()),
            "{status}"
        );
    }
    assert!(threads >= 9, "{threads}");
    // The sockets' directory, and nothing above or beside it.
    let names: Vec<_> = fs::read_dir(format!("/proc/{pid}/root/"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");
    let mounts = read("mountinfo");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
}
