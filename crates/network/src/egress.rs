//! What a guest may send: rules that the host applies to every frame that leaves a tap.

use std::{fmt, net::IpAddr, ops::RangeInclusive, str::FromStr};

use ipnet::IpNet;

/// Rules of one list at most.
pub const RULES_MAX: usize = 128;

/// Rules in their order: the first that a packet fits decides. The last one fits all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    rules: Vec<Rule>,
    /// Of what no rule fits.
    otherwise: Verdict,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is sent.
    Allow,
    /// It is dropped.
    Deny,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) verdict: Verdict,
    /// Where packets are sent; anywhere if there is none.
    pub(crate) to: Option<IpNet>,
    pub(crate) protocol: Option<Protocol>,
    /// Ports that they are sent to.
    pub(crate) ports: Option<RangeInclusive<u16>>,
}

/// What is above IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
    Sctp,
    /// ICMP, or ICMPv6.
    Icmp,
}

impl Protocol {
    const ALL: [(&str, Self); 4] = [
        ("tcp", Self::Tcp),
        ("udp", Self::Udp),
        ("sctp", Self::Sctp),
        ("icmp", Self::Icmp),
    ];

    /// Its number in IPv4 and in IPv6.
    pub(crate) fn numbers(self) -> (i32, i32) {
        match self {
            Self::Tcp => (libc::IPPROTO_TCP, libc::IPPROTO_TCP),
            Self::Udp => (libc::IPPROTO_UDP, libc::IPPROTO_UDP),
            Self::Sctp => (libc::IPPROTO_SCTP, libc::IPPROTO_SCTP),
            Self::Icmp => (libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6),
        }
    }
}

impl Rules {
    /// Rules as people write them, one each: `allow` or `deny`, then `all`, an address or
    /// a network, then, if wanted, `tcp`, `udp`, `sctp` (each with `:PORT` or `:FROM-TO` if
    /// wanted) or `icmp`. The last one is `allow all` or `deny all`.
    ///
    /// # Errors
    /// A sentence about what is wrong, with the rule.
    pub fn parse<T: AsRef<str>>(rules: &[T]) -> Result<Self, String> {
        let Some((last, rules)) = rules.split_last() else {
            return Err(
                "there is no rule; the last one must be \"allow all\" or \"deny all\"".into(),
            );
        };
        let otherwise = match last.as_ref().parse()? {
            Rule {
                verdict,
                to: None,
                protocol: None,
                ports: None,
            } => verdict,
            _ => {
                return Err(format!(
                    "the last rule must be \"allow all\" or \"deny all\", and it is {:?}",
                    last.as_ref()
                ));
            }
        };
        if rules.len() >= RULES_MAX {
            return Err(format!(
                "there are {} rules; {RULES_MAX} can be",
                rules.len() + 1
            ));
        }
        let rules = rules.iter().map(|rule| rule.as_ref().parse());
        Ok(Self {
            rules: rules.collect::<Result<_, _>>()?,
            otherwise,
        })
    }

    /// Everything is allowed but what is sent to these addresses.
    pub fn deny(addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let deny = |address| Rule {
            verdict: Verdict::Deny,
            to: Some(IpNet::from(address)),
            protocol: None,
            ports: None,
        };
        Self {
            rules: addresses.into_iter().map(deny).collect(),
            otherwise: Verdict::Allow,
        }
    }

    /// The rules as people write them.
    pub fn to_texts(&self) -> Vec<String> {
        let rules = self.rules.iter().map(Rule::to_string);
        rules.chain([format!("{} all", self.otherwise)]).collect()
    }

    /// Everything is allowed.
    pub fn is_open(&self) -> bool {
        self.otherwise == Verdict::Allow && self.rules.iter().all(|r| r.verdict == Verdict::Allow)
    }

    pub(crate) fn rules(&self) -> &[Rule] {
        &self.rules
    }

    pub(crate) fn otherwise(&self) -> Verdict {
        self.otherwise
    }

