//! What an emulated processor is spared.
//!
//! An emulator translates code before it runs it, which takes a hundred times as long as
//! running it, and Debian 12's QEMU takes code at another address for other code. Address
//! space layout randomization therefore has it translate the container helper again for
//! each process that it builds. The helper runs nobody's code but ours, so that on such a
//! machine it always lies at the same addresses; what it executes does not, see its
//! `main`. A processor of silicon notices no difference, and there it is left random.

use std::sync::OnceLock;

/// As an emulator names itself in CPUID leaf 0x4000_0000 (qemu,
/// target/i386/cpu.c).
#[cfg(target_arch = "x86_64")]
const TCG: [u8; 12] = *b"TCGTCGTCGTCG";

#[cfg(target_arch = "x86_64")]
fn detect() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    let words = [leaf.ebx, leaf.ecx, leaf.edx];
    words.iter().flat_map(|word| word.to_le_bytes()).eq(TCG)
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> bool {
    false
}

/// Calls `spawn`, which executes a program; it lies at fixed addresses where the
/// processor is emulated.
pub(crate) fn at_fixed_addresses<T>(spawn: impl FnOnce() -> T) -> T {
    static EMULATED: OnceLock<bool> = OnceLock::new();
    if !*EMULATED.get_or_init(detect) {
        return spawn();
    }
    // It is the thread's own, and inherited. Where it cannot be set it stays.
    set(libc::ADDR_NO_RANDOMIZE);
    let result = spawn();
    set(0);
    result
}

fn set(personality: libc::c_int) {
    // SAFETY: personality takes any value, and changes no memory.
    unsafe { libc::personality(libc::c_ulong::from(personality.unsigned_abs())) };
}
