//! fstab-style options, as snapshotters write them, in `mount`'s own terms.

use nix::mount::MsFlags;

/// What a word does to the flags: sets them, or takes them away.
enum Word {
    Set(MsFlags),
    Clear(MsFlags),
}

/// Options, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// Flags of the mount itself.
    pub(crate) flags: MsFlags,
    /// How mounts below it spread, which takes a call of its own.
    pub(crate) propagation: Option<MsFlags>,
    /// The source is a file, to be reached through a loop device.
    pub(crate) is_loop: bool,
    /// What is left for the file system.
    pub(crate) data: Vec<String>,
}

impl Options {
    /// Reads options; what is not known is the file system's.
    pub(crate) fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> Self {
        let mut options = Self {
            flags: MsFlags::empty(),
            propagation: None,
            is_loop: false,
            data: Vec::new(),
        };
        for word in words {
            match word {
                "" | "defaults" => {}
                "loop" => options.is_loop = true,
                // Notes of containerd's to itself.
                _ if word.starts_with("X-containerd.") => {}
                _ => match (flag(word), propagation(word)) {
                    (Some(Word::Set(flag)), _) => options.flags |= flag,
                    (Some(Word::Clear(flag)), _) => options.flags &= !flag,
                    (None, Some(how)) => options.propagation = Some(how),
                    (None, None) => options.data.push(word.to_owned()),
                },
            }
        }
        options
    }

    /// The value of the file system's option `name`.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.data
            .iter()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }
}

fn flag(word: &str) -> Option<Word> {
    use Word::{Clear, Set};
    Some(match word {
        "ro" => Set(MsFlags::MS_RDONLY),
        "rw" => Clear(MsFlags::MS_RDONLY),
        "bind" => Set(MsFlags::MS_BIND),
        "rbind" => Set(MsFlags::MS_BIND | MsFlags::MS_REC),
        "nosuid" => Set(MsFlags::MS_NOSUID),
        "suid" => Clear(MsFlags::MS_NOSUID),
        "nodev" => Set(MsFlags::MS_NODEV),
        "dev" => Clear(MsFlags::MS_NODEV),
        "noexec" => Set(MsFlags::MS_NOEXEC),
        "exec" => Clear(MsFlags::MS_NOEXEC),
        "sync" => Set(MsFlags::MS_SYNCHRONOUS),
        "async" => Clear(MsFlags::MS_SYNCHRONOUS),
        "dirsync" => Set(MsFlags::MS_DIRSYNC),
        "noatime" => Set(MsFlags::MS_NOATIME),
        "atime" => Clear(MsFlags::MS_NOATIME),
        "nodiratime" => Set(MsFlags::MS_NODIRATIME),
        "diratime" => Clear(MsFlags::MS_NODIRATIME),
        "relatime" => Set(MsFlags::MS_RELATIME),
        "norelatime" => Clear(MsFlags::MS_RELATIME),
        "strictatime" => Set(MsFlags::MS_STRICTATIME),
        "nostrictatime" => Clear(MsFlags::MS_STRICTATIME),
        "mand" => Set(MsFlags::MS_MANDLOCK),
        "nomand" => Clear(MsFlags::MS_MANDLOCK),
        "remount" => Set(MsFlags::MS_REMOUNT),
        _ => return None,
    })
}

fn propagation(word: &str) -> Option<MsFlags> {
    Some(match word {
        "shared" => MsFlags::MS_SHARED,
        "rshared" => MsFlags::MS_SHARED | MsFlags::MS_REC,
        "private" => MsFlags::MS_PRIVATE,
        "rprivate" => MsFlags::MS_PRIVATE | MsFlags::MS_REC,
        "slave" => MsFlags::MS_SLAVE,
        "rslave" => MsFlags::MS_SLAVE | MsFlags::MS_REC,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        "runbindable" => MsFlags::MS_UNBINDABLE | MsFlags::MS_REC,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_flags_and_the_rest_data() {
        let words = [
            "rbind",
            "ro",
            "rslave",
            "nosuid",
            "suid",
            "loop",
            "index=off",
            "lowerdir=/a:/b",
            "X-containerd.mkdir.path=/x",
            "defaults",
        ];
        let options = Options::parse(words);
        let want = MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY;
        assert_eq!(options.flags, want);
        let how = MsFlags::MS_SLAVE | MsFlags::MS_REC;
        assert_eq!(options.propagation, Some(how));
        assert!(options.is_loop);
        assert_eq!(options.data, ["index=off", "lowerdir=/a:/b"]);
        assert_eq!(options.value("lowerdir"), Some("/a:/b"));
        assert_eq!(options.value("lower"), None);
        let options = Options::parse(["ro", "rw"]);
        assert_eq!(options.flags, MsFlags::empty());
    }
}
