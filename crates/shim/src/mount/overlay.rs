//! Overlays of many layers: `mount` takes a page of options, and the paths of a
//! hundred layers are more. Relative to a directory that they share, they fit.

use std::path::{Path, PathBuf};

/// What `mount` takes of options, with the NUL; a page everywhere that this runs.
const PAGE: usize = 4096;

/// Options that fit, and the directory that relative paths in them start from.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Fitting {
    pub(crate) directory: Option<PathBuf>,
    pub(crate) data: String,
}

/// Shortens an overlay's options if they are too long; `None` if that does not help.
pub(crate) fn fit(data: &[String]) -> Option<Fitting> {
    let whole = data.join(",");
    if whole.len() < PAGE {
        return Some(Fitting {
            directory: None,
            data: whole,
        });
    }
    let layers = data.iter().find_map(|o| o.strip_prefix("lowerdir="))?;
    let layers: Vec<&Path> = layers.split(':').map(Path::new).collect();
    let directory = shared(&layers)?;
    let relative: Option<Vec<&str>> = layers
        .iter()
        .map(|layer| layer.strip_prefix(&directory).ok()?.to_str())
        .collect();
    let relative = relative?.join(":");
    let data: Vec<String> = data
        .iter()
        .map(|option| match option.starts_with("lowerdir=") {
            true => format!("lowerdir={relative}"),
            false => option.clone(),
        })
        .collect();
    let data = data.join(",");
    (data.len() < PAGE).then_some(Fitting {
        directory: Some(directory),
        data,
    })
}

/// The deepest directory that all layers are below.
fn shared(layers: &[&Path]) -> Option<PathBuf> {
    let mut directory = layers.first()?.parent()?;
    while !layers
        .iter()
        .all(|layer| layer.starts_with(directory) && *layer != directory)
    {
        directory = directory.parent()?;
    }
    directory.is_absolute().then(|| directory.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(layers: &[String]) -> Vec<String> {
        vec![
            "index=off".into(),
            "upperdir=/var/lib/c/snapshots/500/fs".into(),
            format!("lowerdir={}", layers.join(":")),
        ]
    }

    #[test]
    fn short_options_stay() {
        let options = options(&["/var/lib/c/snapshots/1/fs".into()]);
        let fitting = fit(&options).unwrap();
        assert_eq!((fitting.directory, fitting.data), (None, options.join(",")));
    }

    #[test]
    fn a_hundred_layers_fit() {
        let layers: Vec<_> = (1..=100)
            .map(|n| {
                format!(
                    "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/{n}/fs"
                )
            })
            .collect();
        let fitting = fit(&options(&layers)).unwrap();
        assert!(fitting.data.len() < PAGE);
        assert!(fitting.data.contains("lowerdir=1/fs:2/fs:"));
        assert!(fitting.data.contains("upperdir=/var/lib/c/"));
        let directory = fitting.directory.unwrap();
        assert!(directory.ends_with("snapshots"), "{directory:?}");
    }

    #[test]
    fn layers_of_one_directory_keep_their_names() {
        let layers: Vec<_> = (0..300).map(|n| format!("/a/snapshots/{n}/fs")).collect();
        let one = vec![layers[7].clone(); 300];
        let fitting = fit(&options(&one)).unwrap();
        assert!(fitting.data.contains("lowerdir=fs:fs"), "{}", fitting.data);
    }

    #[test]
    fn what_cannot_fit_is_said_so() {
        let long = "x".repeat(60);
        let layers: Vec<_> = (0..100).map(|n| format!("/{long}{n}/fs")).collect();
        assert_eq!(fit(&options(&layers)), None);
    }
}
