//! What each thread may call once the guest runs. This is the one list: the filters
//! are made of it, `walnut-vmm --system-calls` prints it, `docs/threat-model.md` quotes
//! that, and `tests/jail.rs` holds it against what real threads do.
//!
//! A new call is one line here, with its reason; a new kind of thread is one
//! [`Thread`], named in [`THREADS`].

use std::fmt::Write;

/// A kind of thread.
#[derive(Debug)]
pub(crate) struct Thread {
    pub(crate) name: &'static str,
    /// What it calls as one of several kinds.
    shared: &'static [Call],
    own: &'static [Call],
}

/// A system call that a kind of thread makes.
#[derive(Debug)]
pub(crate) struct Call {
    pub(super) name: &'static str,
    pub(super) number: libc::c_long,
    /// What one of its arguments must be.
    pub(super) only: Option<Only>,
    pub(super) why: &'static str,
}

/// The values that an argument, of 32 bits, may have.
#[derive(Debug)]
pub(crate) struct Only {
    pub(crate) argument: u8,
    pub(crate) values: &'static [(&'static str, u32)],
}

macro_rules! call {
    ($call:ident, $why:literal) => {
        Call {
            name: stringify!($call),
            number: libc::$call,
            only: None,
            why: $why,
        }
    };
    ($call:ident($argument:literal: $($value:ident),+ $(,)?), $why:literal) => {
        Call {
            name: stringify!($call),
            number: libc::$call,
            only: Some(Only {
                argument: $argument,
                values: &[$((stringify!($value), $value)),+],
            }),
            why: $why,
        }
    };
}

// linux/kvm.h
const KVM_RUN: u32 = 0xae80;
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
const KVM_IOEVENTFD: u32 = 0x4040_ae79;
const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
const KVM_GET_MP_STATE: u32 = 0x8004_ae98;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_GET_SREGS: u32 = 0x8138_ae83;
const KVM_GET_XSAVE: u32 = 0x9000_aea4;
const KVM_GET_XCRS: u32 = 0x8188_aea6;
const KVM_GET_DEBUGREGS: u32 = 0x8080_aea1;
const KVM_GET_LAPIC: u32 = 0x8400_ae8e;
const KVM_GET_MSRS: u32 = 0xc008_ae88;
const KVM_GET_VCPU_EVENTS: u32 = 0x8040_ae9f;
const KVM_GET_TSC_KHZ: u32 = 0xaea3;
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
const KVM_GET_CLOCK: u32 = 0x8030_ae7c;
const KVM_GET_IRQCHIP: u32 = 0xc208_ae62;
// linux/if_tun.h
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
// linux/futex.h, each of this process alone: the C library's locks wait by the
// first, Rust's by the second.
const FUTEX_WAIT: u32 = 128;
const FUTEX_WAIT_BITSET: u32 = 128 | 9;
const FUTEX_WAKE: u32 = 128 | 1;
// linux/falloc.h
const PUNCH_HOLE: u32 = 0x02 | 0x01;
const ALLOCATE: u32 = 0;
const ZERO_RANGE: u32 = 0x10 | 0x01;
// linux/mman.h
const PROT_NONE: u32 = 0;
const PROT_READ_WRITE: u32 = 1 | 2;
const MADV_DONTNEED: u32 = 4;
const MADV_REMOVE: u32 = 9;
// The rest of what arguments are held to.
const AF_UNIX: u32 = 1;
const CLOCK_MONOTONIC: u32 = 1;
/// The first real-time signal that the C library leaves to programs.
const SIGRTMIN: u32 = 34;

const VCPU: &[Call] = &[
    call!(
        SYS_ioctl(1: KVM_RUN, KVM_SET_GSI_ROUTING, KVM_IOEVENTFD),
        "runs the guest; routes an interrupt message; moves a doorbell"
    ),
    call!(
        SYS_write,
        "rings a device; raises the console's interrupt; the console"
    ),
    call!(
        SYS_futex(1: FUTEX_WAIT, FUTEX_WAIT_BITSET, FUTEX_WAKE),
        "locks; waits while the machine is paused"
    ),
    call!(
        SYS_rt_sigreturn,
        "returns from the signal that calls it out of the guest"
    ),
];

