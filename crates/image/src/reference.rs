//! Image names, parsed and shown as Docker does.
//!
//! Grammar and normalisation: distribution/reference. `nginx` stands for
//! `docker.io/library/nginx:latest`; a first component with a dot, a colon or
//! the word `localhost` is a registry.

use std::{fmt, net::IpAddr, str::FromStr};

use oci_client::Reference as OciReference;

use crate::{Digest, Error};

/// A normalised image reference: registry, repository, and a tag or a digest
/// or both. Displays in canonical form (`docker.io/library/nginx:latest`).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

const HUB: &str = "docker.io";
/// Longest input looked at; the grammar allows 255 + 128 + a digest.
const MAX_LEN: usize = 1024;

impl Reference {
    /// Registry host, with its port if it has one: `docker.io`, `localhost:5055`.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Repository within the registry: `library/nginx`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Tag; `latest` when the name had neither tag nor digest.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Digest, when the name is pinned to one.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Name without tag or digest, as people write it: `nginx`, `localhost:5055/walnut/demo`.
    #[must_use]
    pub fn familiar_name(&self) -> String {
        if self.registry != HUB {
            return format!("{}/{}", self.registry, self.repository);
        }
        match self.repository.strip_prefix("library/") {
            // Docker keeps `library/` when the rest would read as something else.
            Some(rest) if !rest.contains('/') => rest.to_owned(),
            _ => self.repository.clone(),
        }
    }

    /// The reference as people write it: `nginx:latest`.
    #[must_use]
    pub fn familiar(&self) -> String {
        self.suffixed(self.familiar_name())
    }

    /// Whether the registry is this host itself, where plain HTTP is used.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        let host = host_of(&self.registry);
        host == "localhost"
            || host.ends_with(".localhost")
            || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    fn suffixed(&self, mut name: String) -> String {
        if let Some(tag) = &self.tag {
            name.push(':');
            name.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            name.push('@');
            name.push_str(&digest.to_string());
        }
        name
    }

    /// The same for the registry client; a digest wins over the tag there.
    pub(crate) fn to_oci(&self) -> OciReference {
        match (&self.tag, &self.digest) {
            (_, Some(digest)) => OciReference::with_digest(
                self.registry.clone(),
                self.repository.clone(),
                digest.to_string(),
            ),
            (tag, None) => OciReference::with_tag(
                self.registry.clone(),
                self.repository.clone(),
                tag.clone().unwrap_or_else(|| "latest".to_owned()),
            ),
        }
    }
}

