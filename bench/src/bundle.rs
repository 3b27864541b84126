//! The test image as a bundle, for runtimes that want one.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{Host, run};

/// Unpacks the image and makes its program `args`.
pub(crate) fn make(host: &Host, args: &[&str]) -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir().context("make a directory")?;
    let bundle = dir.path().join("bundle");
    let image = format!("{}:latest", host.layout.display());
    run(&[
        "umoci",
        "unpack",
        "--image",
        &image,
        bundle.to_str().context("path")?,
    ])?;
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    config["process"]["args"] = json!(args);
    config["process"]["terminal"] = json!(false);
    // Limits of groups that this host may not have.
    if let Some(linux) = config["linux"].as_object_mut() {
        linux.remove("resources");
    }
    std::fs::write(&path, serde_json::to_vec(&config)?)?;
    Ok(dir)
}
