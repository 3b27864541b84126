//! What a registry that answers 401 wants: Basic (RFC 7617), or a bearer token of the
//! service that it names (the distribution project's token authentication).

use base64::Engine as _;
use futures::StreamExt as _;
use reqwest::{
    Url,
    header::{HeaderValue, WWW_AUTHENTICATE},
};
use serde::Deserialize;

use super::{credentials::Login, endpoint::is_loopback};
use crate::error::chain;

/// Longest answer of a token service, in bytes.
const ANSWER_MAX: usize = 1 << 20;

/// Why there is no authorization.
#[derive(Debug)]
pub(super) enum Denied {
    /// No login is going to be accepted.
    Refused(String),
    /// The service could not be spoken to; another try may help if `true`.
    Failed(String, bool),
}

/// What a challenge asks for.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

#[derive(Debug, Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
}

/// The `Authorization` that answers a 401 of the registry at `asked`, for `scope` unless
/// the challenge names one.
pub(super) async fn answer(
    http: &reqwest::Client,
    response: &reqwest::Response,
    asked: &Url,
    login: &Login,
    scope: &str,
) -> Result<HeaderValue, Denied> {
    let challenges: Vec<&str> = response
        .headers()
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .collect();
    match wanted(&challenges) {
        None => Err(Denied::Refused(format!(
            "it answers {} and does not say what it wants",
            response.status()
        ))),
        Some(Wanted::Basic) => match login {
            Login::Password(user, password) => basic(user, password),
            _ => Err(Denied::Refused(
                "it wants a user name and a password".to_owned(),
            )),
        },
        Some(Wanted::Bearer {
            realm,
            service,
            scope: named,
        }) => {
            let realm = realm_of(&realm, asked, login)?;
            let scope = named.unwrap_or_else(|| scope.to_owned());
            token(http, realm, service.as_deref(), &scope, login).await
        }
    }
}

fn basic(user: &str, password: &str) -> Result<HeaderValue, Denied> {
    let both = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    header(&format!("Basic {both}"))
}

