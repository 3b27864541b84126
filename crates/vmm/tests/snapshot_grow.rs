//! Clones of machines that grow, with a real kernel on real KVM (`tests/lab/README.md`).

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;
mod support_grow;

use std::{
    os::unix::{
        fs::{FileExt, MetadataExt},
        process::ExitStatusExt,
    },
    time::Duration,
};

use sha2::{Digest, Sha256};
use support_grow::{Bell, Files, Guest, Spec};
use walnut_vmm_api::{Backing, Reply, Request};

/// Longest that a guest may take to have what it was given.
const PATIENCE: Duration = Duration::from_secs(600);
const MIB: u64 = 1 << 20;
const BOOT: u64 = 128 * MIB;
const MORE: u64 = 256 * MIB;
/// Much more than any of these machines has.
const ROOM: u64 = 64 << 30;

const SHARED: Backing = Backing {
    shared: true,
    huge_pages: false,
};

fn original() -> (Guest, Bell) {
    let mut spec = Spec::new(&format!("test=memory more={}", MORE / 1024));
    spec.max_memory = BOOT + ROOM;
    let bell = spec.bell();
    let mut guest = spec.start();
    guest.line("boots with");
    (guest, bell)
}

fn clone(files: &Files, backing: Backing) -> (Guest, Bell) {
    let mut spec = Spec::new("");
    spec.backing = backing;
    let bell = spec.bell();
    (spec.try_restore(files).unwrap(), bell)
}

fn grow(guest: &mut Guest) {
    assert_eq!(guest.resize(BOOT + MORE), Ok(Reply::Done));
    guest.line("grown to");
    guest.line("used it");
    assert_eq!(guest.stats().memory, BOOT + MORE);
}

/// It has what it had, gives it back, and can have it again.
fn goes_on(mut guest: Guest, bell: &Bell) {
    assert_eq!(guest.stats().memory, BOOT + MORE);
    // More than the device was made for is not to be had.
    guest.resize(BOOT + ROOM + 2 * MIB).unwrap_err();
    bell.say(b'f');
    guest.line("let go");
    assert_eq!(guest.resize(BOOT), Ok(Reply::Done));
    guest.line("shrunk to");
    assert!(guest.stats().memory < BOOT + MORE / 16);
    assert_eq!(guest.resize(BOOT + MORE), Ok(Reply::Done));
    let began = std::time::Instant::now();
    while guest.stats().memory < BOOT + MORE {
        assert!(began.elapsed() < PATIENCE, "it does not grow again");
        std::thread::sleep(Duration::from_millis(20));
    }
    bell.say(b'e');
    guest.ends();
}

