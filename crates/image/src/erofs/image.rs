//! Completes an image: everything but the file data.

use std::fs::File;

use super::{
    alloc::Allocator,
    data::{DataWriter, outer_blocks, tail_is_inline},
    dir,
    format::{self, BLOCK, FileType, INODE, Inode, Layout, SLOT, Superblock},
};
use crate::{
    Error,
    layer::{
        apply::pairs,
        tree::{Kind, Node, NodeId, ROOT, Tree},
    },
};

/// What is decided about a node before anything of it is written.
#[derive(Debug, Clone, Copy, Default)]
struct Plan {
    nid: u64,
    nlink: u32,
    /// First block of its data.
    block: u32,
    /// Bytes of its data.
    size: u64,
    /// Bytes of its xattrs.
    xattrs: usize,
}

/// Writes directories, inodes and superblock behind the file data, and gives
/// the complete file and its size.
pub(crate) fn write(
    tree: &Tree,
    mut data: DataWriter,
    uuid: [u8; 16],
) -> Result<(File, u64), Error> {
    let mut plans = vec![Plan::default(); tree.nodes().len()];
    let order = walk(tree, &mut plans);
    punch_unreachable(tree, &plans, &mut data)?;
    data.flush_tails()?;

    let first = data.next_block()?;
    data.advance_to(u64::from(first) * BLOCK)?;
    let meta_block = plan_blocks(tree, &order, &mut plans, first)?;
    let mut alloc = Allocator::new();
    for id in &order {
        let plan = &mut plans[index(*id)];
        let inline = match tail_is_inline(plan.size, plan.xattrs) {
            true => plan.size % BLOCK,
            false => 0,
        };
        plan.nid = alloc.place(INODE + plan.xattrs as u64 + inline);
    }
    let blocks = u64::from(meta_block) + alloc.blocks();
    let superblock = Superblock {
        root_nid: u16::try_from(plans[index(ROOT)].nid).unwrap_or(0),
        inodes: order.len() as u64,
        blocks: u32::try_from(blocks).map_err(|_| too_large(blocks))?,
        meta_block,
        uuid,
    };
    write_blocks(tree, &order, &plans, &mut data)?;
    write_inodes(tree, order, &plans, &mut data, meta_block)?;
    let size = blocks * BLOCK;
    let file = data.finish(&superblock.encode(), size)?;
    Ok((file, size))
}

fn index(id: NodeId) -> usize {
    usize::try_from(id).unwrap_or(usize::MAX)
}

fn too_large(blocks: u64) -> Error {
    Error::TooLarge {
        what: "the root file system".to_owned(),
        size: blocks.saturating_mul(BLOCK),
        limit: u64::from(u32::MAX) * BLOCK,
    }
}

/// Visits every node that has a name, a directory's children together, and
/// counts links.
fn walk(tree: &Tree, plans: &mut [Plan]) -> Vec<NodeId> {
    let mut order = vec![ROOT];
    let mut stack = vec![ROOT];
    plans[index(ROOT)].nlink = 2;
    while let Some(id) = stack.pop() {
        let Some(dir) = tree.dir(id) else { continue };
        let first = stack.len();
        for child in dir.children.values() {
            if plans[index(child.node)].nlink == 0 {
                order.push(child.node);
            }
            plans[index(child.node)].nlink += 1;
            if tree.dir(child.node).is_some() {
                plans[index(child.node)].nlink = 2;
                plans[index(id)].nlink += 1;
                stack.push(child.node);
            }
        }
        stack[first..].reverse();
    }
    order
}

fn punch_unreachable(tree: &Tree, plans: &[Plan], data: &mut DataWriter) -> Result<(), Error> {
    for (node, plan) in tree.nodes().iter().zip(plans) {
        if plan.nlink == 0
            && let Kind::File(file) = &node.kind
        {
            data.punch(
                file.block,
                outer_blocks(file.size, xattr_bytes(node).0.len()),
            )?;
        }
    }
    Ok(())
}

fn xattr_bytes(node: &Node) -> (Vec<u8>, u16) {
    node.meta
        .xattrs
        .as_ref()
        .and_then(|map| format::encode_xattrs(pairs(map)))
        .unwrap_or_default()
}

