//! What a fuzz target asks of the parsers.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a check fails by panicking"
)]

use super::{handshake::Line, packet::Header};

/// A line in pieces, cut where `cuts` say, is the line in one piece; and a port comes
/// only of `CONNECT`, blanks and digits.
pub fn handshake(text: &[u8], cuts: &[u8]) {
    let whole = Line::default().push(text);
    let mut line = Line::default();
    let (mut rest, mut taken) = (text, 0);
    let mut cuts = cuts.iter().map(|cut| usize::from(*cut)).cycle();
    let result = loop {
        let part = cuts.next().unwrap_or(1).clamp(1, 64).min(rest.len());
        match line.push(&rest[..part]) {
            Err(bad) => break Err(bad),
            Ok((n, port)) => {
                taken += n;
                rest = &rest[n..];
                if port.is_some() || rest.is_empty() {
                    break Ok((taken, port));
                }
                assert_eq!(n, part);
            }
        }
    };
    assert_eq!(whole, result);
    if let Ok((taken, Some(port))) = whole {
        let text = std::str::from_utf8(&text[..taken]).unwrap();
        let words: Vec<_> = text.split_ascii_whitespace().collect();
        assert!(words[0].eq_ignore_ascii_case("connect") && words.len() == 2);
        assert_eq!(
            words[1].trim_start_matches('0'),
            if port == 0 {
                String::new()
            } else {
                port.to_string()
            }
        );
    }
}

/// Every header survives the wire.
pub fn header(raw: &[u8; 44]) {
    assert_eq!(Header::parse(raw).encode(), *raw);
}
