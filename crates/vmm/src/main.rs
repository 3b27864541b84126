//! `walnut-vmm`: a virtual machine monitor for one microVM, on KVM.
//!
//! It is started by a supervisor with one inherited socket (`--control-fd N`),
//! over which it gets a machine's description and open descriptors, never paths
//! ([`walnut_vmm_api`]). It builds the machine, gives up every privilege and every
//! system call that the running guest does not need, and serves until the guest
//! or the supervisor ends.
//!
//! `machine` puts the parts together; `memory`, `boot`, `acpi` and `cpu` make what
//! the guest finds at its first instruction, `growth` what comes later, within `sizes`; `vcpu`, `irq`,
//! `ports` and `bus` run it; `slots`, `nursery` and `threads` let devices come and go;
//! `snapshot` saves it; `jail` locks the process in. The devices, and the PCI bus they sit on, come
//! from `walnut-devices` and know nothing of KVM.
//!
//! This program must never know containers, images or what a sandbox is.

mod acpi;
mod backends;
mod boot;
mod bus;
mod control;
mod cpu;
mod creation;
mod crew;
mod devices;
mod error;
mod growth;
mod irq;
mod jail;
mod layout;
mod machine;
mod memory;
mod nursery;
mod ports;
mod post;
mod prepared;
mod sizes;
mod slots;
mod snapshot;
mod threads;
mod vcpu;

use std::{
    os::fd::{FromRawFd, OwnedFd, RawFd},
    process::ExitCode,
};

pub(crate) use error::Error;

/// Stack of a thread, bytes. Only what is touched is memory.
const STACK: usize = 256 * 1024;

const USAGE: &str = "usage: walnut-vmm [--id NAME] --control-fd N\n       \
    walnut-vmm --system-calls [--format json]\n\n\
    Runs one microVM on KVM. Started by Walnut's supervisor, which says over the\n\
    inherited socket N what the machine is made of; not meant for people.\n\
    --system-calls tells what each of its threads may call once the guest runs.\n";

/// Makes the kernel's table of this process's descriptors large enough for those of a machine
/// with many devices. Once threads share it, to widen it takes a grace period of the
/// kernel's (`expand_fdtable`), some 10 ms in which nothing is computed.
fn widen(any: &OwnedFd) {
    /// A table of 256 places, the size after next: 64, 128, 256.
    const PLACE: RawFd = 255;
    // Where the limit forbids it, there are no so many descriptors either.
    if let Ok(fd) = nix::fcntl::fcntl(any, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(PLACE)) {
        // SAFETY: the kernel has just made it for us.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let fd = match args[..] {
        ["--version"] => {
            println!("walnut-vmm {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["--help" | "-h"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        ["--system-calls"] => {
            print!("{}", jail::calls::table());
            return ExitCode::SUCCESS;
        }
        ["--system-calls", "--format", "json"] => {
            print!("{}", jail::calls::json());
            return ExitCode::SUCCESS;
        }
        // The name is for people, and for whoever looks for its processes.
        ["--control-fd", number] | ["--id", _, "--control-fd", number] => {
            number.parse::<RawFd>().ok().filter(|fd| *fd > 2)
        }
        _ => None,
    };
    let Some(fd) = fd else {
        eprint!("{USAGE}");
        return ExitCode::from(2);
    };
    // SAFETY: the supervisor left this descriptor to us and nobody else in this
    // process knows it; if it is none, its first use fails.
    let control = unsafe { OwnedFd::from_raw_fd(fd) };
    widen(&control);
    jail::tame_heap();
    let code = match control::serve(control.into()) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("walnut-vmm: {e}");
            1
        }
    };
    // Not by returning: to take a process apart takes calls that a jailed one need not
    // have. Nothing is buffered.
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}
