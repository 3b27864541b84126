//! Builds a container up to the point where its program would run.

use std::fs;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use protobuf::Message;
use walnut_agent::names::ContainerPaths;
use walnut_agent::wire::Ends;
use walnut_protocol::agent::CreateContainerRequest;

use crate::failure::{Failure, chain};
use crate::link::Done;
use crate::program::{self, Program};
use crate::stdio::{self, Own};
use crate::user::{self, Names};
use crate::{devices, files, mounted, spec, storage};

/// Name of the socket on which libcontainer delivers a terminal's master.
const CONSOLE: &str = "console.sock";

/// OCI "create". On failure nothing is left but folders, which the agent
/// removes.
pub(crate) fn create(payload: &[u8]) -> Result<Done, Failure> {
    let request = CreateContainerRequest::parse_from_bytes(payload)
        .map_err(|e| Failure::invalid(format!("create request: {e}")))?;
    let paths =
        ContainerPaths::new(&request.container_id).map_err(|e| Failure::invalid(e.to_string()))?;
    let bundle = paths.bundle();
    fs::create_dir_all(&bundle).map_err(|e| Failure::internal(bundle.display(), e))?;
    let mut spec = spec::adapt(&request.spec, &paths)?;
    let mounted = storage::mount_all(&request.storages)?;
    files::write_all(&request.files, &paths)?;
    let root = spec.root().as_ref().map(|r| r.path().clone());
    if let (Some(process), Some(root)) = (spec.process_mut(), root) {
        user::resolve(process, || Names::below(&root))?;
    }
    let program = Program::new(paths.id(), &bundle, spec::take_start_hooks(&mut spec));
    mounted::prepare(&mut spec)?;
    spec::save(&spec, &bundle)?;
    spec::save_seccomp(&spec, &paths.seccomp())?;
    let done = build(&request, &spec, &paths, program)?;
    mounted.keep();
    Ok(done)
}

fn build(
    request: &CreateContainerRequest,
    spec: &Spec,
    paths: &ContainerPaths,
    program: Program,
) -> Result<Done, Failure> {
    devices::confine(spec, paths)?;
    let (uid, gid, terminal) = spec.process().as_ref().map_or((0, 0, false), |p| {
        (
            p.user().uid(),
            p.user().gid(),
            p.terminal().unwrap_or_default(),
        )
    });
    let state_root = Path::new(ContainerPaths::STATE_ROOT);
    fs::create_dir_all(state_root).map_err(|e| Failure::internal(state_root.display(), e))?;
    let mut builder = ContainerBuilder::new(paths.id().to_owned(), SyscallType::default())
        .with_executor(program)
        .with_root_path(state_root)
        .map_err(|e| Failure::internal("state folder", chain(&e)))?;
    let mut ends = Ends::default();
    let mut console = None;
    if terminal {
        console = Some(listen(&paths.bundle())?);
        builder = builder.with_console_socket(Some(paths.bundle().join(CONSOLE)));
    } else {
        let own: Own;
        (ends, own) = stdio::pipes(&request.stdio, uid, gid)?;
        (builder.stdin, builder.stdout, builder.stderr) = (own.stdin, own.stdout, own.stderr);
    }
    let container = builder
        .as_init(paths.bundle())
        .with_systemd(false)
        .with_detach(true)
        .build()
        .map_err(|e| explain(paths.id(), &chain(&e)))?;
    let pid = pid_of(&container)?;
    devices::link_core(spec, pid);
    if let Some(listener) = console {
        ends.stdin = Some(receive_master(&listener)?);
        ends.terminal = true;
        give_terminal(pid, uid, gid)?;
    }
    Ok(Done { pid, ends })
}

fn explain(id: &str, text: &str) -> Failure {
    // A program that cannot run is the caller's mistake, and known by its text.
    match program::marked(text) {
        Some(text) => Failure::invalid(text),
        None => Failure::internal(format!("create container {id}"), text),
    }
}

fn pid_of(container: &Container) -> Result<u32, Failure> {
    container
        .pid()
        .and_then(|p| u32::try_from(p.as_raw()).ok())
        .ok_or_else(|| Failure::internal("create container", "libcontainer reports no process"))
}

/// A listener in the bundle. Bound by a relative name: the whole path may be
/// longer than a socket address.
fn listen(bundle: &Path) -> Result<UnixListener, Failure> {
    let io = |e| Failure::internal("listen for the terminal", e);
    std::env::set_current_dir(bundle).map_err(io)?;
    let listener = UnixListener::bind(CONSOLE).map_err(io)?;
    std::env::set_current_dir("/").map_err(io)?;
    Ok(listener)
}

/// The terminal's master. The container has been built: it is in the queue.
fn receive_master(listener: &UnixListener) -> Result<OwnedFd, Failure> {
    let what = "receive the terminal";
    let (peer, _) = listener.accept().map_err(|e| Failure::internal(what, e))?;
    let mut name = [0; 64];
    let mut iov = [IoSliceMut::new(&mut name)];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let message = recvmsg::<()>(
        peer.as_raw_fd(),
        &mut iov,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .map_err(|e| Failure::internal(what, e))?;
    for control in message.cmsgs().map_err(|e| Failure::internal(what, e))? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel just made this descriptor for us alone.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Err(Failure::internal(what, "no descriptor came with it"))
}

/// The terminal belongs to the process's user, who reopens /dev/tty and
/// /dev/pts/N. Through /proc, since only the container has it mounted.
fn give_terminal(pid: u32, uid: u32, gid: u32) -> Result<(), Failure> {
    std::os::unix::fs::chown(format!("/proc/{pid}/fd/0"), Some(uid), Some(gid))
        .map_err(|e| Failure::internal("give the terminal to the process's user", e))
}