/// Sizes everything, and gives blocks from `first` on to directories and long
/// symlinks. Returns the first block after them.
fn plan_blocks(
    tree: &Tree,
    order: &[NodeId],
    plans: &mut [Plan],
    first: u32,
) -> Result<u32, Error> {
    let mut next = u64::from(first);
    for id in order {
        let node = tree.node(*id);
        let plan = &mut plans[index(*id)];
        plan.xattrs = xattr_bytes(node).0.len();
        match &node.kind {
            Kind::File(file) => {
                plan.size = file.size;
                plan.block = file.block;
                continue;
            }
            Kind::Dir(dir) => plan.size = dir::size(&dir::entries(dir, *id)),
            Kind::Symlink(target) => plan.size = target.len() as u64,
            Kind::Char(_) | Kind::Block(_) | Kind::Fifo => continue,
        }
        plan.block = u32::try_from(next).map_err(|_| too_large(next))?;
        next += outer_blocks(plan.size, plan.xattrs);
    }
    u32::try_from(next).map_err(|_| too_large(next))
}

/// The content of a directory or a symlink.
fn content(tree: &Tree, plans: &[Plan], id: NodeId) -> Vec<u8> {
    match &tree.node(id).kind {
        Kind::Dir(dir) => dir::encode(&dir::entries(dir, id), |node| {
            (plans[index(node)].nid, file_type(&tree.node(node).kind))
        }),
        Kind::Symlink(target) => target.to_vec(),
        _ => Vec::new(),
    }
}

fn write_blocks(
    tree: &Tree,
    order: &[NodeId],
    plans: &[Plan],
    data: &mut DataWriter,
) -> Result<(), Error> {
    for id in order {
        let plan = &plans[index(*id)];
        let blocks = outer_blocks(plan.size, plan.xattrs);
        if blocks == 0 || matches!(tree.node(*id).kind, Kind::File(_)) {
            continue;
        }
        let mut bytes = content(tree, plans, *id);
        bytes.resize(usize::try_from(blocks * BLOCK).unwrap_or(0), 0);
        data.append(&bytes)?;
    }
    Ok(())
}

fn write_inodes(
    tree: &Tree,
    mut order: Vec<NodeId>,
    plans: &[Plan],
    data: &mut DataWriter,
    meta_block: u32,
) -> Result<(), Error> {
    let numbers: Vec<u32> = {
        let mut numbers = vec![0; plans.len()];
        for (at, id) in (1..).zip(&order) {
            numbers[index(*id)] = at;
        }
        numbers
    };
    order.sort_unstable_by_key(|id| plans[index(*id)].nid);
    for id in order {
        let node = tree.node(id);
        let plan = &plans[index(id)];
        data.advance_to(u64::from(meta_block) * BLOCK + plan.nid * SLOT)?;
        data.append(&inode(node, plan, numbers[index(id)]).encode())?;
        data.append(&xattr_bytes(node).0)?;
        if !tail_is_inline(plan.size, plan.xattrs) {
            continue;
        }
        let tail = usize::try_from(plan.size % BLOCK).unwrap_or(0);
        if let Kind::File(file) = &node.kind {
            let mut bytes = vec![0; tail];
            data.read_tail(file.tail, &mut bytes)?;
            data.append(&bytes)?;
        } else {
            let bytes = content(tree, plans, id);
            data.append(&bytes[bytes.len() - tail..])?;
        }
    }
    Ok(())
}

fn inode(node: &Node, plan: &Plan, ino: u32) -> Inode {
    let (kind_bits, block_or_rdev) = match &node.kind {
        Kind::Fifo => (0o010_000, 0),
        Kind::Char(device) => (0o020_000, *device),
        Kind::Dir(_) => (0o040_000, plan.block),
        Kind::Block(device) => (0o060_000, *device),
        Kind::File(_) => (0o100_000, plan.block),
        Kind::Symlink(_) => (0o120_000, plan.block),
    };
    Inode {
        layout: match tail_is_inline(plan.size, plan.xattrs) {
            true => Layout::Inline,
            false => Layout::Plain,
        },
        xattr_count: xattr_bytes(node).1,
        mode: kind_bits | node.meta.mode,
        size: plan.size,
        block_or_rdev,
        ino,
        uid: node.meta.uid,
        gid: node.meta.gid,
        mtime: node.meta.mtime.0,
        mtime_nsec: node.meta.mtime.1,
        nlink: plan.nlink,
    }
}

fn file_type(kind: &Kind) -> FileType {
    match kind {
        Kind::Dir(_) => FileType::Directory,
        Kind::File(_) => FileType::Regular,
        Kind::Symlink(_) => FileType::Symlink,
        Kind::Char(_) => FileType::Char,
        Kind::Block(_) => FileType::Block,
        Kind::Fifo => FileType::Fifo,
    }
}
