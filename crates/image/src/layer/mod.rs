//! Layers: decompressed, read as tar, and merged into one tree.

pub(crate) mod apply;
pub(crate) mod decode;
pub(crate) mod tree;

#[cfg(test)]
mod tests;
