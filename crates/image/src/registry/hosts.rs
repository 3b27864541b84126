//! Where a registry's images may be had: `hosts.toml` as containerd reads it
//! (docs/hosts.md of containerd), and certificates as Docker keeps them.

use std::{
    io,
    path::{Path, PathBuf},
};

use reqwest::{
    Url,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use toml_edit::{DocumentMut, Item, TableLike, Value};

use crate::Error;

/// Longest file of settings, certificates and keys that is read, in bytes.
const FILE_MAX: u64 = 1 << 20;
/// Most hosts of one registry that are asked.
const HOSTS_MAX: usize = 32;

/// What a host may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// Blobs, and manifests by their digest.
    pub(super) pull: bool,
    /// What a tag stands for: the host is trusted to say so.
    pub(super) resolve: bool,
    /// Blobs and manifests that are sent.
    pub(super) push: bool,
}

/// A certificate of ours and its key, which may be in one file.
pub(super) type Client = (PathBuf, Option<PathBuf>);

/// A host to ask.
#[derive(Debug, Clone)]
pub(super) struct Host {
    /// Up to the repository: `https://host:port/v2`
    pub(super) url: Url,
    pub(super) capabilities: Capabilities,
    pub(super) cas: Vec<PathBuf>,
    pub(super) clients: Vec<Client>,
    pub(super) skip_verify: bool,
    pub(super) headers: HeaderMap,
}

impl Host {
    /// The registry itself, with nothing special about it.
    pub(super) fn plain(url: Url) -> Self {
        Self {
            url,
            capabilities: Capabilities {
                pull: true,
                resolve: true,
                push: true,
            },
            cas: Vec::new(),
            clients: Vec::new(),
            skip_verify: false,
            headers: HeaderMap::new(),
        }
    }
}

/// The hosts of `registry` by the first of `dirs` that says anything of it, in the order
/// in which they are asked. `own` is the registry itself, which comes last unless another
/// server is named.
pub(super) fn load(dirs: &[PathBuf], registry: &str, own: &Url) -> Result<Vec<Host>, Error> {
    let names = [
        registry.rsplit_once(':').map(|(h, p)| format!("{h}_{p}_")),
        Some(registry.to_owned()),
        Some("_default".to_owned()),
    ];
    for dir in dirs {
        for name in names.iter().flatten() {
            // No name leads out of the directory, whatever a reference may be one day.
            if name.contains('/') || name.starts_with('.') {
                continue;
            }
            let dir = dir.join(name);
            let file = dir.join("hosts.toml");
            match read(&file) {
                Ok(text) => {
                    let text = String::from_utf8(text)
                        .map_err(|_| bad(&file, "it is not UTF-8".to_owned()))?;
                    return parse(&text, &dir, own).map_err(|reason| bad(&file, reason));
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(bad(&file, e.to_string())),
            }
            if let Some(host) = certificates(&dir, own)? {
                return Ok(vec![host]);
            }
        }
    }
    Ok(vec![Host::plain(own.clone())])
}

fn bad(path: &Path, reason: String) -> Error {
    Error::Hosts {
        path: path.to_owned(),
        reason,
    }
}

/// Reads a file of bounded length.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = std::fs::File::open(path)?;
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, FILE_MAX + 1), &mut bytes)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(io::Error::other(format!(
            "it is longer than {FILE_MAX} bytes"
        )));
    }
    Ok(bytes)
}

/// A directory of `*.crt`, `*.cert` and `*.key`, as Docker's `certs.d` has them.
fn certificates(dir: &Path, own: &Url) -> Result<Option<Host>, Error> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(bad(dir, e.to_string())),
    };
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()
        .map_err(|e| bad(dir, e.to_string()))?;
    paths.sort();
    let mut host = Host::plain(own.clone());
    for path in paths {
        match path.extension().and_then(|ext| ext.to_str()) {
            Some("crt") => host.cas.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                if !key.exists() {
                    return Err(bad(&path, format!("its key {} is missing", key.display())));
                }
                host.clients.push((path, Some(key)));
            }
            _ => {}
        }
    }
    let any = !host.cas.is_empty() || !host.clients.is_empty();
    Ok(any.then_some(host))
}

