//! Keys that leave a container behind.

use std::str::FromStr;

/// A sequence of keys, as a terminal sends them; none, if it is empty.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct DetachKeys(Vec<u8>);

impl FromStr for DetachKeys {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let key = |word: &str| match word.as_bytes() {
            [one] if one.is_ascii_graphic() => Ok(*one),
            _ => match word.strip_prefix("ctrl-").map(str::as_bytes) {
                Some([c @ b'a'..=b'z']) => Ok(c - b'a' + 1),
                Some([c @ (b'@' | b'[' | b'\\' | b']' | b'^' | b'_')]) => Ok(c - b'@'),
                _ => Err(format!(
                    "{word:?} is no key; write keys as ctrl-p,ctrl-q or a"
                )),
            },
        };
        text.split(',').map(key).collect::<Result<_, _>>().map(Self)
    }
}

/// Looks for the keys in what is typed.
#[derive(Debug)]
pub(crate) struct Watch {
    keys: DetachKeys,
    /// How many of them have come.
    come: usize,
}

/// What of the input is to be passed on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// This much, and more may follow.
    Input(Vec<u8>),
    /// This much: then the keys came.
    Detached(Vec<u8>),
}

impl Watch {
    pub(crate) fn new(keys: DetachKeys) -> Self {
        Self { keys, come: 0 }
    }

    /// Takes what was typed. Keys that may be the beginning of the sequence are kept until
    /// it is known.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Seen {
        let keys = &self.keys.0;
        let mut input = Vec::with_capacity(bytes.len());
        for byte in bytes {
            if keys.get(self.come) == Some(byte) {
                self.come += 1;
                if self.come == keys.len() {
                    self.come = 0;
                    return Seen::Detached(input);
                }
                continue;
            }
            input.extend_from_slice(&keys[..self.come]);
            self.come = 0;
            if keys.first() == Some(byte) && keys.len() > 1 {
                self.come = 1;
            } else {
                input.push(*byte);
            }
        }
        Seen::Input(input)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read() {
        let keys = |text: &str| text.parse::<DetachKeys>().map(|k| k.0);
        assert_eq!(keys("ctrl-p,ctrl-q"), Ok(vec![16, 17]));
        assert_eq!(keys("ctrl-],x"), Ok(vec![29, b'x']));
        assert_eq!(keys(""), Ok(vec![]));
        for text in ["ctrl-", "ctrl-P", "xy", "a,,b", "ä"] {
            assert!(keys(text).is_err(), "{text}");
        }
    }

    #[test]
    fn they_are_found_and_nothing_is_lost() {
        let mut watch = Watch::new("ctrl-p,ctrl-q".parse().unwrap());
        assert_eq!(watch.take(b"ab"), Seen::Input(b"ab".into()));
        assert_eq!(watch.take(b"\x10"), Seen::Input(b"".into()));
        assert_eq!(watch.take(b"x"), Seen::Input(b"\x10x".into()));
        assert_eq!(watch.take(b"\x10\x10"), Seen::Input(b"\x10".into()));
        assert_eq!(watch.take(b"\x11more"), Seen::Detached(b"".into()));
        assert_eq!(watch.take(b"y\x10\x11"), Seen::Detached(b"y".into()));
        let mut none = Watch::new(DetachKeys::default());
        assert_eq!(none.take(b"\x10\x11"), Seen::Input(b"\x10\x11".into()));
        let mut one = Watch::new("x".parse().unwrap());
        assert_eq!(one.take(b"abx"), Seen::Detached(b"ab".into()));
    }
}
