//! Supervisors that become other programs while everything else happens to them.

use std::{
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use walnut_tests::upgrade::{another_shim, upgrade};

use super::{World, plan::Random};

/// Longest between two rounds of upgrades, in milliseconds.
const PAUSE: usize = 2000;

/// Does `act`; meanwhile all shims become one program, and then another one, at moments drawn
/// from `seed`. Whether one of them does is its own to say: it may be busy, or dead.
pub(crate) fn meanwhile(world: &World, seed: u64, act: impl FnOnce()) {
    let dir = world.daemon.scratch();
    // They are known by the beginning of this name.
    let programs = ["a", "b"].map(|n| another_shim(dir, &format!("containerd-shim-walnut-{n}")));
    let (root, run) = (world.daemon.root().join("walnut"), world.daemon.file("w"));
    let (done, over) = channel::<()>();
    thread::scope(|scope| {
        let upgrades = scope.spawn(move || {
            let mut random = Random::new(seed);
            let (mut upgraded, mut unchanged) = (0u64, 0u64);
            for program in programs.iter().cycle() {
                let pause = random.below(PAUSE).try_into().unwrap();
                match over.recv_timeout(Duration::from_millis(pause)) {
                    Err(RecvTimeoutError::Timeout) => {}
                    _ => break,
                }
                let program = program.to_str().unwrap();
                let (_, rows) = upgrade(&root, &run, &["--all", "--program", program]);
                for row in rows {
                    match row["result"].as_str() {
                        Some("upgraded") => upgraded += 1,
                        _ => unchanged += 1,
                    }
                }
            }
            (upgraded, unchanged)
        });
        // Dropped when it has been done, or has failed.
        let done = done;
        act();
        drop(done);
        let (upgraded, unchanged) = upgrades.join().unwrap();
        println!("{upgraded} upgrades meanwhile, {unchanged} refused");
        assert!(upgraded > 0);
    });
}
