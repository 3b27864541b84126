//! Each filter, in processes that try calls.

use std::{arch::asm, collections::BTreeSet};

use nix::{
    sys::{
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, fork},
};

use super::*;
use crate::jail::calls::{Call, THREADS};

/// System calls that there are, and some more.
const NUMBERS: std::ops::Range<libc::c_long> = 0..480;
/// What the kernel itself calls from its probes of user programs (uretprobe, uprobe) and
/// admits past every filter; it kills who calls it without one.
const PROBES: std::ops::RangeInclusive<libc::c_long> = 335..=336;
/// Of 32-bit pointers, by the same entry.
const X32: libc::c_long = 0x4000_0000;

/// What the processes that try calls end by.
static EXIT: Call = Call {
    name: "SYS_exit_group",
    number: libc::SYS_exit_group,
    only: None,
    why: "",
};

fn filter(thread: &Thread) -> Filter {
    let exits = thread.calls().any(|call| call.number == EXIT.number);
    let exit = (!exits).then_some(&EXIT);
    Filter::compile(thread.calls().chain(exit)).unwrap()
}

/// Goes on behind the instruction that does not exist: by a return from a signal, which
/// otherwise would go wherever the stack says.
extern "C" fn skip(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    const UD2: i64 = 2;
    let context = context.cast::<libc::ucontext_t>();
    let register = usize::try_from(libc::REG_RIP).unwrap_or(usize::MAX);
    // SAFETY: the kernel hands the handler a context of its own.
    if let Some(rip) = unsafe { (*context).uc_mcontext.gregs.get_mut(register) } {
        *rip += UD2;
    }
}

/// Whether a process survives a call behind a filter.
fn survives(filter: &Filter, number: libc::c_long, arguments: [libc::c_long; 6]) -> bool {
    // SAFETY: the child makes system calls alone.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let none = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            let [a, b, c, d, e, f] = arguments;
            // SAFETY: descriptors and addresses among the arguments are none, so what
            // is let through fails.
            unsafe {
                libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
                let returns = number == libc::SYS_rt_sigreturn;
                if returns {
                    let handler = skip as extern "C" fn(_, _, _);
                    let handler = SigHandler::SigAction(handler);
                    let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
                    let _ = sigaction(Signal::SIGILL, &action);
                }
                match filter.install() {
                    Ok(()) if returns => asm!("ud2"),
                    Ok(()) => drop(libc::syscall(number, a, b, c, d, e, f)),
                    Err(_) => {}
                }
                libc::syscall(libc::SYS_exit_group, 0);
            }
            unreachable!("it has ended");
        }
        ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
            WaitStatus::Exited(..) => true,
            WaitStatus::Signaled(_, signal, _) => signal != Signal::SIGSYS,
            other => panic!("{other:?}"),
        },
    }
}

/// Arguments that make no call do anything, one of them a given.
fn arguments(given: Option<(u8, u32)>) -> [libc::c_long; 6] {
    let mut arguments = [-1; 6];
    if let Some((at, value)) = given {
        arguments[usize::from(at)] = value.into();
    }
    arguments
}

#[test]
fn what_is_listed_passes_with_its_arguments_alone() {
    for thread in THREADS {
        let filter = filter(thread);
        for call in thread.calls() {
            let passes = |given| survives(&filter, call.number, arguments(given));
            let what = format!("{call:?} of {}", thread.name);
            let Some(only) = &call.only else {
                assert!(passes(None), "{what}");
                continue;
            };
            for (_, value) in only.values {
                assert!(passes(Some((only.argument, *value))), "{value} {what}");
            }
            for other in [0x7777, u32::MAX] {
                assert!(!passes(Some((only.argument, other))), "{other} {what}");
            }
        }
    }
}

#[test]
fn nothing_else_passes() {
    for thread in THREADS {
        let filter = filter(thread);
        let listed: BTreeSet<_> = thread
            .calls()
            .chain([&EXIT])
            .map(|call| call.number)
            .collect();
        let others = NUMBERS.filter(|number| !listed.contains(number) && !PROBES.contains(number));
        for number in others.chain(listed.iter().map(|number| number | X32)) {
            let passes = survives(&filter, number, arguments(None));
            assert!(!passes, "{number} of {}", thread.name);
        }
    }
}

/// A second entry would widen what the first holds to its arguments.
#[test]
fn no_call_is_listed_twice() {
    for thread in THREADS {
        let calls: Vec<_> = thread.calls().map(|call| call.number).collect();
        let distinct: BTreeSet<_> = calls.iter().copied().collect();
        assert_eq!(calls.len(), distinct.len(), "{}", thread.name);
    }
}
