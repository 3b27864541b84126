//! The merged tree of an image's layers: metadata in memory, data elsewhere.
//!
//! An arena of nodes; directories map names to node numbers, and hard links
//! are two names for one node. Every name remembers the layer that set it,
//! so that a whiteout removes only what lower layers brought (OCI image-spec
//! layer.md, "Whiteouts"), wherever it stands in its own layer. Nothing here
//! recurses: a hostile layer chooses the depth.

use std::collections::BTreeMap;

/// Index of a node.
pub(crate) type NodeId = u32;
/// Index of a layer, from the base.
pub(crate) type LayerIndex = u16;

/// The root directory.
pub(crate) const ROOT: NodeId = 0;
/// Symbolic links followed for one path, as in Linux.
const MAX_LINKS: u32 = 40;
/// Longest name (NAME_MAX).
pub(crate) const MAX_NAME: usize = 255;
// Xattrs are sorted by name, so that what is written from them never varies.
pub(crate) use walnut_archive::{MAX_PATH, Xattrs};

/// Owner, permissions, time and extended attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Meta {
    /// The low twelve bits of `st_mode`.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970, and nanoseconds.
    pub(crate) mtime: (i64, u32),
    /// Boxed, as few files have any.
    pub(crate) xattrs: Option<Box<Xattrs>>,
}

impl Meta {
    /// Of a directory that no layer describes: as containerd makes it, but
    /// with a time that does not depend on when the image is converted.
    fn implicit() -> Self {
        Self {
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: None,
        }
    }
}

/// Where a regular file's data lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Data {
    /// Bytes of the file.
    pub(crate) size: u64,
    /// First block of its whole blocks in the image.
    pub(crate) block: u32,
    /// Offset of the rest in the spool of tails.
    pub(crate) tail: u64,
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Dir(Dir),
    File(Data),
    Symlink(Box<[u8]>),
    /// Device number in the kernel's encoding.
    Char(u32),
    Block(u32),
    Fifo,
}

/// A directory's names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Dir {
    pub(crate) children: BTreeMap<Box<[u8]>, Child>,
    /// Holds nothing from layers below this one. Lets a whiteout in a large
    /// tree be paid for once per layer.
    pure: LayerIndex,
    parent: NodeId,
}

/// A name's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Child {
    pub(crate) node: NodeId,
    /// The layer that set this name.
    pub(crate) layer: LayerIndex,
}

#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) kind: Kind,
}

/// Why an entry cannot be put in the tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TreeError {
    #[error("too many symbolic links on the way")]
    TooManyLinks,
    #[error("a part of its path is a file of the same layer")]
    NotADirectory,
    #[error("a part of its path is longer than {MAX_NAME} bytes")]
    NameTooLong,
    #[error("its path is longer than {MAX_PATH} bytes")]
    PathTooLong,
    #[error("it would replace the root directory")]
    ReplacesRoot,
    #[error("it is a hard link to something that does not exist")]
    NoLinkTarget,
    #[error("it is a hard link to a directory")]
    LinkToDirectory,
    #[error("the image has more entries than can be counted")]
    TooManyNodes,
}

