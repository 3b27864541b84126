//! Containers that have a terminal.

use std::{
    fs::File,
    io::{IoSliceMut, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::Path,
    sync::mpsc,
    thread,
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::json;
use walnut_tests::{Terminal, unique};

use crate::place::Place;

/// What podman and others do: they listen, and get the terminal's outer side.
fn listen(socket: &Path) -> mpsc::Receiver<File> {
    let listener = UnixListener::bind(socket).unwrap();
    let (give, get) = mpsc::channel();
    thread::spawn(move || {
        let (peer, _) = listener.accept().unwrap();
        let mut name = [0; 64];
        let mut iov = [IoSliceMut::new(&mut name)];
        let mut space = nix::cmsg_space!([i32; 1]);
        let message = recvmsg::<()>(
            peer.as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .unwrap();
        for control in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel just made this descriptor for this process alone.
                give.send(unsafe { OwnedFd::from_raw_fd(fds[0]) }.into())
                    .unwrap();
            }
        }
    });
    get
}

/// Reads until `text` has been shown.
fn shows(master: &mut File, text: &str) {
    let mut seen = String::new();
    let mut buffer = [0; 1024];
    while !seen.contains(text) {
        let read = master.read(&mut buffer);
        let read = read.unwrap_or_else(|e| panic!("{text:?} is not in {seen:?}: {e}"));
        seen.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
}

#[test]
fn run_in_front_shows_a_terminal_of_the_callers_size() {
    let place = Place::new();
    let bundle = place.bundle("stty size; read line; echo got $line; exit 4", |config| {
        config["process"]["terminal"] = json!(true);
    });
    let id = unique("oci-tty");
    place.note(&id);
    let command = place.command(&["run", "--bundle", bundle.to_str().unwrap(), &id]);
    let mut terminal = Terminal::start(command, 91, 17);
    terminal.shows("17 91");
    terminal.keys("hey\r");
    terminal.shows("got hey");
    assert_eq!(terminal.end(), 4);
}

#[test]
fn terminals_are_sent_over_the_console_socket() {
    let place = Place::new();
    let script = "stty size; read line; echo got $line; while :; do sleep 1; done";
    let bundle = place.bundle(script, |config| {
        config["process"]["terminal"] = json!(true);
        config["process"]["consoleSize"] = json!({"height": 33, "width": 44});
    });
    let id = unique("oci-console");
    let id = id.as_str();
    let without = place.create(id, &bundle, &[]).exits(1);
    assert!(without.stderr.contains("console socket"), "{without:#?}");
    let socket = place.dir.join("console");
    let get = listen(&socket);
    place
        .create(id, &bundle, &["--console-socket", socket.to_str().unwrap()])
        .exits(0);
    let mut master = get.recv_timeout(walnut_tests::DEADLINE).unwrap();
    place.oci(&["start", id]).exits(0);
    shows(&mut master, "33 44");
    master.write_all(b"there\r").unwrap();
    shows(&mut master, "got there");

    // A second one, for a process beside it.
    let socket = place.dir.join("console-2");
    let get = listen(&socket);
    let socket = socket.to_str().unwrap();
    let script = "read line; echo have $line";
    let args = [
        "exec",
        "-t",
        "-d",
        "--console-socket",
        socket,
        id,
        "sh",
        "-c",
        script,
    ];
    place.oci(&args).exits(0);
    let mut second = get.recv_timeout(walnut_tests::DEADLINE).unwrap();
    second.write_all(b"this\r").unwrap();
    shows(&mut second, "have this");
    place.oci(&["delete", "--force", id]).exits(0);
}
