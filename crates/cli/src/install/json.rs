//! Members of objects in a JSON text that is somebody's: what is not touched stays as it was
//! written.

use std::ops::Range;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// An object in a text.
#[derive(Debug)]
pub(super) struct Object<'a> {
    text: &'a str,
    members: Vec<Member>,
    /// Its opening and its closing brace.
    braces: Range<usize>,
}

#[derive(Debug)]
struct Member {
    name: String,
    /// From the name to the end of the value.
    whole: Range<usize>,
    value: usize,
}

impl<'a> Object<'a> {
    /// The one that a whole text is.
    pub(super) fn parse(text: &'a str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).context("it is not JSON")?;
        if !value.is_object() {
            bail!("it is no JSON object");
        }
        let start = text.find('{').unwrap_or_default();
        Self::at(text, start)
    }

    /// The one that begins at `start` of a text which has been parsed as JSON.
    fn at(text: &'a str, start: usize) -> Result<Self> {
        let odd = || anyhow::anyhow!("it is written in a way that is not understood");
        let bytes = text.as_bytes();
        let mut members = Vec::new();
        let mut at = skip(bytes, start + 1);
        while bytes.get(at) == Some(&b'"') {
            let name_end = end(bytes, at);
            let name = text.get(at..name_end).ok_or_else(odd)?;
            let value = skip(bytes, skip(bytes, name_end) + 1);
            let value_end = end(bytes, value);
            members.push(Member {
                name: serde_json::from_str(name).map_err(|_| odd())?,
                whole: at..value_end,
                value,
            });
            at = skip(bytes, value_end);
            if bytes.get(at) == Some(&b',') {
                at = skip(bytes, at + 1);
            }
        }
        match bytes.get(at) {
            Some(b'}') => Ok(Self {
                text,
                members,
                braces: start..at,
            }),
            _ => Err(odd()),
        }
    }

    fn position(&self, name: &str) -> Option<usize> {
        // Of several the last one counts, as for most readers.
        self.members.iter().rposition(|member| member.name == name)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.position(name).is_some()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// A member that is an object itself.
    pub(super) fn object(&self, name: &str) -> Result<Option<Object<'a>>> {
        let Some(member) = self.position(name).and_then(|n| self.members.get(n)) else {
            return Ok(None);
        };
        if self.text.as_bytes().get(member.value) != Some(&b'{') {
            bail!("{name:?} is no object; set the runtime up by hand");
        }
        Self::at(self.text, member.value).map(Some)
    }

    /// A member's value.
    pub(super) fn value(&self, name: &str) -> Option<Value> {
        let member = self.members.get(self.position(name)?)?;
        let text = self.text.get(member.value..member.whole.end)?;
        serde_json::from_str(text).ok()
    }

    /// The text with this as a member's value, where it was or after all others.
    pub(super) fn set(&self, name: &str, value: &Value) -> String {
        let (before, after, new);
        match self.position(name).and_then(|n| self.members.get(n)) {
            Some(member) => {
                new = self.written(value);
                (before, after) = (member.value, member.whole.end);
            }
            None => {
                let member = format!("{}: {}", Value::from(name), self.written(value));
                let break_ = self.line_break();
                match self.members.last() {
                    Some(last) => {
                        let between = if break_.is_empty() { " " } else { "" };
                        new = format!(",{between}{break_}{member}");
                        (before, after) = (last.whole.end, last.whole.end);
                    }
                    None => {
                        let outer = break_.strip_suffix(UNIT).unwrap_or(&break_);
                        new = format!("{break_}{member}{outer}");
                        (before, after) = (self.braces.start + 1, self.braces.end);
                    }
                }
            }
        }
        self.replaced(before..after, &new)
    }

    /// The text without a member.
    pub(super) fn without(&self, name: &str) -> String {
        let Some(n) = self.position(name) else {
            return self.text.to_owned();
        };
        let edge = |at: Option<usize>| at.and_then(|n| self.members.get(n)).map(|m| &m.whole);
        let range = match (edge(n.checked_sub(1)), edge(Some(n)), edge(Some(n + 1))) {
            (Some(before), Some(own), _) => before.end..own.end,
            (None, Some(own), Some(next)) => own.start..next.start,
            _ => self.braces.start + 1..self.braces.end,
        };
        self.replaced(range, "")
    }

    fn replaced(&self, range: Range<usize>, new: &str) -> String {
        let part = |range| self.text.get(range).unwrap_or_default();
        let (before, after) = (part(0..range.start), part(range.end..self.text.len()));
        format!("{before}{new}{after}")
    }

