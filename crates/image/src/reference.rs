//! Image names, parsed and shown as Docker does.
//!
//! Grammar and normalisation: distribution/reference. `nginx` stands for
//! `docker.io/library/nginx:latest`; a first component with a dot, a colon or
//! the word `localhost` is a registry.

use std::{fmt, net::IpAddr, str::FromStr};

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
/// The name by which it is spoken to, and under which logins are kept for it.
const HUB_ADDRESS: &str = "index.docker.io";
/// Longest input looked at; the grammar allows 255 + 128 + a digest.
const MAX_LEN: usize = 1024;
/// Of registry and repository together, of a tag, and the fewest digits of a digest.
const NAME_MAX: usize = 255;
const TAG_MAX: usize = 128;
const HEX_MIN: usize = 32;

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

    /// Where the registry answers.
    pub(crate) fn address(&self) -> &str {
        match self.registry.as_str() {
            HUB => HUB_ADDRESS,
            other => other,
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
        parse(input).ok_or_else(|| {
            let (name, _) = input.split_once('@').unwrap_or((input, ""));
            let path = name.rsplit_once(':').map_or(name, |(path, _)| path);
            if input.starts_with('[') {
                return bad("what stands in [ ] is no IPv6 address, or no repository follows it");
            }
            if path.bytes().any(|b| b.is_ascii_uppercase()) {
                return bad("a repository name must be lowercase");
            }
            bad("invalid reference format")
        })?
    }
}

/// `name [":" tag] ["@" digest]`. The error in it is a digest's own.
///
/// Read by hand: the expression that libraries match it with takes 20 ms to compile, more
/// than all that a command does besides.
fn parse(input: &str) -> Option<Result<Reference, Error>> {
    let (rest, digest) = match input.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (input, None),
    };
    // A colon after the last slash is a tag's; another is a port's.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains(['/', ']']) => (name, Some(tag)),
        _ => (rest, None),
    };
    if !tag.is_none_or(is_tag) || !digest.is_none_or(is_digest) || name.len() > NAME_MAX {
        return None;
    }
    let (registry, path) = match name.split_once('/') {
        Some((first, path)) if names_registry(first) => (first, path),
        _ => (HUB, name),
    };
    if !is_registry(registry) || !path.split('/').all(is_component) {
        return None;
    }
    let (registry, path) = match registry {
        HUB | HUB_ADDRESS if !path.contains('/') => (HUB, format!("library/{path}")),
        HUB_ADDRESS => (HUB, path.to_owned()),
        other => (other, path.to_owned()),
    };
    let digest = match digest.map(str::parse).transpose() {
        Ok(digest) => digest,
        Err(e) => return Some(Err(e)),
    };
    let tag = match (tag, &digest) {
        (None, None) => Some("latest"),
        (tag, _) => tag,
    };
    Some(Ok(Reference {
        registry: registry.to_owned(),
        repository: path,
        tag: tag.map(str::to_owned),
        digest,
    }))
}

/// Whether a first component is a registry and no part of a path.
fn names_registry(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':', '['])
        || first.bytes().any(|b| b.is_ascii_uppercase())
}

/// `host [":" port]`, where an IPv6 address stands in brackets.
fn is_registry(registry: &str) -> bool {
    let port = |port: &str| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    if let Some(rest) = registry.strip_prefix('[') {
        let Some((address, rest)) = rest.split_once(']') else {
            return false;
        };
        return address.parse::<std::net::Ipv6Addr>().is_ok()
            && (rest.is_empty() || rest.strip_prefix(':').is_some_and(port));
    }
    let (host, rest) = match registry.split_once(':') {
        Some((host, rest)) => (host, Some(rest)),
        None => (registry, None),
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    host.split('.').all(label) && rest.is_none_or(port)
}

/// Lowercase letters and digits, between which may stand one of `.`, `_`, `__` or any
/// number of `-`.
fn is_component(component: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    word(first)
        && word(last)
        && bytes.chunk_by(|a, b| word(*a) == word(*b)).all(|part| {
            word(part[0]) || matches!(part, b"." | b"_" | b"__") || part.iter().all(|&b| b == b'-')
        })
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= TAG_MAX
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'))
}

/// `algorithm ":" hex`, of any algorithm.
fn is_digest(digest: &str) -> bool {
    let Some((algorithm, hex)) = digest.split_once(':') else {
        return false;
    };
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphabetic())
            && part.bytes().all(|b| b.is_ascii_alphanumeric())
    };
    algorithm.split(['-', '_', '+', '.']).all(part)
        && hex.len() >= HEX_MIN
        && hex.bytes().all(|b| b.is_ascii_hexdigit())
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
    use oci_client::Reference as OciReference;

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

    /// The registry client's own parser: the same grammar, but for IPv6.
    #[test]
    fn the_grammar_is_everybodys() {
        let pieces = [
            "a",
            "Z",
            "0",
            "a1",
            "localhost",
            "docker.io",
            "index.docker.io",
            "x.y",
            ":",
            "/",
            "@",
            "-",
            "--",
            "_",
            "__",
            "___",
            ".",
            "..",
            "5000",
            "latest",
            "library",
            "sha256:",
            D,
            "é",
            " ",
            "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        ];
        // Every sequence of up to three pieces, and then many of more.
        let mut inputs = vec![String::new()];
        for length in 0..3 {
            let longest: Vec<_> = inputs
                .iter()
                .rev()
                .take(pieces.len().pow(length))
                .cloned()
                .collect();
            for start in longest {
                inputs.extend(pieces.iter().map(|piece| format!("{start}{piece}")));
            }
        }
        let mut state = 1_u64;
        for _ in 0..20_000 {
            let mut input = String::new();
            for _ in 0..4 + state % 7 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let at = usize::try_from(state >> 40).unwrap() % pieces.len();
                input.push_str(pieces[at]);
            }
            inputs.push(input);
        }
        let mut good = 0;
        for input in inputs {
            if !input.is_ascii() {
                // Theirs lets a tag be of any script; Docker's does not.
                assert!(parse(&input).is_none(), "{input}");
                continue;
            }
            if input
                .split_once('/')
                .is_some_and(|(first, _)| first.contains('Z'))
            {
                // A registry to Docker, and to them only if it has a dot.
                continue;
            }
            let theirs = OciReference::try_from(input.as_str()).ok();
            match (theirs, parse(&input)) {
                (None, None | Some(Err(_))) => {}
                // They take for a registry what can be no host.
                (Some(theirs), None) if !is_registry(theirs.registry()) => {}
                (Some(theirs), Some(Ok(ours))) => {
                    good += 1;
                    assert_eq!(ours.registry(), theirs.registry(), "{input}");
                    assert_eq!(ours.repository(), theirs.repository(), "{input}");
                    assert_eq!(ours.tag(), theirs.tag(), "{input}");
                }
                (Some(theirs), Some(Err(_))) => {
                    // Of an algorithm or a length that images do not have.
                    assert!(
                        theirs.digest().unwrap().parse::<Digest>().is_err(),
                        "{input}"
                    );
                }
                (theirs, ours) => panic!("{input:?}: {theirs:?}, {ours:?}"),
            }
        }
        assert!(good > 1000, "{good}");
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
