//! `walnut cp`: files to and from a running container, as tar streams.
//!
//! In the container a process of Walnut's own packs or unpacks ([`walnut_archive`]), so that
//! nothing is needed of the image. What comes from there is a stranger's: it is unpacked by
//! descriptors, below the one directory that was named.

mod place;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IsTerminal, Read, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use containerd_shim_protos::{
    api::ExecProcessRequest,
    protobuf::{MessageField, well_known_types::any::Any},
};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::stat::Mode,
    unistd::mkfifo,
};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use walnut_archive::{FIELD, Kind, Operation, Ownership, Rules, Stat, pack, unpack};
use walnut_sandbox::{Error, Layout, Record, Status, find};

use self::place::{Copied, End, Place, absolute, place};
use crate::{client::Supervisor, create::new_id};

/// Most that is read of what a process complains of, or of what it says of a path.
const SAID_MAX: u64 = 16 << 10;
/// What copying may take, in a container that may have given up everything else.
const CAPABILITIES: [&str; 8] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_MKNOD",
    "CAP_SETGID",
    "CAP_SETUID",
];

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut cp web:/etc/nginx/nginx.conf .
  walnut cp ./site web:/usr/share/nginx/html # the directory, in the other one
  walnut cp ./site/. web:/usr/share/nginx/html  # what is in it
  walnut cp web:/var/log - | tar -t          # a tar stream
  tar -c data | walnut cp - web:/srv

Files are the container's root's, or those of who copies them out, unless -a is given. The container must
run: without its machine it has no root file system.")]
pub(crate) struct CpArgs {
    /// Keep owners
    #[arg(short, long)]
    archive: bool,
    /// Copy what a symbolic link in SOURCE leads to, and not the link
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// Say nothing, as is done anyway
    #[arg(short, long, hide = true)]
    quiet: bool,
    /// CONTAINER:PATH, a path of the host's, or - for a tar stream
    source: String,
    /// The same
    destination: String,
}

pub(crate) async fn cp(args: CpArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    match (End::of(&args.source), End::of(&args.destination)) {
        (End::Container(name, path), to @ (End::Host(_) | End::Stream)) => {
            let inside = Inside::open(&layout, &name).await?;
            inside.copy_out(&args, &absolute(&path), to).await?;
        }
        (from @ (End::Host(_) | End::Stream), End::Container(name, path)) => {
            let inside = Inside::open(&layout, &name).await?;
            inside.copy_in(&args, from, &absolute(&path)).await?;
        }
        (End::Container(..), End::Container(..)) => bail!(
            "cp: from one container to another goes by a stream: walnut cp A:/path - | walnut cp - B:/path"
        ),
        _ => bail!("cp: one of both must be CONTAINER:PATH"),
    }
    Ok(0)
}

/// A running container, as it is copied from and to.
struct Inside {
    supervisor: Supervisor,
    run_dir: PathBuf,
    /// The container's own process, which copying ones are like.
    process: Value,
}

