//! What a container is to see at which path: directories of the host, volumes, memory.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use walnut_sandbox::{Bytes, NamedVolume, NamedVolumes};

/// Where something comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// A path of the host's.
    Host(PathBuf),
    /// A volume, by its name; one of nobody's else, if it has none.
    Volume(Option<String>),
    /// Memory.
    Memory,
}

/// Something at a path of the container's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) source: Source,
    pub(crate) target: PathBuf,
    pub(crate) options: Vec<String>,
    /// The host's path must be there; else a directory is made, as Docker's `-v` does.
    must_exist: bool,
}

/// `[SOURCE:]TARGET[:OPTIONS]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VolumeArg(pub(crate) Mount);

/// `type=…,source=…,target=…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountArg(pub(crate) Mount);

/// `TARGET[:OPTIONS]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TmpfsArg(pub(crate) Mount);

/// Where a mount may be.
fn target(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    let climbs = path
        .components()
        .any(|c| c == std::path::Component::ParentDir);
    if !path.is_absolute() || path.parent().is_none() || climbs {
        return Err("the path in the container must be absolute and not /".into());
    }
    Ok(path)
}

/// A word of `-v`'s third part as mount options have it; none for those that ask for what
/// is so anyway.
fn option(word: &str) -> Result<Option<&str>, String> {
    match word {
        "ro" | "rw" | "noexec" | "nosuid" | "nodev" | "rslave" | "slave" => Ok(Some(word)),
        // Docker Desktop's, and what holds here in any case.
        "cached" | "delegated" | "consistent" | "nocopy" | "rprivate" | "private" => Ok(None),
        "z" | "Z" => Err(format!(
            "option {word:?}: the container's processes are none of the host's, so SELinux' labels of files say nothing of them; leave it out"
        )),
        "shared" | "rshared" => Err(format!(
            "option {word:?}: what a container mounts is its own kernel's, and cannot be the host's too; use rslave for the other direction"
        )),
        "U" => Err("option \"U\": owners of files are left as they are; chown them".into()),
        other => Err(format!("unknown option {other:?}; use ro or rw")),
    }
}

/// A path of the host's, or a name.
fn source(text: &str) -> Result<Source, String> {
    if text.starts_with(['/', '.', '~']) {
        let path = std::path::absolute(text).map_err(|e| format!("{text}: {e}"))?;
        return Ok(Source::Host(path));
    }
    NamedVolumes::check_name(text).map_err(|e| format!("{e}; for a directory write ./{text}"))?;
    Ok(Source::Volume(Some(text.to_owned())))
}

impl FromStr for VolumeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<_> = text.split(':').collect();
        let (from, to, words) = match parts.as_slice() {
            [to] => (None, *to, ""),
            [from, to] => (Some(*from), *to, ""),
            [from, to, words] => (Some(*from), *to, *words),
            _ => return Err("write it as HOST:CONTAINER or NAME:CONTAINER:ro".into()),
        };
        let words = words.split(',').filter(|w| !w.is_empty());
        let options = words.filter_map(|w| option(w).transpose());
        let options: Vec<_> = options.collect::<Result<_, _>>()?;
        Ok(Self(Mount {
            source: match from {
                Some(from) => source(from)?,
                None => Source::Volume(None),
            },
            target: target(to)?,
            options: options.into_iter().map(str::to_owned).collect(),
            must_exist: false,
        }))
    }
}

