//! One host of a registry's: how it is spoken to, and as whom.

use std::{net::IpAddr, time::Duration};

use reqwest::{
    Certificate, Identity, Method, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RANGE},
};
use tokio::sync::Mutex;

use super::{
    auth::{self, Denied},
    credentials::Login,
    hosts::{self, Capabilities, Host},
};
use crate::{Error, error::chain, reference::host_of};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Between two reads: a stalled transfer ends here.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const USER_AGENT: &str = concat!("walnut/", env!("CARGO_PKG_VERSION"));

/// Why a request came to nothing.
#[derive(Debug)]
pub(super) enum Problem {
    NotFound,
    Refused(String),
    /// Another try may help if `true`.
    Failed(String, bool),
}

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ask<'a> {
    pub(super) method: &'a Method,
    /// Below the repository: `manifests/latest`.
    pub(super) path: &'a str,
    pub(super) accept: &'a [&'a str],
    /// From which byte on.
    pub(super) from: u64,
}

pub(super) struct Endpoint {
    http: reqwest::Client,
    host: Host,
    repository: String,
    /// Of a mirror: whose images are meant.
    namespace: Option<String>,
    login: Login,
    /// Of the token that is asked for: `pull`, or `pull,push`.
    actions: &'static str,
    loopback: bool,
    /// What the last 401 was answered with. Held while one is answered, so that requests
    /// that run at the same time do not all do that.
    authorization: Mutex<Option<HeaderValue>>,
}

impl Endpoint {
    pub(super) fn new(
        host: Host,
        repository: &str,
        namespace: Option<String>,
        login: Login,
        actions: &'static str,
    ) -> Result<Self, Error> {
        let loopback = is_loopback(&host.url);
        Ok(Self {
            http: client(&host, loopback)?,
            host,
            repository: repository.to_owned(),
            namespace,
            login,
            actions,
            loopback,
            authorization: Mutex::new(None),
        })
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        self.host.capabilities
    }

    pub(super) fn name(&self) -> &str {
        self.host.url.as_str()
    }

    /// Asks, and once more with what a 401 wants.
    pub(super) async fn send(&self, ask: Ask<'_>) -> Result<reqwest::Response, Problem> {
        let known = self.authorization.lock().await.clone();
        let response = self.once(ask, known.as_ref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return judge(response);
        }
        let mut authorization = self.authorization.lock().await;
        // Another request may have answered meanwhile.
        let answer = match authorization.clone() {
            Some(other) if known.as_ref() != Some(&other) => other,
            _ => {
                let scope = format!("repository:{}:{}", self.repository, self.actions);
                let asked = &self.host.url;
                auth::answer(&self.http, &response, asked, &self.login, &scope)
                    .await
                    .map_err(|denied| match denied {
                        Denied::Refused(reason) => Problem::Refused(reason),
                        Denied::Failed(reason, transient) => Problem::Failed(reason, transient),
                    })?
            }
        };
        *authorization = Some(answer.clone());
        drop(authorization);
        judge(self.once(ask, Some(&answer)).await?)
    }

    /// Sends a body, which cannot be sent twice, to a place that an answer named or to one
    /// below the repository.
    pub(super) async fn put(
        &self,
        url: Url,
        kind: &str,
        length: u64,
        body: reqwest::Body,
    ) -> Result<reqwest::Response, Problem> {
        let mut request = self
            .http
            .put(url.clone())
            .header(CONTENT_TYPE, kind)
            .header(CONTENT_LENGTH, length)
            .body(body);
        // A place elsewhere has its own right in its address; ours is not for it.
        if url.origin() == self.host.url.origin()
            && let Some(authorization) = self.authorization.lock().await.clone()
        {
            request = request.header(AUTHORIZATION, authorization);
        }
        let response = request.send().await;
        judge(response.map_err(|e| Problem::Failed(chain(&e), !e.is_builder()))?)
    }

    /// The address of what is below the repository.
    pub(super) fn below(&self, path: &str) -> Url {
        let mut url = self.host.url.clone();
        let base = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{base}/{}/{path}", self.repository));
        url
    }

