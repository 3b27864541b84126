//! The node's settings, or those that containerd's configuration of the runtime names.

use std::path::Path;

use containerd_shim_protos::protobuf::{self, CodedInputStream, well_known_types::any::Any};
use walnut_sandbox::{Error, Result, Settings};

/// containerd's `runtimeoptions.v1.Options`, in its older and its newer package: what it
/// gives runtimes whose options it does not know.
const OPTIONS: &str = "runtimeoptions.v1.Options";
/// Options of runc's shim, which clients give to whatever runtime they use. Nothing that
/// they can say means something for a machine.
const RUNC: &str = "containerd.runc.v1.Options";

/// What a container's first request says of its sandbox.
pub(crate) fn of(options: Option<&Any>) -> Result<Settings> {
    let Some(any) = options else {
        return Settings::load();
    };
    let kind = any.type_url.trim_start_matches("type.googleapis.com/");
    if kind.is_empty() || kind == RUNC {
        return Settings::load();
    }
    if !(kind == OPTIONS || kind.ends_with(&format!(".{OPTIONS}"))) {
        return Err(Error::Invalid(format!(
            "the runtime's options are of an unknown kind, {kind:?}; give {OPTIONS} with the path of a configuration file"
        )));
    }
    let Options { path, body } = Options::parse(&any.value)
        .map_err(|e| Error::Invalid(format!("the runtime's options: {e}")))?;
    match (body.as_str(), path.as_str()) {
        ("", "") => Settings::load(),
        ("", path) => Settings::load_from(Path::new(path)),
        (body, _) => Settings::parse(body),
    }
}

/// The message's fields that mean something.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    path: String,
    body: String,
}

impl Options {
    /// `string type_url = 1; string config_path = 2; bytes config_body = 3;`
    fn parse(bytes: &[u8]) -> protobuf::Result<Self> {
        const CONFIG_PATH: u32 = 2 << 3 | 2;
        const CONFIG_BODY: u32 = 3 << 3 | 2;
        let mut stream = CodedInputStream::from_bytes(bytes);
        let mut options = Self::default();
        while let Some(tag) = stream.read_raw_tag_or_eof()? {
            match tag {
                CONFIG_PATH => options.path = stream.read_string()?,
                CONFIG_BODY => options.body = stream.read_string()?,
                _ => protobuf::rt::skip_field_for_tag(tag, &mut stream)?,
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use walnut_sandbox::machine::DriverChoice;

    use super::*;

    fn any(kind: &str, fields: &[(u8, &str)]) -> Any {
        let mut value = Vec::new();
        for (number, text) in fields {
            value.extend([number << 3 | 2, u8::try_from(text.len()).unwrap()]);
            value.extend(text.as_bytes());
        }
        Any {
            type_url: kind.into(),
            value,
            ..Any::default()
        }
    }

    #[test]
    fn a_file_or_its_text_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.toml");
        std::fs::write(&file, "machine.driver = \"qemu-tcg\"").unwrap();
        let file = file.to_str().unwrap();
        let usual = Settings::load().unwrap();
        let driver = |any: &Any| of(Some(any)).unwrap().machine.driver;
        for kind in [
            "runtimeoptions.v1.Options",
            "type.googleapis.com/containerd.runtimeoptions.v1.Options",
        ] {
            assert_eq!(driver(&any(kind, &[(2, file)])), DriverChoice::QemuTcg);
            let body = any(
                kind,
                &[(1, "t"), (2, "/nothing"), (3, "machine.driver = \"vmm\"")],
            );
            assert_eq!(driver(&body), DriverChoice::Vmm);
            assert_eq!(of(Some(&any(kind, &[(1, "t")]))).unwrap(), usual);
        }
        let runc = any(RUNC, &[(2, "/nothing")]);
        assert_eq!(of(Some(&runc)).unwrap(), usual);
        assert_eq!(of(None).unwrap(), usual);
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let mut cut = any(OPTIONS, &[(2, "/etc/walnut")]);
        cut.value.truncate(4);
        for (any, why) in [
            (any("my.Options", &[]), "my.Options"),
            (any("xruntimeoptions.v1.Options", &[]), "unknown kind"),
            (any(OPTIONS, &[(2, "/nothing")]), "/nothing"),
            (any(OPTIONS, &[(3, "machine = 1")]), "machine"),
            (cut, "options"),
        ] {
            let error = of(Some(&any)).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
