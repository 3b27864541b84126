//! Speaks to one registry for one repository (OCI distribution-spec): to its mirrors in
//! their order, then to itself.
//!
//! `hosts` says whom to ask, `credentials` as whom, `auth` what a 401 wants, `endpoint`
//! asks, `push` sends. Bodies of any size may answer: none is taken whole without a bound.

mod auth;
mod credentials;
mod endpoint;
mod hosts;
mod push;

use futures::{StreamExt as _, stream::BoxStream};
use reqwest::{Method, StatusCode, header};

use self::{
    endpoint::{Ask, Endpoint, Problem},
    hosts::Capabilities,
};
use crate::{
    Digest, Error, PullOptions, Reference,
    error::chain,
    manifest::{ACCEPT, Blob, MAX_MANIFEST},
    reference::host_of,
};

pub(crate) use self::credentials::files as credential_files;

/// Bytes of a blob as they arrive, unverified.
pub(crate) type Chunks = BoxStream<'static, Result<Vec<u8>, String>>;

/// A failure, and whether another try may help.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: Error,
    pub(crate) transient: bool,
}

/// What is to be done there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Pull,
    Push,
}

/// A repository of a registry, with credentials.
#[derive(Debug)]
pub(crate) struct Registry {
    reference: Reference,
    /// At least one.
    endpoints: Vec<Endpoint>,
}

impl Registry {
    /// Prepares to speak to `reference`'s registry; nothing is sent yet, but credential
    /// helpers are asked.
    pub(crate) async fn new(
        reference: &Reference,
        options: &PullOptions,
        purpose: Purpose,
    ) -> Result<Self, Error> {
        let name = reference.registry();
        // One registry answers at another name than it is known by.
        let resolved = reference.address();
        let insecure = |host: &str| {
            options
                .insecure
                .iter()
                .any(|it| it == host || it == host_of(host))
        };
        let plain = reference.is_loopback() || insecure(name) || insecure(resolved);
        let own = endpoint::own(resolved, plain).map_err(|reason| Error::Registry {
            registry: name.to_owned(),
            what: reference.familiar(),
            reason,
        })?;
        let mut endpoints = Vec::new();
        for host in hosts::load(&options.hosts, name, &own)? {
            let address = match (host.url.host_str(), host.url.port()) {
                (Some(host), Some(port)) => format!("{host}:{port}"),
                (host, _) => host.unwrap_or_default().to_owned(),
            };
            let is_own = host.url.host_str() == own.host_str()
                && host.url.port_or_known_default() == own.port_or_known_default();
            let names: &[&str] = match is_own {
                true => &[name, resolved],
                false => &[&address],
            };
            let login =
                credentials::find(&options.credentials, names, reference.repository()).await?;
            let namespace = (!is_own).then(|| name.to_owned());
            let actions = match purpose {
                Purpose::Pull => "pull",
                Purpose::Push => "pull,push",
            };
            endpoints.push(Endpoint::new(
                host,
                reference.repository(),
                namespace,
                login,
                actions,
            )?);
        }
        Ok(Self {
            reference: reference.clone(),
            endpoints,
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

    fn failure(&self, what: &str, problem: Problem) -> Failure {
        let (registry, reference) = (
            self.reference.registry().to_owned(),
            self.reference.familiar(),
        );
        match problem {
            Problem::NotFound => Failure {
                error: Error::NotInRegistry {
                    registry,
                    reference,
                },
                transient: false,
            },
            Problem::Refused(reason) => Failure {
                error: Error::Unauthorized {
                    registry,
                    reference,
                    reason,
                },
                transient: false,
            },
            Problem::Failed(reason, transient) => self.failed(what, reason, transient),
        }
    }

    /// Asks one host after the other, of those that may be, until one has it.
    async fn ask(
        &self,
        what: &str,
        may: impl Fn(Capabilities) -> bool,
        ask: Ask<'_>,
    ) -> Result<reqwest::Response, Failure> {
        let mut earlier = false;
        let mut last = None;
        for endpoint in self.endpoints.iter().filter(|it| may(it.capabilities())) {
            if let Some(problem) = last.take() {
                tracing::debug!(
                    ?problem,
                    what,
                    "a mirror does not do; {} is next",
                    endpoint.name()
                );
                // What a mirror could not do for now, it may do later.
                earlier |= matches!(problem, Problem::Failed(_, true));
            }
            match endpoint.send(ask).await {
                Ok(response) => return Ok(response),
                Err(problem) => last = Some(problem),
            }
        }
        let problem = last.unwrap_or_else(|| {
            let none = "no host in its hosts.toml has the capability for it";
            Problem::Failed(none.to_owned(), false)
        });
        let mut failure = self.failure(what, problem);
        failure.transient |= earlier;
        Err(failure)
    }

    async fn ask_manifest(
        &self,
        method: Method,
        name: &str,
        what: &str,
    ) -> Result<reqwest::Response, Failure> {
        let by_digest = name.contains(':');
        let ask = Ask {
            method: &method,
            path: &format!("manifests/{name}"),
            accept: &ACCEPT,
            from: 0,
        };
        let may = |it: Capabilities| if by_digest { it.pull } else { it.resolve };
        self.ask(what, may, ask).await
    }

    /// Digest of what the tag stands for, if the registry tells it cheaply.
    pub(crate) async fn head(&self, tag: &str) -> Result<Option<Digest>, Failure> {
        let what = format!("the manifest of {}", self.reference.familiar());
        let response = self.ask_manifest(Method::HEAD, tag, &what).await?;
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
        let response = self.ask_manifest(Method::GET, name, &what).await?;
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

    /// Begins to fetch a blob, from byte `from` on if the registry can do that: says from
    /// which it does.
    pub(crate) async fn blob(&self, blob: &Blob, from: u64) -> Result<(u64, Chunks), Failure> {
        let what = format!("blob {} of {}", blob.digest, self.reference.familiar());
        let ask = Ask {
            method: &Method::GET,
            path: &format!("blobs/{}", blob.digest),
            accept: &[],
            from,
        };
        let response = self.ask(&what, |it| it.pull, ask).await?;
        let begins = match response.status() {
            StatusCode::PARTIAL_CONTENT => begin_of(response.headers()).filter(|at| *at == from),
            _ => Some(0),
        };
        let Some(begins) = begins else {
            let reason = format!("it gives another part than that from byte {from} on");
            return Err(self.failed(&what, reason, false));
        };
        let chunks = response
            .bytes_stream()
            .map(|chunk| chunk.map(|bytes| bytes.to_vec()).map_err(|e| chain(&e)))
            .boxed();
        Ok((begins, chunks))
    }

    /// A transfer of `blob` broke off for `reason`.
    pub(crate) fn broken(&self, blob: &Blob, reason: String) -> Failure {
        let what = format!("blob {} of {}", blob.digest, self.reference.familiar());
        self.failed(&what, reason, true)
    }
}

/// The first byte of a part: `Content-Range: bytes 5-9/10` (RFC 9110 §14.4).
fn begin_of(headers: &header::HeaderMap) -> Option<u64> {
    let range = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (first, _) = range.strip_prefix("bytes ")?.split_once('-')?;
    first.parse().ok()
}
