//! Amounts of memory as people write them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Bytes, written as Docker takes them: `512m`, `1.5GiB`, `1048576`. Units are powers of
/// 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
/// Larger numbers with a fraction are no memory of this world.
const WHOLE_MAX: f64 = 8192.0;

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let number = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift: u8 = match &lower[number.len()..] {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            unit => return Err(format!("unknown unit {unit:?}; use b, k, m, g or t")),
        };
        let bytes = match number.parse::<u64>() {
            Ok(whole) => whole.checked_mul(1_u64 << shift),
            Err(_) => number
                .parse::<f64>()
                .ok()
                .filter(|n| (0.0..WHOLE_MAX).contains(n))
                .and_then(|n| {
                    let bytes = n * 2_f64.powi(i32::from(shift));
                    format!("{bytes:.0}").parse().ok()
                }),
        };
        bytes
            .map(Self)
            .ok_or_else(|| format!("{text:?} is no size; write it as 512m or 2g"))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = |shift: u32| self.0 != 0 && self.0.trailing_zeros() >= shift;
        match UNITS.iter().find(|(_, shift)| exact(*shift)) {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes, or a size as \"512MiB\"")
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Bytes, E> {
                let bytes = u64::try_from(bytes);
                bytes.map(Bytes).map_err(|_| E::custom("a negative size"))
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Bytes, E> {
                text.parse().map_err(E::custom)
            }
        }
        from.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes, written) in [
            ("512m", 512 << 20, "512MiB"),
            ("1.5G", 3 << 29, "1536MiB"),
            ("8388608", 8 << 20, "8MiB"),
            ("64MiB", 64 << 20, "64MiB"),
            ("0.5t", 1 << 39, "512GiB"),
            ("7", 7, "7"),
            ("0", 0, "0"),
        ] {
            let size: Bytes = text.parse().unwrap();
            assert_eq!((size.0, size.to_string().as_str()), (bytes, written));
        }
        for text in [
            "",
            "-5g",
            "1x",
            "99999999999g",
            "nang",
            "1 g",
            "9000.5g",
            "ä",
        ] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }
}
