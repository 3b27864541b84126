//! A process's streams on this side: FIFOs, and the copying between them and
//! the user's own.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use nix::{sys::stat::Mode, unistd::mkfifo};
use tokio::{io::AsyncReadExt, net::unix::pipe, sync::Notify};

use crate::detach::{DetachKeys, Seen, Watch};

const CHUNK: usize = 64 << 10;

/// FIFOs for one process, in a directory of the sandbox's.
#[derive(Debug)]
pub(crate) struct Fifos {
    dir: PathBuf,
    stdin: Option<File>,
    stdout: pipe::Receiver,
    stderr: Option<pipe::Receiver>,
}

impl Fifos {
    /// Makes the FIFOs and opens this side of them. A terminal has no stderr.
    pub(crate) fn create(dir: &Path, stdin: bool, terminal: bool) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let make = |name: &str| {
            let path = dir.join(name);
            mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)
                .with_context(|| format!("create FIFO {}", path.display()))?;
            anyhow::Ok(path)
        };
        let reader = |name: &str| {
            let path = make(name)?;
            pipe::OpenOptions::new()
                .open_receiver(&path)
                .with_context(|| format!("open FIFO {}", path.display()))
        };
        let stdin = if stdin {
            let path = make("stdin")?;
            // Both ends, so that the supervisor finds a writer before the first
            // byte; it sees the end of file when this is dropped.
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .with_context(|| format!("open FIFO {}", path.display()))?;
            Some(file)
        } else {
            None
        };
        Ok(Self {
            stdout: reader("stdout")?,
            stderr: (!terminal).then(|| reader("stderr")).transpose()?,
            stdin,
            dir: dir.to_path_buf(),
        })
    }

    /// Path of a FIFO as the Task API takes it; empty where there is none.
    pub(crate) fn path(&self, name: &str) -> String {
        let there = match name {
            "stdin" => self.stdin.is_some(),
            "stderr" => self.stderr.is_some(),
            _ => true,
        };
        if there {
            self.dir.join(name).display().to_string()
        } else {
            String::new()
        }
    }

    /// Starts copying, once the supervisor has opened its side. The returned
    /// future ends when all output has been shown.
    pub(crate) fn attach(self) -> impl Future<Output = ()> {
        self.attach_with(true, None).0
    }

    /// The same; input is copied if it is wanted, and a second future ends when `keys` come
    /// in it.
    pub(crate) fn attach_with(
        self,
        input: bool,
        keys: Option<DetachKeys>,
    ) -> (impl Future<Output = ()>, impl Future<Output = ()>) {
        let Self {
            dir,
            stdin,
            stdout,
            stderr,
        } = self;
        let left = Typed::default();
        if let Some(fifo) = stdin.filter(|_| input) {
            left.copy(fifo, keys);
        }
        let shown = async move {
            let err = async {
                if let Some(stderr) = stderr {
                    copy(stderr, io::stderr().as_fd().try_clone_to_owned()).await;
                }
            };
            tokio::join!(copy(stdout, io::stdout().as_fd().try_clone_to_owned()), err);
            // Gone already when the sandbox is.
            let _ = std::fs::remove_dir_all(dir);
        };
        (shown, async move { left.detached().await })
    }
}

/// The user's input, on its way to a FIFO.
#[derive(Debug, Default)]
pub(crate) struct Typed(Arc<Notify>);

impl Typed {
    /// Starts copying it, until `keys` come.
    pub(crate) fn copy(&self, fifo: File, keys: Option<DetachKeys>) {
        let left = self.0.clone();
        let mut watch = Watch::new(keys.unwrap_or_default());
        // A thread, for a read of a terminal or a file cannot be awaited. It
        // ends with the program.
        std::thread::spawn(move || copy_stdin(fifo, &mut watch, &left));
    }

    /// Returns when the keys have come.
    pub(crate) async fn detached(&self) {
        self.0.notified().await;
    }
}

fn copy_stdin(mut fifo: File, watch: &mut Watch, left: &Notify) {
    let mut buffer = vec![0; CHUNK];
    let mut stdin = io::stdin().lock();
    loop {
        match stdin.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => match watch.take(&buffer[..read]) {
                Seen::Input(bytes) => {
                    if fifo.write_all(&bytes).is_err() {
                        break;
                    }
                }
                Seen::Detached(bytes) => {
                    let _ = fifo.write_all(&bytes);
                    left.notify_one();
                    // Whoever was told makes the FIFO outlive this end of it.
                    std::mem::forget(fifo);
                    return;
                }
            },
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
}

async fn copy(mut from: pipe::Receiver, to: io::Result<std::os::fd::OwnedFd>) {
    let mut to = to.ok().map(File::from);
    let mut buffer = vec![0; CHUNK];
    while let Ok(read) = from.read(&mut buffer).await {
        if read == 0 {
            break;
        }
        // The user's side may be slow: that is what stops the container.
        if let Some(file) = &mut to
            && file.write_all(&buffer[..read]).is_err()
        {
            to = None;
        }
    }
}