fn content(files: &Files) -> [u8; 32] {
    let mut digest = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    let len = files.memory.metadata().unwrap().len();
    for at in (0..len).step_by(chunk.len()) {
        let read = files.memory.read_at(&mut chunk, at).unwrap();
        digest.update(&chunk[..read]);
    }
    digest.finalize().into()
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn a_clone_grows_and_a_clone_of_one_that_has_grown_goes_on() {
    let (mut original, bell) = original();
    let small = original.save();
    // Room costs nothing: neither the file nor the process has anything of it.
    assert_eq!(small.memory.metadata().unwrap().len(), BOOT + 4096);
    assert!(small.state.metadata().unwrap().len() < 64 << 10);
    grow(&mut original);
    let large = original.save();
    let len = large.memory.metadata().unwrap().len();
    assert_eq!(len, BOOT + MORE + 4096);
    assert!(large.memory.metadata().unwrap().blocks() * 512 > MORE);
    let before = content(&large);

    for backing in [Backing::default(), SHARED] {
        let (mut first, rings) = clone(&small, backing);
        assert_eq!(first.stats().memory, BOOT);
        grow(&mut first);
        goes_on(first, &rings);

        let (second, rings) = clone(&large, backing);
        goes_on(second, &rings);
    }
    // A clone that is saved again before and after it has given something back.
    let (mut third, rings) = clone(&large, Backing::default());
    let again = third.save();
    rings.say(b'f');
    third.line("let go");
    assert_eq!(third.resize(BOOT), Ok(Reply::Done));
    third.line("shrunk to");
    let less = third.save();
    assert!(less.memory.metadata().unwrap().len() < BOOT + MORE / 16);
    third.stop();
    let (fourth, rings) = clone(&again, Backing::default());
    goes_on(fourth, &rings);
    let (fifth, rings) = clone(&less, Backing::default());
    rings.say(b'e');
    fifth.ends();

    goes_on(original, &bell);
    assert!(
        content(&large) == before,
        "a clone wrote to the memory file"
    );
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn a_clone_brings_vcpus_online_that_never_were() {
    let mut spec = Spec::new("test=cpus");
    spec.max_vcpus = 4;
    let bell = spec.bell();
    let mut original = spec.start();
    original.line("1 of 4 online");
    let files = original.save();
    drop((original, bell));
    let (mut clone, bell) = clone(&files, Backing::default());
    bell.say(b'w');
    clone.line("worked");
    bell.say(b'g');
    clone.line("grown to 4");
    clone.line("ran on all");
    clone.ends();
}

/// As `snapshot.rs` has it of other devices: digest and all, and the VMM does not crash.
#[test]
#[ignore = "needs KVM: runs in the lab"]
fn hostile_states_of_a_machine_that_grows_are_refused_or_run_but_break_nothing() {
    const BODY: usize = 72;
    let (mut original, _bell) = original();
    grow(&mut original);
    let files = original.save();
    original.stop();
    let len = usize::try_from(files.state.metadata().unwrap().len()).unwrap();
    let mut state = vec![0; len];
    files.state.read_exact_at(&mut state, 0).unwrap();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed >> 1).unwrap() % below
    };
    // The device's own is the last of the body: its bits, and before them a version and
    // four words.
    let own = usize::try_from(ROOM / (2 * MIB) / 8 + 33).unwrap();
    let (mut refused, mut ran) = (0, 0);
    for round in 0..40 {
        let mut bad = state.clone();
        for _ in 0..=random(3) {
            let start = bad.len() - own;
            let at = match random(3) {
                // Its version and words, and the bits of what is plugged.
                0 => start + random(50),
                1 => start + random(own),
                // What the bus knows of it.
                _ => start - 1 - random(200),
            };
            bad[at] = [0, 0xff, 0x80, bad[at] ^ 1 << random(8)][random(4)];
        }
        let digest = Sha256::new()
            .chain_update(&bad[..40])
            .chain_update(&bad[BODY..])
            .finalize();
        bad[40..BODY].copy_from_slice(&digest);
        files.state.write_all_at(&bad, 0).unwrap();
        let mut spec = Spec::new("");
        spec.bell();
        match spec.try_restore(&files) {
            Err(said) => {
                println!("round {round}: {said}");
                refused += 1;
            }
            Ok(mut clone) => {
                // It lives, or its guest has ended; then it says so and goes.
                clone.vmm.control.send(&Request::Stats, &[]).unwrap();
                assert!(clone.vmm.hear().is_some(), "round {round}: it died");
                let status = clone.vmm.child.try_wait().unwrap();
                let crashed = status.is_some_and(|status| status.signal().is_some());
                assert!(!crashed, "round {round}: {status:?}");
                ran += 1;
            }
        }
    }
    println!("{refused} refused, {ran} ran");
    assert!(refused > 0 && ran > 0, "{refused} refused, {ran} ran");
    // Whole, and with a file that ends too early.
    files.state.write_all_at(&state, 0).unwrap();
    files.memory.set_len(BOOT + MORE).unwrap();
    let mut spec = Spec::new("");
    spec.bell();
    let said = spec.try_restore(&files).err().unwrap();
    assert!(said.contains("cut or added to"), "{said}");
}