    /// What stands before each member: a line's end and the next one's indentation, if
    /// each has a line of its own.
    fn line_break(&self) -> String {
        let indentation = |at: usize| {
            let line = self.text.get(..at)?.rsplit('\n').next()?;
            line.trim().is_empty().then(|| line.to_owned())
        };
        match self.members.first() {
            Some(first) if first.whole.start > 0 => match indentation(first.whole.start) {
                Some(indent) if self.text.contains('\n') => format!("\n{indent}"),
                _ => String::new(),
            },
            // Indented further than the line that it begins in.
            _ => {
                let line = self.text.get(..self.braces.start).unwrap_or_default();
                let line = line.rsplit('\n').next().unwrap_or_default();
                let indent = line.len() - line.trim_start().len();
                let indent = line.get(..indent).unwrap_or_default();
                format!("\n{indent}{UNIT}")
            }
        }
    }

    /// A value as its neighbours are written.
    fn written(&self, value: &Value) -> String {
        let break_ = self.line_break();
        if break_.is_empty() {
            return value.to_string();
        }
        nested(value, &break_)
    }
}

const UNIT: &str = "    ";

fn nested(value: &Value, break_: &str) -> String {
    match value.as_object().filter(|object| !object.is_empty()) {
        None => value.to_string(),
        Some(object) => {
            let inner = format!("{break_}{UNIT}");
            let members: Vec<_> = object
                .iter()
                .map(|(name, value)| {
                    let name = Value::from(name.as_str());
                    format!("{inner}{name}: {}", nested(value, &inner))
                })
                .collect();
            format!("{{{}{break_}}}", members.join(","))
        }
    }
}

/// Past white space.
fn skip(bytes: &[u8], at: usize) -> usize {
    let rest = bytes.get(at..).unwrap_or_default();
    at + rest.iter().take_while(|b| b.is_ascii_whitespace()).count()
}

/// Past the value that begins at `at`.
fn end(bytes: &[u8], mut at: usize) -> usize {
    let mut depth = 0_usize;
    while let Some(byte) = bytes.get(at) {
        at += 1;
        match byte {
            b'"' => {
                while let Some(byte) = bytes.get(at) {
                    at += if *byte == b'\\' { 2 } else { 1 };
                    if *byte == b'"' {
                        break;
                    }
                }
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth > 0 => depth -= 1,
            _ if depth > 0 => continue,
            // A number or a word goes on to what cannot be of it.
            _ => {
                let more = |b: &&u8| b.is_ascii_alphanumeric() || b"+-.".contains(b);
                return at
                    + bytes
                        .get(at..)
                        .unwrap_or_default()
                        .iter()
                        .take_while(more)
                        .count();
            }
        }
        if depth == 0 {
            return at;
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const FILE: &str = r#"{
  "debug": true, "hosts": ["unix:///a", "b}\"{"],
  "log-opts": { "max-size": "1\\" },
  "max": -1.5e3
}
"#;

    #[test]
    fn members_are_found_whatever_is_in_them() {
        let file = Object::parse(FILE).unwrap();
        let names: Vec<_> = file.members.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["debug", "hosts", "log-opts", "max"]);
        assert_eq!(file.value("max"), Some(json!(-1500.0)));
        assert_eq!(file.value("hosts"), Some(json!(["unix:///a", "b}\"{"])));
        let inner = file.object("log-opts").unwrap().unwrap();
        assert_eq!(inner.value("max-size"), Some(json!("1\\")));
        assert!(file.object("none").unwrap().is_none());
        assert!(file.object("debug").is_err());
        for odd in ["", "[]", "{", "{} x", "3"] {
            assert!(Object::parse(odd).is_err(), "{odd}");
        }
    }

    #[test]
    fn what_is_added_can_be_taken_away_and_nothing_else_changes() {
        let value = json!({"x": {"path": "/p"}});
        for text in [
            FILE,
            "{}",
            "{\n}\n",
            "{\"a\":1}",
            "{\"a\": {}}\n",
            "{\n\t\"a\": 1\n}",
        ] {
            let with = Object::parse(text).unwrap().set("new", &value);
            let parsed: Value = serde_json::from_str(&with).unwrap();
            assert_eq!(parsed["new"], value, "{with}");
            let again = Object::parse(&with).unwrap().set("new", &value);
            let without = Object::parse(&again).unwrap().without("new");
            let empty = Object::parse(text).unwrap().is_empty();
            match empty {
                true => assert_eq!(without.trim(), "{}", "{text}"),
                false => assert_eq!(without, text),
            }
        }
        let with = Object::parse(FILE).unwrap().set("new", &value);
        assert!(
            with.ends_with("\"max\": -1.5e3,\n  \"new\": {\n      \"x\": {\n          \"path\": \"/p\"\n      }\n  }\n}\n"),
            "{with}"
        );
        let first = Object::parse(FILE).unwrap().without("debug");
        assert!(first.starts_with("{\n  \"hosts\""), "{first}");
    }
}
