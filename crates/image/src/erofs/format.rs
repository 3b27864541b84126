//! EROFS on-disk structures (Linux `fs/erofs/erofs_fs.h`), as bytes.
//!
//! Only what an uncompressed image needs: 4096-byte blocks, extended inodes
//! (compact ones carry no time of their own), flat-plain and flat-inline
//! data, inline xattrs. Linux 5.4 and later mount it.

/// Bytes of a block.
pub(crate) const BLOCK: u64 = 4096;
/// [`BLOCK`] as an index type.
pub(crate) const BLOCK_USIZE: usize = 4096;
/// Bytes of a slot: inodes start on these, and are numbered by them.
pub(crate) const SLOT: u64 = 32;
/// Bytes of an extended inode.
pub(crate) const INODE: u64 = 64;
/// Bytes of a directory entry without its name.
pub(crate) const DIRENT: usize = 12;
/// Where the superblock lies in block 0.
const SUPER_OFFSET: usize = 1024;
const MAGIC: u32 = 0xE0F5_E1E2;
const COMPAT_SB_CHKSUM: u32 = 1;
const COMPAT_MTIME: u32 = 2;

/// How an inode's data is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Whole blocks.
    Plain,
    /// Whole blocks, and the last part behind the inode.
    Inline,
}

/// File types of directory entries. Tar has no sockets (type 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum FileType {
    Regular = 1,
    Directory = 2,
    Char = 3,
    Block = 4,
    Fifo = 5,
    Symlink = 7,
}

/// What the superblock says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Superblock {
    pub(crate) root_nid: u16,
    pub(crate) inodes: u64,
    pub(crate) blocks: u32,
    pub(crate) meta_block: u32,
    pub(crate) uuid: [u8; 16],
}

impl Superblock {
    /// Block 0, with its checksum.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut block = vec![0u8; BLOCK_USIZE];
        let sb = &mut block[SUPER_OFFSET..];
        put32(sb, 0, MAGIC);
        put32(sb, 8, COMPAT_SB_CHKSUM | COMPAT_MTIME);
        sb[12] = 12; // log2 of the block size
        sb[14..16].copy_from_slice(&self.root_nid.to_le_bytes());
        sb[16..24].copy_from_slice(&self.inodes.to_le_bytes());
        put32(sb, 36, self.blocks);
        put32(sb, 40, self.meta_block);
        sb[48..64].copy_from_slice(&self.uuid);
        // The checksum covers the rest of the block, itself as zero, and is
        // crc32c without the final inversion.
        let crc = crc32c(&block[SUPER_OFFSET..]);
        put32(&mut block[SUPER_OFFSET..], 4, crc);
        block
    }

    /// Bytes that the file system of this first block claims, if it is one of ours.
    pub(crate) fn claimed_size(block: &[u8]) -> Option<u64> {
        let sb = block.get(SUPER_OFFSET..BLOCK_USIZE)?;
        let get32 = |at: usize| -> Option<u32> {
            Some(u32::from_le_bytes(sb.get(at..at + 4)?.try_into().ok()?))
        };
        let mut zeroed = sb.to_vec();
        zeroed[4..8].fill(0);
        (get32(0)? == MAGIC && get32(4)? == crc32c(&zeroed))
            .then(|| get32(36).map(|blocks| u64::from(blocks) * BLOCK))?
    }
}

/// An extended inode, without what follows it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Inode {
    pub(crate) layout: Layout,
    pub(crate) xattr_count: u16,
    /// Type and permission bits, as in `st_mode`.
    pub(crate) mode: u16,
    pub(crate) size: u64,
    /// First block of the data, or a device's number.
    pub(crate) block_or_rdev: u32,
    pub(crate) ino: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970.
    pub(crate) mtime: i64,
    pub(crate) mtime_nsec: u32,
    pub(crate) nlink: u32,
}

