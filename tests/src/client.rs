//! Programs of others that are driven against the product, and the test image as they
//! take it.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use crate::DEADLINE;

/// What a command left behind.
#[derive(Debug, PartialEq, Eq)]
pub struct Done {
    /// Exit code; -1 if there is none.
    pub code: i32,
    /// Standard output, as text.
    pub stdout: String,
    /// Standard error, as text.
    pub stderr: String,
}

impl Done {
    /// Panics unless the exit code is `code`.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }
}

/// Where this repository is.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ is in the repository")
}

/// Where the tests keep what takes long to make; never on an overlay.
pub fn cache() -> PathBuf {
    std::env::var_os("WALNUT_CACHE").map_or_else(
        || Path::new(&std::env::var_os("HOME").expect("HOME is set")).join(".cache/walnut"),
        PathBuf::from,
    )
}

/// The test image as one file, an OCI archive; the first caller makes it.
pub fn image() -> PathBuf {
    archive("build.sh")
}

/// The same of the image with node, systemd and programs of Go's.
pub fn programs_image() -> PathBuf {
    archive("programs.sh")
}

fn archive(script: &str) -> PathBuf {
    let dir = cache().join("e2e");
    fs::create_dir_all(&dir).expect("create the tests' root");
    let lock = fs::File::create(dir.join("containerd.lock")).expect("create the lock");
    lock.lock().expect("lock");
    let built = Command::new(repository().join("tests/image").join(script))
        .stderr(Stdio::null())
        .output()
        .expect("run the script");
    assert!(built.status.success(), "tests/image/{script} failed");
    let layout = String::from_utf8(built.stdout).expect("text");
    let layout = Path::new(layout.lines().last().expect("the layout's path"));
    let hash = layout.parent().and_then(Path::file_name);
    let file = dir
        .join(hash.expect("the image's hash"))
        .with_extension("tar");
    if !file.exists() {
        let new = file.with_extension("new");
        let packed = Command::new("tar")
            .arg("-C")
            .arg(layout)
            .arg("-cf")
            .args([new.as_os_str(), ".".as_ref()])
            .status()
            .expect("run tar");
        assert!(packed.success());
        fs::rename(&new, &file).expect("put the image in place");
    }
    file
}

/// A disk of this host's, by its name in /dev.
pub fn disk() -> String {
    let disks = fs::read_dir("/sys/block").expect("list disks").flatten();
    let mut names = disks.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let there = |name: &String| Path::new("/dev").join(name).exists();
    names.find(there).expect("a host has a disk")
}

/// Runs a command to its end, and kills one that reaches the deadline.
#[track_caller]
pub fn finish(command: &mut Command, input: &[u8]) -> Done {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start a program");
    let mut stdin = child.stdin.take().expect("piped");
    let input = input.to_vec();
    let writer = thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
    let reader = |mut from: Box<dyn Read + Send>| {
        let all = Arc::new(Mutex::new(Vec::new()));
        let so_far = Arc::clone(&all);
        let thread = thread::spawn(move || {
            let mut some = [0; 65536];
            while let Ok(n @ 1..) = from.read(&mut some) {
                so_far.lock().expect("reader").extend_from_slice(&some[..n]);
            }
        });
        (thread, all)
    };
    let text =
        |all: &Mutex<Vec<u8>>| String::from_utf8_lossy(&all.lock().expect("reader")).into_owned();
    let stdout = reader(Box::new(child.stdout.take().expect("piped")));
    let stderr = reader(Box::new(child.stderr.take().expect("piped")));
    let start = Instant::now();
    let mut waited_for = || match child.try_wait().expect("wait") {
        None => false,
        Some(_) => stdout.0.is_finished() && stderr.0.is_finished() && writer.is_finished(),
    };
    while !waited_for() {
        if start.elapsed() > DEADLINE {
            // Nothing is waited for: another may hold its streams for good.
            let (ended, _) = (child.try_wait(), child.kill());
            panic!(
                "it hangs: {command:?}: {ended:?}\n{}\n{}",
                text(&stdout.1),
                text(&stderr.1)
            );
        }
        thread::sleep(Duration::from_millis(5));
    }
    Done {
        code: child.wait().expect("wait").code().unwrap_or(-1),
        stdout: text(&stdout.1),
        stderr: text(&stderr.1),
    }
}