fn parse(text: &str, dir: &Path, own: &Url) -> Result<Vec<Host>, String> {
    let document: DocumentMut = text
        .parse()
        .map_err(|e: toml_edit::TomlError| e.to_string().trim().replace('\n', " "))?;
    let mut hosts = Vec::new();
    if let Some(table) = document.get("host") {
        let table = table.as_table_like().ok_or("host is no table")?;
        for (name, item) in table.iter() {
            let table = item
                .as_table_like()
                .ok_or_else(|| format!("host.\"{name}\" is no table"))?;
            let host = host(Some(name), table, dir, own);
            hosts.push(host.map_err(|reason| format!("host.\"{name}\": {reason}"))?);
        }
    }
    let server = match document.get("server") {
        Some(server) => Some(server.as_str().ok_or("server is no string")?),
        None => None,
    };
    hosts.push(host(server, document.as_table(), dir, own)?);
    if hosts.len() > HOSTS_MAX {
        return Err(format!("it has more than {HOSTS_MAX} hosts"));
    }
    Ok(hosts)
}

/// One host: its table, or, of the server, the document.
fn host(name: Option<&str>, table: &dyn TableLike, dir: &Path, own: &Url) -> Result<Host, String> {
    let flag = |key: &str| match table.get(key) {
        None => Ok(false),
        Some(item) => item.as_bool().ok_or_else(|| format!("{key} is no boolean")),
    };
    let url = match name {
        Some(name) => address(name, flag("override_path")?)?,
        None => own.clone(),
    };
    let mut host = Host::plain(url);
    if let Some(item) = table.get("capabilities") {
        host.capabilities = Capabilities {
            pull: false,
            resolve: false,
            push: false,
        };
        for capability in strings(item).ok_or("capabilities are no list of strings")? {
            match capability.as_str() {
                "pull" => host.capabilities.pull = true,
                "resolve" => host.capabilities.resolve = true,
                "push" => host.capabilities.push = true,
                "referrers" => {}
                other => return Err(format!("\"{other}\" is no capability")),
            }
        }
    }
    if let Some(item) = table.get("ca") {
        let files = strings(item).ok_or("ca is neither a file nor a list of files")?;
        host.cas = files.iter().map(|file| dir.join(file)).collect();
    }
    if let Some(item) = table.get("client") {
        host.clients = clients(item, dir)
            .ok_or("client is neither a file nor a list of files, or of pairs of files")?;
    }
    host.skip_verify = flag("skip_verify")?;
    if let Some(item) = table.get("header") {
        let headers = item.as_table_like().ok_or("header is no table")?;
        for (name, item) in headers.iter() {
            let wrong = || format!("header {name} is none that HTTP has");
            let key: HeaderName = name.parse().map_err(|_| wrong())?;
            for text in strings(item).ok_or_else(wrong)? {
                let mut value: HeaderValue = text.parse().map_err(|_| wrong())?;
                value.set_sensitive(true);
                host.headers.append(key.clone(), value);
            }
        }
    }
    Ok(host)
}

