//! Pushing (OCI distribution-spec, "Pushing manifests" and "Pushing blobs"), to the first
//! host that may be sent to.

use bytes::Bytes;
use futures::stream::BoxStream;
use reqwest::{Method, Url, header::LOCATION};

use super::{
    Failure, Registry,
    endpoint::{Ask, Endpoint, Problem},
};
use crate::{Digest, manifest::Blob};

impl Registry {
    fn sent_to(&self, what: &str) -> Result<&Endpoint, Failure> {
        let found = self.endpoints.iter().find(|it| it.capabilities().push);
        found.ok_or_else(|| {
            let none = "no host in its hosts.toml has the capability \"push\"";
            self.failed(what, none.to_owned(), false)
        })
    }

    /// Whether the registry has a blob.
    pub(crate) async fn has(&self, digest: &Digest) -> Result<bool, Failure> {
        let what = format!("whether it has blob {digest}");
        let ask = Ask {
            method: &Method::HEAD,
            path: &format!("blobs/{digest}"),
            accept: &[],
            from: 0,
        };
        match self.sent_to(&what)?.send(ask).await {
            Ok(_) => Ok(true),
            Err(Problem::NotFound) => Ok(false),
            Err(problem) => Err(self.failure(&what, problem)),
        }
    }

    /// Sends a blob.
    pub(crate) async fn put_blob(
        &self,
        blob: &Blob,
        bytes: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> Result<(), Failure> {
        let what = format!("the end of the push of blob {}", blob.digest);
        let endpoint = self.sent_to(&what)?;
        let ask = Ask {
            method: &Method::POST,
            path: "blobs/uploads/",
            accept: &[],
            from: 0,
        };
        let begun = endpoint.send(ask).await;
        let begun = begun.map_err(|problem| self.failure(&what, problem))?;
        let place = begun
            .headers()
            .get(LOCATION)
            .and_then(|it| it.to_str().ok());
        let place = place.and_then(|place| endpoint.below("blobs/uploads/").join(place).ok());
        let place = place.filter(|place| may_follow(begun.url(), place));
        let Some(mut place) = place else {
            let reason = "it does not say where a blob is to be sent".to_owned();
            return Err(self.failed(&what, reason, false));
        };
        place
            .query_pairs_mut()
            .append_pair("digest", &blob.digest.to_string());
        let body = reqwest::Body::wrap_stream(bytes);
        let kind = "application/octet-stream";
        let sent = endpoint.put(place, kind, blob.size, body).await;
        sent.map(drop)
            .map_err(|problem| self.failure(&what, problem))
    }

    /// Sends the manifest that the name is to stand for.
    pub(crate) async fn put_manifest(&self, bytes: Vec<u8>, kind: &str) -> Result<(), Failure> {
        let what = format!("the end of the push of {}", self.reference.familiar());
        let endpoint = self.sent_to(&what)?;
        let tag = self.reference.tag().unwrap_or("latest");
        let name = self
            .reference
            .digest()
            .map_or_else(|| tag.to_owned(), ToString::to_string);
        let place = endpoint.below(&format!("manifests/{name}"));
        let length = bytes.len() as u64;
        let sent = endpoint.put(place, kind, length, bytes.into()).await;
        sent.map(drop)
            .map_err(|problem| self.failure(&what, problem))
    }
}

/// What was to go over TLS does not go without because an answer says so.
fn may_follow(asked: &Url, place: &Url) -> bool {
    place.scheme() == "https" || place.scheme() == "http" && asked.scheme() == "http"
}
