//! What is wrong with a specification, whatever the driver.

use crate::{Disk, Error, MachineSpec, Nic, Share};

/// Longest name of a machine.
const ID_MAX: usize = 128;

/// The error for `problem`, if there is one.
pub(crate) fn refuse(spec: &MachineSpec, problem: Option<String>) -> Result<(), Error> {
    match problem {
        None => Ok(()),
        Some(problem) => Err(Error::Spec {
            id: spec.id.chars().take(ID_MAX).collect(),
            problem,
        }),
    }
}

/// What no driver can make a machine from, as a sentence.
pub(crate) fn problem(spec: &MachineSpec) -> Option<String> {
    if !word(&spec.id, ID_MAX) {
        return Some(format!("the name must be 1–{ID_MAX} of A-Z a-z 0-9 _ . -"));
    }
    if !(1..=32).contains(&spec.vcpus) {
        return Some(format!(
            "{} vCPUs were asked for; 1 to 32 can be had",
            spec.vcpus
        ));
    }
    if !(spec.vcpus..=32).contains(&spec.max_vcpus) {
        return Some(format!(
            "{} vCPUs that may become {} were asked for; it must be as many or more, and 32 at most",
            spec.vcpus, spec.max_vcpus
        ));
    }
    let more = spec.max_memory.checked_sub(spec.memory);
    if more.is_none_or(|more| !more.is_multiple_of(2 << 20)) {
        return Some(format!(
            "{} bytes of memory cannot grow to {}: the difference must be a multiple of 2 MiB",
            spec.memory, spec.max_memory
        ));
    }
    if spec.memory == 0 || !spec.memory.is_multiple_of(1 << 20) {
        return Some(format!(
            "{} bytes of memory are not a multiple of 1 MiB",
            spec.memory
        ));
    }
    let disks = spec.disks.iter().find_map(disk_problem);
    disks
        .or_else(|| spec.shares.iter().find_map(share_problem))
        .or_else(|| spec.nics.iter().find_map(nic_problem))
}

fn word(s: &str, max: usize) -> bool {
    (1..=max).contains(&s.len())
        && s.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// What is wrong with a disk.
pub(crate) fn disk_problem(disk: &Disk) -> Option<String> {
    let serial = &disk.serial;
    (!word(serial, 20)).then(|| format!("disk serial {serial:?} is not 1–20 of A-Z a-z 0-9 _ . -"))
}

/// What is wrong with a share.
pub(crate) fn share_problem(share: &Share) -> Option<String> {
    let tag = &share.tag;
    (!word(tag, 36)).then(|| format!("share tag {tag:?} is not 1–36 of A-Z a-z 0-9 _ . -"))
}

/// What is wrong with a network interface.
fn nic_problem(nic: &Nic) -> Option<String> {
    if nic.mac[0] & 1 != 0 {
        return Some(format!("the address {:x?} is a group's", nic.mac));
    }
    if nic.mtu < 68 {
        return Some(format!(
            "an MTU of {} bytes is below the least, 68",
            nic.mtu
        ));
    }
    let queues = nic.taps.len();
    (!(1..=32).contains(&queues)).then(|| format!("a tap has {queues} queues; 1 to 32 can be had"))
}