const DEVICE: &[Call] = &[
    call!(SYS_epoll_wait, "waits for kicks, requests and the host"),
    call!(
        SYS_write,
        "raises an interrupt; answers a pause; a line of the log"
    ),
    call!(
        SYS_futex(1: FUTEX_WAIT, FUTEX_WAIT_BITSET, FUTEX_WAKE),
        "locks that it shares with vCPUs"
    ),
    call!(
        SYS_clock_gettime(0: CLOCK_MONOTONIC),
        "deadlines, rate limits; a call only while the host's clock is one that the vDSO cannot read"
    ),
];

const URING: &[Call] = &[call!(
    SYS_io_uring_enter,
    "submits requests to a ring that takes readv, writev, fsync and fallocate of the one disk"
)];

const PLAIN: &[Call] = &[
    call!(SYS_preadv, "reads"),
    call!(SYS_pwritev, "writes"),
    call!(SYS_fdatasync, "flushes"),
    call!(SYS_fallocate(1: PUNCH_HOLE, ZERO_RANGE), "discards, writes zeroes"),
];

const NET: &[Call] = &[
    call!(SYS_readv, "takes a frame from the tap"),
    call!(SYS_writev, "gives a frame to the tap"),
    call!(
        SYS_ioctl(1: TUNSETOFFLOAD),
        "tells the tap which offloads the driver takes"
    ),
];

const VHOST: &[Call] = &[
    call!(SYS_sendmsg, "a request to the back end, with descriptors"),
    call!(SYS_recvfrom, "its answer, without"),
    call!(SYS_ppoll, "waits for the answer, but not for ever"),
];

const VSOCK: &[Call] = &[
    call!(SYS_sendmsg, "gives to a connection"),
    call!(
        SYS_recvmsg,
        "takes from a connection, and looks ahead for its first line"
    ),
    call!(SYS_epoll_ctl, "watches a new connection; watches for room"),
    call!(SYS_accept4, "a host's program connects"),
    call!(SYS_socket(0: AF_UNIX), "the guest connects"),
    call!(
        SYS_connect,
        "to a socket in the one directory that there is"
    ),
    call!(SYS_shutdown, "passes on the end of one direction"),
    call!(SYS_close, "a connection ends"),
];

const GROW_PRIVATE: &[Call] = &[
    call!(SYS_mprotect(2: PROT_NONE, PROT_READ_WRITE), "lets a block be reached, or not"),
    call!(SYS_madvise(2: MADV_DONTNEED), "gives a block's pages back to the host"),
    call!(SYS_ioctl(1: KVM_SET_USER_MEMORY_REGION), "shows KVM a slot, or takes it away"),
];

const GROW_SHARED: &[Call] = &[
    call!(SYS_mprotect(2: PROT_NONE, PROT_READ_WRITE), "lets a block be reached, or not"),
    call!(
        SYS_fallocate(1: PUNCH_HOLE, ALLOCATE),
        "gives a block's pages back to the host; takes huge ones"
    ),
    call!(SYS_ioctl(1: KVM_SET_USER_MEMORY_REGION), "shows KVM a slot, or takes it away"),
];

const RNG: &[Call] = &[call!(SYS_getrandom, "fills the guest's buffers")];

const BALLOON: &[Call] = &[call!(
    SYS_madvise(2: MADV_DONTNEED, MADV_REMOVE),
    "gives pages back to the host"
)];

const SNAPSHOT: &[Call] = &[
    call!(
        SYS_ioctl(1: KVM_GET_MP_STATE, KVM_GET_REGS, KVM_GET_SREGS, KVM_GET_XSAVE,
            KVM_GET_XCRS, KVM_GET_DEBUGREGS, KVM_GET_LAPIC, KVM_GET_MSRS,
            KVM_GET_VCPU_EVENTS, KVM_GET_TSC_KHZ, KVM_KVMCLOCK_CTRL, KVM_GET_CLOCK,
            KVM_GET_IRQCHIP),
        "reads what KVM has of the guest"
    ),
    call!(SYS_pwrite64, "writes the files"),
    call!(SYS_ftruncate, "gives the memory file its length"),
    call!(SYS_fdatasync, "so that it survives the host"),
    call!(SYS_close, "the files are the supervisor's alone again"),
    call!(
        SYS_futex(1: FUTEX_WAIT, FUTEX_WAIT_BITSET, FUTEX_WAKE),
        "waits to be asked"
    ),
];

