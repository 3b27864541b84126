//! Which devices a container may use: a BPF_PROG_TYPE_CGROUP_DEVICE program on
//! its cgroup. Without it, a container that may mknod could open the disks of
//! its neighbours in the same machine. (libcontainer's own needs libbpf; the
//! program is a list of comparisons.) See the kernel's cgroup-v2.rst, "Device
//! controller", and runtime-spec `linux.resources.devices`.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::symlink;

use libcontainer::oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, Mount, Spec};
use walnut_agent::names::ContainerPaths;

use crate::failure::Failure;

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;

const BLOCK: i32 = 1;
const CHAR: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

/// Most rules taken from a spec; each costs at most eight instructions.
const RULES_MAX: usize = 256;

/// One rule; `None` matches anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// What every container may use, as runc has it: making any node, and using
/// null, full, zero, random, urandom, tty, console, ptmx and pts.
fn defaults() -> Vec<Rule> {
    let node = |kind| Rule {
        allow: true,
        kind: Some(kind),
        major: None,
        minor: None,
        access: MKNOD,
    };
    let char = |major, minor| Rule {
        allow: true,
        kind: Some(CHAR),
        major: Some(major),
        minor,
        access: ALL,
    };
    let mut rules = vec![node(CHAR), node(BLOCK)];
    rules.extend([3, 5, 7, 8, 9].map(|minor| char(1, Some(minor))));
    rules.extend([0, 1, 2].map(|minor| char(5, Some(minor))));
    rules.push(char(136, None));
    rules
}

/// The defaults come last, as runc has them, and so hold whatever the spec says: docker says
/// "deny all" more than once.
fn with_defaults(mut given: Vec<Rule>) -> Vec<Rule> {
    given.extend(defaults());
    given
}

fn rule(device: &LinuxDeviceCgroup) -> Result<Rule, Failure> {
    let number = |n: Option<i64>| match n {
        None => Ok(None),
        Some(n) if n < 0 => Ok(None),
        Some(n) => i32::try_from(n)
            .map(Some)
            .map_err(|_| Failure::invalid(format!("resources.devices: no such number {n}"))),
    };
    let access = device.access().as_deref().unwrap_or("rwm");
    let mut mask = 0;
    for c in access.chars() {
        mask |= match c {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => {
                return Err(Failure::invalid(format!(
                    "resources.devices: access {access:?}: want letters of \"rwm\""
                )));
            }
        };
    }
    Ok(Rule {
        allow: device.allow(),
        kind: match device.typ() {
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
            _ => None,
        },
        major: number(device.major())?,
        minor: number(device.minor())?,
        access: mask,
    })
}