/// `https://host` as people write it, to what comes before the repository.
fn address(text: &str, overrides: bool) -> Result<Url, String> {
    let whole = if text.contains("://") {
        text.to_owned()
    } else {
        format!("https://{text}")
    };
    let mut url: Url = whole.parse().map_err(|e| format!("\"{text}\": {e}"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(format!("\"{text}\" is no address of HTTP"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(format!(
            "\"{}\" holds a login, which belongs to Docker's config.json",
            url.host_str().unwrap_or_default()
        ));
    }
    let path = url.path().trim_end_matches('/').to_owned();
    let path = match overrides || path.ends_with("/v2") {
        true => path,
        false => path + "/v2",
    };
    url.set_path(&path);
    url.set_query(None);
    url.set_fragment(None);
    Ok(url)
}

fn strings(item: &Item) -> Option<Vec<String>> {
    match item.as_value()? {
        Value::String(text) => Some(vec![text.value().clone()]),
        Value::Array(list) => list
            .iter()
            .map(|value| value.as_str().map(str::to_owned))
            .collect(),
        _ => None,
    }
}

fn clients(item: &Item, dir: &Path) -> Option<Vec<Client>> {
    if let Some(files) = strings(item) {
        return Some(files.iter().map(|file| (dir.join(file), None)).collect());
    }
    let pair = |value: &Value| {
        let files: Option<Vec<&str>> = value.as_array()?.iter().map(Value::as_str).collect();
        match files?.as_slice() {
            [both] => Some((dir.join(both), None)),
            [cert, key] => Some((dir.join(cert), Some(dir.join(key)))),
            _ => None,
        }
    };
    item.as_array()?.iter().map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Url {
        "https://registry.example/v2".parse().unwrap()
    }

    fn hosts(text: &str) -> Result<Vec<Host>, String> {
        parse(text, Path::new("/certs"), &own())
    }

    #[test]
    fn hosts_are_asked_in_the_order_of_the_file_and_the_server_last() {
        let text = r#"
            server = "https://upstream.example"
            [host."https://zeta.example:5000"]
              capabilities = ["pull"]
              ca = ["zeta.crt", "/etc/more.crt"]
              skip_verify = true
              [host."https://zeta.example:5000".header]
                x-key = ["a", "b"]
            [host."http://alpha.example/cache"]
              client = [["alpha.cert", "alpha.key"], ["both.pem"]]
            [host."beta.example/v2/hub"]
              override_path = true
              client = "beta.pem"
        "#;
        let hosts = hosts(text).unwrap();
        let urls: Vec<&str> = hosts.iter().map(|host| host.url.as_str()).collect();
        assert_eq!(
            urls,
            [
                "https://zeta.example:5000/v2",
                "http://alpha.example/cache/v2",
                "https://beta.example/v2/hub",
                "https://upstream.example/v2",
            ]
        );
        let zeta = &hosts[0];
        assert!(zeta.capabilities.pull && !zeta.capabilities.resolve && zeta.skip_verify);
        assert_eq!(
            zeta.cas,
            [Path::new("/certs/zeta.crt"), Path::new("/etc/more.crt")]
        );
        assert_eq!(zeta.headers.get_all("x-key").iter().count(), 2);
        assert_eq!(
            hosts[1].clients,
            [
                ("/certs/alpha.cert".into(), Some("/certs/alpha.key".into())),
                ("/certs/both.pem".into(), None)
            ]
        );
        assert_eq!(hosts[2].clients, [("/certs/beta.pem".into(), None)]);
        assert!(hosts[3].capabilities.resolve);
    }

    #[test]
    fn a_file_that_names_no_server_means_the_registry() {
        let hosts = hosts("ca = \"own.crt\"").unwrap();
        assert_eq!(hosts.len(), 1);
        assert_eq!(hosts[0].url, own());
        assert_eq!(hosts[0].cas, [Path::new("/certs/own.crt")]);
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        for (text, word) in [
            ("server = 1", "server"),
            ("host = 1", "host"),
            ("[host.\"ftp://a\"]", "ftp://a"),
            ("[host.\"https://u:p@a\"]", "login"),
            ("[host.\"a\"]\ncapabilities = [\"fly\"]", "fly"),
            ("[host.\"a\"]\nca = 1", "ca"),
            ("[host.\"a\"]\nclient = [[]]", "client"),
            ("[host.\"a\"]\nskip_verify = \"no\"", "skip_verify"),
            ("[host.\"a\".header]\n\"a b\" = \"c\"", "a b"),
            ("[host", "line 1"),
        ] {
            let reason = hosts(text).unwrap_err();
            assert!(reason.contains(word), "{text}: {reason}");
        }
    }

    #[test]
    fn directories_are_those_of_containerd_and_docker() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = [dir.path().to_owned()];
        let load = |registry| load(&dirs, registry, &own()).unwrap();
        assert_eq!(load("a.example:5000")[0].url, own());
        let put = |name: &str, file: &str, text: &str| {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join(file), text).unwrap();
        };
        put("_default", "hosts.toml", "[host.\"mirror.example\"]");
        assert_eq!(load("a.example:5000").len(), 2);
        put("a.example:5000", "ca.crt", "");
        put("a.example:5000", "me.cert", "");
        put("a.example:5000", "me.key", "");
        let docker = load("a.example:5000");
        assert_eq!(docker.len(), 1);
        assert!(docker[0].cas[0].ends_with("ca.crt"));
        assert!(docker[0].clients[0].0.ends_with("me.cert"));
        put("a.example_5000_", "hosts.toml", "server = \"b.example\"");
        assert_eq!(
            load("a.example:5000")[0].url.as_str(),
            "https://b.example/v2"
        );
    }
}