fn header(text: &str) -> Result<HeaderValue, Denied> {
    let mut value = HeaderValue::from_str(text)
        .map_err(|_| Denied::Refused("its token is none that HTTP can carry".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// The first challenge that can be met, a bearer token before a password.
fn wanted(challenges: &[&str]) -> Option<Wanted> {
    let parsed: Vec<_> = challenges
        .iter()
        .filter_map(|text| http_auth::parse_challenges(text).ok())
        .flatten()
        .collect();
    let of = |scheme: &str| {
        parsed
            .iter()
            .find(|challenge| challenge.scheme.eq_ignore_ascii_case(scheme))
    };
    if let Some(bearer) = of("Bearer") {
        let param = |name: &str| {
            let found = bearer
                .params
                .iter()
                .find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped())
        };
        if let Some(realm) = param("realm") {
            return Some(Wanted::Bearer {
                realm,
                service: param("service"),
                scope: param("scope").filter(|scope| !scope.is_empty()),
            });
        }
    }
    of("Basic").map(|_| Wanted::Basic)
}

/// The token service's address. A login is not sent in the clear to another host, whoever
/// says so: an answer that was not encrypted could be anybody's.
fn realm_of(realm: &str, asked: &Url, login: &Login) -> Result<Url, Denied> {
    let refused = |why: &str| Denied::Refused(format!("its token service \"{realm}\" {why}"));
    let url: Url = realm
        .parse()
        .map_err(|_| refused("has no address that can be understood"))?;
    let loopback = is_loopback(&url);
    match url.scheme() {
        "https" => Ok(url),
        "http"
            if *login == Login::Anonymous
                || loopback
                || asked.scheme() == "http" && url.host_str() == asked.host_str() =>
        {
            Ok(url)
        }
        "http" => Err(refused("would have the login in the clear")),
        _ => Err(refused("is not spoken to over HTTP")),
    }
}

async fn token(
    http: &reqwest::Client,
    mut realm: Url,
    service: Option<&str>,
    scope: &str,
    login: &Login,
) -> Result<HeaderValue, Denied> {
    let request = match login {
        Login::Identity(identity) => {
            let mut form = url::form_urlencoded::Serializer::new(String::new());
            form.append_pair("grant_type", "refresh_token")
                .append_pair("client_id", "walnut")
                .append_pair("refresh_token", identity)
                .append_pair("scope", scope);
            if let Some(service) = service {
                form.append_pair("service", service);
            }
            http.post(realm.clone())
                .header(
                    reqwest::header::CONTENT_TYPE,
                    "application/x-www-form-urlencoded",
                )
                .body(form.finish())
        }
        _ => {
            {
                let mut query = realm.query_pairs_mut();
                if let Some(service) = service {
                    query.append_pair("service", service);
                }
                // Several are several parameters.
                for scope in scope.split_ascii_whitespace() {
                    query.append_pair("scope", scope);
                }
            }
            let request = http.get(realm.clone());
            match login {
                Login::Password(user, password) => request.basic_auth(user, Some(password)),
                _ => request,
            }
        }
    };
    let host = realm.host_str().unwrap_or_default().to_owned();
    let failed = |reason: String, transient| {
        Denied::Failed(format!("its token service {host}: {reason}"), transient)
    };
    let response = request
        .send()
        .await
        .map_err(|e| failed(chain(&e), !e.is_builder()))?;
    let status = response.status();
    if status.is_client_error() {
        return Err(Denied::Refused(format!(
            "its token service {host} answers {status}"
        )));
    }
    if !status.is_success() {
        return Err(failed(format!("it answers {status}"), true));
    }
    let mut body = Vec::new();
    let mut stream = response.bytes_stream();
    while let Some(chunk) = stream.next().await {
        body.extend_from_slice(&chunk.map_err(|e| failed(chain(&e), true))?);
        if body.len() > ANSWER_MAX {
            return Err(failed("its answer is too long".to_owned(), false));
        }
    }
    let answer: Answer = serde_json::from_slice(&body)
        .map_err(|e| failed(format!("its answer is no token: {e}"), false))?;
    let token = answer.token.or(answer.access_token);
    match token.filter(|token| !token.is_empty()) {
        Some(token) => header(&format!("Bearer {token}")),
        None => Err(failed("its answer has no token".to_owned(), false)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_preferred_to_a_password() {
        let bearer = r#"Bearer realm="https://auth.example/token",service="reg",scope="""#;
        let expected = Wanted::Bearer {
            realm: "https://auth.example/token".to_owned(),
            service: Some("reg".to_owned()),
            scope: None,
        };
        assert_eq!(wanted(&["Basic realm=\"x\"", bearer]), Some(expected));
        assert_eq!(wanted(&["basic realm=\"x\""]), Some(Wanted::Basic));
        for none in [
            &[][..],
            &["Digest realm=\"x\""],
            &["Bearer service=\"x\""],
            &["\"\""],
        ] {
            assert_eq!(wanted(none), None, "{none:?}");
        }
    }

    #[test]
    fn a_login_is_not_sent_in_the_clear() {
        let login = Login::Password("u".to_owned(), "p".to_owned());
        let secure: Url = "https://r.example/v2".parse().unwrap();
        let open: Url = "http://r.example/v2".parse().unwrap();
        let may = |realm: &str, asked: &Url, login: &Login| realm_of(realm, asked, login).is_ok();
        assert!(may("https://a.example/t", &secure, &login));
        assert!(!may("http://a.example/t", &secure, &login));
        assert!(!may("http://r.example/t", &secure, &login));
        assert!(!may("http://a.example/t", &open, &login));
        assert!(may("http://r.example/t", &open, &login));
        assert!(may("http://127.0.0.1:5001/t", &open, &login));
        assert!(may("http://a.example/t", &secure, &Login::Anonymous));
        assert!(!may("file:///etc/passwd", &secure, &Login::Anonymous));
        assert!(!may("token", &secure, &Login::Anonymous));
    }
}
