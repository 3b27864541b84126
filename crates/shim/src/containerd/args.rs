//! The command line that containerd gives a shim, in the manner of Go's `flag`
//! package: one dash or two, `-name value` or `-name=value`, then the action.

use std::path::PathBuf;

/// What is asked of the shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Start a sandbox's supervisor, or name the one that there is.
    Start,
    /// Remove what a dead supervisor left of a container.
    Delete,
    /// Describe the runtime.
    Info,
}

/// The flags.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// containerd's gRPC socket.
    pub(crate) address: String,
    /// Set with `delete`; else the bundle is the working directory.
    pub(crate) bundle: Option<PathBuf>,
    pub(crate) debug: bool,
}

/// Reads a command line of containerd's; one that is not is an error.
pub(crate) fn parse(args: impl Iterator<Item = String>) -> Result<(Action, Flags), String> {
    let mut flags = Flags::default();
    let mut args = args.peekable();
    let mut info = false;
    while let Some(arg) = args.next_if(|arg| arg.starts_with('-')) {
        let name = arg.trim_start_matches('-');
        let (name, given) = match name.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (name, None),
        };
        let switch = || match given.as_deref() {
            None => Ok(true),
            Some(text) => text.parse().map_err(|e| format!("-{name} {text:?}: {e}")),
        };
        match name {
            "debug" => {
                flags.debug = switch()?;
                continue;
            }
            "info" => {
                info = switch()?;
                continue;
            }
            _ => {}
        }
        let value = given.clone().or_else(|| args.next());
        let value = value.ok_or_else(|| format!("-{name} needs a value"))?;
        match name {
            "namespace" => flags.namespace = value,
            "id" => flags.id = value,
            "address" => flags.address = value,
            "bundle" => flags.bundle = Some(value.into()),
            // Where to listen is ours to choose, and events go over ttrpc.
            "publish-binary" | "socket" | "debug-socket" => {}
            _ => return Err(format!("unknown flag -{name}")),
        }
    }
    if info {
        return Ok((Action::Info, flags));
    }
    let action = match args.next().as_deref() {
        Some("start") => Action::Start,
        Some("delete") => Action::Delete,
        other => {
            let other = other.unwrap_or_default();
            return Err(format!("unknown action {other:?}; it is start or delete"));
        }
    };
    for (name, value) in [("namespace", &flags.namespace), ("id", &flags.id)] {
        // Both become parts of paths and of addresses.
        if value.is_empty() || value.contains(['/', '\0']) || value.starts_with('.') {
            return Err(format!("-{name} {value:?}: not a valid name"));
        }
    }
    Ok((action, flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<(Action, Flags), String> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn what_containerd_writes_is_understood() {
        let (action, flags) = read(
            "-namespace k8s.io -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id abc -debug start",
        )
        .unwrap();
        assert_eq!(action, Action::Start);
        let want = Flags {
            namespace: "k8s.io".into(),
            id: "abc".into(),
            address: "/run/containerd/containerd.sock".into(),
            bundle: None,
            debug: true,
        };
        assert_eq!(flags, want);
        let (action, flags) =
            read("-namespace=n --id=x -address a -bundle /b -debug=false delete").unwrap();
        assert_eq!(action, Action::Delete);
        assert_eq!((flags.bundle, flags.debug), (Some("/b".into()), false));
        assert_eq!(read("-info").unwrap().0, Action::Info);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (line, says) in [
            ("-namespace n -id x", "unknown action"),
            ("-namespace n start", "-id"),
            ("-id x start", "-namespace"),
            ("-namespace n -id ../x start", "not a valid name"),
            ("-namespace n -id", "-id needs a value"),
            ("-what 1 start", "unknown flag -what"),
            ("-debug=maybe start", "-debug"),
        ] {
            let error = read(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }
}
