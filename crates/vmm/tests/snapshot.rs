//! Saving and restoring, with a real kernel on real KVM (`tests/lab/README.md`).

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::{
    collections::BTreeSet,
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::Path,
};

use support::{Guest, Vmm};
use walnut_vmm_api::{
    Attachment, Backing, Device, FdIndex, Jail, Limits, Reply, Request, Restore, VERSION,
};

/// The two files of a snapshot.
struct Files {
    state: File,
    memory: File,
}

fn file(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}

impl Files {
    fn at(dir: &Path) -> Self {
        Self {
            state: file(&dir.join("state")),
            memory: file(&dir.join("memory")),
        }
    }
}

fn save(vmm: &mut Vmm, files: &Files) -> Result<Reply, String> {
    let request = Request::Snapshot {
        state: FdIndex(0),
        memory: FdIndex(1),
    };
    vmm.ask(&request, &[files.state.as_fd(), files.memory.as_fd()])
}

fn restore(vmm: &mut Vmm, files: &Files, disk: &File, backing: Backing) -> Result<Reply, String> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let kvm = kvm.unwrap();
    let (console, to_console) = std::io::pipe().unwrap();
    vmm.console = OwnedFd::from(console).into();
    let request = Restore {
        version: VERSION,
        kvm: FdIndex(0),
        state: FdIndex(1),
        memory: FdIndex(2),
        backing,
        console: Some(FdIndex(3)),
        devices: vec![Attachment {
            name: "disk-0".to_owned(),
            device: Device::Block {
                serial: "disk-0".to_owned(),
                read_only: false,
                file: FdIndex(4),
                queues: 1,
                limits: Limits::default(),
            },
        }],
        jail: Jail::Full { user: None },
        run: false,
    };
    let fds = [
        kvm.as_fd(),
        files.state.as_fd(),
        files.memory.as_fd(),
        to_console.as_fd(),
        disk.as_fd(),
    ];
    vmm.ask(&Request::Restore(Box::new(request)), &fds)
}

/// The steps in what a guest of `test=ticks` said: number, random bytes, and whether
/// its disk keeps what it writes.
fn ticks(console: &str) -> Vec<(u64, String, bool)> {
    // What is not yet a line may be cut anywhere.
    let whole = console.rfind('\n').map_or("", |end| &console[..end]);
    let lines = whole.lines().filter_map(|line| {
        let (n, rest) = line.trim().strip_prefix("tick ")?.split_once(" random=")?;
        let (random, disk) = rest.split_once(" disk=")?;
        // The kernel's own words may come in between.
        let whole = random.len() == 16 && random.bytes().all(|it| it.is_ascii_hexdigit());
        whole.then_some((n.parse().ok()?, random.to_owned(), disk.starts_with('1')))
    });
    lines.collect()
}

fn disk(dir: &Path, name: &str) -> File {
    let disk = file(&dir.join(name));
    disk.set_len(1 << 20).unwrap();
    disk
}

