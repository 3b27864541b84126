//! Speaks to one registry for one repository (OCI distribution-spec).
//!
//! Token exchange and blobs are oci-client's. Manifests are fetched here,
//! because a body of any size may answer and must not be taken whole.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, stream::BoxStream};
use oci_client::{
    Client, Reference as OciReference, RegistryOperation,
    client::{ClientConfig, ClientProtocol},
    errors::OciDistributionError,
    manifest::OciDescriptor,
    secrets::RegistryAuth,
};
use reqwest::{Method, StatusCode, header};

use crate::{
    Digest, Error, PullOptions, Reference,
    error::chain,
    manifest::{ACCEPT, Blob, MAX_MANIFEST},
    reference::host_of,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Between two reads: a stalled transfer ends here.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const USER_AGENT: &str = concat!("walnut/", env!("CARGO_PKG_VERSION"));

/// Bytes of a blob as they arrive, unverified.
pub(crate) type Chunks = BoxStream<'static, Result<Vec<u8>, String>>;

/// A failure, and whether another try may help.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: Error,
    pub(crate) transient: bool,
}

/// A repository of a registry, with credentials.
pub(crate) struct Registry {
    client: Client,
    http: reqwest::Client,
    reference: Reference,
    oci: OciReference,
    auth: RegistryAuth,
    /// `https://host/v2/repository`
    base: String,
}

impl Registry {
    /// Prepares to speak to `reference`'s registry; nothing is sent yet.
    pub(crate) fn new(reference: &Reference, options: &PullOptions) -> Result<Self, Error> {
        let oci = reference.to_oci();
        let host = oci.resolve_registry().to_owned();
        let plain = reference.is_loopback()
            || options
                .insecure
                .iter()
                .any(|name| *name == host || *name == host_of(&host));
        let failed = |reason: String| Error::Registry {
            registry: host.clone(),
            what: reference.familiar(),
            reason: format!("no HTTP client can be made: {reason} (is ca-certificates installed?)"),
        };
        let mut proxies = Proxies::from_env();
        if reference.is_loopback() {
            // Never through a proxy, as with Docker.
            proxies.except = Some("*".to_owned());
        }
        let client = Client::try_from(ClientConfig {
            protocol: if plain {
                ClientProtocol::HttpsExcept(vec![host.clone()])
            } else {
                ClientProtocol::Https
            },
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: USER_AGENT,
            https_proxy: proxies.https.clone(),
            http_proxy: proxies.http.clone(),
            no_proxy: proxies.except.clone(),
            ..ClientConfig::default()
        })
        .map_err(|e| failed(chain(&e)))?;
        let http = proxies.client().map_err(|e| failed(chain(&e)))?;
        let scheme = if plain { "http" } else { "https" };
        Ok(Self {
            base: format!("{scheme}://{host}/v2/{}", reference.repository()),
            client,
            http,
            reference: reference.clone(),
            oci,
            auth: match &options.login {
                Some((user, password)) => RegistryAuth::Basic(user.clone(), password.clone()),
                None => RegistryAuth::Anonymous,
            },
        })
    }

    fn failed(&self, what: &str, reason: String, transient: bool) -> Failure {
        Failure {
            error: Error::Registry {
                registry: self.reference.registry().to_owned(),
                what: what.to_owned(),
                reason,
            },
            transient,
        }
    }

    fn refused(&self, reason: String) -> Failure {
        Failure {
            error: Error::Unauthorized {
                registry: self.reference.registry().to_owned(),
                reference: self.reference.familiar(),
                reason,
            },
            transient: false,
        }
    }

    fn not_found(&self) -> Failure {
        Failure {
            error: Error::NotInRegistry {
                registry: self.reference.registry().to_owned(),
                reference: self.reference.familiar(),
            },
            transient: false,
        }
    }

