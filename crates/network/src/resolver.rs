//! Names of containers on the networks that have them: `aardvark-dns` answers on the
//! host's address in each, and asks the host's name servers for what it does not know.
//!
//! One process serves a node's networks. What it is to know is in a directory of files, one
//! a network; it ends when there is none. It may be killed at any time: whoever changes
//! something, or looks after what the dead have left, starts it again.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    os::unix::{
        fs::{DirBuilderExt, OpenOptionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tracing::debug;

use crate::{Error, Result, networks::program};

const PROGRAM: &str = "aardvark-dns";
/// Where packages put it, beside `PATH`.
const PLACES: &str = "/usr/lib/podman:/usr/libexec/podman:/usr/local/libexec/podman";
/// Where its files are, and nothing else: it reads all that there is.
const FILES: &str = "networks";
/// Where it writes its own PID, among them.
const PID: &str = "aardvark.pid";
const LOCK: &str = ".lock";
const PORT: u16 = 53;
/// Where questions of an internal network's containers would go: no datagram is sent there.
const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::BROADCAST);
/// Longest it may take to know what it has been told.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long it may not answer before it is started anew.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(20);
/// How long one question waits for its answer.
const ANSWER: Duration = Duration::from_millis(100);

/// The name server of a node's networks.
#[derive(Debug, Clone)]
pub struct Resolver {
    dir: PathBuf,
}

/// A container on a network.
#[derive(Debug, Clone, Copy)]
pub struct Named<'a> {
    /// Its ID.
    pub id: &'a str,
    /// Its names; the first is asked for to see whether they are known.
    pub names: &'a [&'a str],
    /// Its addresses on the network.
    pub addresses: &'a [IpAddr],
    /// Who is asked for it what is not known; the host's name servers, if nobody is named.
    pub forward: &'a [IpAddr],
    /// Nobody is asked.
    pub internal: bool,
}

