//! Rules which table of routes is looked at.

use walnut_protocol::agent::{Range, Rule};

use super::{Ip, Refused, family, flags, invalid};
use crate::netlink::Message;

// linux/fib_rules.h
const FRA_DST: u16 = 1;
const FRA_SRC: u16 = 2;
const FRA_IIFNAME: u16 = 3;
const FRA_GOTO: u16 = 4;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_OIFNAME: u16 = 17;
const FRA_UID_RANGE: u16 = 20;
const FRA_IP_PROTO: u16 = 22;
const FRA_SPORT_RANGE: u16 = 23;
const FRA_DPORT_RANGE: u16 = 24;
const FIB_RULE_INVERT: u32 = 2;

/// The rule, for an error.
pub(super) fn shown(attempt: &str, rule: &Rule) -> String {
    format!("{attempt} the rule of priority {}", rule.priority)
}

/// A request of this kind that is about the rule.
pub(super) fn message(kind: u16, rule: &Rule) -> Result<Message, Refused> {
    let own = if rule.ipv6 {
        libc::AF_INET6
    } else {
        libc::AF_INET
    };
    let own = u8::try_from(own).unwrap_or(0);
    let prefix = |ip: &[u8], prefix: u32| match ip.is_empty() {
        true => Ok(0),
        false => match family(ip, prefix)? {
            (family, prefix) if family == own => Ok(prefix),
            _ => invalid(format!("{} is not of the rule's family", Ip(ip))),
        },
    };
    let byte = |what: &str, number: u32| {
        u8::try_from(number).or_else(|_| invalid(format!("{number} is no {what}")))
    };
    // struct fib_rule_hdr; the table is below.
    let mut body = vec![
        own,
        prefix(&rule.destination, rule.destination_prefix)?,
        prefix(&rule.source, rule.source_prefix)?,
        byte("type of service", rule.tos)?,
        0,
        0,
        0,
        byte("action of a rule", rule.action)?,
    ];
    body.extend(if rule.invert { FIB_RULE_INVERT } else { 0 }.to_ne_bytes());
    let mut message = Message::new(kind, flags(kind), &body)
        .with(FRA_DST, &rule.destination)
        .with(FRA_SRC, &rule.source)
        .with(FRA_IIFNAME, &name(&rule.incoming)?)
        .with(FRA_OIFNAME, &name(&rule.outgoing)?)
        .with(FRA_PRIORITY, &rule.priority.to_ne_bytes())
        .with(FRA_SPORT_RANGE, &ports(rule.source_ports.as_ref())?)
        .with(FRA_DPORT_RANGE, &ports(rule.destination_ports.as_ref())?);
    if rule.table > 0 {
        message = message.with(FRA_TABLE, &rule.table.to_ne_bytes());
    }
    if rule.target > 0 {
        message = message.with(FRA_GOTO, &rule.target.to_ne_bytes());
    }
    if rule.mask > 0 {
        message = message
            .with(FRA_FWMARK, &rule.mark.to_ne_bytes())
            .with(FRA_FWMASK, &rule.mask.to_ne_bytes());
    }
    if rule.protocol > 0 {
        message = message.with(FRA_IP_PROTO, &[byte("IP protocol", rule.protocol)?]);
    }
    if let Some(bits) = rule.suppress_prefix.checked_sub(1) {
        message = message.with(FRA_SUPPRESS_PREFIXLEN, &bits.to_ne_bytes());
    }
    if let Some(users) = rule.users.as_ref() {
        let range = [users.first, users.last].map(u32::to_ne_bytes);
        message = message.with(FRA_UID_RANGE, range.as_flattened());
    }
    Ok(message)
}

/// An interface's name with a zero at its end; empty for none.
fn name(name: &str) -> Result<Vec<u8>, Refused> {
    match name.len() {
        0 => Ok(Vec::new()),
        1..=15 if !name.contains('\0') => Ok(name.bytes().chain([0]).collect()),
        _ => invalid(format!("{name:?} is no name of an interface")),
    }
}

fn ports(range: Option<&Range>) -> Result<Vec<u8>, Refused> {
    let Some(range) = range else {
        return Ok(Vec::new());
    };
    match (u16::try_from(range.first), u16::try_from(range.last)) {
        (Ok(first), Ok(last)) => Ok([first, last].map(u16::to_ne_bytes).concat()),
        _ => invalid(format!("{}-{} are no ports", range.first, range.last)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_rules_are_refused_with_a_sentence() {
        let refused = |change: fn(&mut Rule)| {
            let mut rule = Rule::default();
            change(&mut rule);
            message(32, &rule).unwrap_err().to_string()
        };
        assert!(message(32, &Rule::default()).is_ok());
        assert!(refused(|r| r.source = vec![0; 16]).contains("not of the rule's family"));
        assert!(refused(|r| r.action = 256).contains("256 is no action"));
        assert!(refused(|r| r.incoming = "x".repeat(16)).contains("no name"));
        let wide = |r: &mut Rule| {
            r.source_ports = Some(Range {
                first: 1,
                last: 65_536,
                ..Default::default()
            })
            .into();
        };
        assert!(refused(wide).contains("1-65536 are no ports"));
        let long = |r: &mut Rule| (r.destination, r.destination_prefix) = (vec![0; 4], 33);
        assert!(refused(long).contains("0.0.0.0/33"));
    }
}
