//! A directory that a guest shares.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

const VIRTIOFSD: [&str; 3] = [
    "/usr/libexec/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
    "/usr/lib/virtiofsd",
];

/// A directory with a greeting, and the real virtiofsd that serves it.
pub(crate) struct Share {
    pub(crate) child: Child,
    pub(crate) socket: UnixStream,
}

impl Share {
    /// A directory `root` in `dir` with a file `greeting`.
    pub(crate) fn new(dir: &Path, greeting: &str) -> Self {
        let program = VIRTIOFSD.iter().map(PathBuf::from).find(|p| p.exists());
        let (root, path) = (dir.join("root"), dir.join("socket"));
        std::fs::create_dir_all(&root).unwrap();
        std::fs::write(root.join("greeting"), greeting).unwrap();
        let _ = std::fs::remove_file(&path);
        let mut command = Command::new(program.unwrap());
        command
            .arg(format!("--socket-path={}", path.display()))
            .args(["-o", &format!("source={}", root.display())])
            .stdin(Stdio::null());
        let mut child = command.spawn().unwrap();
        let socket = loop {
            match UnixStream::connect(&path) {
                Ok(socket) => break socket,
                Err(_) => assert_eq!(child.try_wait().unwrap(), None, "virtiofsd has ended"),
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        };
        Self { child, socket }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