impl Inside {
    async fn open(layout: &Layout, name: &str) -> Result<Self> {
        let record: Record = find(layout, name)?;
        match record.status {
            Status::Running => {}
            Status::Paused => bail!(Error::WrongState(format!(
                "container {} is paused; unpause it first",
                record.name
            ))),
            status => bail!(Error::WrongState(format!(
                "container {} is {}: its root file system is its machine's; start it, or put what is to last on a volume",
                record.name,
                status.as_str()
            ))),
        }
        let path = layout.container(&record.id).join("config.json");
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let spec: Value =
            serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))?;
        let mut process = spec["process"].clone();
        process["user"] = json!({ "uid": 0, "gid": 0 });
        process["cwd"] = json!("/");
        process["terminal"] = json!(false);
        process["rlimits"] = json!([]);
        process["capabilities"] = json!({
            "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
        });
        // What an agent tries to execute that knows no copying.
        process["args"] =
            json!(["the agent of this container's machine, which is too old to copy files"]);
        Ok(Self {
            supervisor: Supervisor::connect(layout, &record).await?,
            run_dir: layout.sandbox(&record.id),
            process,
        })
    }

    async fn stat(&self, path: &str, follow: bool) -> Result<Stat> {
        let operation = Operation {
            kind: Kind::Stat,
            path: path.to_owned(),
            name: String::new(),
            follow,
            keep_owner: false,
        };
        let read = |mut from: Box<dyn Read + Send>| {
            let mut said = Vec::new();
            from.by_ref().take(SAID_MAX).read_to_end(&mut said)?;
            Ok(said)
        };
        let said = self.run(&operation, None, read).await?;
        serde_json::from_slice(&said).with_context(|| format!("ask for {path}"))
    }

    async fn copy_out(&self, args: &CpArgs, path: &str, to: End) -> Result<()> {
        let stat = self.stat(path, args.follow_link).await?;
        if !stat.exists {
            bail!(
                "copy {}: there is no such file in the container",
                args.source
            );
        }
        let from = Copied {
            path,
            dir: stat.dir,
        };
        let pack = |name: &str| Operation {
            kind: Kind::Pack,
            path: path.to_owned(),
            name: name.to_owned(),
            follow: args.follow_link,
            keep_owner: false,
        };
        let End::Host(to) = to else {
            if io::stdout().is_terminal() {
                bail!("cp: a tar stream is nothing for a terminal; write it to a file or a pipe");
            }
            let operation = pack(from.name().unwrap_or("."));
            return self
                .run(&operation, None, |mut from| {
                    io::copy(&mut from, &mut io::stdout().lock())?;
                    Ok(())
                })
                .await;
        };
        let there = Stat::of(Path::new(&to), true).with_context(|| format!("look at {to}"))?;
        let Place { dir, name } = place(&from, &to, &there)?;
        let open = File::open(&dir).with_context(|| format!("copy to {to}: {dir}"))?;
        if !open.metadata()?.is_dir() {
            bail!("copy to {to}: {dir} is not a directory");
        }
        let rules = Rules {
            within: (name != ".").then(|| name.clone()),
            ownership: args.archive.then_some(Ownership::Kept),
            trusted: false,
            follow: false,
        };
        let operation = pack(&name);
        let done = self
            .run(&operation, None, move |from| {
                Ok(unpack(from, open.as_fd(), &rules)?)
            })
            .await?;
        if done.left_out > 0 {
            eprintln!(
                "walnut: {} device files were left out: on the host they would be the host's devices",
                done.left_out
            );
        }
        Ok(())
    }

    async fn copy_in(&self, args: &CpArgs, from: End, to: &str) -> Result<()> {
        let there = self.stat(to, true).await?;
        let keep_owner = args.archive || from == End::Stream;
        let unpack = |dir: &str| Operation {
            kind: Kind::Unpack,
            path: dir.to_owned(),
            name: String::new(),
            follow: true,
            keep_owner,
        };
        let End::Host(from) = from else {
            if !there.dir {
                bail!(
                    "copy to {}: a stream is unpacked into a directory, and that is none",
                    args.destination
                );
            }
            let pass = |out: &mut dyn Write| Ok(io::copy(&mut io::stdin().lock(), out).map(drop)?);
            let nothing = |_: Box<dyn Read + Send>| Ok(());
            return self.run(&unpack(to), Some(Box::new(pass)), nothing).await;
        };
        let path = Path::new(&from);
        let stat = Stat::of(path, args.follow_link).with_context(|| format!("copy {from}"))?;
        if !stat.exists {
            bail!("copy {from}: there is no such file");
        }
        let source = Copied {
            path: &from,
            dir: stat.dir,
        };
        let Place { dir, name } = place(&source, to, &there)?;
        if !self.stat(&dir, true).await?.dir {
            bail!(
                "copy to {}: there is no directory {dir} in the container",
                args.destination
            );
        }
        let (path, follow) = (path.to_owned(), args.follow_link);
        let ownership = match keep_owner {
            true => Ownership::Kept,
            false => Ownership::Of(0, 0),
        };
        let packed = move |out: &mut dyn Write| Ok(pack(&path, &name, follow, ownership, out)?);
        let nothing = |_: Box<dyn Read + Send>| Ok(());
        self.run(&unpack(&dir), Some(Box::new(packed)), nothing)
            .await
    }

    /// Has a process in the container do it; `give` writes its input, `take` reads its
    /// output.
    async fn run<T: Send + 'static>(
        &self,
        operation: &Operation,
        give: Option<Give>,
        take: impl FnOnce(Box<dyn Read + Send>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let id = new_id()?;
        let dir = self.run_dir.join(&id);
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        let result = self.run_in(&dir, &id, operation, give, take).await;
        // Gone already when the sandbox is.
        let _ = fs::remove_dir_all(&dir);
        result
    }

    async fn run_in<T: Send + 'static>(
        &self,
        dir: &Path,
        id: &str,
        operation: &Operation,
        give: Option<Give>,
        take: impl FnOnce(Box<dyn Read + Send>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mut process = self.process.clone();
        process[FIELD] = serde_json::to_value(operation)?;
        let [stdin, stdout, stderr] = ["stdin", "stdout", "stderr"].map(|name| dir.join(name));
        let output = fifo(&stdout, OFlag::O_RDONLY)?;
        let complaint = fifo(&stderr, OFlag::O_RDONLY)?;
        let input = give
            .as_ref()
            .map(|_| fifo(&stdin, OFlag::O_RDWR))
            .transpose()?;
        let path = |path: &Path| path.display().to_string();
        let request = ExecProcessRequest {
            id: self.supervisor.id.clone(),
            exec_id: id.to_owned(),
            stdin: input.as_ref().map(|_| path(&stdin)).unwrap_or_default(),
            stdout: path(&stdout),
            stderr: path(&stderr),
            spec: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: serde_json::to_vec(&process)?,
                ..Default::default()
            }),
            ..Default::default()
        };
        self.supervisor.exec(request).await?;
        self.supervisor.start(id).await?;
        let giving = spawn_blocking(move || match give.zip(input) {
            Some((give, mut input)) => give(&mut input),
            None => Ok(()),
        });
        let complaining = spawn_blocking(move || {
            let mut said = Vec::new();
            // The rest is read as well: who says it must not wait for ever.
            let mut complaint = complaint;
            let _ = (&mut complaint).take(SAID_MAX).read_to_end(&mut said);
            let _ = io::copy(&mut complaint, &mut io::sink());
            String::from_utf8_lossy(&said).trim().to_owned()
        });
        let taking = spawn_blocking(move || take(Box::new(output)));
        let taken = taking.await?;
        if taken.is_err() {
            // Nobody reads what it has to say any more.
            let _ = self.supervisor.kill(id, 9).await;
        }
        let code = self.supervisor.wait(id).await?;
        let said = complaining.await?;
        match code {
            0 => {
                giving.await??;
                taken
            }
            _ if taken.is_err() => taken,
            // An input that cannot be read is the reason for all else.
            _ => match giving.await? {
                Err(e)
                    if e.downcast_ref::<walnut_archive::PackError>()
                        .is_some_and(own) =>
                {
                    Err(e)
                }
                _ => Err(anyhow!("in the container: {}", printable(&said))),
            },
        }
    }
}

type Give = Box<dyn FnOnce(&mut dyn Write) -> Result<()> + Send>;

/// It is not that the other side has gone.
fn own(error: &walnut_archive::PackError) -> bool {
    !matches!(error, walnut_archive::PackError::Write(_))
}

/// One line, that tells a terminal nothing.
fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(shown).take(1000).collect()
}

/// Makes a FIFO and opens this side of it; reads and writes wait.
fn fifo(path: &Path, flags: OFlag) -> Result<File> {
    mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)
        .with_context(|| format!("create FIFO {}", path.display()))?;
    let mut options = OpenOptions::new();
    options.read(true).write(flags == OFlag::O_RDWR);
    options.custom_flags(libc::O_NONBLOCK);
    let file = options.open(path);
    let file = file.with_context(|| format!("open FIFO {}", path.display()))?;
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).context("use a FIFO")?;
    Ok(file)
}
