//! Layers: decompressed, read as tar, and merged into one tree.

pub(crate) mod apply;
pub(crate) mod decode;
pub(crate) mod sparse;
pub(crate) mod tar;
pub(crate) mod tree;

#[cfg(test)]
mod tests;
