//! Logins to registries, as Docker's `config.json` has them.

use std::{
    collections::BTreeMap,
    env,
    fs::File,
    io::{self, Read, Write},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;

/// Largest configuration, and largest answer of a credential helper.
const CONFIG_MAX: u64 = 1 << 20;

/// User and password.
type Login = (String, String);

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    auths: BTreeMap<String, Auth>,
    /// A helper for all registries.
    creds_store: Option<String>,
    /// One for some.
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: String,
}

/// What a helper says.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Credentials {
    username: String,
    secret: String,
}

/// The login for a registry, if there is one.
pub(crate) fn of(registry: &str) -> Result<Option<Login>> {
    let dir = env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker"));
    let Some(path) = dir.or_else(home).map(|dir| dir.join("config.json")) else {
        return Ok(None);
    };
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
            ) =>
        {
            return Ok(None);
        }
        Err(e) => return Err(e).with_context(|| format!("read {}", path.display())),
    };
    let what = || format!("read logins from {}", path.display());
    let mut text = String::new();
    file.take(CONFIG_MAX)
        .read_to_string(&mut text)
        .with_context(what)?;
    let config: Config = serde_json::from_str(&text).with_context(what)?;
    config.login(registry).with_context(what)
}

impl Config {
    /// Names that a registry has had in such files.
    fn names(registry: &str) -> Vec<String> {
        let mut names = vec![registry.to_owned(), format!("https://{registry}")];
        if registry == "docker.io" {
            names.push("https://index.docker.io/v1/".into());
            names.push("index.docker.io".into());
        }
        names
    }

    fn login(&self, registry: &str) -> Result<Option<Login>> {
        let names = Self::names(registry);
        if let Some(helper) = names.iter().find_map(|name| self.cred_helpers.get(name)) {
            return helped(helper, registry);
        }
        let auth = names.iter().find_map(|name| self.auths.get(name));
        if let Some(auth) = auth.filter(|auth| !auth.auth.is_empty()) {
            return decode(&auth.auth).map(Some);
        }
        match (&self.creds_store, auth) {
            // The file says that there is one, and the helper has it.
            (Some(helper), Some(_)) => {
                let name = names.iter().find(|name| self.auths.contains_key(*name));
                helped(helper, name.map_or(registry, String::as_str))
            }
            _ => Ok(None),
        }
    }
}

fn decode(auth: &str) -> Result<Login> {
    let bytes = STANDARD.decode(auth.trim()).ok();
    let text = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
    match text.as_deref().and_then(|text| text.split_once(':')) {
        Some((user, password)) => Ok((user.into(), password.trim_end_matches('\0').into())),
        None => bail!("an \"auth\" is not base64 of USER:PASSWORD; log in again"),
    }
}

/// Asks `docker-credential-HELPER`.
fn helped(helper: &str, registry: &str) -> Result<Option<Login>> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if helper.is_empty() || !helper.chars().all(plain) {
        bail!("{helper:?} is no name of a credential helper");
    }
    let program = format!("docker-credential-{helper}");
    let ask = || {
        let mut child = Command::new(&program)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read has its own reason.
            let _ = stdin.write_all(registry.as_bytes());
        }
        let mut answer = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(CONFIG_MAX).read_to_end(&mut answer)?;
        }
        Ok::<_, io::Error>((child.wait()?, answer))
    };
    let (status, answer) = ask().with_context(|| format!("run {program}"))?;
    if !status.success() {
        // It has none: the registry may want none.
        return Ok(None);
    }
    let said: Credentials =
        serde_json::from_slice(&answer).with_context(|| format!("read what {program} says"))?;
    Ok(Some((said.username, said.secret)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(text: &str, registry: &str) -> Result<Option<Login>> {
        serde_json::from_str::<Config>(text)?.login(registry)
    }

    #[test]
    fn logins_are_found() {
        let text = r#"{"auths":{"reg.example:5000":{"auth":"dXNlcjpwYTpzcw=="},
            "https://index.docker.io/v1/":{"auth":"aHViOnNlY3JldA=="}},"HttpHeaders":{}}"#;
        let of = |user: &str, password: &str| Some((user.to_owned(), password.to_owned()));
        assert_eq!(
            login(text, "reg.example:5000").unwrap(),
            of("user", "pa:ss")
        );
        assert_eq!(login(text, "docker.io").unwrap(), of("hub", "secret"));
        assert_eq!(login(text, "other.example").unwrap(), None);
        assert_eq!(login("{}", "docker.io").unwrap(), None);
        // One that a helper has, and has no more.
        let helped = r#"{"auths":{"r":{}},"credsStore":"none-such"}"#;
        assert!(login(helped, "r").is_err() && login(helped, "other").unwrap().is_none());
        for bad in [
            r#"{"auths":{"r":{"auth":"%%"}}}"#,
            r#"{"auths":{"r":{"auth":"dXNlcg=="}}}"#,
            r#"{"credHelpers":{"r":"../../bin/sh"}}"#,
        ] {
            assert!(login(bad, "r").is_err(), "{bad}");
        }
    }
}
