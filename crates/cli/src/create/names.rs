//! Names of containers: which may be one, which is taken, and whose one is.

use anyhow::{Result, bail};
use walnut_sandbox::{Error, Layout, Record, Status, find, list};

/// Refuses what is no name.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let starts = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !starts || name.len() < 2 || name.len() > 128 || !name.chars().all(fine) {
        bail!("--name {name:?}: use 2 to 128 of [a-zA-Z0-9_.-], beginning with a letter or digit");
    }
    Ok(())
}

/// An adjective and a nut, with two digits that make a clash unlikely.
pub(super) fn random_name() -> Result<String> {
    let random = super::random()?;
    const ADJECTIVES: [&str; 16] = [
        "amber", "brisk", "calm", "deft", "eager", "fresh", "gentle", "hardy", "keen", "lively",
        "mellow", "noble", "quiet", "sturdy", "swift", "wise",
    ];
    const NUTS: [&str; 16] = [
        "acorn",
        "almond",
        "beech",
        "brazil",
        "cashew",
        "chestnut",
        "cob",
        "filbert",
        "hazel",
        "hickory",
        "kola",
        "macadamia",
        "peanut",
        "pecan",
        "pine",
        "pistachio",
    ];
    let pick = |list: [&'static str; 16], byte: u8| list[usize::from(byte % 16)];
    Ok(format!(
        "{}_{}{:02}",
        pick(ADJECTIVES, random[0]),
        pick(NUTS, random[1]),
        random[2] % 100
    ))
}

/// Refuses a name that a container has. The caller holds the lock of names.
pub(crate) fn check_free(layout: &Layout, name: &str) -> Result<()> {
    if let Some(other) = list(layout)?.iter().find(|r| r.name == name) {
        bail!(
            "the name {name:?} is in use by container {}; remove it (walnut rm {name}) or choose another",
            other.short_id(),
        );
    }
    Ok(())
}

/// The container with this name or ID, which must have a supervisor.
pub(crate) fn find_live(layout: &Layout, name: &str) -> Result<Record> {
    let record = find(layout, name)?;
    if record.status == Status::Exited || record.at_rest() {
        return Err(Error::WrongState(format!("container {} is not running", record.name)).into());
    }
    Ok(record)
}
