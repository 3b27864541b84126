//! The file and its drop-ins.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::Settings;
use crate::{Error, Result};

/// Largest file that is read, in bytes.
const MOST: u64 = 1 << 20;
/// Most drop-ins.
const MOST_FILES: usize = 256;

/// What a file and its drop-ins say, over what is built in, and the files that were read.
pub(super) fn load(file: &Path, must_exist: bool) -> Result<(Settings, Vec<PathBuf>)> {
    let mut files = Vec::new();
    if must_exist || file.exists() {
        files.push(file.to_path_buf());
    }
    files.extend(drop_ins(file)?);
    let mut table = built_in()?;
    for file in &files {
        let name = file.display().to_string();
        overlay(&mut table, read(file)?.as_str(), &name)?;
    }
    // Every overlay has been found to be good.
    let settings = settings(&table, &file.display().to_string())?;
    Ok((settings, files))
}

/// What one text says, over what is built in.
pub(super) fn parse(text: &str, name: &str) -> Result<Settings> {
    let mut table = built_in()?;
    overlay(&mut table, text, name)?;
    settings(&table, name)
}

/// `config.toml` has its own in `config.d`, of which those named `*.toml` count.
fn drop_ins(file: &Path) -> Result<Vec<PathBuf>> {
    let dir = file.with_extension("d");
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(Error::io("read", dir)(e)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io("read", &dir))?.path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|e| e == "toml") {
            files.push(path);
        }
        if files.len() > MOST_FILES {
            return Err(Error::Invalid(format!(
                "read {}: more than {MOST_FILES} files",
                dir.display()
            )));
        }
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(Error::io("read the settings", path))?;
    let mut text = String::new();
    file.take(MOST + 1)
        .read_to_string(&mut text)
        .map_err(Error::io("read the settings", path))?;
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > MOST {
        return Err(Error::Invalid(format!(
            "read the settings {}: larger than {MOST} bytes",
            path.display()
        )));
    }
    Ok(text)
}

fn built_in() -> Result<Table> {
    Table::try_from(Settings::default())
        .map_err(|e| Error::Invalid(format!("read the built-in settings: {e}")))
}

/// Lays a text over a table, if the result is good.
fn overlay(table: &mut Table, text: &str, name: &str) -> Result<()> {
    let over: Table = text.parse().map_err(|e: toml::de::Error| {
        let start = e.span().map_or(0, |span| span.start);
        let line = 1 + text
            .bytes()
            .take(start)
            .filter(|&byte| byte == b'\n')
            .count();
        Error::Invalid(format!(
            "read the settings {name}: line {line}: {}",
            e.message()
        ))
    })?;
    merge(table, over);
    settings(table, name).map(drop)
}

fn merge(table: &mut Table, over: Table) {
    for (key, value) in over {
        match (table.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => merge(below, above),
            (_, value) => {
                table.insert(key, value);
            }
        }
    }
}

fn settings(table: &Table, name: &str) -> Result<Settings> {
    let settings: Settings = table.clone().try_into().map_err(|e: toml::de::Error| {
        // The place comes on a line of its own.
        let text = e.to_string();
        let text: Vec<_> = text.lines().map(str::trim).collect();
        Error::Invalid(format!("read the settings {name}: {}", text.join(" ")))
    })?;
    settings
        .check()
        .map_err(|why| Error::Invalid(format!("read the settings {name}: {why}")))?;
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use walnut_machine::DriverChoice;

    use super::*;
    use crate::settings::{Annotation, Bytes};

    #[test]
    fn drop_ins_win_key_by_key_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        let (nothing, read) = load(&file, false).unwrap();
        assert_eq!((nothing, read), (Settings::default(), Vec::new()));
        let error = load(&file, true).unwrap_err().to_string();
        assert!(error.contains("No such file"), "{error}");

        fs::create_dir(dir.path().join("config.d")).unwrap();
        for (name, text) in [
            (
                "config.toml",
                "[machine]\ndriver = \"qemu-tcg\"\nboot_timeout = 5\n[pod]\nvcpus = 2\n",
            ),
            ("config.d/20-b.toml", "machine.boot_timeout = 9\n"),
            (
                "config.d/10-a.toml",
                "machine.boot_timeout = 7\npod.memory = 268435456\nannotations.allow = []\n",
            ),
            ("config.d/.30.toml", "broken"),
            ("config.d/40.toml.bak", "broken"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let (settings, read) = load(&file, true).unwrap();
        assert_eq!(read.len(), 3);
        assert_eq!(settings.machine.driver, DriverChoice::QemuTcg);
        assert_eq!(settings.machine.boot_timeout, 9);
        assert_eq!(settings.pod.vcpus, 2);
        assert_eq!(settings.pod.memory, Bytes(256 << 20));
        assert!(settings.annotations.allow.is_empty());
        assert_eq!(settings.container, Settings::default().container);

        let bad = dir.path().join("config.d/50.toml");
        fs::write(&bad, "[machine]\ndrver = 1\n").unwrap();
        let error = load(&file, true).unwrap_err().to_string();
        assert!(
            error.contains("50.toml") && error.contains("drver"),
            "{error}"
        );
    }

    #[test]
    fn bad_files_are_refused_with_their_reason() {
        for (text, why) in [
            ("\n[machine\n", "line 2"),
            ("machine = 1\n", "machine"),
            ("[machine]\ndriver = \"best\"\n", "best"),
            ("[machine]\nboot_timeout = 0\n", "boot_timeout"),
            ("[pod]\nmemory = \"1m\"\n", "pod.memory"),
            ("[pod]\nmemory = -1\n", "negative"),
            ("[container]\nvcpus = 33\n", "container.vcpus"),
            ("[annotations]\nallow = [\"everything\"]\n", "everything"),
            ("[networks]\n", "networks"),
            ("[network]\nplugins = [\"cni\"]\n", "network.plugins"),
        ] {
            let error = parse(text, "FILE").unwrap_err().to_string();
            assert!(error.contains("FILE") && error.contains(why), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        let good = "[annotations]\nallow = [\"memory\", \"vcpus\"]\n";
        let allow = parse(good, "FILE").unwrap().annotations.allow;
        assert_eq!(allow, [Annotation::Memory, Annotation::Vcpus].into());
    }
}
