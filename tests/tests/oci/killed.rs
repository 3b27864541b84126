//! Whoever is killed, nothing stays, and everybody is told the same.

use walnut_tests::{machine, unique};

use crate::{engine::Engine, place::Place};

const FOR_EVER: &str = "while :; do sleep 1; done";

#[test]
fn a_killed_supervisor_takes_its_container_along() {
    let place = Place::new();
    let bundle = place.bundle(FOR_EVER, |_| ());
    let id = unique("oci-lost");
    let id = id.as_str();
    for started in [true, false] {
        match started {
            true => place.start(id, &bundle),
            false => drop(place.create(id, &bundle, &[]).exits(0)),
        }
        place.kill_process("containerd-shim-walnut-v2");
        place.until_is(id, "stopped");
        let late = place.oci(&["kill", id, "KILL"]).exits(1);
        assert!(late.stderr.contains("container not running"), "{late:#?}");
        place.oci(&["delete", id]).exits(0);
        place.assert_nothing_left();
    }
}

#[test]
fn a_killed_machine_ends_its_container() {
    let place = Place::new();
    let bundle = place.bundle(FOR_EVER, |_| ());
    let id = unique("oci-dead");
    let id = id.as_str();
    for started in [true, false] {
        match started {
            true => place.start(id, &bundle),
            false => drop(place.create(id, &bundle, &[]).exits(0)),
        }
        place.kill_process(machine().0);
        place.until_is(id, "stopped");
        place.oci(&["exec", id, "true"]).exits(255);
        let late = place.oci(&["kill", id, "KILL"]).exits(1);
        assert!(late.stderr.contains("container not running"), "{late:#?}");
        place.oci(&["delete", id]).exits(0);
        place.assert_nothing_left();
    }
    // In front, somebody reads why.
    place.note(id);
    let args = ["run", "--bundle", bundle.to_str().unwrap(), id];
    let mut command = place.command(&args);
    let waits = std::thread::scope(|scope| {
        let run = scope.spawn(|| walnut_tests::client::finish(&mut command, b""));
        place.until_runs(id);
        place.kill_process(machine().0);
        run.join().unwrap()
    });
    let done = waits.exits(1);
    assert!(done.stderr.contains("signal 9"), "{done:#?}");
}

#[test]
fn podman_is_told_of_what_was_killed() {
    let engine = Engine::new();
    for name in ["containerd-shim-walnut-v2", machine().0] {
        engine
            .podman(&[
                "run",
                "-d",
                "--network=none",
                "--name=c",
                "demo",
                "sleep",
                "infinity",
            ])
            .exits(0);
        engine.note_all();
        engine.place.kill_process(name);
        let code = engine.podman(&["wait", "c"]).exits(0);
        assert_eq!(code.stdout, "137\n", "{name} was killed: {code:#?}");
        engine.until_shows("c", "{{.State.Status}}", "exited");
        engine.podman(&["exec", "c", "true"]).exits(255);
        engine.podman(&["rm", "c"]).exits(0);
        engine.assert_nothing_left();
    }
}