/// No file, no socket and no program can be opened by it. What its devices' threads
/// call is here as well: theirs can only be narrower than the filter of the thread
/// that starts them.
const NURSERY: &[Call] = &[
    call!(SYS_futex(1: FUTEX_WAIT, FUTEX_WAIT_BITSET, FUTEX_WAKE), "waits for something to do"),
    call!(SYS_close, "drops a device"),
    call!(
        SYS_write,
        "says that a device is gone; raises the pin of the slots"
    ),
    call!(SYS_epoll_create1, "makes a device"),
    call!(SYS_epoll_ctl, "makes a device"),
    call!(SYS_eventfd2, "makes a device: kicks, messages, its bell"),
    call!(SYS_io_uring_setup, "makes a disk"),
    call!(SYS_io_uring_register, "makes a disk"),
    call!(SYS_fcntl, "copies descriptors; looks at a disk's"),
    call!(SYS_fstat, "looks at a disk"),
    call!(SYS_newfstatat, "looks at a disk"),
    call!(SYS_statx, "looks at a disk"),
    call!(SYS_lseek, "looks at a disk"),
    call!(
        SYS_ioctl,
        "interrupts and doorbells of KVM; a tap's flags; a disk's size"
    ),
    call!(SYS_mmap, "a ring; a thread's stack"),
    call!(SYS_munmap, "drops a ring"),
    call!(SYS_mprotect, "a thread's stack"),
    call!(SYS_getsockopt, "looks at a back end's socket"),
    call!(SYS_setsockopt, "limits how long a back end is waited for"),
    call!(SYS_clone3, "starts a device's thread"),
    call!(SYS_clone, "starts a device's thread, on an older host"),
    call!(SYS_set_robust_list, "a thread's start"),
    call!(SYS_rseq, "a thread's start"),
    call!(SYS_rt_sigprocmask, "a thread's start"),
    call!(SYS_sigaltstack, "a thread's start"),
    call!(SYS_sched_getaffinity, "a thread's start"),
    call!(SYS_gettid, "a thread's start"),
    call!(SYS_prctl, "a thread's name; its filter"),
    call!(SYS_seccomp, "a thread's filter"),
    call!(SYS_epoll_wait, "devices"),
    call!(SYS_clock_gettime(0: CLOCK_MONOTONIC), "devices"),
    call!(SYS_io_uring_enter, "devices"),
    call!(SYS_preadv, "devices"),
    call!(SYS_pwritev, "devices"),
    call!(SYS_fdatasync, "devices"),
    call!(SYS_fallocate, "devices"),
    call!(SYS_readv, "devices"),
    call!(SYS_writev, "devices"),
    call!(SYS_ppoll, "devices; a back end's handshake"),
    call!(SYS_sendmsg, "devices; a back end's handshake"),
    call!(SYS_recvmsg, "devices; a back end's handshake"),
    call!(SYS_recvfrom, "devices; a back end's handshake"),
    call!(SYS_getrandom, "devices"),
    call!(SYS_madvise, "devices"),
];

const CONTROL: &[Call] = &[
    call!(
        SYS_epoll_wait,
        "waits for a request, the guest's end, a device's rest"
    ),
    call!(SYS_recvmsg, "a request, with descriptors"),
    call!(
        SYS_close,
        "descriptors that came with a request and are not needed"
    ),
    call!(
        SYS_write,
        "a reply or an event; rings devices; the last words"
    ),
    call!(
        SYS_futex(1: FUTEX_WAIT, FUTEX_WAIT_BITSET, FUTEX_WAKE),
        "locks; orders to vCPUs, and waiting until they have stopped"
    ),
    call!(SYS_tgkill(2: SIGRTMIN), "calls a vCPU out of the guest"),
    call!(SYS_exit_group, "the end"),
];

