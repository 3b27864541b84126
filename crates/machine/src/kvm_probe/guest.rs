//! The probe's guest: a few hundred bytes of 64-bit ring-0 code and the memory
//! image around it.
//!
//! It does what an operating system's first milliseconds do and what
//! paravirtual or emulated KVMs have been seen to get wrong: exceptions through
//! its own IDT, a page fault mended and retried, floating-point state saved and
//! restored, control registers and MSRs written. After each check it writes the
//! check's number to [`PORT_STEP`]; then it runs a timed loop and halts.

use std::arch::global_asm;

/// Checks passed are written here.
pub(super) const PORT_STEP: u16 = 0x10;
/// Reading it gives [`INPUT`].
pub(super) const PORT_INPUT: u16 = 0x11;
/// An exception that was not provoked arrived.
pub(super) const PORT_STRAY: u16 = 0x12;
/// A check gave a wrong result.
pub(super) const PORT_WRONG: u16 = 0x13;
pub(super) const INPUT: u8 = 0x5a;

/// What each number on [`PORT_STEP`] proves, from 1 on.
pub(super) const STEPS: [&str; 12] = [
    "arithmetic",
    "CPUID",
    "a breakpoint exception",
    "an invalid-opcode exception",
    "a page fault",
    "FXSAVE and FXRSTOR",
    "XSAVE and XRSTOR",
    "reloading CR0 and CR3",
    "writing and reading an MSR",
    "port input",
    "beginning the timed loop",
    "the timed loop",
];
/// Numbers around the timed loop.
pub(super) const STEP_LOOP_START: u8 = 11;
pub(super) const STEP_LOOP_END: u8 = 12;
/// Rounds of the timed loop, four instructions each. Native: about 20 µs;
/// where each instruction is emulated (1 µs): 80 ms.
pub(super) const ROUNDS: u32 = 20_000;

/// Guest memory: one slot from address 0.
pub(super) const MEMORY: usize = 128 * 1024;
pub(super) const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PD: usize = 0x3000;
const PT: usize = 0x4000;
pub(super) const GDT: usize = 0x5000;
pub(super) const GDT_LIMIT: u16 = 3 * 8 - 1;
pub(super) const IDT: usize = 0x6000;
pub(super) const IDT_LIMIT: u16 = 32 * 16 - 1;
const DATA: usize = 0x7000;
pub(super) const CODE: usize = 0x8000;
pub(super) const STACK_TOP: usize = 0x1e000;
/// The page that is absent until the guest's own handler maps it.
const HOLE: usize = 0x1f000;
pub(super) const CODE_SELECTOR: u16 = 8;
pub(super) const DATA_SELECTOR: u16 = 16;

// Offsets in DATA.
const D_INT3: usize = 0x08;
const D_UD: usize = 0x10;
const D_PF: usize = 0x18;
const D_CR2: usize = 0x20;
const D_CPUID: usize = 0x28;
const D_SUM: usize = 0x30;
const D_XCR0: usize = 0x38;

macro_rules! timed_loop {
    () => {
        "
    22: add rax, rcx
        xor rax, 0x5a5a
        dec ecx
        jnz 22b
        "
    };
}

global_asm!(
    ".pushsection .text.walnut_kvm_probe, \"ax\", @progbits",
    ".globl walnut_kvm_probe_loop",
    "walnut_kvm_probe_loop:",
    "mov ecx, edi",
    "xor eax, eax",
    timed_loop!(),
    "ret",
    ".popsection",
    ".pushsection .rodata.walnut_kvm_probe, \"a\", @progbits",
    ".globl walnut_kvm_probe_code, walnut_kvm_probe_int3, walnut_kvm_probe_ud, walnut_kvm_probe_pf, walnut_kvm_probe_stray, walnut_kvm_probe_end",
    "
walnut_kvm_probe_code:
    mov r15d, 0x7000
    // 1: arithmetic
    xor eax, eax
    mov ecx, 1000
22: imul rax, rax, 31
    add rax, rcx
    dec ecx
    jnz 22b
    mov [r15 + 0x30], rax
    mov al, 1
    out 0x10, al
    // 2: CPUID
    mov eax, 1
    xor ecx, ecx
    cpuid
    mov [r15 + 0x28], rax
    mov al, 2
    out 0x10, al
    // 3: breakpoint
    int3
    mov al, 3
    out 0x10, al
    // 4: invalid opcode; the handler skips its two bytes
    ud2
    mov al, 4
    out 0x10, al
    // 5: page fault; the handler maps the page and the load is retried
    mov ecx, 0x1f000
    mov rax, [rcx]
    test rax, rax
    jnz 88f
    mov al, 5
    out 0x10, al
    // 6: FXSAVE
    mov rax, 0x1122334455667788
    movq xmm0, rax
    mov ecx, 0xb000
    fxsave64 [rcx]
    pxor xmm0, xmm0
    fxrstor64 [rcx]
    movq rdx, xmm0
    cmp rax, rdx
    jne 88f
    mov al, 6
    out 0x10, al
    // 7: XSAVE with the XCR0 the host asks for, if any
    cmp dword ptr [r15 + 0x38], 0
    je 33f
    xor ecx, ecx
    xor edx, edx
    mov eax, [r15 + 0x38]
    xsetbv
    xgetbv
    cmp eax, [r15 + 0x38]
    jne 88f
    mov rsi, 0x2233445566778899
    movq xmm0, rsi
    mov edi, 0xc000
    xsave64 [rdi]
    pxor xmm0, xmm0
    xrstor64 [rdi]
    movq rdx, xmm0
    cmp rsi, rdx
    jne 88f
33: mov al, 7
    out 0x10, al
    // 8: control registers
    mov rax, cr3
    mov cr3, rax
    mov rax, cr0
    or rax, 8
    mov cr0, rax
    clts
    mov rax, cr0
    test al, 8
    jnz 88f
    cmp qword ptr [r15 + 0x08], 1
    jne 88f
    mov al, 8
    out 0x10, al
    // 9: MSR_KERNEL_GS_BASE
    mov ecx, 0xc0000102
    mov eax, 0x12345678
    mov edx, 0x00001234
    wrmsr
    xor eax, eax
    xor edx, edx
    rdmsr
    cmp eax, 0x12345678
    jne 88f
    cmp edx, 0x1234
    jne 88f
    mov al, 9
    out 0x10, al
    // 10: port input
    in al, 0x11
    cmp al, 0x5a
    jne 88f
    mov al, 10
    out 0x10, al
    // 11, 12: speed
    mov al, 11
    out 0x10, al
    mov ecx, 20000
    xor eax, eax
    ",
    timed_loop!(),
    "
    mov al, 12
    out 0x10, al
77: hlt
    jmp 77b
88: out 0x13, al
    jmp 77b
walnut_kvm_probe_int3:
    inc qword ptr [r15 + 0x08]
    iretq
walnut_kvm_probe_ud:
    inc qword ptr [r15 + 0x10]
    add qword ptr [rsp], 2
    iretq
walnut_kvm_probe_pf:
    push rax
    push rcx
    mov rax, cr2
    mov [r15 + 0x20], rax
    inc qword ptr [r15 + 0x18]
    mov ecx, 0x40f8
    or qword ptr [rcx], 3
    pop rcx
    pop rax
    add rsp, 8
    iretq
walnut_kvm_probe_stray:
    out 0x12, al
    jmp 77b
walnut_kvm_probe_end:
    ",
    ".popsection",
);