/// The tree.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// An empty root directory.
    pub(crate) fn new() -> Self {
        Self {
            nodes: vec![Node {
                meta: Meta::implicit(),
                kind: Kind::Dir(Dir::default()),
            }],
        }
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[usize::try_from(id).unwrap_or(usize::MAX)]
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[usize::try_from(id).unwrap_or(usize::MAX)]
    }

    /// Every node, those that lost their last name included.
    pub(crate) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A directory's names; `None` for anything else.
    pub(crate) fn dir(&self, id: NodeId) -> Option<&Dir> {
        match &self.node(id).kind {
            Kind::Dir(dir) => Some(dir),
            _ => None,
        }
    }

    fn dir_mut(&mut self, id: NodeId) -> Option<&mut Dir> {
        match &mut self.node_mut(id).kind {
            Kind::Dir(dir) => Some(dir),
            _ => None,
        }
    }

    fn child(&self, dir: NodeId, name: &[u8]) -> Option<Child> {
        self.dir(dir)?.children.get(name).copied()
    }

    fn push(&mut self, node: Node) -> Result<NodeId, TreeError> {
        let id = NodeId::try_from(self.nodes.len()).map_err(|_| TreeError::TooManyNodes)?;
        self.nodes.push(node);
        Ok(id)
    }

    fn set(&mut self, dir: NodeId, name: &[u8], node: NodeId, layer: LayerIndex) {
        if let Some(dir) = self.dir_mut(dir) {
            dir.children.insert(name.into(), Child { node, layer });
        }
    }

    fn make_dir(
        &mut self,
        parent: NodeId,
        name: &[u8],
        meta: Meta,
        layer: LayerIndex,
    ) -> Result<NodeId, TreeError> {
        let id = self.push(Node {
            meta,
            kind: Kind::Dir(Dir {
                children: BTreeMap::new(),
                pure: layer,
                parent,
            }),
        })?;
        self.set(parent, name, id, layer);
        Ok(id)
    }

    /// Puts an entry at `path`. A directory over a directory keeps what is in
    /// it; anything else replaces what was there.
    pub(crate) fn put(
        &mut self,
        path: &[u8],
        meta: Meta,
        kind: Kind,
        layer: LayerIndex,
    ) -> Result<(), TreeError> {
        let parts = clean(path)?;
        let Some((name, parents)) = parts.split_last() else {
            if !matches!(kind, Kind::Dir(_)) {
                return Err(TreeError::ReplacesRoot);
            }
            self.node_mut(ROOT).meta = meta;
            return Ok(());
        };
        let parent = self.walk_or_make(parents, layer)?;
        let existing = self.child(parent, name);
        if !matches!(kind, Kind::Dir(_)) {
            let id = self.push(Node { meta, kind })?;
            self.set(parent, name, id, layer);
            return Ok(());
        }
        match existing {
            Some(child) if self.dir(child.node).is_some() => {
                self.node_mut(child.node).meta = meta;
                self.set(parent, name, child.node, layer);
            }
            _ => {
                self.make_dir(parent, name, meta, layer)?;
            }
        }
        Ok(())
    }

    /// Makes `path` another name of what `target` names.
    pub(crate) fn link(
        &mut self,
        path: &[u8],
        target: &[u8],
        layer: LayerIndex,
    ) -> Result<(), TreeError> {
        let target = clean(target)?;
        let (target_name, target_parents) =
            target.split_last().ok_or(TreeError::LinkToDirectory)?;
        let node = self
            .walk(target_parents)?
            .and_then(|dir| self.child(dir, target_name))
            .ok_or(TreeError::NoLinkTarget)?
            .node;
        if self.dir(node).is_some() {
            return Err(TreeError::LinkToDirectory);
        }
        let parts = clean(path)?;
        let (name, parents) = parts.split_last().ok_or(TreeError::ReplacesRoot)?;
        let parent = self.walk_or_make(parents, layer)?;
        self.set(parent, name, node, layer);
        Ok(())
    }

    /// Removes what lower layers put at `path`.
    pub(crate) fn whiteout(&mut self, path: &[u8], layer: LayerIndex) -> Result<(), TreeError> {
        let parts = clean(path)?;
        let Some((name, parents)) = parts.split_last() else {
            return Ok(());
        };
        let Some(parent) = self.walk(parents)? else {
            return Ok(());
        };
        let Some(child) = self.child(parent, name) else {
            return Ok(());
        };
        let mut keep = child.layer == layer;
        if self.dir(child.node).is_some() {
            self.prune(child.node, layer);
            keep |= self.dir(child.node).is_some_and(|d| !d.children.is_empty());
        }
        if !keep && let Some(dir) = self.dir_mut(parent) {
            dir.children.remove(*name);
        }
        Ok(())
    }

    /// Empties the directory at `path` of what lower layers put in it.
    pub(crate) fn opaque(&mut self, path: &[u8], layer: LayerIndex) -> Result<(), TreeError> {
        if let Some(dir) = self.walk(&clean(path)?)? {
            self.prune(dir, layer);
        }
        Ok(())
    }

    /// Removes from under `top` every name that a layer below `layer` set,
    /// but for directories that still hold something.
    fn prune(&mut self, top: NodeId, layer: LayerIndex) {
        let mut stack = vec![top];
        let mut visited = Vec::new();
        while let Some(id) = stack.pop() {
            let Some(dir) = self.dir_mut(id) else {
                continue;
            };
            if dir.pure >= layer {
                continue;
            }
            dir.pure = layer;
            visited.push(id);
            let below: Vec<NodeId> = dir.children.values().map(|c| c.node).collect();
            stack.extend(below.into_iter().filter(|id| self.dir(*id).is_some()));
        }
        // Children before parents: whoever ends up empty goes too.
        for id in visited.into_iter().rev() {
            let Some(dir) = self.dir(id) else { continue };
            let doomed: Vec<Box<[u8]>> = dir
                .children
                .iter()
                .filter(|(_, child)| {
                    child.layer < layer
                        && self
                            .dir(child.node)
                            .is_none_or(|dir| dir.children.is_empty())
                })
                .map(|(name, _)| name.clone())
                .collect();
            if let Some(dir) = self.dir_mut(id) {
                for name in doomed {
                    dir.children.remove(&name);
                }
            }
        }
    }

    /// The directory at `parts`, following symlinks within the root; `None`
    /// if there is none.
    fn walk(&self, parts: &[&[u8]]) -> Result<Option<NodeId>, TreeError> {
        let mut path = Path::new(parts);
        let mut at = ROOT;
        while let Some(part) = path.next() {
            if *part == *b".." {
                at = self.dir(at).map_or(ROOT, |dir| dir.parent);
                continue;
            }
            let Some(child) = self.child(at, &part) else {
                return Ok(None);
            };
            match &self.node(child.node).kind {
                Kind::Dir(_) => at = child.node,
                Kind::Symlink(target) => {
                    if path.follow(target)? {
                        at = ROOT;
                    }
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// The same, making what does not exist.
    fn walk_or_make(&mut self, parts: &[&[u8]], layer: LayerIndex) -> Result<NodeId, TreeError> {
        let mut path = Path::new(parts);
        let mut at = ROOT;
        while let Some(part) = path.next() {
            if *part == *b".." {
                at = self.dir(at).map_or(ROOT, |dir| dir.parent);
                continue;
            }
            let Some(child) = self.child(at, &part) else {
                at = self.make_dir(at, &part, Meta::implicit(), layer)?;
                continue;
            };
            match &self.node(child.node).kind {
                Kind::Dir(_) => at = child.node,
                Kind::Symlink(target) => {
                    if path.follow(&target.clone())? {
                        at = ROOT;
                    }
                }
                _ if child.layer < layer => {
                    at = self.make_dir(at, &part, Meta::implicit(), layer)?;
                }
                _ => return Err(TreeError::NotADirectory),
            }
        }
        Ok(at)
    }
}

/// The rest of a path being walked, last part first.
struct Path {
    rest: Vec<Box<[u8]>>,
    links: u32,
}

impl Path {
    fn new(parts: &[&[u8]]) -> Self {
        Self {
            rest: parts.iter().rev().map(|part| Box::from(*part)).collect(),
            links: 0,
        }
    }

    fn next(&mut self) -> Option<Box<[u8]>> {
        self.rest.pop()
    }

    /// Goes on through a symlink; true if its target is absolute. Only here
    /// may `..` stand in a path, and the root is its own parent.
    fn follow(&mut self, target: &[u8]) -> Result<bool, TreeError> {
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(TreeError::TooManyLinks);
        }
        for part in target.split(|b| *b == b'/').rev() {
            if part.is_empty() || part == b"." {
                continue;
            }
            if part.len() > MAX_NAME {
                return Err(TreeError::NameTooLong);
            }
            self.rest.push(part.into());
        }
        Ok(target.first() == Some(&b'/'))
    }
}

/// Splits a tar path into names. As with Go's `filepath.Clean("/" + path)`:
/// `.` and empty parts vanish, `..` takes back a name and stops at the root,
/// so that nothing leads out.
pub(crate) fn clean(path: &[u8]) -> Result<Vec<&[u8]>, TreeError> {
    if path.len() > MAX_PATH {
        return Err(TreeError::PathTooLong);
    }
    let mut parts = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            _ if part.len() > MAX_NAME => return Err(TreeError::NameTooLong),
            _ => parts.push(part),
        }
    }
    Ok(parts)
}

impl Dir {
    /// The directory this one is in; the root is in itself.
    pub(crate) fn parent(&self) -> NodeId {
        self.parent
    }
}
