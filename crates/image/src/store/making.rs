//! From layers in the store to the root file system in it.

use std::{fs::File, path::Path, sync::Arc};

use crate::{
    Digest, Error, Event, Progress, PullOptions, convert,
    error::IoAt,
    manifest::Manifest,
    store::files::{self, Layout},
};

/// What a root file system is made with.
pub(crate) struct Making<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) options: &'a PullOptions,
    pub(crate) progress: &'a dyn Progress,
}

impl Making<'_> {
    /// Converts on a thread of its own, which holds the locks until it ends,
    /// even if no one waits for it any more.
    pub(crate) async fn rootfs(
        &self,
        image: &Manifest,
        diff_ids: &[Digest],
        path: &Path,
        locks: (File, Arc<File>),
    ) -> Result<u64, Error> {
        let layers: Vec<convert::Layer> = image
            .layers
            .iter()
            .zip(diff_ids)
            .map(|(blob, diff_id)| convert::Layer {
                blob: self.layout.blob(&blob.digest),
                digest: blob.digest,
                size: blob.size,
                diff_id: *diff_id,
            })
            .collect();
        let total = layers.iter().map(|layer| layer.size).sum();
        let limits = convert::Limits {
            bytes: self.options.max_image_size,
            entries: self.options.max_entries,
        };
        let (layout, path) = (self.layout.clone(), path.to_owned());
        let (sender, mut done) = tokio::sync::watch::channel(0u64);
        let mut task = tokio::task::spawn_blocking(move || {
            let _locks = locks;
            let report = |bytes: u64| {
                // Some 2 MiB apart: bars need no more.
                sender.send_if_modified(|last| {
                    let news = bytes.abs_diff(*last) > 2 << 20;
                    if news {
                        *last = bytes;
                    }
                    news
                });
            };
            convert_to(&layout, &layers, &path, limits, &report)
        });
        loop {
            tokio::select! {
                result = &mut task => {
                    return result.map_err(|e| Error::Internal(e.to_string()))?;
                }
                Ok(()) = done.changed() => {
                    let done = *done.borrow_and_update();
                    self.progress.event(Event::Converting { done, total });
                }
            }
        }
    }
}

fn convert_to(
    layout: &Layout,
    layers: &[convert::Layer],
    path: &Path,
    limits: convert::Limits,
    report: &dyn Fn(u64),
) -> Result<u64, Error> {
    let temp = layout.temp()?;
    let tails = tempfile::tempfile_in(layout.tmp()).at("create a file in", layout.tmp())?;
    let out = temp.reopen().at("open", temp.path())?;
    let size = convert::convert(layers, (out, temp.path()), tails, limits, report)?;
    let read_only = std::os::unix::fs::PermissionsExt::from_mode(0o444);
    temp.as_file()
        .set_permissions(read_only)
        .at("change the mode of", temp.path())?;
    // An old damaged one may be there; the rename replaces it.
    files::keep_synced(temp, path)?;
    Ok(size)
}