impl Resolver {
    /// The one whose files are in this directory, which is made on its first use and does
    /// not outlive a boot.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into() }
    }

    /// Whether the program is there.
    ///
    /// # Errors
    /// If it is not; the error names the package.
    pub fn check() -> Result<()> {
        find().map(drop)
    }

    /// Lets the other containers of a network find this one. `servers` are the host's
    /// addresses in it.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn add(&self, network: &str, servers: &[IpAddr], named: &Named<'_>) -> Result<()> {
        let files = self.files();
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&files);
        made.map_err(Error::file("create the directory", files))?;
        let _lock = self.lock()?;
        let mut entries = self.entries(network)?;
        entries.retain(|line| id(line) != named.id);
        entries.push(line(named));
        self.write(network, &heading(servers), &entries)?;
        self.tell()?;
        self.answers(network, servers, named)
    }

    /// Waits until the servers know the container.
    fn answers(&self, network: &str, servers: &[IpAddr], named: &Named<'_>) -> Result<()> {
        let (Some(name), Some(ip)) = (named.names.first(), named.addresses.first()) else {
            return Ok(());
        };
        let until = Instant::now() + DEADLINE;
        let mut patience = Instant::now() + PATIENCE;
        for server in servers {
            while !knows(*server, name, *ip).unwrap_or(false) {
                if Instant::now() > until {
                    return Err(Error::Config(format!(
                        "wait for the name server of the network {network}: {PROGRAM} does not answer on {}; does another program have this port?",
                        SocketAddr::new(*server, PORT)
                    )));
                }
                std::thread::sleep(PAUSE);
                // It ends, or goes without, if it cannot listen on an address that is not ready.
                let pid = self.pid();
                if pid.is_none() || Instant::now() > patience {
                    self.stop(pid)?;
                    self.start()?;
                    patience = Instant::now() + PATIENCE;
                }
            }
        }
        Ok(())
    }

    /// Forgets a container, if it knows it.
    ///
    /// # Errors
    /// If its files cannot be written.
    pub fn remove(&self, network: &str, container: &str) -> Result<()> {
        if !self.file(network).exists() {
            return Ok(());
        }
        let _lock = self.lock()?;
        let mut entries = self.entries(network)?;
        entries.retain(|line| id(line) != container);
        let path = self.file(network);
        if entries.is_empty() {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::file("remove", path)(e));
                }
                _ => {}
            }
        } else {
            let heading = self.heading(network)?;
            self.write(network, &heading, &entries)?;
        }
        self.tell()
    }

    /// Starts it again, if it is not there and there is something that it should know.
    ///
    /// # Errors
    /// If it does not start.
    pub fn revive(&self) -> Result<()> {
        if !self.files().exists() || self.pid().is_some() {
            return Ok(());
        }
        let _lock = self.lock()?;
        if self.pid().is_none() && self.networks()? > 0 {
            return self.start();
        }
        Ok(())
    }

    fn files(&self) -> PathBuf {
        self.dir.join(FILES)
    }

    fn file(&self, network: &str) -> PathBuf {
        self.files().join(network)
    }

    fn lock(&self) -> Result<File> {
        let path = self.dir.join(LOCK);
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(Error::file("open", &path))?;
        lock.lock().map_err(Error::file("lock", &path))?;
        Ok(lock)
    }

    fn read(&self, network: &str) -> Result<String> {
        match fs::read_to_string(self.file(network)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            text => text.map_err(Error::file("read", self.file(network))),
        }
    }

    fn heading(&self, network: &str) -> Result<String> {
        let text = self.read(network)?;
        Ok(text.lines().next().unwrap_or_default().to_owned())
    }

    fn entries(&self, network: &str) -> Result<Vec<String>> {
        let text = self.read(network)?;
        Ok(text.lines().skip(1).map(str::to_owned).collect())
    }

    fn write(&self, network: &str, heading: &str, entries: &[String]) -> Result<()> {
        let (path, temp) = (self.file(network), self.dir.join(format!(".{network}.new")));
        let written = || -> io::Result<()> {
            let mut file = File::create(&temp)?;
            writeln!(file, "{heading}")?;
            for line in entries {
                writeln!(file, "{line}")?;
            }
            fs::rename(&temp, &path)
        };
        written().map_err(Error::file("write", &path))
    }

    /// How many networks there are.
    fn networks(&self) -> Result<usize> {
        let files = self.files();
        let entries = fs::read_dir(&files).map_err(Error::file("list", files))?;
        let names = entries.flatten().map(|entry| entry.file_name());
        Ok(names.filter(|name| name != PID).count())
    }

    /// Its process, if that is there. The file may be of one that was killed, whose number is
    /// another's by now.
    fn pid(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.files().join(PID)).ok()?;
        let pid: i32 = text.trim().parse().ok().filter(|pid| *pid > 1)?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut words = line.split(|byte| *byte == 0);
        let files = self.files();
        let own = files.as_os_str().as_encoded_bytes();
        words.any(|word| word == own).then(|| Pid::from_raw(pid))
    }

    /// Has it read its files; ends it if there are none.
    fn tell(&self) -> Result<()> {
        let networks = self.networks()?;
        match self.pid() {
            pid if networks == 0 => self.stop(pid),
            Some(pid) if kill(pid, Signal::SIGHUP).is_ok() => Ok(()),
            _ => self.start(),
        }
    }

    /// Returns when it is gone: who is told something while it ends would not hear it.
    fn stop(&self, pid: Option<Pid>) -> Result<()> {
        let until = Instant::now() + DEADLINE;
        let mut signal = Signal::SIGTERM;
        while let Some(pid) = pid.filter(|pid| self.pid() == Some(*pid)) {
            let _ = kill(pid, signal);
            if Instant::now() > until {
                signal = Signal::SIGKILL;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let path = self.files().join(PID);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::file("remove", path)(e)),
            _ => Ok(()),
        }
    }

    fn start(&self) -> Result<()> {
        let program = find()?;
        let mut command = Command::new(&program);
        command
            .arg("--config")
            .arg(self.files())
            .args(["--port", &PORT.to_string(), "run"])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // Of what the caller holds, locks above all, it keeps nothing.
        // SAFETY: both are system calls and no more.
        unsafe {
            command.pre_exec(|| {
                let all = (3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
                match libc::syscall(libc::SYS_close_range, all.0, all.1, all.2) {
                    0 if libc::setsid() != -1 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        // It goes its own way when it is up.
        let status = command.status();
        let status = status.map_err(Error::file("execute", &program))?;
        debug!(%status, "name server started");
        if !status.success() {
            return Err(Error::Config(format!(
                "start {}: it ended with {status}",
                program.display()
            )));
        }
        Ok(())
    }
}

fn find() -> Result<PathBuf> {
    program(PROGRAM, PLACES).ok_or_else(|| {
        Error::Config(format!(
            "look for {PROGRAM}, which tells containers of a network each other's addresses: it is nowhere in PATH or {PLACES}; install the package {PROGRAM}, or make the network with --disable-dns"
        ))
    })
}

fn heading(servers: &[IpAddr]) -> String {
    list(servers)
}

fn list(addresses: &[IpAddr]) -> String {
    let words: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    words.join(",")
}

/// A line of a network's file: ID, addresses of each family, names, who is asked.
fn line(named: &Named<'_>) -> String {
    let of = |v4: bool| {
        let all = named.addresses.iter().copied();
        list(&all.filter(|ip| ip.is_ipv4() == v4).collect::<Vec<_>>())
    };
    let forward = match named.internal {
        true => list(&[NOWHERE]),
        false => list(named.forward),
    };
    let line = format!(
        "{} {} {} {} {forward}",
        named.id,
        of(true),
        of(false),
        named.names.join(",")
    );
    line.trim_end().to_owned()
}

fn id(line: &str) -> &str {
    line.split(' ').next().unwrap_or_default()
}

/// Whether a server says that a name has this address.
fn knows(server: IpAddr, name: &str, ip: IpAddr) -> io::Result<bool> {
    let socket = UdpSocket::bind((
        match server {
            IpAddr::V4(_) => IpAddr::from([0; 4]),
            IpAddr::V6(_) => IpAddr::from([0; 16]),
        },
        0,
    ))?;
    socket.set_read_timeout(Some(ANSWER))?;
    socket.connect((server, PORT))?;
    socket.send(&question(name, ip.is_ipv4()))?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer)?;
    let answer = answer.get(..length).unwrap_or_default();
    let bytes = match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    Ok(answer.windows(bytes.len()).any(|window| window == bytes))
}

/// A question of DNS's (RFC 1035 §4.1) for a name's addresses of one family.
fn question(name: &str, v4: bool) -> Vec<u8> {
    const RECURSION_DESIRED: u16 = 0x100;
    const IN: u16 = 1;
    let kind: u16 = if v4 { 1 } else { 28 };
    let mut message = Vec::new();
    for word in [0, RECURSION_DESIRED, 1, 0, 0, 0] {
        message.extend(u16::to_be_bytes(word));
    }
    for label in name.split('.') {
        let label = label.as_bytes();
        let length = u8::try_from(label.len()).unwrap_or(u8::MAX).min(63);
        message.push(length);
        message.extend(label.iter().take(length.into()));
    }
    message.push(0);
    for word in [kind, IN] {
        message.extend(word.to_be_bytes());
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_what_the_server_reads() {
        let addresses = ["192.0.2.5", "fd00::5"].map(|ip| ip.parse().unwrap());
        let named = Named {
            id: "c1",
            names: &["web", "c1"],
            addresses: &addresses,
            forward: &[],
            internal: false,
        };
        assert_eq!(line(&named), "c1 192.0.2.5 fd00::5 web,c1");
        assert_eq!(id(&line(&named)), "c1");
        let only = Named {
            addresses: &addresses[..1],
            ..named
        };
        assert_eq!(line(&only), "c1 192.0.2.5  web,c1");
        let asks = Named {
            forward: &addresses,
            ..only
        };
        assert_eq!(line(&asks), "c1 192.0.2.5  web,c1 192.0.2.5,fd00::5");
        let alone = Named {
            internal: true,
            ..asks
        };
        assert_eq!(line(&alone), "c1 192.0.2.5  web,c1 255.255.255.255");
    }

    #[test]
    fn a_question_is_one_of_dns() {
        let expected = b"\0\0\x01\0\0\x01\0\0\0\0\0\0\x03web\x01x\0\0\x01\0\x01";
        assert_eq!(question("web.x", true), expected);
        assert_eq!(question("a", false)[15..], [0, 28, 0, 1]);
    }

    #[test]
    fn who_is_not_known_is_forgotten_quietly() {
        let dir = tempfile::tempdir().unwrap();
        let resolver = Resolver::new(&dir.path().join("absent"));
        resolver.remove("net", "c1").unwrap();
        resolver.revive().unwrap();
        assert!(!dir.path().join("absent").exists());
        // A PID that is somebody else's.
        let resolver = Resolver::new(dir.path());
        fs::create_dir(resolver.files()).unwrap();
        fs::write(resolver.files().join(PID), std::process::id().to_string()).unwrap();
        assert_eq!(resolver.pid(), None);
        resolver.revive().unwrap();
    }
}
