//! The command line.

use std::{ffi::OsString, os::fd::RawFd, path::PathBuf};

pub(crate) const USAGE: &str = "\
Serves a virtio socket device to a virtual machine over vhost-user.

Usage: walnut-vsock (--vhost-fd N | --vhost-socket PATH) --uds PATH [options]

  --vhost-fd N          inherited Unix socket, listening or connected to the machine
  --vhost-socket PATH   create and listen on this socket for the machine
  --uds PATH            create the socket that host programs connect to; guest
                        connections to port P arrive at PATH_P beside it
  --cid N               the guest's context identifier (default 3)
  --die-with-parent[=PID]
                        be killed when the starting thread ends; with PID, refuse
                        to start if the parent is another process
  --version, --help

It ends with status 0 when the machine disconnects, and removes its socket.";

/// Where the machine is met.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Vhost {
    Fd(RawFd),
    Socket(PathBuf),
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) vhost: Vhost,
    pub(crate) uds: PathBuf,
    pub(crate) cid: u64,
    pub(crate) die_with_parent: Option<Option<i32>>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Serve(Args),
    Help,
    Version,
}

/// Why the command line makes no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ArgsError {
    #[error("unknown argument {0:?}; see --help")]
    Unknown(OsString),
    #[error("{0} needs a value; see --help")]
    NoValue(&'static str),
    #[error("{0} cannot be {1:?}: it must be a number; see --help")]
    NotANumber(&'static str, OsString),
    #[error("name the machine's socket once, by --vhost-fd or --vhost-socket; see --help")]
    Vhost,
    #[error("--uds is missing: the socket that host programs connect to; see --help")]
    Uds,
}

fn number<T: std::str::FromStr>(name: &'static str, value: &OsString) -> Result<T, ArgsError> {
    value
        .to_str()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| ArgsError::NotANumber(name, value.clone()))
}

/// Reads the arguments behind the program's name. Values may follow their names
/// after a blank or an equals sign.
pub(crate) fn parse(args: impl Iterator<Item = OsString>) -> Result<Command, ArgsError> {
    let (mut vhost, mut uds, mut cid, mut die) = (None, None, 3, None);
    let mut args = args;
    while let Some(arg) = args.next() {
        let (name, inline) = split(&arg);
        let mut value = |name| {
            inline
                .clone()
                .or_else(|| args.next())
                .ok_or(ArgsError::NoValue(name))
        };
        let place = match name {
            Some("--vhost-fd") => Vhost::Fd(number("--vhost-fd", &value("--vhost-fd")?)?),
            Some("--vhost-socket") => Vhost::Socket(value("--vhost-socket")?.into()),
            Some("--uds") => {
                uds = Some(PathBuf::from(value("--uds")?));
                continue;
            }
            Some("--cid") => {
                cid = number("--cid", &value("--cid")?)?;
                continue;
            }
            Some("--die-with-parent") => {
                let pid = inline.as_ref().map(|pid| number("--die-with-parent", pid));
                die = Some(pid.transpose()?);
                continue;
            }
            Some("--help" | "-h") => return Ok(Command::Help),
            Some("--version" | "-V") => return Ok(Command::Version),
            _ => return Err(ArgsError::Unknown(arg)),
        };
        if vhost.replace(place).is_some() {
            return Err(ArgsError::Vhost);
        }
    }
    Ok(Command::Serve(Args {
        vhost: vhost.ok_or(ArgsError::Vhost)?,
        uds: uds.ok_or(ArgsError::Uds)?,
        cid,
        die_with_parent: die,
    }))
}

/// `--name=value` as name and value; a name is always text.
fn split(arg: &OsString) -> (Option<&str>, Option<OsString>) {
    use std::os::unix::ffi::OsStrExt;
    let bytes = arg.as_bytes();
    let (name, value) = match bytes.iter().position(|&byte| byte == b'=') {
        Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
        None => (bytes, None),
    };
    let value = value.map(|value| std::ffi::OsStr::from_bytes(value).to_owned());
    (std::str::from_utf8(name).ok(), value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Result<Command, ArgsError> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn takes_both_spellings() {
        let expected = Command::Serve(Args {
            vhost: Vhost::Fd(5),
            uds: "/run/x/vsock".into(),
            cid: 7,
            die_with_parent: Some(Some(42)),
        });
        let line = "--vhost-fd 5 --uds=/run/x/vsock --cid 7 --die-with-parent=42";
        assert_eq!(words(line), Ok(expected));
        let Ok(Command::Serve(args)) = words("--vhost-socket a=b --uds x --die-with-parent") else {
            panic!("refused");
        };
        assert_eq!(args.vhost, Vhost::Socket("a=b".into()));
        assert_eq!((args.cid, args.die_with_parent), (3, Some(None)));
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        assert_eq!(words("--uds x"), Err(ArgsError::Vhost));
        assert_eq!(words("--vhost-fd 3"), Err(ArgsError::Uds));
        assert_eq!(
            words("--vhost-fd 3 --vhost-socket x --uds y"),
            Err(ArgsError::Vhost)
        );
        assert_eq!(words("--uds"), Err(ArgsError::NoValue("--uds")));
        assert!(matches!(
            words("--vhost-fd x"),
            Err(ArgsError::NotANumber("--vhost-fd", _))
        ));
        assert!(matches!(words("--frob"), Err(ArgsError::Unknown(_))));
    }
}
