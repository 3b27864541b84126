//! `walnut images`.

use anyhow::Result;
use serde_json::json;
use walnut_image::{Image, Reference, Store};
use walnut_sandbox::Layout;

use crate::{
    args::{Format, ImagesArgs, RmiArgs},
    output,
};

pub(crate) fn images(args: &ImagesArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let images = Store::open(layout.images())?.list()?;
    if args.quiet {
        for image in &images {
            println!("{}", short(image));
        }
        return Ok(0);
    }
    if args.format == Format::Json {
        let all: Vec<_> = images
            .iter()
            .map(|i| {
                json!({
                    "id": i.id.to_string(),
                    "names": i.names.iter().map(|n| n.familiar()).collect::<Vec<_>>(),
                    "digest": i.digest.to_string(),
                    "created": i.created,
                    "size": i.size,
                    "checkpoint": i.checkpoint.is_some(),
                })
            })
            .collect();
        output::json(&all)?;
        return Ok(0);
    }
    let mut rows = Vec::new();
    for image in &images {
        let row = |name: String, tag: String| {
            [
                name,
                tag,
                short(image),
                image
                    .created
                    .as_deref()
                    .and_then(|c| c.get(..10))
                    .unwrap_or("-")
                    .to_owned(),
                output::bytes(image.size),
            ]
        };
        if image.names.is_empty() {
            rows.push(row("<none>".into(), "<none>".into()));
        }
        for name in &image.names {
            rows.push(row(
                name.familiar_name(),
                name.tag().unwrap_or("<none>").to_owned(),
            ));
        }
    }
    output::table(["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"], &rows)?;
    Ok(0)
}

pub(crate) fn rmi(args: &RmiArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let store = Store::open(layout.images())?;
    let mut code = 0;
    for image in &args.images {
        match store.remove(image) {
            Ok(removed) => {
                for name in removed.names {
                    let name = name.parse::<Reference>().map_or(name, |n| n.familiar());
                    println!("{name}");
                }
            }
            Err(e) => {
                eprintln!("walnut: {e}");
                code = 1;
            }
        }
    }
    Ok(code)
}

fn short(image: &Image) -> String {
    let id = image.id.to_string();
    let hex = id.strip_prefix("sha256:").unwrap_or(&id);
    hex.get(..12).unwrap_or(hex).to_owned()
}
