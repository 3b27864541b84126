//! The heap, which no thread may make grow once the process is locked in.
//!
//! All that it will ever have is reserved before: addresses, no memory, until they are
//! used. So no thread needs a call for it, and it has a limit.

use nix::errno::Errno;

use crate::Error;

/// What the heap has for the whole life of the guest, in bytes. The vsock device may
/// hold 76 MiB of data for programs of the host that do not read, in buffers that are
/// up to twice that while they grow; all else takes less than a MiB.
const RESERVE: usize = 192 << 20;

const PAGE: usize = 4096;

/// Lets the heap grow in one place. Called first of all.
pub(crate) fn tame() {
    const NEVER: libc::c_int = 1 << 30;
    // SAFETY: sets numbers of the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, NEVER);
    }
}

/// Takes the reserve. What the start had used and is free again goes back to the host
/// first.
pub(crate) fn reserve() -> Result<(), Error> {
    // SAFETY: gives back what is free; the break is only looked at.
    let from = unsafe {
        libc::malloc_trim(0);
        libc::sbrk(0).addr()
    };
    // SAFETY: asks for bytes that nobody writes to, and gives them back: they become
    // the end of the heap.
    let taken = unsafe {
        // Or the compiler would see through it.
        let bytes = std::hint::black_box(libc::malloc(RESERVE));
        libc::free(bytes);
        !bytes.is_null()
    };
    if !taken {
        return Err(Error::Host("reserve the heap", Errno::ENOMEM));
    }
    // SAFETY: the break is only looked at; the advice changes no content.
    unsafe {
        let to = libc::sbrk(0).addr();
        // One byte in use here must not become a huge page of 2 MiB. A host without
        // them refuses the advice.
        let from = from.next_multiple_of(PAGE);
        libc::madvise(
            std::ptr::with_exposed_provenance_mut(from),
            to.saturating_sub(from),
            libc::MADV_NOHUGEPAGE,
        );
    }
    Ok(())
}