/// The host of `host`, `host:port` or `[v6]:port`.
pub(crate) fn host_of(registry: &str) -> &str {
    if let Some(rest) = registry.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    registry.split(':').next().unwrap_or(registry)
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(input: &str) -> Result<Self, Error> {
        let bad = |reason: &str| Error::Reference {
            input: input.chars().take(160).collect(),
            reason: reason.to_owned(),
        };
        if input.is_empty() {
            return Err(bad("it is empty"));
        }
        if input.len() > MAX_LEN {
            return Err(bad("it is longer than any name may be"));
        }
        if input.contains("://") {
            return Err(bad("leave out the scheme"));
        }
        if input.len() == 64
            && input
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        {
            return Err(bad("64 hex digits are an image ID, not a name"));
        }
        // An IPv6 registry is outside the parser's grammar: parsed with a
        // stand-in host of the same shape.
        if let Some(rest) = input.strip_prefix('[') {
            let (address, rest) = rest.split_once(']').ok_or_else(|| bad("it lacks a ]"))?;
            address
                .parse::<std::net::Ipv6Addr>()
                .map_err(|_| bad("what stands in [ ] is no IPv6 address"))?;
            let mut parsed: Self = format!("v6.invalid{rest}")
                .parse()
                .map_err(|_| bad("what follows the address is no repository"))?;
            let Some(port) = parsed.registry.strip_prefix("v6.invalid") else {
                return Err(bad("what follows the address is no repository"));
            };
            parsed.registry = format!("[{address}]{port}");
            return Ok(parsed);
        }
        let parsed = OciReference::try_from(input).map_err(|e| {
            let (name, _) = input.split_once('@').unwrap_or((input, ""));
            let path = name.rsplit_once(':').map_or(name, |(path, _)| path);
            if path.bytes().any(|b| b.is_ascii_uppercase()) {
                return bad("a repository name must be lowercase");
            }
            bad(&e.to_string())
        })?;
        let digest = parsed.digest().map(str::parse).transpose()?;
        Ok(Self {
            registry: parsed.registry().to_owned(),
            repository: parsed.repository().to_owned(),
            tag: parsed.tag().map(str::to_owned),
            digest,
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.suffixed(format!("{}/{}", self.registry, self.repository)))
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";

    #[test]
    fn names_normalise_as_docker_does() {
        let cases = [
            ("nginx", "docker.io/library/nginx:latest", "nginx:latest"),
            ("nginx:1.25", "docker.io/library/nginx:1.25", "nginx:1.25"),
            ("user/app", "docker.io/user/app:latest", "user/app:latest"),
            (
                "index.docker.io/nginx",
                "docker.io/library/nginx:latest",
                "nginx:latest",
            ),
            (
                "localhost:5055/walnut/demo:latest",
                "localhost:5055/walnut/demo:latest",
                "localhost:5055/walnut/demo:latest",
            ),
            (
                "localhost/demo",
                "localhost/demo:latest",
                "localhost/demo:latest",
            ),
            ("[::1]:5000/x:y", "[::1]:5000/x:y", "[::1]:5000/x:y"),
        ];
        for (input, canonical, familiar) in cases {
            let parsed: Reference = input.parse().unwrap();
            assert_eq!(parsed.to_string(), canonical);
            assert_eq!(parsed.familiar(), familiar);
            assert_eq!(canonical.parse::<Reference>().unwrap(), parsed);
            assert_eq!(familiar.parse::<Reference>().unwrap(), parsed);
        }
    }

    #[test]
    fn digests_pin_and_may_stand_beside_a_tag() {
        let pinned: Reference = format!("127.0.0.1:5055/x@{D}").parse().unwrap();
        assert_eq!(pinned.tag(), None);
        assert_eq!(pinned.digest().unwrap().to_string(), D);
        assert!(pinned.is_loopback());
        let both: Reference = format!("nginx:1.25@{D}").parse().unwrap();
        assert_eq!(both.tag(), Some("1.25"));
        assert_eq!(both.familiar(), format!("nginx:1.25@{D}"));
        assert_eq!(both.to_oci().tag(), None);
    }

    #[test]
    fn loopback_is_recognised() {
        for yes in [
            "localhost/a",
            "localhost:1/a",
            "127.0.0.1:1/a",
            "127.9.9.9:1/a",
            "[::1]:1/a",
        ] {
            assert!(yes.parse::<Reference>().unwrap().is_loopback(), "{yes}");
        }
        for no in [
            "nginx",
            "127.evil.com/a",
            "localhost.evil.com/a",
            "10.0.0.1:1/a",
        ] {
            assert!(!no.parse::<Reference>().unwrap().is_loopback(), "{no}");
        }
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let text = |input: &str| input.parse::<Reference>().unwrap_err().to_string();
        assert!(text("Nginx").contains("lowercase"));
        assert!(text("https://x.io/a").contains("scheme"));
        assert!(text(&"a".repeat(64)).contains("image ID"));
        assert!(text("nginx@sha256:12").contains("not an image reference"));
        assert!(text("").contains("empty"));
        assert!(text("a b").contains("invalid reference format"));
        assert!(text(&format!("x@sha512:{}", "0".repeat(128))).contains("only sha256"));
        for bad in [
            "../x", "a//b", ":tag", "@", "x:", "x@", "[::1/x", "[zz]:1/x", "[::1]",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }
}
