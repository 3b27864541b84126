//! `walnut images`, `rmi` and `tag`.

use anyhow::{Result, anyhow, bail};
use chrono::DateTime;
use clap::Args;
use serde_json::{Value, json};
use walnut_image::{Image, Reference, Store};
use walnut_sandbox::{Journal, Layout, Record, list, now_ns, similar};

use crate::{
    filter::Filter,
    format::{List, ListFormat, Row, row},
    output,
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut images
  walnut images -q 'debian:*'
  walnut images --format '{{.Repository}}:{{.Tag}} {{.Size}}'

Filters: reference, label[=VALUE], before, since, dangling. Fields: ID, Repository, Tag, Digest,
CreatedAt, CreatedSince, Size, Checkpoint.")]
pub(crate) struct ImagesArgs {
    /// Show IDs alone
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Show those alone that fit, as reference=debian:*
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) filter: Vec<Filter>,
    /// Show digests too
    #[arg(long)]
    pub(crate) digests: bool,
    /// Do not shorten IDs
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// How to show them: table, json, a Go template, or a table of one
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    pub(crate) format: ListFormat,
    /// Show images of this name alone, with or without a tag; * stands for anything
    pub(crate) name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RmiArgs {
    /// Remove them even if containers that have ended are made of them
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Images, by name or ID
    #[arg(required = true)]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  walnut tag debian:12 localhost:5000/base:1")]
pub(crate) struct TagArgs {
    /// Image, by name or ID
    pub(crate) image: String,
    /// Its other name
    pub(crate) name: String,
}

const FIELDS: [(&str, &str); 8] = [
    ("ID", "IMAGE ID"),
    ("Repository", "REPOSITORY"),
    ("Tag", "TAG"),
    ("Digest", "DIGEST"),
    ("CreatedAt", "CREATED AT"),
    ("CreatedSince", "CREATED"),
    ("Size", "SIZE"),
    ("Checkpoint", "CHECKPOINT"),
];

pub(crate) fn images(args: &ImagesArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let all = Store::open(layout.images())?.list()?;
    let mut images = all.clone();
    for filter in &args.filter {
        filter.check(&["reference", "label", "before", "since", "dangling"])?;
        let mut kept = Vec::new();
        for image in images {
            if fits(&all, &image, filter)? {
                kept.push(image);
            }
        }
        images = kept;
    }
    if let Some(pattern) = &args.name {
        images.retain(|image| image.names.iter().any(|name| matches(pattern, name)));
    }
    let id = |image: &Image| match args.no_trunc {
        true => image.id.to_string(),
        false => short(image),
    };
    if args.quiet {
        images.iter().for_each(|image| println!("{}", id(image)));
        return Ok(0);
    }
    let rows = images.iter().flat_map(|image| {
        let names: Vec<_> = image.names.iter().collect();
        let names = names.into_iter().filter(|name| {
            let wanted = args.name.as_deref();
            wanted.is_none_or(|pattern| matches(pattern, name))
        });
        let mut rows: Vec<_> = names
            .map(|name| shown(image, Some(name), id(image)))
            .collect();
        if rows.is_empty() {
            rows.push(shown(image, None, id(image)));
        }
        rows
    });
    let rows: Vec<Row> = rows.collect();
    let columns: &[&str] = match args.digests {
        true => &["Repository", "Tag", "Digest", "ID", "CreatedAt", "Size"],
        false => &["Repository", "Tag", "ID", "CreatedAt", "Size"],
    };
    let list = List {
        fields: &FIELDS,
        columns,
    };
    let json = || Ok(images.iter().map(as_json).collect::<Vec<Value>>().into());
    list.show(&args.format, &rows, json)?;
    Ok(0)
}

fn fits(all: &[Image], image: &Image, filter: &Filter) -> Result<bool> {
    let made = |image: &Image| image.created.clone().unwrap_or_default();
    let other = |word: &str| {
        let named = |i: &&Image| i.names.iter().any(|n| matches(word, n)) || short(i) == word;
        let found = all.iter().find(named).map(made);
        found.ok_or_else(|| anyhow!("--filter {}={word}: no such image", filter.name))
    };
    Ok(match filter.name.as_str() {
        "reference" => filter.any(|value| image.names.iter().any(|name| matches(value, name))),
        "label" => {
            let config = image.config.config().as_ref();
            let labels = config.and_then(|c| c.labels().clone()).unwrap_or_default();
            filter.fits_labels(&labels.into_iter().collect())
        }
        "before" => made(image) < other(&filter.value)?,
        "since" => made(image) > other(&filter.value)?,
        // What has no name is not kept.
        _ => filter.value == image.names.is_empty().to_string(),
    })
}

/// Whether a name is what is asked for, with or without its tag.
fn matches(pattern: &str, name: &Reference) -> bool {
    fits_pattern(pattern, &name.familiar()) || fits_pattern(pattern, &name.familiar_name())
}

/// `*` stands for anything.
fn fits_pattern(pattern: &str, text: &str) -> bool {
    let parts: Vec<_> = pattern.split('*').collect();
    let [first, middle @ .., last] = parts.as_slice() else {
        return pattern == text;
    };
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    for part in middle {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

fn shown(image: &Image, name: Option<&Reference>, id: String) -> Row {
    let created = image.created.as_deref();
    let time = created.and_then(|text| DateTime::parse_from_rfc3339(text).ok());
    let since = time.and_then(|time| time.timestamp_nanos_opt());
    let since = since.map_or("-".into(), |then| {
        format!("{} ago", output::ago(then, now_ns()))
    });
    row(json!({
        "ID": id,
        "Repository": name.map_or("<none>".into(), Reference::familiar_name),
        "Tag": name.and_then(|name| name.tag()).unwrap_or("<none>"),
        "Digest": image.digest.to_string(),
        "CreatedAt": created.and_then(|c| c.get(..10)).unwrap_or("-"),
        "CreatedSince": since,
        "Size": output::bytes(image.size),
        "Checkpoint": image.checkpoint.is_some(),
    }))
}

fn as_json(image: &Image) -> Value {
    json!({
        "id": image.id.to_string(),
        "names": image.names.iter().map(|n| n.familiar()).collect::<Vec<_>>(),
        "digest": image.digest.to_string(),
        "created": image.created,
        "size": image.size,
        "checkpoint": image.checkpoint.is_some(),
    })
}

/// An image, with a word on what may have been meant if there is none.
pub(crate) fn find(store: &Store, name: &str) -> Result<Image> {
    store.resolve(name).map_err(|e| match e {
        walnut_image::Error::NoSuchImage(_) => {
            let names: Vec<_> = store
                .list()
                .unwrap_or_default()
                .iter()
                .flat_map(|image| {
                    image
                        .names
                        .iter()
                        .flat_map(|n| [n.familiar(), n.familiar_name()])
                })
                .collect();
            match similar(name, names.iter().map(String::as_str)) {
                Some(other) => anyhow!("no image {name:?} here; did you mean {other}?"),
                None => e.into(),
            }
        }
        other => other.into(),
    })
}

/// Names of the containers that are made of an image.
fn users<'a>(containers: &'a [Record], image: &Image) -> Vec<&'a str> {
    let id = image.id.to_string();
    let made = containers.iter().filter(|r| r.image.id == id);
    made.map(|r| r.name.as_str()).collect()
}

/// Whether no container is made of it.
pub(crate) fn is_unused(containers: &[Record], image: &Image) -> bool {
    users(containers, image).is_empty()
}

pub(crate) fn rmi(args: &RmiArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let store = Store::open(layout.images())?;
    let mut code = 0;
    for name in &args.images {
        if let Err(e) = remove(&layout, &store, name, args.force) {
            eprintln!("walnut: {e:#}");
            code = 1;
        }
    }
    Ok(code)
}

/// Refuses to take the last name from an image that containers are made of.
fn check_unused(layout: &Layout, image: &Image, name: &str) -> Result<()> {
    let containers = list(layout)?;
    let users = users(&containers, image);
    // One of several names is none that a container needs.
    let last = image.names.len() < 2 || image.id.to_string().contains(name);
    if !last || users.is_empty() {
        return Ok(());
    }
    let (are, them) = match users.len() {
        1 => ("is", "it"),
        _ => ("are", "them"),
    };
    bail!(
        "image {name} is what {} {are} made of; remove {them} first, or use -f",
        users.join(", ")
    )
}

fn remove(layout: &Layout, store: &Store, name: &str, force: bool) -> Result<()> {
    match store.resolve(name) {
        // One that is damaged is nobody's any more.
        Err(e) if !matches!(e, walnut_image::Error::NoSuchImage(_)) => {}
        _ if force => drop(find(store, name)?),
        _ => check_unused(layout, &find(store, name)?, name)?,
    }
    for name in store.remove(name)?.names {
        let name = name.parse::<Reference>().map_or(name, |n| n.familiar());
        Journal::new(&layout.state).other("image", &name, "delete");
        println!("{name}");
    }
    Ok(())
}

pub(crate) fn tag(args: &TagArgs) -> Result<u8> {
    let layout = Layout::from_env()?;
    let store = Store::open(layout.images())?;
    let name: Reference = args.name.parse()?;
    find(&store, &args.image)?;
    store.tag(&args.image, &name)?;
    Journal::new(&layout.state).other("image", &name.familiar(), "tag");
    Ok(0)
}

pub(crate) fn short(image: &Image) -> String {
    let id = image.id.to_string();
    let hex = id.strip_prefix("sha256:").unwrap_or(&id);
    hex.get(..12).unwrap_or(hex).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, text, fits) in [
            ("debian", "debian", true),
            ("debian", "debian:12", false),
            ("deb*", "debian:12", true),
            ("*:12", "debian:12", true),
            ("d*b*:1*", "debian:12", true),
            ("*x*", "debian", false),
            ("a*a", "a", false),
            ("a*c", "abcc", true),
            ("a*c", "abcd", false),
        ] {
            assert_eq!(fits_pattern(pattern, text), fits, "{pattern} {text}");
        }
        let name: Reference = "debian:12".parse().unwrap();
        assert!(matches("debian", &name) && matches("debian:12", &name) && !matches("deb", &name));
    }
}
