//! The real programs around the store: a registry, and what fills it.

#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// Runs a program; fails with its output, or with what to install.
pub(crate) fn run(dir: &Path, program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap_or_else(|e| {
            panic!("cannot run {program} ({e}); install skopeo umoci docker-registry erofs-utils attr busybox-static")
        });
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A `docker-registry` on a loopback port, gone with this value.
pub(crate) struct Registry {
    child: Child,
    pub(crate) dir: TempDir,
    pub(crate) port: u16,
}

impl Registry {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        Self::serve_in(dir, &data, "")
    }

    /// One more door to the data of another; `more` is added to its configuration, below
    /// `http`.
    pub(crate) fn serve(data: &Path, more: &str) -> Self {
        Self::serve_in(tempfile::tempdir().unwrap(), data, more)
    }

    fn serve_in(dir: TempDir, data: &Path, more: &str) -> Self {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp:\n  addr: '127.0.0.1:{port}'\n{more}",
            data.display()
        );
        std::fs::write(dir.path().join("config.yml"), config).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.path().join("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("cannot run docker-registry; install it");
        let this = Self { child, dir, port };
        let end = Instant::now() + Duration::from_secs(30);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < end, "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        this
    }

    pub(crate) fn name(&self, image: &str) -> String {
        format!("127.0.0.1:{}/{image}", self.port)
    }

    /// Where it keeps a blob, to damage it.
    pub(crate) fn blob(&self, hex: &str) -> PathBuf {
        self.dir
            .path()
            .join("data/docker/registry/v2/blobs/sha256")
            .join(&hex[..2])
            .join(hex)
            .join("data")
    }

    /// Pushes tag `tag` of an OCI layout.
    pub(crate) fn push(&self, layout: &Path, tag: &str, image: &str, extra: &[&str]) {
        let from = format!("oci:{}:{tag}", layout.display());
        let to = format!("docker://{}", self.name(image));
        let mut args = vec!["--insecure-policy", "copy", "-q", "--dest-tls-verify=false"];
        args.extend(extra);
        args.extend([from.as_str(), to.as_str()]);
        run(layout, "skopeo", &args);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An OCI layout `layout` in `dir` whose image `tag` has these tars as layers.
pub(crate) fn layout(dir: &Path, tag: &str, tars: &[PathBuf]) -> PathBuf {
    let layout = dir.join("layout");
    let image = format!("{}:{tag}", layout.display());
    if !layout.exists() {
        run(
            dir,
            "umoci",
            &["init", "--layout", layout.to_str().unwrap()],
        );
    }
    run(dir, "umoci", &["new", "--image", &image]);
    for tar in tars {
        let tar = tar.to_str().unwrap();
        run(dir, "umoci", &["raw", "add-layer", "--image", &image, tar]);
    }
    layout
}

/// A tar of regular files.
pub(crate) fn tar(path: &Path, files: &[(&str, &[u8])]) {
    let mut builder = tar::Builder::new(std::fs::File::create(path).unwrap());
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_000_000_000);
        // Set raw: the builder would refuse paths a hostile layer has.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, *data).unwrap();
    }
    builder.finish().unwrap();
}