impl FromStr for MountArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut kind = "volume";
        let (mut from, mut to) = (None, None);
        let mut options = Vec::new();
        let mut memory = Vec::new();
        for word in text.split(',') {
            let (key, value) = match word.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (word, None),
            };
            let given = || value.ok_or_else(|| format!("{key} needs a value: {key}=…"));
            match key {
                "type" => kind = given()?,
                "source" | "src" => from = Some(given()?),
                "target" | "dst" | "destination" => to = Some(target(given()?)?),
                "readonly" | "ro" => match value {
                    None | Some("true" | "1") => options.push("ro".to_owned()),
                    Some("false" | "0") => {}
                    Some(other) => return Err(format!("{key}={other}: use true or false")),
                },
                "bind-propagation" => {
                    let word = option(given()?)?;
                    options.extend(word.map(str::to_owned));
                }
                "consistency" => drop(option(given()?)?),
                "volume-nocopy" => {}
                "volume-driver" if value == Some("local") => {}
                "volume-driver" => {
                    return Err(format!(
                        "volume-driver={}: volumes are directories of this host; mount what else there is, and share that with type=bind",
                        given()?
                    ));
                }
                "tmpfs-size" => {
                    let Bytes(bytes) = given()?.parse()?;
                    memory.push(format!("size={bytes}"));
                }
                "tmpfs-mode" => {
                    let mode = u32::from_str_radix(given()?, 8);
                    let mode = mode.map_err(|e| format!("{word}: {e}; write it as 1777"))?;
                    memory.push(format!("mode={:o}", mode & 0o7777));
                }
                _ => {
                    return Err(format!(
                        "unknown word {key:?}; use type, source, target, readonly, bind-propagation, tmpfs-size, tmpfs-mode"
                    ));
                }
            }
        }
        let to = to.ok_or("it needs a target=/path")?;
        if kind != "tmpfs" && !memory.is_empty() {
            return Err(format!("type={kind} has no {}", memory[0]));
        }
        let source = match (kind, from) {
            ("bind", Some(path)) => {
                let path = std::path::absolute(path).map_err(|e| format!("{path}: {e}"))?;
                Source::Host(path)
            }
            ("bind", None) => return Err("type=bind needs a source=/path".into()),
            ("volume", None) => Source::Volume(None),
            ("volume", Some(name)) => {
                NamedVolumes::check_name(name).map_err(|e| e.to_string())?;
                Source::Volume(Some(name.to_owned()))
            }
            ("tmpfs", None) => {
                options.extend(memory);
                options.splice(0..0, ["nosuid", "nodev", "noexec"].map(str::to_owned));
                Source::Memory
            }
            ("tmpfs", Some(_)) => return Err("type=tmpfs has no source".into()),
            (other, _) => {
                return Err(format!(
                    "type={other} is not known; use bind, volume or tmpfs"
                ));
            }
        };
        Ok(Self(Mount {
            source,
            target: to,
            options,
            must_exist: true,
        }))
    }
}

impl FromStr for TmpfsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (to, words) = text.split_once(':').unwrap_or((text, ""));
        let mut options: Vec<String> = ["nosuid", "nodev", "noexec"].map(str::to_owned).into();
        for word in words.split(',').filter(|w| !w.is_empty()) {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "size" => {
                    let Bytes(bytes) = value.parse()?;
                    options.push(format!("size={bytes}"));
                }
                "mode" | "uid" | "gid" | "nr_inodes" if !value.is_empty() => {
                    options.push(word.to_owned());
                }
                "exec" | "suid" | "dev" => options.retain(|o| *o != format!("no{key}")),
                "ro" | "rw" | "noexec" | "nosuid" | "nodev" | "noatime" => {
                    options.push(word.to_owned());
                }
                _ => {
                    return Err(format!(
                        "unknown option {word:?}; use size=, mode=, uid=, gid=, nr_inodes=, ro, exec, suid or dev"
                    ));
                }
            }
        }
        Ok(Self(Mount {
            source: Source::Memory,
            target: target(to)?,
            options,
            must_exist: false,
        }))
    }
}