    /// The networks that are denied, if that is all that the rules say.
    pub(crate) fn denied(&self) -> Option<Vec<IpNet>> {
        if self.otherwise != Verdict::Allow {
            return None;
        }
        let denied = |rule: &Rule| match rule {
            Rule {
                verdict: Verdict::Deny,
                to: Some(to),
                protocol: None,
                ports: None,
            } => Some(*to),
            _ => None,
        };
        self.rules.iter().map(denied).collect()
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            format!(
                "the rule {text:?}: {why}; one reads \"allow|deny all|NETWORK [tcp|udp|sctp[:PORT[-PORT]]|icmp]\""
            )
        };
        let mut words = text.split_whitespace();
        let verdict = match words.next() {
            Some("allow") => Verdict::Allow,
            Some("deny") => Verdict::Deny,
            _ => return Err(wrong("it neither allows nor denies")),
        };
        let to = match words.next() {
            None => return Err(wrong("it does not say what")),
            Some("all") => None,
            Some(network) => {
                let address = network.parse::<IpAddr>().map(IpNet::from);
                let network = address.or_else(|_| network.parse::<IpNet>());
                let network = network.map_err(|_| wrong("that is no network"))?;
                if network != network.trunc() {
                    return Err(wrong(
                        "an address of the network has bits beyond its prefix",
                    ));
                }
                Some(network)
            }
        };
        let (mut protocol, mut ports) = (None, None);
        if let Some(word) = words.next() {
            let (name, numbers) = match word.split_once(':') {
                Some((name, numbers)) => (name, Some(numbers)),
                None => (word, None),
            };
            let found = Protocol::ALL.iter().find(|(known, _)| *known == name);
            let (_, found) = found.ok_or_else(|| wrong("that is no protocol it knows"))?;
            protocol = Some(*found);
            if let Some(numbers) = numbers {
                if *found == Protocol::Icmp {
                    return Err(wrong("ICMP has no ports"));
                }
                ports = Some(range(numbers).ok_or_else(|| wrong("those are no ports"))?);
            }
        }
        match words.next() {
            Some(_) => Err(wrong("it is too long")),
            None => Ok(Self {
                verdict,
                to,
                protocol,
                ports,
            }),
        }
    }
}

/// `PORT` or `FROM-TO`.
fn range(text: &str) -> Option<RangeInclusive<u16>> {
    let (from, to) = text.split_once('-').unwrap_or((text, text));
    let (from, to) = (from.parse().ok()?, to.parse().ok()?);
    (0 < from && from <= to).then_some(from..=to)
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.verdict)?;
        match self.to {
            None => f.write_str("all")?,
            Some(to) if to.prefix_len() == to.max_prefix_len() => write!(f, "{}", to.addr())?,
            Some(to) => write!(f, "{to}")?,
        }
        let Some(protocol) = self.protocol else {
            return Ok(());
        };
        let name = Protocol::ALL.iter().find(|(_, known)| *known == protocol);
        write!(f, " {}", name.map_or("", |(name, _)| name))?;
        match &self.ports {
            None => Ok(()),
            Some(ports) if ports.start() == ports.end() => write!(f, ":{}", ports.start()),
            Some(ports) => write!(f, ":{}-{}", ports.start(), ports.end()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_they_are_written() {
        let all = [
            "allow 10.0.0.0/8 tcp:443",
            "deny 169.254.169.254",
            "allow fd00::/8 udp:53-55",
            "deny all icmp",
            "allow ::1 sctp",
        ];
        let last = ["deny all"];
        let rules = Rules::parse(&[&all[..], &last].concat()).unwrap();
        assert_eq!(rules.to_texts(), [&all[..], &last].concat());
        assert_eq!(rules.otherwise(), Verdict::Deny);
        assert!(!rules.is_open() && rules.denied().is_none());
        let open = Rules::parse(&["allow 1.2.3.4", "allow all"]).unwrap();
        assert!(open.is_open());
        let some = Rules::parse(&["deny 1.2.3.4", "deny fd00::/8", "allow all"]).unwrap();
        assert_eq!(some.denied().unwrap().len(), 2);
    }

    #[test]
    fn what_is_no_rule_is_said() {
        for (rule, why) in [
            ("", "neither"),
            ("permit all", "neither"),
            ("allow", "what"),
            ("allow 10.0.0.0/40", "no network"),
            ("allow example.org", "no network"),
            ("allow 10.0.0.1/8", "beyond its prefix"),
            ("allow all gre", "no protocol"),
            ("allow all tcp:", "no ports"),
            ("allow all tcp:0", "no ports"),
            ("allow all tcp:9-8", "no ports"),
            ("allow all tcp:65536", "no ports"),
            ("allow all icmp:8", "no ports"),
            ("allow all tcp:1 x", "too long"),
        ] {
            let said = Rules::parse(&[rule, "deny all"]).unwrap_err();
            assert!(said.contains(why), "{rule}: {said}");
        }
        assert!(Rules::parse::<&str>(&[]).unwrap_err().contains("no rule"));
        let said = Rules::parse(&["allow 10.0.0.0/8"]).unwrap_err();
        assert!(said.contains("last rule"), "{said}");
        let many = vec!["deny all"; RULES_MAX + 1];
        assert!(Rules::parse(&many).unwrap_err().contains("128"));
        assert!(Rules::parse(&many[1..]).is_ok());
    }
}