    async fn ask(&self, method: Method, name: &str) -> Result<reqwest::Response, Failure> {
        let what = format!("the manifest of {}", self.reference.familiar());
        let token = self
            .client
            .auth(&self.oci, &self.auth, RegistryOperation::Pull)
            .await
            .map_err(|e| self.judge(&what, &e))?;
        let url = format!("{}/manifests/{name}", self.base);
        let mut request = self.http.request(method, url);
        for kind in ACCEPT {
            request = request.header(header::ACCEPT, kind);
        }
        request = match (&token, &self.auth) {
            (Some(token), _) => request.bearer_auth(token),
            (None, RegistryAuth::Basic(user, password)) => request.basic_auth(user, Some(password)),
            _ => request,
        };
        let response = request
            .send()
            .await
            .map_err(|e| self.failed(&what, chain(&e), self.may_pass(&e)))?;
        let status = response.status();
        match status {
            _ if status.is_success() => Ok(response),
            StatusCode::NOT_FOUND => Err(self.not_found()),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(self.refused(status.to_string()))
            }
            _ => Err(self.failed(&what, format!("it answers {status}"), is_transient(status))),
        }
    }

    /// Digest of what the tag stands for, if the registry tells it cheaply.
    pub(crate) async fn head(&self, tag: &str) -> Result<Option<Digest>, Failure> {
        let response = self.ask(Method::HEAD, tag).await?;
        Ok(response
            .headers()
            .get("docker-content-digest")
            .and_then(|value| value.to_str().ok())
            .and_then(|text| text.parse().ok()))
    }

    /// A manifest or index by tag or digest; verified if `expected`.
    pub(crate) async fn manifest(
        &self,
        name: &str,
        expected: Option<&Digest>,
    ) -> Result<(Vec<u8>, Digest), Failure> {
        let what = format!("the manifest of {}", self.reference.familiar());
        let response = self.ask(Method::GET, name).await?;
        let too_large = |size: u64| Failure {
            error: Error::TooLarge {
                what: what.clone(),
                size,
                limit: MAX_MANIFEST,
            },
            transient: false,
        };
        if let Some(size) = response
            .content_length()
            .filter(|size| *size > MAX_MANIFEST)
        {
            return Err(too_large(size));
        }
        let mut body = Vec::new();
        let mut stream = response.bytes_stream();
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|e| self.failed(&what, chain(&e), true))?;
            body.extend_from_slice(&chunk);
            if body.len() as u64 > MAX_MANIFEST {
                return Err(too_large(body.len() as u64));
            }
        }
        let digest = Digest::of(&body);
        match expected {
            Some(expected) if *expected != digest => Err(Failure {
                error: Error::Mismatch {
                    what: "manifest",
                    expected: *expected,
                    reason: format!("the registry gave {digest}"),
                },
                transient: true,
            }),
            _ => Ok((body, digest)),
        }
    }

    /// Begins to fetch a blob.
    pub(crate) async fn blob(&self, blob: &Blob) -> Result<Chunks, Failure> {
        let what = format!("blob {} of {}", blob.digest, self.reference.familiar());
        self.client
            .store_auth_if_needed(self.oci.resolve_registry(), &self.auth)
            .await;
        let descriptor = OciDescriptor {
            digest: blob.digest.to_string(),
            ..OciDescriptor::default()
        };
        let stream = self
            .client
            .pull_blob_stream(&self.oci, &descriptor)
            .await
            .map_err(|e| self.judge(&what, &e))?;
        Ok(stream
            .stream
            .map(|chunk| chunk.map(|bytes| bytes.to_vec()).map_err(|e| chain(&e)))
            .boxed())
    }

    /// Asks for leave to push.
    pub(crate) async fn allow_push(&self) -> Result<(), Failure> {
        let what = format!("leave to push {}", self.reference.familiar());
        let asked = self
            .client
            .auth(&self.oci, &self.auth, RegistryOperation::Push)
            .await;
        asked.map(drop).map_err(|e| self.judge(&what, &e))
    }

    /// Whether the registry has a blob.
    pub(crate) async fn has(&self, digest: &Digest) -> Result<bool, Failure> {
        let what = format!("whether it has blob {digest}");
        let found = self
            .client
            .blob_exists(&self.oci, &digest.to_string())
            .await;
        found.map_err(|e| self.judge(&what, &e))
    }

    /// Sends a blob.
    pub(crate) async fn put_blob(
        &self,
        blob: &Blob,
        bytes: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> Result<(), Failure> {
        let what = format!("the end of the push of blob {}", blob.digest);
        let bytes = bytes.map(|chunk| chunk.map_err(OciDistributionError::IoError));
        let digest = blob.digest.to_string();
        let sent = self
            .client
            .push_blob_stream(&self.oci, bytes, &digest, Some(blob.size))
            .await;
        sent.map(drop).map_err(|e| self.judge(&what, &e))
    }

    /// Sends the manifest that the name is to stand for.
    pub(crate) async fn put_manifest(&self, bytes: Vec<u8>, kind: &str) -> Result<(), Failure> {
        let what = format!("the end of the push of {}", self.reference.familiar());
        let kind = header::HeaderValue::from_str(kind)
            .map_err(|e| self.failed(&what, e.to_string(), false))?;
        let sent = self.client.push_manifest_raw(&self.oci, bytes, kind).await;
        sent.map(drop).map_err(|e| self.judge(&what, &e))
    }

    /// A transfer of `blob` broke off for `reason`.
    pub(crate) fn broken(&self, blob: &Blob, reason: String) -> Failure {
        let what = format!("blob {} of {}", blob.digest, self.reference.familiar());
        self.failed(&what, reason, true)
    }

    /// Whether a request that failed so may succeed later. Nobody listening
    /// on this very host is an answer.
    fn may_pass(&self, error: &reqwest::Error) -> bool {
        !(error.is_builder() || error.is_connect() && self.reference.is_loopback())
    }

    fn judge(&self, what: &str, error: &OciDistributionError) -> Failure {
        use OciDistributionError as E;
        match error {
            E::AuthenticationFailure(reason) => self.refused(reason.chars().take(300).collect()),
            E::UnauthorizedError { .. } => self.refused("not authorized".to_owned()),
            E::ServerError { code, .. } => {
                let transient = StatusCode::from_u16(*code).is_ok_and(is_transient);
                self.failed(what, format!("it answers {code}"), transient)
            }
            E::RegistryError { .. } => self.failed(what, chain(error), false),
            E::RequestError(e) => self.failed(what, chain(error), self.may_pass(e)),
            E::IoError(_) | E::DigestError(_) => self.failed(what, chain(error), true),
            _ => self.failed(what, chain(error), false),
        }
    }
}

fn is_transient(status: StatusCode) -> bool {
    status.is_server_error()
        || matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
        )
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

    fn client(&self) -> Result<reqwest::Client, reqwest::Error> {
        let except = || {
            self.except
                .as_deref()
                .and_then(reqwest::NoProxy::from_string)
        };
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .user_agent(USER_AGENT)
            .no_proxy();
        if let Some(url) = &self.https {
            builder = builder.proxy(reqwest::Proxy::https(url)?.no_proxy(except()));
        }
        if let Some(url) = &self.http {
            builder = builder.proxy(reqwest::Proxy::http(url)?.no_proxy(except()));
        }
        builder.build()
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Credentials stay out of logs.
        write!(f, "Registry({})", self.base)
    }
}