unsafe extern "C" {
    static walnut_kvm_probe_code: u8;
    static walnut_kvm_probe_int3: u8;
    static walnut_kvm_probe_ud: u8;
    static walnut_kvm_probe_pf: u8;
    static walnut_kvm_probe_stray: u8;
    static walnut_kvm_probe_end: u8;
    safe fn walnut_kvm_probe_loop(rounds: u32) -> u64;
}

/// Runs the timed loop here, natively.
pub(super) fn native_loop() {
    std::hint::black_box(walnut_kvm_probe_loop(ROUNDS));
}

/// Offset of a label in the code.
fn offset(label: *const u8) -> usize {
    label as usize - (&raw const walnut_kvm_probe_code) as usize
}

fn code() -> &'static [u8] {
    let length = offset(&raw const walnut_kvm_probe_end);
    // SAFETY: the assembly above puts code and end in one section, in this
    // order, so `length` bytes from `code` are one read-only object.
    unsafe { std::slice::from_raw_parts(&raw const walnut_kvm_probe_code, length) }
}

fn put(memory: &mut [u8], at: usize, value: u64) {
    memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn get(memory: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&memory[at..at + 8]);
    u64::from_le_bytes(value)
}

/// Writes the guest into its zeroed memory of [`MEMORY`] bytes. `xcr0` is what
/// the guest shall enable, 0 where there is no XSAVE.
pub(super) fn load(memory: &mut [u8], xcr0: u64) {
    const TABLE: u64 = 3; // present, writable
    put(memory, PML4, PDPT as u64 | TABLE);
    put(memory, PDPT, PD as u64 | TABLE);
    put(memory, PD, PT as u64 | TABLE);
    for page in 0..MEMORY / 4096 {
        let present = if page * 4096 == HOLE { 0 } else { TABLE };
        put(memory, PT + page * 8, (page * 4096) as u64 | present);
    }
    put(memory, GDT + 8, 0x00af_9b00_0000_ffff); // 64-bit code, accessed
    put(memory, GDT + 16, 0x00cf_9300_0000_ffff); // data, accessed
    for vector in 0..32 {
        let handler = match vector {
            3 => &raw const walnut_kvm_probe_int3,
            6 => &raw const walnut_kvm_probe_ud,
            14 => &raw const walnut_kvm_probe_pf,
            _ => &raw const walnut_kvm_probe_stray,
        };
        let at = (CODE + offset(handler)) as u64;
        let gate = at & 0xffff | u64::from(CODE_SELECTOR) << 16 | 0x8e00 << 32 | (at >> 16) << 48;
        put(memory, IDT + vector * 16, gate);
    }
    put(memory, DATA + D_XCR0, xcr0);
    memory[CODE..CODE + code().len()].copy_from_slice(code());
}

/// What the guest's memory gives away after it halted, if anything is wrong.
pub(super) fn wrong(memory: &[u8], cpuid_signature: u32) -> Option<&'static str> {
    let sum = (1..=1000)
        .rev()
        .fold(0u64, |sum, n| sum.wrapping_mul(31).wrapping_add(n));
    [
        (D_SUM, sum, "arithmetic"),
        (D_CPUID, u64::from(cpuid_signature), "CPUID"),
        (D_INT3, 1, "a breakpoint exception"),
        (D_UD, 1, "an invalid-opcode exception"),
        (D_PF, 1, "a page fault"),
        (D_CR2, HOLE as u64, "a page fault's address"),
    ]
    .into_iter()
    .find(|(at, right, _)| get(memory, DATA + at) != *right)
    .map(|(_, _, what)| what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_fits_its_pages() {
        assert!(
            CODE + code().len() <= 0xb000,
            "code runs into the FXSAVE area"
        );
        let mut memory = vec![0; MEMORY];
        load(&mut memory, 7);
        assert_eq!(get(&memory, PT + 0x1f * 8), HOLE as u64);
        assert_eq!(wrong(&memory, 0), Some("arithmetic"));
    }
}