    async fn once(
        &self,
        ask: Ask<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<reqwest::Response, Problem> {
        let mut url = self.below(ask.path);
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        let mut request = self.http.request(ask.method.clone(), url);
        for kind in ask.accept {
            request = request.header(ACCEPT, *kind);
        }
        if ask.from > 0 {
            request = request.header(RANGE, format!("bytes={}-", ask.from));
        }
        if let Some(authorization) = authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        request.send().await.map_err(|e| {
            // Nobody listening on this very host is an answer.
            let transient = !(e.is_builder() || e.is_connect() && self.loopback);
            Problem::Failed(chain(&e), transient)
        })
    }
}

/// Whether a host is this very one.
pub(super) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    host == "localhost"
        || host_of(host)
            .parse::<IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

fn judge(response: reqwest::Response) -> Result<reqwest::Response, Problem> {
    let status = response.status();
    match status {
        _ if status.is_success() => Ok(response),
        StatusCode::NOT_FOUND => Err(Problem::NotFound),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Err(Problem::Refused(status.to_string()))
        }
        _ => Err(Problem::Failed(
            format!("it answers {status}"),
            status.is_server_error()
                || matches!(
                    status,
                    StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
                ),
        )),
    }
}

fn client(host: &Host, loopback: bool) -> Result<reqwest::Client, Error> {
    let failed = |reason: String| Error::Registry {
        registry: host.url.host_str().unwrap_or_default().to_owned(),
        what: "anything".to_owned(),
        reason: format!("no HTTP client can be made: {reason} (is ca-certificates installed?)"),
    };
    let load = |path: &std::path::Path| {
        hosts::read(path).map_err(|e| Error::Hosts {
            path: path.to_owned(),
            reason: e.to_string(),
        })
    };
    let mut builder = reqwest::Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .user_agent(USER_AGENT)
        .default_headers(host.headers.clone())
        .tls_danger_accept_invalid_certs(host.skip_verify)
        .no_proxy();
    for path in &host.cas {
        let certificates = Certificate::from_pem_bundle(&load(path)?);
        let certificates = certificates.ok().filter(|list| !list.is_empty());
        let certificates = certificates.ok_or_else(|| Error::Hosts {
            path: path.clone(),
            reason: "it holds no certificate in PEM".to_owned(),
        })?;
        builder = builder.tls_certs_merge(certificates);
    }
    // One is presented: TLS has no place for a second.
    if let Some((certificate, key)) = host.clients.first() {
        let mut pem = load(certificate)?;
        if let Some(key) = key {
            pem.push(b'\n');
            pem.extend(load(key)?);
        }
        let identity = Identity::from_pem(&pem).map_err(|e| Error::Hosts {
            path: certificate.clone(),
            reason: format!("it is no certificate with its key in PEM: {}", chain(&e)),
        })?;
        builder = builder.identity(identity);
    }
    // Never through a proxy to this very host, as with Docker.
    if !loopback {
        builder = Proxies::from_env()
            .apply(builder)
            .map_err(|e| failed(chain(&e)))?;
    }
    builder.build().map_err(|e| failed(chain(&e)))
}

/// The proxies of the environment.
#[derive(Debug, Default)]
struct Proxies {
    http: Option<String>,
    https: Option<String>,
    except: Option<String>,
}

impl Proxies {
    fn from_env() -> Self {
        let get = |names: [&str; 2]| {
            names
                .into_iter()
                .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
        };
        let all = get(["all_proxy", "ALL_PROXY"]);
        Self {
            http: get(["http_proxy", "HTTP_PROXY"]).or_else(|| all.clone()),
            https: get(["https_proxy", "HTTPS_PROXY"]).or(all),
            except: get(["no_proxy", "NO_PROXY"]),
        }
    }

    fn apply(
        &self,
        mut builder: reqwest::ClientBuilder,
    ) -> Result<reqwest::ClientBuilder, reqwest::Error> {
        let except = || {
            self.except
                .as_deref()
                .and_then(reqwest::NoProxy::from_string)
        };
        if let Some(url) = &self.https {
            builder = builder.proxy(reqwest::Proxy::https(url)?.no_proxy(except()));
        }
        if let Some(url) = &self.http {
            builder = builder.proxy(reqwest::Proxy::http(url)?.no_proxy(except()));
        }
        Ok(builder)
    }
}

/// The address of the registry itself.
pub(super) fn own(host: &str, plain: bool) -> Result<Url, String> {
    let scheme = if plain { "http" } else { "https" };
    format!("{scheme}://{host}/v2")
        .parse()
        .map_err(|e| format!("\"{host}\" is no address: {e}"))
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Credentials stay out of logs.
        write!(f, "Endpoint({}, {:?})", self.host.url, self.login)
    }
}
