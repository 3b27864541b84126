//! vCPUs: as many as there can be, and more than the guest booted with.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;
mod support_grow;

use std::{collections::BTreeMap, fs};

use support_grow::{Guest, Spec};

/// By the name of each vCPU's thread: nanoseconds run, and how often it was switched
/// to.
fn times(guest: &Guest) -> BTreeMap<String, (u64, u64)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap();
    let mut times = BTreeMap::new();
    for task in tasks {
        let task = task.unwrap().path();
        let name = fs::read_to_string(task.join("comm")).unwrap();
        let figures = fs::read_to_string(task.join("schedstat")).unwrap();
        let mut figures = figures.split_whitespace().map(|it| it.parse().unwrap());
        let (run, _, switches) = (figures.next(), figures.next(), figures.next());
        times.insert(name.trim().to_owned(), (run.unwrap(), switches.unwrap()));
    }
    times.retain(|name, _| name.starts_with("vcpu"));
    times
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn vcpus_come_online_when_asked_and_cost_nothing_before() {
    let mut spec = Spec::new("test=cpus");
    spec.max_vcpus = 4;
    let bell = spec.bell();
    let mut guest = spec.start();
    guest.line("1 of 4 online");
    let before = times(&guest);
    assert_eq!(before.len(), 4);
    bell.say(b'w');
    guest.line("worked");
    let after = times(&guest);
    println!("{before:?} {after:?}");
    for offline in ["vcpu1", "vcpu2", "vcpu3"] {
        assert_eq!(before[offline], after[offline], "{offline}");
    }
    assert!(after["vcpu0"].0 > before["vcpu0"].0);
    bell.say(b'g');
    guest.line("grown to 4");
    guest.line("ran on all");
    guest.ends();
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn thirty_two_vcpus_boot() {
    let mut spec = Spec::new("test=hello");
    (spec.vcpus, spec.max_vcpus) = (32, 32);
    let mut guest = spec.start();
    guest.line("hello, 32 online");
    guest.ends();
}
