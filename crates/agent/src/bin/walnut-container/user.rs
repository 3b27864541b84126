//! Users and groups by name, as image configurations give them.
//!
//! `process.user.username` carries Docker's `user[:group]`; names are looked up
//! in the container's own `/etc/passwd` and `/etc/group`. A spec without it says
//! its numbers itself.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use libcontainer::oci_spec::runtime::Process;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::failure::Failure;

/// Longest passwd or group file that is read.
const FILE_MAX: u64 = 1 << 20;

/// The two files' texts; empty where there is none.
#[derive(Debug, Default)]
pub(crate) struct Names {
    passwd: String,
    group: String,
}

impl Names {
    /// Those of the root file system `root`, whose links cannot lead out of it.
    pub(crate) fn below(root: &Path) -> Self {
        let Ok(root) = File::open(root) else {
            return Self::default();
        };
        let read = |name: &str| {
            let how = OpenHow::new()
                .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
                .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
            text(openat2(&root, name, how).map(File::from).ok())
        };
        Self {
            passwd: read("etc/passwd"),
            group: read("etc/group"),
        }
    }

    /// Those of the root this process has already entered.
    pub(crate) fn here() -> Self {
        Self {
            passwd: text(File::open("/etc/passwd").ok()),
            group: text(File::open("/etc/group").ok()),
        }
    }
}

fn text(file: Option<File>) -> String {
    let mut bytes = Vec::new();
    if let Some(file) = file
        && file.metadata().is_ok_and(|m| m.is_file())
    {
        // What cannot be read has no names in it.
        let _ = file.take(FILE_MAX).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Puts numbers where the process's user is a name.
pub(crate) fn resolve(process: &mut Process, names: impl FnOnce() -> Names) -> Result<(), Failure> {
    let mut user = process.user().clone();
    let Some(wanted) = user.username().clone().filter(|name| !name.is_empty()) else {
        return Ok(());
    };
    let (ids, more) = lookup(&wanted, &names()).map_err(Failure::invalid)?;
    user.set_uid(ids.0);
    user.set_gid(ids.1);
    user.set_additional_gids((!more.is_empty()).then_some(more));
    user.set_username(None);
    process.set_user(user);
    Ok(())
}

/// uid and gid, and the supplementary groups.
type Found = ((u32, u32), Vec<u32>);

fn lookup(wanted: &str, names: &Names) -> Result<Found, String> {
    let (user, group) = match wanted.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (wanted, None),
    };
    let number: Option<u32> = user.parse().ok();
    let entry = names.passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid: u32 = fields.nth(1)?.parse().ok()?;
        let gid: u32 = fields.next()?.parse().ok()?;
        (name == user || (number == Some(uid))).then_some((name, uid, gid))
    });
    let (name, uid, gid) = match (entry, number) {
        (Some(entry), _) => entry,
        (None, Some(uid)) => ("", uid, 0),
        (None, None) => {
            return Err(format!(
                "unable to find user {user}: no matching entries in passwd file"
            ));
        }
    };
    if let Some(group) = group {
        return Ok(((uid, group_id(group, names)?), Vec::new()));
    }
    let member = |line: &str| -> Option<u32> {
        let mut fields = line.split(':');
        let id = fields.nth(2)?.parse().ok()?;
        let listed = fields.next()?.split(',').any(|member| member == name);
        (listed && !name.is_empty() && id != gid).then_some(id)
    };
    Ok(((uid, gid), names.group.lines().filter_map(member).collect()))
}

fn group_id(group: &str, names: &Names) -> Result<u32, String> {
    if let Ok(id) = group.parse() {
        return Ok(id);
    }
    names
        .group
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            (fields.next()? == group).then_some(())?;
            fields.nth(1)?.parse().ok()
        })
        .ok_or_else(|| format!("unable to find group {group}: no matching entries in group file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names {
            passwd: "root:x:0:0:root:/root:/bin/sh\nbroken\nwww:x:33:34::/var:/bin/sh\n".into(),
            group: "root:x:0:\nwww:x:34:www\nssl:x:101:a,www\n".into(),
        }
    }

    #[test]
    fn names_and_numbers() {
        let found = |text: &str| lookup(text, &names()).unwrap();
        assert_eq!(found("www"), ((33, 34), vec![101]));
        assert_eq!(found("33"), ((33, 34), vec![101]));
        assert_eq!(found("1000"), ((1000, 0), vec![]));
        assert_eq!(found("www:ssl"), ((33, 101), vec![]));
        assert_eq!(found("5:6"), ((5, 6), vec![]));
        assert_eq!(found("root:"), ((0, 0), vec![]));
    }

    #[test]
    fn strangers_are_refused() {
        for text in ["nobody", "www:nobody", "broken", "-1"] {
            let error = lookup(text, &names()).unwrap_err();
            assert!(error.contains("unable to find"), "{error}");
        }
        assert!(lookup("x", &Names::default()).is_err());
    }

    #[test]
    fn links_stay_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/../../../etc/passwd", dir.path().join("etc/passwd")).unwrap();
        assert!(Names::below(dir.path()).passwd.is_empty());
    }
}
