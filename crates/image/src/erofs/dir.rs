//! Directory blocks: 12-byte entries sorted by name, then the names.
//!
//! The kernel finds a name by bisecting blocks, then entries, comparing bytes;
//! so `.` and `..` are sorted among the others.

use super::format::{BLOCK_USIZE, DIRENT, FileType};
use crate::layer::tree::{Dir, NodeId};

/// The sorted names of a directory, with `.` and `..`.
pub(crate) fn entries(dir: &Dir, this: NodeId) -> Vec<(&[u8], NodeId)> {
    let mut list: Vec<(&[u8], NodeId)> = dir
        .children
        .iter()
        .map(|(name, child)| (&name[..], child.node))
        .collect();
    for (name, node) in [(&b"."[..], this), (b"..", dir.parent())] {
        let at = list.partition_point(|(other, _)| *other < name);
        list.insert(at, (name, node));
    }
    list
}

/// How many names go into each block.
fn split<'a>(names: impl Iterator<Item = &'a [u8]>) -> (Vec<usize>, usize) {
    let (mut counts, mut count, mut used) = (Vec::new(), 0, 0);
    for name in names {
        let need = DIRENT + name.len();
        if used + need > BLOCK_USIZE {
            counts.push(count);
            (count, used) = (0, 0);
        }
        count += 1;
        used += need;
    }
    counts.push(count);
    (counts, used)
}

/// Bytes of the directory: whole blocks, and what the last one uses.
pub(crate) fn size(entries: &[(&[u8], NodeId)]) -> u64 {
    let (counts, used) = split(entries.iter().map(|(name, _)| *name));
    ((counts.len() - 1) * BLOCK_USIZE + used) as u64
}

/// The directory's content; `look_up` gives a node's number and type.
pub(crate) fn encode(
    entries: &[(&[u8], NodeId)],
    look_up: impl Fn(NodeId) -> (u64, FileType),
) -> Vec<u8> {
    let (counts, _) = split(entries.iter().map(|(name, _)| *name));
    let mut out = Vec::new();
    let mut rest = entries;
    for count in counts {
        let (block, after) = rest.split_at(count);
        rest = after;
        out.resize(out.len().next_multiple_of(BLOCK_USIZE), 0);
        let mut name_at = count * DIRENT;
        for (name, node) in block {
            let (nid, kind) = look_up(*node);
            out.extend_from_slice(&nid.to_le_bytes());
            // Within a block, hence below 4096.
            out.extend_from_slice(&u16::try_from(name_at).unwrap_or(0).to_le_bytes());
            out.extend_from_slice(&[kind as u8, 0]);
            name_at += name.len();
        }
        for (name, _) in block {
            out.extend_from_slice(name);
        }
    }
    out
}
