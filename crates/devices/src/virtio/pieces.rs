//! Guest buffers as pieces for the kernel to read or write.

use vm_memory::{Address, GuestAddress, GuestMemory, Permissions};

use super::Memory;

/// A buffer that guest memory does not contain, or of too many pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Adds a buffer to a list of at most `most` pieces, split where regions meet. The
/// pieces are valid as long as `mem` is.
pub(crate) fn push(
    mem: &Memory,
    addr: GuestAddress,
    len: usize,
    access: Permissions,
    most: usize,
    out: &mut Vec<libc::iovec>,
) -> Result<(), Malformed> {
    if len == 0 {
        return Ok(());
    }
    // Linear addresses must not wrap: get_slices would start again at zero.
    addr.checked_add(u64::try_from(len).map_err(|_| Malformed)?)
        .ok_or(Malformed)?;
    let slices = mem.get_slices(addr, len, access).map_err(|_| Malformed)?;
    for slice in slices {
        let slice = slice.map_err(|_| Malformed)?;
        if out.len() >= most {
            return Err(Malformed);
        }
        out.push(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        });
    }
    Ok(())
}
