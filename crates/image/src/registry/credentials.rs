//! Logins: Docker's `config.json`, podman's `auth.json`, and the programs they name.

use std::{io::ErrorKind, path::PathBuf, process::Stdio, time::Duration};

use base64::Engine as _;
use serde::Deserialize;
use tokio::{io::AsyncWriteExt as _, process::Command};

use super::hosts::read;
use crate::Error;

/// How long a credential helper may take: it may ask a keyring, or a cloud.
const HELPER_TIME: Duration = Duration::from_secs(30);
/// Most that is taken from one, in bytes.
const HELPER_MAX: usize = 64 << 10;
/// What a helper gives as user name when its secret is an identity token.
const TOKEN_USER: &str = "<token>";

/// How one proves to a registry who one is.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Login {
    Anonymous,
    Password(String, String),
    /// A refresh token of OAuth 2.
    Identity(String),
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Secrets stay out of logs.
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Password(..) => "Password",
            Self::Identity(_) => "Identity",
        })
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Config {
    auths: std::collections::BTreeMap<String, Entry>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
    #[serde(rename = "credHelpers")]
    helpers: std::collections::BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    #[serde(rename = "identitytoken")]
    identity: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Answer {
    #[serde(rename = "Username")]
    user: String,
    #[serde(rename = "Secret")]
    secret: String,
}

/// Where logins are kept, in the order in which they are looked for: Docker's file
/// (`DOCKER_CONFIG`, else `~/.docker`), then podman's (`REGISTRY_AUTH_FILE`, else below
/// `XDG_RUNTIME_DIR` and `~/.config`).
pub(crate) fn files() -> Vec<PathBuf> {
    let var = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let home = var("HOME");
    let below = |dir: Option<PathBuf>, path: &str| dir.map(|dir| dir.join(path));
    let docker = var("DOCKER_CONFIG").or_else(|| below(home.clone(), ".docker"));
    [
        below(docker, "config.json"),
        var("REGISTRY_AUTH_FILE"),
        below(var("XDG_RUNTIME_DIR"), "containers/auth.json"),
        below(home, ".config/containers/auth.json"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The login for a repository of a registry, which may have several names.
pub(super) async fn find(
    files: &[PathBuf],
    registries: &[&str],
    repository: &str,
) -> Result<Login, Error> {
    for path in files {
        let bad = |reason: String| Error::Credentials {
            what: path.display().to_string(),
            reason,
        };
        let config: Config = match read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?,
            // A file that is another user's is not for us.
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
                continue;
            }
            Err(e) => return Err(bad(e.to_string())),
        };
        for registry in registries {
            if let Some(helper) = config.helpers.get(*registry)
                && let Some(login) = ask(helper, registry).await?
            {
                return Ok(login);
            }
        }
        let entries = config.auths.iter().filter_map(|(key, entry)| {
            let length = fits(key, registries, repository)?;
            Some((length, key, entry))
        });
        let best = entries.max_by_key(|(length, ..)| *length);
        if let Some((_, key, entry)) = best {
            if let Some(login) = entry
                .login()
                .map_err(|reason| bad(format!("auths.\"{key}\": {reason}")))?
            {
                return Ok(login);
            }
            // An entry with nothing in it says that the store has it.
            if let Some(store) = &config.store
                && let Some(login) = ask(store, key).await?
            {
                return Ok(login);
            }
        } else if let Some(store) = &config.store {
            for registry in registries {
                if let Some(login) = ask(store, registry).await? {
                    return Ok(login);
                }
            }
        }
    }
    Ok(Login::Anonymous)
}

/// How well an entry's name fits, if it does: `host`, `https://host/v1/`, or, of podman,
/// `host/part/of/the/repository`.
fn fits(key: &str, registries: &[&str], repository: &str) -> Option<usize> {
    let bare = key.split_once("://").map_or(key, |(_, rest)| rest);
    let bare = bare.trim_end_matches('/');
    let bare = bare
        .strip_suffix("/v1")
        .or_else(|| bare.strip_suffix("/v2"))
        .unwrap_or(bare);
    let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
    let inside = path.is_empty()
        || repository
            .strip_prefix(path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    (registries.contains(&host) && inside).then_some(path.len())
}

impl Entry {
    fn login(&self) -> Result<Option<Login>, &'static str> {
        let some = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(identity) = some(&self.identity) {
            return Ok(Some(Login::Identity(identity)));
        }
        if let (Some(user), Some(password)) = (some(&self.username), some(&self.password)) {
            return Ok(Some(Login::Password(user, password)));
        }
        let Some(auth) = some(&self.auth) else {
            return Ok(None);
        };
        let wrong = "its auth is not the base64 of user:password";
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(auth.trim())
            .map_err(|_| wrong)?;
        let text = String::from_utf8(bytes).map_err(|_| wrong)?;
        let (user, password) = text.split_once(':').ok_or(wrong)?;
        // Docker pads some with zeroes.
        let password = password.trim_end_matches('\0');
        Ok(Some(Login::Password(user.to_owned(), password.to_owned())))
    }
}

/// Asks `docker-credential-NAME`, by the protocol of Docker's credential helpers.
async fn ask(name: &str, server: &str) -> Result<Option<Login>, Error> {
    let program = format!("docker-credential-{name}");
    let failed = |reason: String| Error::Credentials {
        what: program.clone(),
        reason,
    };
    // It becomes part of a program's name.
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || !name.chars().all(plain) {
        return Err(failed("a helper is not called so".to_owned()));
    }
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| failed(format!("it cannot be started: {e}; is it installed?")))?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let talk = async {
        if let Some(mut stdin) = stdin {
            // One that does not read is judged by what it says.
            let _ = stdin.write_all(format!("{server}\n").as_bytes()).await;
        }
        let mut said = Vec::new();
        if let Some(stdout) = stdout {
            let limit = HELPER_MAX as u64 + 1;
            let mut stdout = tokio::io::AsyncReadExt::take(stdout, limit);
            tokio::io::AsyncReadExt::read_to_end(&mut stdout, &mut said).await?;
        }
        if said.len() > HELPER_MAX {
            return Err(std::io::Error::other("it says too much"));
        }
        Ok((child.wait().await?, said))
    };
    let (status, said) = tokio::time::timeout(HELPER_TIME, talk)
        .await
        .map_err(|_| failed(format!("it took longer than {} s", HELPER_TIME.as_secs())))?
        .map_err(|e| failed(e.to_string()))?;
    if !status.success() {
        let said = String::from_utf8_lossy(&said);
        // The one answer that the protocol has for it.
        if said.contains("credentials not found") {
            return Ok(None);
        }
        let said: String = said.trim().chars().take(300).collect();
        return Err(failed(format!("it failed ({status}): {said}")));
    }
    let answer: Answer =
        serde_json::from_slice(&said).map_err(|e| failed(format!("what it says is none: {e}")))?;
    Ok(match (answer.user.as_str(), answer.secret.as_str()) {
        ("", "") => None,
        (TOKEN_USER, _) => Some(Login::Identity(answer.secret)),
        _ => Some(Login::Password(answer.user, answer.secret)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn login(json: &str, registry: &str, repository: &str) -> Result<Login, Error> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        std::fs::write(&file, json).unwrap();
        let files = [dir.path().join("none.json"), file];
        find(&files, &[registry], repository).await
    }

    fn password(user: &str, password: &str) -> Login {
        Login::Password(user.to_owned(), password.to_owned())
    }

    #[tokio::test]
    async fn the_entry_that_fits_best_is_taken() {
        // user:secret, team:other
        let json = r#"{"auths": {
            "https://a.example/v1/": {"auth": "dXNlcjpzZWNyZXQ="},
            "a.example/team": {"auth": "dGVhbTpvdGhlcg=="},
            "b.example:5000": {"identitytoken": "tok", "auth": "dXNlcjo="},
            "c.example": {"username": "u", "password": "p"}
        }}"#;
        let cases = [
            ("a.example", "library/x", password("user", "secret")),
            ("a.example", "team/x", password("team", "other")),
            ("a.example", "teams/x", password("user", "secret")),
            ("b.example:5000", "x", Login::Identity("tok".to_owned())),
            ("b.example", "x", Login::Anonymous),
            ("c.example", "x", password("u", "p")),
        ];
        for (registry, repository, wanted) in cases {
            let found = login(json, registry, repository).await.unwrap();
            assert_eq!(found, wanted, "{registry}/{repository}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_said_without_its_secret() {
        let json = r#"{"auths": {"a.example": {"auth": "c2VjcmV0"}}}"#;
        let error = login(json, "a.example", "x").await.unwrap_err().to_string();
        assert!(
            error.contains("a.example") && error.contains("base64"),
            "{error}"
        );
        assert!(!error.contains("c2VjcmV0"), "{error}");
        assert!(login("{", "a.example", "x").await.is_err());
        let json = r#"{"credHelpers": {"a.example": "../evil"}}"#;
        let error = login(json, "a.example", "x").await.unwrap_err().to_string();
        assert!(error.contains("not called so"), "{error}");
        let json = r#"{"credHelpers": {"a.example": "walnut-has-none"}}"#;
        let error = login(json, "a.example", "x").await.unwrap_err().to_string();
        assert!(
            error.contains("docker-credential-walnut-has-none"),
            "{error}"
        );
    }
}