impl Inode {
    /// The 64 bytes.
    pub(crate) fn encode(&self) -> [u8; 64] {
        let mut out = [0u8; 64];
        let layout: u16 = match self.layout {
            Layout::Plain => 0,
            Layout::Inline => 2,
        };
        out[0..2].copy_from_slice(&(1 | layout << 1).to_le_bytes());
        out[2..4].copy_from_slice(&self.xattr_count.to_le_bytes());
        out[4..6].copy_from_slice(&self.mode.to_le_bytes());
        out[8..16].copy_from_slice(&self.size.to_le_bytes());
        put32(&mut out, 16, self.block_or_rdev);
        put32(&mut out, 20, self.ino);
        put32(&mut out, 24, self.uid);
        put32(&mut out, 28, self.gid);
        out[32..40].copy_from_slice(&self.mtime.to_le_bytes());
        put32(&mut out, 40, self.mtime_nsec);
        put32(&mut out, 44, self.nlink);
        out
    }
}

/// A device number as the kernel's `new_encode_dev` has it: 12-bit major,
/// 20-bit minor.
pub(crate) fn encode_device(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20)
        .then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// Splits an xattr's name into EROFS's prefix index and the rest; `None` for
/// a name space that the kernel's EROFS does not serve.
pub(crate) fn split_xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    [(&b"user."[..], 1), (b"trusted.", 4), (b"security.", 6)]
        .into_iter()
        .find_map(|(prefix, index)| {
            let rest = name.strip_prefix(prefix)?;
            (!rest.is_empty()).then_some((index, rest))
        })
}

/// The inline xattrs that follow an inode: a header of 12 bytes, then
/// entries of 4-byte alignment. Returns the bytes and `i_xattr_icount`.
/// `None` if they exceed what the count can say.
pub(crate) fn encode_xattrs<'a>(
    xattrs: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> Option<(Vec<u8>, u16)> {
    let mut out = vec![0u8; 12];
    for (name, value) in xattrs {
        let Some((index, rest)) = split_xattr_name(name) else {
            continue;
        };
        out.push(u8::try_from(rest.len()).ok()?);
        out.push(index);
        out.extend_from_slice(&u16::try_from(value.len()).ok()?.to_le_bytes());
        out.extend_from_slice(rest);
        out.extend_from_slice(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    if out.len() == 12 {
        return Some((Vec::new(), 0));
    }
    let count = u16::try_from((out.len() - 12) / 4 + 1).ok()?;
    Some((out, count))
}

fn put32(out: &mut [u8], at: usize, value: u32) {
    out[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Castagnoli CRC, seed all ones, not inverted at the end. One block per
/// image: a table would cost more than it saves.
fn crc32c(data: &[u8]) -> u32 {
    data.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_matches_the_published_check_value() {
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn device_numbers_pack_as_the_kernel_does() {
        assert_eq!(encode_device(1, 3), Some(0x0103));
        assert_eq!(encode_device(259, 0x12345), Some(0x1231_0345));
        assert_eq!(encode_device(4096, 0), None);
        assert_eq!(encode_device(0, 1 << 20), None);
    }

    #[test]
    fn xattrs_are_split_and_padded() {
        let pairs: [(&[u8], &[u8]); 3] = [
            (b"user.a", b"xyz"),
            (b"com.apple.x", b"dropped"),
            (b"system.posix_acl_access", b"\x02\0\0\0"),
        ];
        let (bytes, count) = encode_xattrs(pairs.into_iter()).unwrap();
        assert_eq!(bytes.len(), 12 + 8 + 8);
        assert_eq!(count, 5);
        assert_eq!(&bytes[12..20], b"\x01\x01\x03\0axyz");
        assert_eq!(encode_xattrs(std::iter::empty()).unwrap(), (vec![], 0));
        let huge = vec![0u8; 70_000];
        assert!(encode_xattrs([(&b"user.a"[..], &huge[..])].into_iter()).is_none());
    }
}