pub(crate) static VCPU_THREAD: Thread = Thread {
    name: "vCPU",
    shared: &[],
    own: VCPU,
};
pub(crate) static CONTROL_THREAD: Thread = Thread {
    name: "control",
    shared: &[],
    own: CONTROL,
};
pub(crate) static SNAPSHOT_THREAD: Thread = Thread {
    name: "snapshot",
    shared: &[],
    own: SNAPSHOT,
};
/// Brings devices up and takes them apart while the guest runs, and touches nothing
/// that the guest wrote.
pub(crate) static NURSERY_THREAD: Thread = Thread {
    name: "nursery",
    shared: &[],
    own: NURSERY,
};
pub(crate) static BLOCK_URING: Thread = Thread {
    name: "block, io_uring",
    shared: DEVICE,
    own: URING,
};
pub(crate) static BLOCK_PLAIN: Thread = Thread {
    name: "block, plain",
    shared: DEVICE,
    own: PLAIN,
};
pub(crate) static NET_THREAD: Thread = Thread {
    name: "net",
    shared: DEVICE,
    own: NET,
};
pub(crate) static VHOST_THREAD: Thread = Thread {
    name: "fs, vhost-user",
    shared: DEVICE,
    own: VHOST,
};
pub(crate) static VSOCK_THREAD: Thread = Thread {
    name: "vsock",
    shared: DEVICE,
    own: VSOCK,
};
pub(crate) static RNG_THREAD: Thread = Thread {
    name: "rng",
    shared: DEVICE,
    own: RNG,
};
pub(crate) static BALLOON_THREAD: Thread = Thread {
    name: "balloon",
    shared: DEVICE,
    own: BALLOON,
};

pub(crate) static MEM_PRIVATE: Thread = Thread {
    name: "memory, private",
    shared: DEVICE,
    own: GROW_PRIVATE,
};
pub(crate) static MEM_SHARED: Thread = Thread {
    name: "memory, shared",
    shared: DEVICE,
    own: GROW_SHARED,
};

/// Every kind there is.
pub(crate) static THREADS: &[&Thread] = &[
    &VCPU_THREAD,
    &CONTROL_THREAD,
    &SNAPSHOT_THREAD,
    &NURSERY_THREAD,
    &BLOCK_URING,
    &BLOCK_PLAIN,
    &NET_THREAD,
    &VHOST_THREAD,
    &VSOCK_THREAD,
    &RNG_THREAD,
    &BALLOON_THREAD,
    &MEM_PRIVATE,
    &MEM_SHARED,
];

impl Call {
    fn name(&self) -> &'static str {
        self.name.trim_start_matches("SYS_")
    }
}

impl Thread {
    pub(crate) fn calls(&self) -> impl Iterator<Item = &'static Call> {
        self.shared.iter().chain(self.own)
    }
}

/// The list as a table of Markdown.
pub(crate) fn table() -> String {
    let mut text = String::from("| thread | calls | which, and why |\n|---|---|---|\n");
    let mut row = |name: &str, count: usize, lead: &str, calls: &[Call]| {
        let reason = |call: &Call| format!("`{}`: {}", call.name(), call.why);
        let reasons: Vec<String> = calls.iter().map(reason).collect();
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "| {name} | {count} | {lead}{} |",
            reasons.join("<br>")
        );
    };
    row("every device", DEVICE.len(), "", DEVICE);
    for thread in THREADS {
        let lead = if thread.shared.is_empty() {
            ""
        } else {
            "those of every device<br>"
        };
        row(thread.name, thread.calls().count(), lead, thread.own);
    }
    text
}

/// The list as JSON: for each kind of thread its calls, each with the names of the
/// values that an argument is held to.
pub(crate) fn json() -> String {
    // The names hold nothing that JSON would have escaped.
    let threads: Vec<String> = THREADS
        .iter()
        .map(|thread| {
            let calls: Vec<String> = thread
                .calls()
                .map(|call| {
                    let values = call.only.as_ref().map_or(&[][..], |only| only.values);
                    let values: Vec<String> = values
                        .iter()
                        .map(|(name, _)| format!("\"{name}\""))
                        .collect();
                    format!("\"{}\": [{}]", call.name(), values.join(", "))
                })
                .collect();
            format!("  \"{}\": {{{}}}", thread.name, calls.join(", "))
        })
        .collect();
    format!("{{\n{}\n}}\n", threads.join(",\n"))
}