/// One eBPF instruction as the kernel lays it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
struct Insn {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn insn(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> Insn {
    Insn {
        code,
        registers: dst | src << 4,
        offset,
        immediate,
    }
}

const LOAD_W: u8 = 0x61;
const AND32_K: u8 = 0x54;
const RSH32_K: u8 = 0x74;
const MOV32_X: u8 = 0xbc;
const MOV32_K: u8 = 0xb4;
const JNE32_K: u8 = 0x56;
const JNE32_X: u8 = 0x5e;
const EXIT: u8 = 0x95;

/// The last rule that matches decides; so they are asked last to first.
/// Registers: 2 access, 3 kind, 4 major, 5 minor, 1 scratch, 0 the verdict.
fn assemble(rules: &[Rule]) -> Vec<Insn> {
    let mut program = vec![
        insn(LOAD_W, 2, 1, 0, 0),
        insn(MOV32_X, 3, 2, 0, 0),
        insn(AND32_K, 3, 0, 0, 0xffff),
        insn(RSH32_K, 2, 0, 0, 16),
        insn(LOAD_W, 4, 1, 4, 0),
        insn(LOAD_W, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut tests = Vec::with_capacity(5);
        let equal = |register, wanted| insn(JNE32_K, register, 0, 0, wanted);
        tests.extend(rule.kind.map(|k| equal(3, k)));
        if rule.access != ALL {
            // All that is asked must be in the rule.
            tests.push(insn(MOV32_X, 1, 2, 0, 0));
            tests.push(insn(AND32_K, 1, 0, 0, rule.access));
            tests.push(insn(JNE32_X, 1, 2, 0, 0));
        }
        tests.extend(rule.major.map(|m| equal(4, m)));
        tests.extend(rule.minor.map(|m| equal(5, m)));
        let everything = tests.is_empty();
        // A test that fails skips the rest and the two that give the verdict.
        let mut skip = i16::try_from(tests.len()).unwrap_or_default() + 2;
        for mut test in tests {
            skip -= 1;
            if test.code == JNE32_K || test.code == JNE32_X {
                test.offset = skip;
            }
            program.push(test);
        }
        program.push(insn(MOV32_K, 0, 0, 0, i32::from(rule.allow)));
        program.push(insn(EXIT, 0, 0, 0, 0));
        if everything {
            // The kernel refuses instructions that cannot be reached.
            return program;
        }
    }
    program.push(insn(MOV32_K, 0, 0, 0, 0));
    program.push(insn(EXIT, 0, 0, 0, 0));
    program
}

/// Makes the container's cgroup and puts the program on it.
pub(crate) fn confine(spec: &Spec, paths: &ContainerPaths) -> Result<(), Failure> {
    let cgroup = paths.cgroup();
    fs::create_dir_all(&cgroup).map_err(|e| Failure::internal(cgroup.display(), e))?;
    let from_spec = spec
        .linux()
        .as_ref()
        .and_then(|l| l.resources().as_ref())
        .and_then(|r| r.devices().as_deref())
        .unwrap_or_default();
    if from_spec.len() > RULES_MAX {
        return Err(Failure::invalid(format!(
            "resources.devices: {} rules; at most {RULES_MAX}",
            from_spec.len()
        )));
    }
    let given: Vec<Rule> = from_spec.iter().map(rule).collect::<Result<_, _>>()?;
    let rules = with_defaults(given);
    let what = || format!("confine container {} to its devices", paths.id());
    let directory = File::open(&cgroup).map_err(|e| Failure::internal(what(), e))?;
    let program = load(&assemble(&rules)).map_err(|e| Failure::internal(what(), e))?;
    attach(&directory, &program).map_err(|e| Failure::internal(what(), e))
}

/// `/dev/core`, which runc and crun make and libcontainer calls otherwise. `pid` is the
/// container's first process, whose root it has by now, and which executes nothing yet.
pub(crate) fn link_core(spec: &Spec, pid: u32) {
    let mounts = spec.mounts().iter().flatten();
    let made = |m: &Mount| m.destination() == "/dev" && m.typ().as_deref() == Some("tmpfs");
    if !mounts.into_iter().any(made) {
        return;
    }
    // The tmpfs is new: no link of the image's is in this path.
    // It is no more than a name: a /dev that has it, or takes none, is well without.
    let _ = symlink("/proc/kcore", format!("/proc/{pid}/root/dev/core"));
}

#[repr(C)]
struct LoadAttributes {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

fn load(program: &[Insn]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        prog_type: PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(program.len()).map_err(io::Error::other)?,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
    };
    // SAFETY: the attributes and what they point to outlive the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attributes,
            size_of::<LoadAttributes>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn attach(cgroup: &File, program: &OwnedFd) -> io::Result<()> {
    let attributes = [
        cgroup.as_raw_fd().cast_unsigned(),
        program.as_raw_fd().cast_unsigned(),
        ATTACH_CGROUP_DEVICE,
        0,
    ];
    // SAFETY: the attributes outlive the call; both descriptors are open.
    let done = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the handful of instructions `assemble` uses.
    fn verdict(program: &[Insn], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_i32; 6];
        let mut at = 0_usize;
        loop {
            let i = program[at];
            let (dst, src) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            at += 1;
            match i.code {
                LOAD_W => registers[dst] = context[usize::try_from(i.offset).unwrap() / 4],
                MOV32_X => registers[dst] = registers[src],
                MOV32_K => registers[dst] = i.immediate,
                AND32_K => registers[dst] &= i.immediate,
                RSH32_K => registers[dst] >>= i.immediate,
                JNE32_K if registers[dst] != i.immediate => {
                    at += usize::try_from(i.offset).unwrap();
                }
                JNE32_X if registers[dst] != registers[src] => {
                    at += usize::try_from(i.offset).unwrap();
                }
                JNE32_K | JNE32_X => {}
                EXIT => return registers[0] != 0,
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    #[test]
    fn defaults_allow_null_and_no_disk() {
        let program = assemble(&defaults());
        assert!(verdict(&program, CHAR, READ | WRITE, 1, 3));
        assert!(verdict(&program, CHAR, READ | WRITE, 136, 77));
        assert!(verdict(&program, BLOCK, MKNOD, 254, 0));
        assert!(!verdict(&program, BLOCK, READ, 254, 0));
        assert!(!verdict(&program, BLOCK, READ | MKNOD, 254, 0));
        assert!(!verdict(&program, CHAR, READ, 1, 1), "/dev/mem");
    }

    #[test]
    fn defaults_hold_whatever_a_spec_denies() {
        // docker 26's rules.
        let docker = r#"[{"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm"},
            {"allow": false, "type": "c", "major": 10, "minor": 229, "access": "rwm"},
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": 8, "minor": 1, "access": "rw"}]"#;
        let docker: Vec<LinuxDeviceCgroup> = serde_json::from_str(docker).unwrap();
        let given = docker.iter().map(|d| rule(d).unwrap()).collect();
        let program = assemble(&with_defaults(given));
        assert!(verdict(&program, CHAR, MKNOD, 1, 7), "/dev/full is made");
        assert!(verdict(&program, CHAR, READ | WRITE, 136, 0));
        assert!(verdict(&program, BLOCK, READ, 8, 1));
        assert!(!verdict(&program, BLOCK, READ, 8, 2));
        assert!(!verdict(&program, CHAR, READ, 10, 229));
    }

    #[test]
    fn the_last_match_decides() {
        let any = |allow| Rule {
            allow,
            kind: None,
            major: None,
            minor: None,
            access: ALL,
        };
        let disk = Rule {
            kind: Some(BLOCK),
            major: Some(254),
            access: READ,
            ..any(true)
        };
        let program = assemble(&[any(false), disk]);
        assert!(verdict(&program, BLOCK, READ, 254, 3));
        assert!(!verdict(&program, BLOCK, WRITE, 254, 3));
        assert!(!verdict(&program, CHAR, READ, 254, 3));
        let program = assemble(&[disk, any(true)]);
        assert!(verdict(&program, CHAR, ALL, 9, 9));
        assert_eq!(program.len(), 8, "nothing after a rule that matches all");
    }
}