/// A running guest that counts, paused and saved; the last step that it told.
fn counting(dir: &Path, vcpus: u8) -> (Vmm, Files, u64) {
    let mut vmm = Vmm::spawn();
    let disk = disk(dir, "disk");
    let guest = Guest {
        test: "ticks",
        // As the product's guests: or the kernel would speak of its clocks.
        cmdline: "tsc=reliable",
        vcpus,
        shared: false,
    };
    let started = vmm.start_disks(guest, &[(&disk, false)]);
    assert_eq!(started, Ok(Reply::Done));
    let console = vmm.console_until(|text| ticks(text).len() >= 5);
    assert_eq!(vmm.ask(&Request::Pause, &[]), Ok(Reply::Done));
    let files = Files::at(dir);
    assert_eq!(save(&mut vmm, &files), Ok(Reply::Done));
    let last = ticks(&console).last().unwrap().0;
    (vmm, files, last)
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn clones_go_on_where_it_stood_each_with_randomness_of_its_own() {
    for vcpus in [1, 2] {
        let dir = tempfile::tempdir().unwrap();
        let (mut original, files, last) = counting(dir.path(), vcpus);
        let before = std::fs::read(dir.path().join("memory")).unwrap();
        let mut seen = BTreeSet::new();
        let shared = Backing {
            shared: true,
            huge_pages: false,
        };
        for (n, backing) in [Backing::default(), Backing::default(), shared]
            .into_iter()
            .enumerate()
        {
            let disk = disk(dir.path(), &format!("clone-{n}"));
            let mut clone = Vmm::spawn();
            let restored = restore(&mut clone, &files, &disk, backing);
            assert_eq!(restored, Ok(Reply::Done));
            assert_eq!(clone.ask(&Request::Resume, &[]), Ok(Reply::Done));
            let console = clone.console_until(|text| {
                ticks(text).len() >= 5 && text.contains("virtual machine fork")
            });
            let ticks = ticks(&console);
            // It goes on: some steps may have been in the console's pipe.
            assert!(
                ticks[0].0 > last && ticks[0].0 < last + 20,
                "{last} {console}"
            );
            // The step that was under way had its random bytes from before, and may
            // have written to the original's disk.
            let (under_way, _, _) = ticks[0];
            let own = ticks.iter().skip(1);
            assert!(own.clone().count() >= 4, "{console}");
            assert!(own.clone().all(|(_, _, disk)| *disk), "{console}");
            // From the moment that the guest's kernel has heard of it.
            let (_, after) = console.split_once("virtual machine fork").unwrap();
            let after = self::ticks(after);
            for (n, random, _) in after.iter().filter(|(n, _, _)| *n > under_way) {
                assert!(seen.insert(random.clone()), "step {n} again: {random}");
            }
        }
        // The original goes on as well, and nobody has written to the files.
        assert_eq!(original.ask(&Request::Resume, &[]), Ok(Reply::Done));
        let console = original.console_until(|text| ticks(text).len() >= 5);
        assert!(!console.contains("virtual machine fork"));
        for (n, random, _) in ticks(&console).iter().skip(1) {
            assert!(seen.insert(random.clone()), "step {n} again: {random}");
        }
        let after = std::fs::read(dir.path().join("memory")).unwrap();
        assert!(before == after, "a clone wrote to the memory file");
    }
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn a_snapshot_of_a_clone_is_one_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let (original, files, first) = counting(dir.path(), 1);
    drop(original);
    let disk = disk(dir.path(), "clone");
    let mut clone = Vmm::spawn();
    assert_eq!(
        restore(&mut clone, &files, &disk, Backing::default()),
        Ok(Reply::Done)
    );
    // One that has not run yet, and then one that has.
    for (name, steps) in [("second", 0), ("third", 5)] {
        if steps > 0 {
            assert_eq!(clone.ask(&Request::Resume, &[]), Ok(Reply::Done));
            clone.console_until(|text| ticks(text).len() >= steps);
            assert_eq!(clone.ask(&Request::Pause, &[]), Ok(Reply::Done));
        }
        let dir = dir.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let files = Files::at(&dir);
        assert_eq!(save(&mut clone, &files), Ok(Reply::Done));
        let mut grandchild = Vmm::spawn();
        assert_eq!(
            restore(&mut grandchild, &files, &disk, Backing::default()),
            Ok(Reply::Done)
        );
        assert_eq!(grandchild.ask(&Request::Resume, &[]), Ok(Reply::Done));
        let console = grandchild.console_until(|text| ticks(text).len() >= 3);
        assert!(ticks(&console)[0].0 > first, "{console}");
    }
}

#[test]
#[ignore = "needs KVM: runs in the lab"]
fn what_cannot_be_saved_or_restored_is_said_and_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (mut original, files, _) = counting(dir.path(), 1);
    let disk = disk(dir.path(), "clone");
    let refused = |files: &Files, expected: &str| {
        let mut clone = Vmm::spawn();
        let said = restore(&mut clone, files, &disk, Backing::default()).unwrap_err();
        assert!(said.contains(expected), "{said}");
    };
    // Running machines are not saved.
    assert_eq!(original.ask(&Request::Resume, &[]), Ok(Reply::Done));
    let other = dir.path().join("running");
    std::fs::create_dir(&other).unwrap();
    let said = save(&mut original, &Files::at(&other)).unwrap_err();
    assert!(said.contains("pause it"), "{said}");
    drop(original);

    let state = std::fs::read(dir.path().join("state")).unwrap();
    let write = |bytes: &[u8]| {
        files.state.set_len(0).unwrap();
        files.state.write_all_at(bytes, 0).unwrap();
    };
    write(&state[..state.len() / 2]);
    refused(&files, "cut or added to");
    let mut bad = state.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    write(&bad);
    refused(&files, "damaged");
    write(&state);
    let len = files.memory.metadata().unwrap().len();
    files.memory.set_len(len - 4096).unwrap();
    refused(&files, "cut or added to");
    files.memory.set_len(len).unwrap();
    refused(&files, "not a Walnut snapshot");
}

/// A state that was made to harm: digest and all. Whatever it says, the VMM answers
/// or its guest ends; it does not crash, and nobody's filter is met.
#[test]
#[ignore = "needs KVM: runs in the lab"]
fn hostile_states_are_refused_or_run_but_break_nothing() {
    use sha2::{Digest, Sha256};
    let dir = tempfile::tempdir().unwrap();
    let (original, files, _) = counting(dir.path(), 1);
    drop(original);
    let disk = disk(dir.path(), "clone");
    let state = std::fs::read(dir.path().join("state")).unwrap();
    const BODY: usize = 72;
    // A small generator of numbers: the same ones in every run.
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed >> 1).unwrap() % below
    };
    let (mut refused, mut ran) = (0, 0);
    for round in 0..60 {
        let mut bad = state.clone();
        for _ in 0..=random(4) {
            // Devices and their registers stand at the end.
            let from = match random(2) {
                0 => BODY,
                _ => bad.len() - 1500,
            };
            let at = from + random(bad.len() - from);
            bad[at] = [0, 0xff, 0x80, bad[at] ^ 1 << random(8)][random(4)];
        }
        let digest = Sha256::new()
            .chain_update(&bad[..40])
            .chain_update(&bad[BODY..])
            .finalize();
        bad[40..BODY].copy_from_slice(&digest);
        files.state.set_len(0).unwrap();
        files.state.write_all_at(&bad, 0).unwrap();
        let mut clone = Vmm::spawn();
        match restore(&mut clone, &files, &disk, Backing::default()) {
            Err(said) => {
                println!("round {round}: {said}");
                refused += 1;
            }
            Ok(_) => {
                assert_eq!(clone.ask(&Request::Resume, &[]), Ok(Reply::Done));
                // It lives, or its guest has ended; then it says so and goes.
                clone.control.send(&Request::Stats, &[]).unwrap();
                let heard = clone.hear();
                assert!(heard.is_some(), "round {round}: it died");
                ran += 1;
            }
        }
        let status = clone.child.try_wait().unwrap();
        let crashed =
            status.is_some_and(|s| std::os::unix::process::ExitStatusExt::signal(&s).is_some());
        assert!(!crashed, "round {round}: {status:?}");
    }
    println!("{refused} refused, {ran} ran");
    assert!(refused > 0 && ran > 0, "{refused} refused, {ran} ran");
}
