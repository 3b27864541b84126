//! A host of a test's own: network namespace, directories and name server of its own; the
//! images are those of the other tests.

use std::{
    cell::RefCell,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use walnut_tests::{
    Namespace, assert_gone, client::Done, client::finish, command, host, processes, unique, until,
};

/// The host's address towards the outside, and the outside's.
pub(super) const HOST: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
pub(super) const OUTSIDE: [&str; 2] = ["192.0.2.2", "2001:db8::2"];

/// Tells who asks what the asker's address is, at port 9000.
const WHO: &str = "
import http.server
class Who(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.client_address[0].encode())
http.server.HTTPServer(('0.0.0.0', 9000), Who).serve_forever()
";
/// A name server: every name has the address 198.51.100.9.
const NAMES: &str = "
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(('192.0.2.2', 53))
while True:
    ask, peer = server.recvfrom(4096)
    end = ask.index(0, 12) + 5
    v4 = ask[end - 4:end - 2] == bytes([0, 1])
    answer = bytes.fromhex('c00c00010001000000050004c6336409') if v4 else b''
    server.sendto(ask[:2] + bytes([0x81, 0x80, 0, 1, 0, v4, 0, 0, 0, 0]) + ask[12:end] + answer, peer)
";

pub(super) struct Node {
    namespace: Namespace,
    outside: Namespace,
    servers: Vec<Child>,
    pub(super) root: PathBuf,
    pub(super) run: PathBuf,
    ids: RefCell<Vec<String>>,
}

impl Node {
    /// With a link to the outside, where nobody knows a way to containers.
    pub(super) fn new() -> Self {
        let name = unique("net");
        let root = host().root.with_file_name(&name);
        fs::create_dir(&root).unwrap();
        symlink(host().root.join("images"), root.join("images")).unwrap();
        fs::write(
            root.join("resolv.conf"),
            "search example.test\nnameserver 192.0.2.2\n",
        )
        .unwrap();
        let (namespace, outside) = (Namespace::new(), Namespace::new());
        namespace.ip("link set lo up");
        outside.ip("link set lo up");
        namespace.ip("link add wan type veth peer name lan");
        namespace.ip(&format!("link set lan netns {}", outside.pid()));
        for (end, link, addresses) in [(&namespace, "wan", HOST), (&outside, "lan", OUTSIDE)] {
            end.ip(&format!("link set {link} up"));
            end.ip(&format!("addr add {}/24 dev {link}", addresses[0]));
            end.ip(&format!("addr add {}/64 dev {link} nodad", addresses[1]));
        }
        let mut node = Self {
            namespace,
            outside,
            servers: Vec::new(),
            root,
            run: format!("/tmp/walnut-{name}").into(),
            ids: RefCell::default(),
        };
        for server in [WHO, NAMES] {
            let mut command = node.outside.within("python3");
            command.args(["-c", server]).stderr(Stdio::null());
            node.servers.push(command.spawn().unwrap());
        }
        node
    }

    /// `walnut`, as it is called there; `IMAGE` names the image.
    pub(super) fn command(&self, args: &[&str]) -> Command {
        let mut inside = self.namespace.within("unshare");
        let image = host().image.as_str();
        let walnut = command(&[]);
        inside
            .args(["--mount", "sh", "-c"])
            .arg("mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"")
            .arg(self.root.join("resolv.conf"))
            .arg(walnut.get_program())
            .args(
                args.iter()
                    .map(|&arg| if arg == "IMAGE" { image } else { arg }),
            )
            .env("WALNUT_ROOT", &self.root)
            .env("WALNUT_RUN", &self.run)
            .env_remove("WALNUT_LIB")
            .env_remove("WALNUT_DRIVER")
            .env_remove("WALNUT_NETWORK");
        inside
    }

    #[track_caller]
    pub(super) fn walnut(&self, args: &[&str]) -> Done {
        finish(&mut self.command(args), b"")
    }

    /// Panics unless it fails with one sentence that has `part` in it.
    #[track_caller]
    pub(super) fn fails(&self, args: &[&str], part: &str) {
        let done = self.walnut(args);
        let said: Vec<_> = done
            .stderr
            .lines()
            .filter(|l| l.starts_with("walnut: "))
            .collect();
        assert_ne!(done.code, 0, "{done:#?}");
        assert!(
            said.len() == 1 && said[0].contains(part),
            "{part:?} not in one sentence of {done:#?}"
        );
    }

    /// A container behind; its ID.
    #[track_caller]
    pub(super) fn start(&self, args: &[&str]) -> String {
        let done = self.walnut(&[&["run", "-d"], args].concat()).exits(0);
        let id = done.stdout.trim_end().to_owned();
        self.ids.borrow_mut().push(id.clone());
        id
    }

    /// A container in front, with a shell script; what it prints.
    #[track_caller]
    pub(super) fn prints(&self, args: &[&str], script: &str) -> String {
        let tail = ["IMAGE", "sh", "-c", script];
        let all = [&["run", "--rm"], args, &tail].concat();
        self.walnut(&all).exits(0).stdout
    }

    #[track_caller]
    pub(super) fn json(&self, args: &[&str]) -> Value {
        let done = self.walnut(args).exits(0);
        serde_json::from_str(&done.stdout).unwrap()
    }

    /// Addresses of a container on a network, IPv4's first, without their prefixes.
    #[track_caller]
    pub(super) fn addresses(&self, network: &str, container: &str) -> Vec<String> {
        let shown = self.json(&["network", "inspect", network]);
        let members = shown[0]["containers"].as_array().unwrap();
        let member = members.iter().find(|member| member["name"] == container);
        let addresses = member.unwrap()["addresses"].as_array().unwrap();
        let bare = |ip: &Value| ip.as_str().unwrap().split('/').next().unwrap().to_owned();
        addresses.iter().map(bare).collect()
    }

    /// A program of Python's on the host.
    #[track_caller]
    pub(super) fn on_the_host(&self, program: &str) -> Done {
        finish(self.namespace.within("python3").args(["-c", program]), b"")
    }

    /// One that goes on.
    pub(super) fn on_the_host_behind(&self, program: &str) -> Child {
        let mut command = self.namespace.within("python3");
        command.args(["-c", program]).stdin(Stdio::piped());
        command.spawn().unwrap()
    }

    /// The same in the outside.
    #[track_caller]
    pub(super) fn outside(&self, program: &str) -> Done {
        finish(self.outside.within("python3").args(["-c", program]), b"")
    }

    /// What the host has of interfaces, or of rules.
    #[track_caller]
    pub(super) fn host_has(&self, program: &str, args: &[&str]) -> String {
        let mut command = self.namespace.within(program);
        finish(command.args(args), b"").exits(0).stdout
    }

    /// Kills processes that have `word` in their command line, as `kill -9` does.
    #[track_caller]
    pub(super) fn kill(&self, word: &str, program: &str) {
        let mut pid = None;
        until(&format!("{program} of {word} runs"), || {
            let mut found = processes(word).into_iter();
            pid = found.find(|(_, name)| name.starts_with(program));
            pid.is_some()
        });
        let pid = nix::unistd::Pid::from_raw(pid.unwrap().0);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    /// What is there of containers' networks.
    fn traces(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut lines = |what: &str, text: &str, words: &[&str]| {
            let bad = text
                .lines()
                .filter(|l| words.iter().any(|word| l.contains(word)));
            found.extend(bad.map(|line| format!("{what}: {line}")));
        };
        let links = self.host_has("ip", &["-brief", "link"]);
        lines("link", &links, &["veth", "eth0"]);
        for program in ["iptables-save", "ip6tables-save"] {
            // Rules of one container, by its ID, addresses or ports.
            let words = [
                " id: ", "-s 10.", "-d 10.", "CNI-DN-", "-s fd", "-d fd", "--dport",
            ];
            let rules = self.host_has(program, &[]);
            lines(program, &rules, &words);
        }
        let mut walk = vec![
            self.root.join("networks"),
            self.root.join("containers"),
            self.run.clone(),
        ];
        while let Some(dir) = walk.pop() {
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let (path, name) = (entry.path(), entry.file_name());
                let name = name.to_string_lossy();
                let id = self.ids.borrow().iter().any(|id| *name == **id);
                let lease = name.parse::<std::net::IpAddr>().is_ok();
                let known = ["network.json", "making.json", "aardvark.pid"];
                if id && !dir.ends_with("containers") || lease || known.contains(&&*name) {
                    found.push(path.display().to_string());
                } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    walk.push(path);
                }
            }
        }
        for id in self.ids.borrow().iter() {
            found.extend(
                processes(id)
                    .into_iter()
                    .map(|(pid, name)| format!("process {pid} {name}")),
            );
        }
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            if line.contains("aardvark-dns\0") && line.contains(&*self.run.to_string_lossy()) {
                found.push(format!("process {}", entry.path().display()));
            }
        }
        found
    }

    /// Panics unless nothing of any container is left.
    #[track_caller]
    pub(super) fn assert_nothing_left(&self) {
        assert_gone(|| self.traces());
    }

    /// Removes networks; nothing of them is left.
    #[track_caller]
    pub(super) fn remove(&self, networks: &[&str]) {
        self.walnut(&[&["network", "rm"], networks].concat())
            .exits(0);
        let links = self.host_has("ip", &["-brief", "link"]);
        assert!(!links.contains("walnut-br"), "{links}");
        for program in ["iptables-save", "ip6tables-save"] {
            let rules = self.host_has(program, &[]);
            assert!(!rules.contains("walnut-br"), "{rules}");
        }
        let left: Vec<_> = fs::read_dir(self.root.join("networks/leases"))
            .into_iter()
            .flatten()
            .flatten()
            .collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(self.walnut(&["network", "ls", "-q"]).exits(0).stdout, "");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let all = finish(&mut self.command(&["ps", "-aq"]), b"").stdout;
        let all: Vec<_> = all.lines().collect();
        if !all.is_empty() {
            finish(&mut self.command(&[&["rm", "-f"], &all[..]].concat()), b"");
        }
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        let template = |path: &Path| processes(&path.display().to_string()).is_empty();
        until("nobody is at work there", || template(&self.root));
        let _ = fs::remove_dir_all(&self.root);
        let _ = fs::remove_dir_all(&self.run);
    }
}
