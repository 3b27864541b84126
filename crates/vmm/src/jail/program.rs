//! A filter as the program that the kernel runs at each system call.
//!
//! A thread waits for its filter: the kernel translates it, and runs it once for each
//! number that there is, to know which calls it always admits. So it is short, and
//! finds a number by halving: after the architecture and the number nothing is loaded
//! before a call is known whose argument counts, and what is admitted whatever its
//! arguments is known as such.

use seccompiler::{BpfProgram, sock_filter};

use super::calls::{Call, Only};

// linux/bpf_common.h
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_NOT_LESS: u16 = 0x35;
const RETURN: u16 = 0x06;
// linux/seccomp.h
const KILL_PROCESS: u32 = 0x8000_0000;
const ALLOW: u32 = 0x7fff_0000;
// linux/audit.h: x86-64, and x32, which has numbers of its own.
const ARCH: u32 = 0xc000_003e;
// struct seccomp_data
const AT_NUMBER: u32 = 0;
const AT_ARCH: u32 = 4;
const AT_ARGUMENTS: u32 = 16;

/// Numbers that are tried one after the other. Halving further makes a longer program.
const LEAF: usize = 3;

/// Why there is no program.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProgramError {
    #[error("{0} is listed twice")]
    Twice(&'static str),
    #[error("{0} has no number or no such argument")]
    Call(&'static str),
    #[error("the list is too long")]
    TooLong,
}

/// Where a jump leads.
#[derive(Debug, Clone, Copy)]
enum To {
    Next,
    /// An instruction, by its index.
    At(usize),
    /// Where the argument of a call is looked at, by the call's index.
    Argument(usize),
    Allow,
    Kill,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// Loads the 32 bits at this offset.
    Load(u32),
    Jump {
        code: u16,
        value: u32,
        yes: To,
        no: To,
    },
    Return(u32),
}

struct Entry {
    number: u32,
    only: Option<&'static Only>,
}

/// Admits `calls`; whatever else is called kills the process.
pub(super) fn compile(
    calls: impl Iterator<Item = &'static Call>,
) -> Result<BpfProgram, ProgramError> {
    let mut entries = Vec::new();
    for call in calls {
        let invalid = ProgramError::Call(call.name);
        let Ok(number) = u32::try_from(call.number) else {
            return Err(invalid);
        };
        if call.only.as_ref().is_some_and(|only| only.argument > 5) {
            return Err(invalid);
        }
        if entries.iter().any(|entry: &Entry| entry.number == number) {
            return Err(ProgramError::Twice(call.name));
        }
        let only = call.only.as_ref();
        entries.push(Entry { number, only });
    }
    entries.sort_by_key(|entry| entry.number);

    let mut steps = vec![
        Step::Load(AT_ARCH),
        equal(ARCH, To::Next, To::Kill),
        Step::Load(AT_NUMBER),
    ];
    find(&mut steps, &entries, 0);
    let mut arguments = vec![None; entries.len()];
    for (entry, at) in entries.iter().zip(&mut arguments) {
        if let Some(only) = entry.only {
            *at = Some(steps.len());
            look(&mut steps, only);
        }
    }
    let allow = steps.len();
    steps.extend([Step::Return(ALLOW), Step::Return(KILL_PROCESS)]);
    let place = |here: usize, to| match to {
        To::Next => Some(here + 1),
        To::At(at) => Some(at),
        To::Argument(index) => arguments.get(index).copied().flatten(),
        To::Allow => Some(allow),
        To::Kill => Some(allow + 1),
    };
    let jump = |here: usize, to| {
        let distance = place(here, to)?.checked_sub(here + 1)?;
        u8::try_from(distance).ok()
    };
    let instruction = |(here, step): (usize, &Step)| {
        let (code, jt, jf, k) = match *step {
            Step::Load(offset) => (LOAD, 0, 0, offset),
            Step::Return(what) => (RETURN, 0, 0, what),
            Step::Jump {
                code,
                value,
                yes,
                no,
            } => (code, jump(here, yes)?, jump(here, no)?, value),
        };
        Some(sock_filter { code, jt, jf, k })
    };
    let program: Option<BpfProgram> = steps.iter().enumerate().map(instruction).collect();
    program.ok_or(ProgramError::TooLong)
}

fn equal(value: u32, yes: To, no: To) -> Step {
    Step::Jump {
        code: JUMP_IF_EQUAL,
        value,
        yes,
        no,
    }
}

/// Finds the loaded number among entries in order, the first of which has the index
/// `first`.
fn find(steps: &mut Vec<Step>, entries: &[Entry], first: usize) {
    let (low, high) = match entries.len() {
        0..=LEAF => (entries, &[][..]),
        len => entries.split_at(len / 2),
    };
    if let Some(middle) = high.first() {
        let here = steps.len();
        steps.push(Step::Load(0));
        find(steps, low, first);
        let yes = To::At(steps.len());
        if let Some(step) = steps.get_mut(here) {
            *step = Step::Jump {
                code: JUMP_IF_NOT_LESS,
                value: middle.number,
                yes,
                no: To::Next,
            };
        }
        find(steps, high, first + low.len());
        return;
    }
    for (index, entry) in entries.iter().enumerate() {
        let yes = match entry.only {
            Some(_) => To::Argument(first + index),
            None => To::Allow,
        };
        let last = index + 1 == entries.len();
        let no = if last { To::Kill } else { To::Next };
        steps.push(equal(entry.number, yes, no));
    }
    if entries.is_empty() {
        steps.push(Step::Return(KILL_PROCESS));
    }
}

/// Looks whether an argument's low half has one of its values.
fn look(steps: &mut Vec<Step>, only: &Only) {
    // Little-endian.
    steps.push(Step::Load(AT_ARGUMENTS + 8 * u32::from(only.argument)));
    for (index, (_, value)) in only.values.iter().enumerate() {
        let last = index + 1 == only.values.len();
        let no = if last { To::Kill } else { To::Next };
        steps.push(equal(*value, To::Allow, no));
    }
    if only.values.is_empty() {
        steps.push(Step::Return(KILL_PROCESS));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use seccompiler::{
        SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule, TargetArch,
    };

    use super::*;
    use crate::jail::calls::{THREADS, Thread};

    /// What a filter is asked.
    #[derive(Debug, Clone, Copy)]
    struct Question {
        number: u32,
        arch: u32,
        arguments: [u64; 6],
    }

    impl Question {
        fn word(&self, offset: u32) -> u32 {
            let mut bytes = Vec::new();
            bytes.extend(self.number.to_le_bytes());
            bytes.extend(self.arch.to_le_bytes());
            bytes.extend([0; 8]);
            for argument in self.arguments {
                bytes.extend(argument.to_le_bytes());
            }
            let word = bytes.get(offset as usize..).unwrap().first_chunk().unwrap();
            u32::from_le_bytes(*word)
        }
    }

    /// What the kernel makes of a program.
    fn run(program: &[sock_filter], question: &Question) -> u32 {
        const JUMP: u16 = 0x05;
        const JUMP_IF_GREATER: u16 = 0x25;
        let (mut at, mut word) = (0, 0);
        loop {
            let &sock_filter { code, jt, jf, k } = program.get(at).unwrap();
            at += 1;
            let yes = match code {
                LOAD => {
                    word = question.word(k);
                    continue;
                }
                JUMP => {
                    at += k as usize;
                    continue;
                }
                RETURN => return k,
                JUMP_IF_EQUAL => word == k,
                JUMP_IF_GREATER => word > k,
                JUMP_IF_NOT_LESS => word >= k,
                other => panic!("{other:#x}"),
            };
            at += usize::from(if yes { jt } else { jf });
        }
    }

    /// The same list, made into a program by somebody else.
    fn other(thread: &Thread) -> BpfProgram {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for call in thread.calls() {
            let rules = rules.entry(call.number).or_default();
            let Some(only) = &call.only else { continue };
            for (_, value) in only.values {
                let equal = SeccompCondition::new(
                    only.argument,
                    SeccompCmpArgLen::Dword,
                    SeccompCmpOp::Eq,
                    u64::from(*value),
                );
                rules.push(SeccompRule::new(vec![equal.unwrap()]).unwrap());
            }
        }
        SeccompFilter::new(
            rules,
            SeccompAction::KillProcess,
            SeccompAction::Allow,
            TargetArch::x86_64,
        )
        .and_then(TryInto::try_into)
        .unwrap()
    }

    /// Around each value that there is, in each half of an argument.
    fn values(thread: &Thread) -> BTreeSet<u64> {
        let mut low = BTreeSet::from([0, 1, u32::MAX, 1 << 31]);
        for only in thread.calls().filter_map(|call| call.only.as_ref()) {
            for (_, value) in only.values {
                low.extend([value.wrapping_sub(1), *value, value.wrapping_add(1)]);
            }
        }
        let halves = |value| [u64::from(value), u64::from(value) | 1 << 32];
        low.into_iter().flat_map(halves).collect()
    }

    #[test]
    fn the_program_decides_as_the_list_does() {
        for thread in THREADS {
            let (program, other) = (compile(thread.calls()).unwrap(), other(thread));
            assert!(program.len() < other.len(), "{}", thread.name);
            let values = values(thread);
            let numbers = (0..1024)
                .flat_map(|number| [number, number | 1 << 30, number | 1 << 31])
                .chain([u32::MAX]);
            for number in numbers {
                let call = thread
                    .calls()
                    .find(|call| call.number == libc::c_long::from(number));
                let ask = |arguments| {
                    let question = Question {
                        number,
                        arch: ARCH,
                        arguments,
                    };
                    let admitted = call.is_some_and(|call| {
                        call.only.as_ref().is_none_or(|only| {
                            let low = arguments[usize::from(only.argument)] & 0xffff_ffff;
                            only.values.iter().any(|(_, v)| u64::from(*v) == low)
                        })
                    });
                    let expected = if admitted { ALLOW } else { KILL_PROCESS };
                    let what = format!("{question:x?} of {}", thread.name);
                    assert_eq!(run(&program, &question), expected, "{what}");
                    assert_eq!(run(&other, &question), expected, "{what}");
                };
                ask([0; 6]);
                let Some(call) = call else { continue };
                let looked_at = call.only.as_ref().map(|only| usize::from(only.argument));
                for place in 0..6 {
                    for value in &values {
                        let mut arguments = [u64::MAX; 6];
                        arguments[place] = *value;
                        ask(arguments);
                        // A good value elsewhere is none here.
                        if Some(place) != looked_at {
                            arguments[looked_at.unwrap_or(place)] = 0x7777;
                            ask(arguments);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn another_architecture_has_no_calls() {
        // 32-bit x86, 64-bit Arm.
        for arch in [0x4000_0003, 0xc000_00b7, 0] {
            for thread in THREADS {
                let program = compile(thread.calls()).unwrap();
                for number in 0..1024 {
                    let question = Question {
                        number,
                        arch,
                        arguments: [0; 6],
                    };
                    assert_eq!(run(&program, &question), KILL_PROCESS, "{question:x?}");
                }
            }
        }
    }

    /// By which the kernel need not run the filter for it any more.
    #[test]
    fn a_call_without_a_condition_is_admitted_by_its_number_alone() {
        for thread in THREADS {
            let program = compile(thread.calls()).unwrap();
            let look = program
                .iter()
                .position(|step| step.k >= AT_ARGUMENTS && step.code == LOAD);
            let numbers = program.get(..look.unwrap_or(program.len())).unwrap();
            let loads = numbers.iter().filter(|step| step.code == LOAD).count();
            assert_eq!(loads, 2, "{}", thread.name);
        }
    }

    static CALL: Call = Call {
        name: "SYS_ioctl",
        number: libc::SYS_ioctl,
        only: None,
        why: "",
    };

    #[test]
    fn no_call_can_be_listed_twice_and_no_list_is_cut() {
        let twice = compile([&CALL, &CALL].into_iter());
        assert!(matches!(twice, Err(ProgramError::Twice("SYS_ioctl"))));
        let many = (0..300).map(|number| -> &'static Call {
            let call = Call {
                name: "many",
                number,
                only: None,
                why: "",
            };
            Box::leak(Box::new(call))
        });
        assert!(matches!(compile(many), Err(ProgramError::TooLong)));
        let none = compile(std::iter::empty()).unwrap();
        let question = Question {
            number: 0,
            arch: ARCH,
            arguments: [0; 6],
        };
        assert_eq!(run(&none, &question), KILL_PROCESS);
    }
}