/// The mounts of a spec, and the volumes among them, which are made if they are not there.
pub(crate) fn resolve<'a>(
    mounts: impl Iterator<Item = &'a Mount>,
    volumes: &NamedVolumes,
) -> Result<(Vec<Value>, Vec<NamedVolume>)> {
    let mut seen: BTreeMap<&Path, ()> = BTreeMap::new();
    let (mut specs, mut named) = (Vec::new(), Vec::new());
    for mount in mounts {
        let target = mount.target.as_path();
        if seen.insert(target, ()).is_some() {
            bail!("two mounts on {}; leave one out", target.display());
        }
        let source = match &mount.source {
            Source::Memory => {
                let tmpfs = json!({ "destination": target, "type": "tmpfs", "source": "tmpfs", "options": mount.options });
                specs.push(tmpfs);
                continue;
            }
            Source::Host(path) if !mount.must_exist || path.exists() => path.clone(),
            Source::Host(path) => bail!("--mount: {} is not there", path.display()),
            Source::Volume(name) => {
                let anonymous = name.is_none();
                let name = match name {
                    Some(name) => name.clone(),
                    None => crate::create::new_id()?,
                };
                volumes.ensure(&name, BTreeMap::new(), anonymous)?;
                let path = volumes.data(&name);
                named.push(NamedVolume {
                    name,
                    target: target.to_owned(),
                    anonymous,
                });
                path
            }
        };
        let mut options = vec!["rbind".to_owned(), "rprivate".to_owned()];
        if mount.options.iter().any(|o| o.ends_with("slave")) {
            options.pop();
        }
        if !mount.options.iter().any(|o| o == "ro") {
            options.push("rw".into());
        }
        options.extend(mount.options.iter().cloned());
        specs.push(
            json!({ "destination": target, "type": "bind", "source": source, "options": options }),
        );
    }
    Ok((specs, named))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes() {
        let v = |text: &str| text.parse::<VolumeArg>().map(|VolumeArg(mount)| mount);
        let host = v("/srv/a:/data:ro").unwrap();
        assert!(host.options == ["ro"] && host.source == Source::Host("/srv/a".into()));
        let named = v("data:/data").unwrap();
        assert_eq!(named.source, Source::Volume(Some("data".into())));
        assert_eq!(v("/data").unwrap().source, Source::Volume(None));
        assert!(v("/a:/b:cached,rslave").unwrap().options == ["rslave"]);
        for (text, why) in [
            ("/a:b", "must be absolute"),
            ("/a:/", "must be absolute"),
            ("/a:/b/../..", "must be absolute"),
            ("/a:/b:z", "SELinux"),
            ("/a:/b:rshared", "rslave"),
            ("/a:/b:x", "unknown option"),
            ("/a:/b:ro:x", "HOST:CONTAINER"),
            ("a b:/c", "for a directory write ./a b"),
            (":/c", "name a volume"),
        ] {
            let said = v(text).unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
    }

    #[test]
    fn mounts() {
        let m = |text: &str| text.parse::<MountArg>().map(|MountArg(mount)| mount);
        let bind = m("type=bind,src=/srv,dst=/data,readonly").unwrap();
        assert!(bind.options == ["ro"] && bind.source == Source::Host("/srv".into()));
        let volume = m("source=data,target=/data").unwrap();
        assert_eq!(volume.source, Source::Volume(Some("data".into())));
        let memory = m("type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=1777").unwrap();
        assert!(memory.options.contains(&"size=1048576".to_owned()));
        assert!(memory.options.contains(&"mode=1777".to_owned()));
        for (text, why) in [
            ("type=bind,target=/x", "needs a source"),
            ("type=bind,source=/x", "needs a target"),
            ("type=npipe,target=/x", "not known"),
            ("type=tmpfs,source=x,target=/x", "has no source"),
            ("type=bind,source=/x,target=/x,tmpfs-size=1m", "has no size"),
            ("target=/x,volume-driver=nfs", "directories of this host"),
            ("target=/x,colour=red", "unknown word"),
            (
                "type=bind,source=/x,target=/x,bind-propagation=shared",
                "rslave",
            ),
            ("target", "needs a value"),
        ] {
            let said = m(text).unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
    }

    #[test]
    fn memory() {
        let t = |text: &str| text.parse::<TmpfsArg>().map(|TmpfsArg(mount)| mount);
        assert_eq!(t("/t").unwrap().options, ["nosuid", "nodev", "noexec"]);
        let more = t("/t:exec,size=64k,mode=700").unwrap().options;
        assert_eq!(more, ["nosuid", "nodev", "size=65536", "mode=700"]);
        for text in ["t", "/", "/t:huge=always", "/t:size=x"] {
            assert!(t(text).is_err(), "{text}");
        }
    }

    #[test]
    fn two_on_one_path_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let layout =
            walnut_sandbox::Layout::new(dir.path().join("s"), dir.path().join("r")).unwrap();
        let volumes = NamedVolumes::new(&layout);
        let mounts: Vec<Mount> = ["data:/a", "/b", "/srv:/c:ro"]
            .map(|text| text.parse::<VolumeArg>().unwrap().0)
            .into();
        let (specs, named) = resolve(mounts.iter(), &volumes).unwrap();
        assert_eq!(specs.len(), 3);
        assert!(named[0].name == "data" && named[1].anonymous && named.len() == 2);
        assert_eq!(volumes.list().unwrap().len(), 2);
        let twice = [mounts[0].clone(), mounts[0].clone()];
        assert!(resolve(twice.iter(), &volumes).is_err());
    }
}
