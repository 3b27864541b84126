//! Go templates: what they say of a value.

use std::cmp::Ordering;

use serde_json::Value;

use super::parse::{Base, Command, Node, Pipe, Range, Term};

/// Longest that may come of one template, bytes.
const OUTPUT_MAX: usize = 64 << 20;

/// What a template says of a value.
pub(super) fn eval(nodes: &[Node], dot: &Value) -> Result<String, String> {
    let mut state = State {
        root: dot,
        variables: Vec::new(),
        out: String::new(),
    };
    state.nodes(nodes, dot)?;
    Ok(state.out)
}

struct State<'a> {
    root: &'a Value,
    variables: Vec<(String, Value)>,
    out: String,
}

impl State<'_> {
    fn nodes(&mut self, nodes: &[Node], dot: &Value) -> Result<(), String> {
        let scope = self.variables.len();
        for node in nodes {
            match node {
                Node::Text(text) => self.out.push_str(text),
                Node::Show(pipe) => {
                    let value = self.pipe(pipe, dot)?;
                    self.out.push_str(&shown(&value));
                }
                Node::Set(name, pipe) => {
                    let value = self.pipe(pipe, dot)?;
                    self.variables.push((name.clone(), value));
                }
                Node::If(pipe, body, otherwise) => {
                    let value = self.pipe(pipe, dot)?;
                    self.nodes(if truth(&value) { body } else { otherwise }, dot)?;
                }
                Node::With(pipe, body, otherwise) => {
                    let value = self.pipe(pipe, dot)?;
                    match truth(&value) {
                        true => self.nodes(body, &value)?,
                        false => self.nodes(otherwise, dot)?,
                    }
                }
                Node::Range(range) => self.range(range, dot)?,
            }
            if self.out.len() > OUTPUT_MAX {
                return Err(format!("it says more than {OUTPUT_MAX} bytes"));
            }
        }
        self.variables.truncate(scope);
        Ok(())
    }

    fn range(&mut self, range: &Range, dot: &Value) -> Result<(), String> {
        let over = self.pipe(&range.over, dot)?;
        let items: Vec<(Value, Value)> = match over {
            Value::Array(items) => items
                .into_iter()
                .enumerate()
                .map(|(i, v)| (i.into(), v))
                .collect(),
            Value::Object(map) => map.into_iter().map(|(k, v)| (k.into(), v)).collect(),
            Value::Null => Vec::new(),
            other => return Err(format!("range can't iterate over {}", shown(&other))),
        };
        if items.is_empty() {
            return self.nodes(&range.otherwise, dot);
        }
        for (key, value) in items {
            let scope = self.variables.len();
            if let Some(name) = &range.key {
                self.variables.push((name.clone(), key));
            }
            if let Some(name) = &range.value {
                self.variables.push((name.clone(), value.clone()));
            }
            self.nodes(&range.body, &value)?;
            self.variables.truncate(scope);
        }
        Ok(())
    }

    fn pipe(&self, pipe: &Pipe, dot: &Value) -> Result<Value, String> {
        let mut last = None;
        for command in &pipe.0 {
            last = Some(self.command(command, dot, last)?);
        }
        last.ok_or_else(|| "a value is missing".into())
    }

    fn command(
        &self,
        command: &Command,
        dot: &Value,
        last: Option<Value>,
    ) -> Result<Value, String> {
        let [first, rest @ ..] = command.0.as_slice() else {
            return Err("a value is missing".into());
        };
        if let Term::Function(name) = first {
            let args = rest.iter().map(|term| self.term(term, dot));
            let mut args: Vec<Value> = args.collect::<Result<_, _>>()?;
            args.extend(last);
            return call(name, &args);
        }
        match (rest, last) {
            ([], None) => self.term(first, dot),
            _ => Err("a value is followed by another; only functions take arguments".into()),
        }
    }

    fn term(&self, term: &Term, dot: &Value) -> Result<Value, String> {
        match term {
            Term::Literal(value) => Ok(value.clone()),
            Term::Function(name) => call(name, &[]),
            Term::Path(base, names) => {
                let from = match base {
                    Base::Dot => dot.clone(),
                    Base::Variable(name) if name.is_empty() => self.root.clone(),
                    Base::Variable(name) => {
                        let known = self.variables.iter().rev().find(|(n, _)| n == name);
                        let (_, value) =
                            known.ok_or_else(|| format!("undefined variable ${name}"))?;
                        value.clone()
                    }
                    Base::Pipe(pipe) => self.pipe(pipe, dot)?,
                };
                names
                    .iter()
                    .try_fold(from, |value, name| field(value, name))
            }
        }
    }
}

/// A field, which must be there: a script with a slip is told so.
fn field(value: Value, name: &str) -> Result<Value, String> {
    match value {
        Value::Object(mut map) => match map.remove(name) {
            Some(value) => Ok(value),
            None => {
                let names: Vec<_> = map.keys().take(60).map(String::as_str).collect();
                Err(format!(
                    "there is no .{name}; there are {}",
                    names.join(", ")
                ))
            }
        },
        Value::Null => Err(format!(
            "nothing has a .{name}: what it is asked of is not set"
        )),
        other => Err(format!("{} has no .{name}", shown(&other))),
    }
}

/// Whether a value counts as true: not empty, as Go has it.
fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(yes) => *yes,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// A value as Go prints it.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Null => "<no value>".into(),
        Value::Bool(yes) => yes.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let items: Vec<_> = items.iter().map(shown).collect();
            format!("[{}]", items.join(" "))
        }
        Value::Object(map) => {
            let pairs: Vec<_> = map
                .iter()
                .map(|(key, value)| format!("{key}:{}", shown(value)))
                .collect();
            format!("map[{}]", pairs.join(" "))
        }
    }
}

fn call(name: &str, args: &[Value]) -> Result<Value, String> {
    let wrong = |usage: &str| format!("write it as {usage}");
    let text = |value: &Value| shown(value);
    Ok(match (name, args) {
        ("json", [value]) => serde_json::to_string(value)
            .map_err(|e| e.to_string())?
            .into(),
        ("lower", [value]) => text(value).to_lowercase().into(),
        ("upper", [value]) => text(value).to_uppercase().into(),
        ("title", [value]) => title(&text(value)).into(),
        ("join", [Value::Array(items), with]) => {
            let items: Vec<_> = items.iter().map(shown).collect();
            items.join(&text(with)).into()
        }
        ("split", [value, at]) => {
            let (value, at) = (text(value), text(at));
            value
                .split(at.as_str())
                .map(str::to_owned)
                .collect::<Vec<_>>()
                .into()
        }
        ("truncate", [value, Value::Number(len)]) => {
            let len = usize::try_from(len.as_u64().unwrap_or(0)).unwrap_or(usize::MAX);
            text(value).chars().take(len).collect::<String>().into()
        }
        ("len", [Value::Array(items)]) => items.len().into(),
        ("len", [Value::Object(map)]) => map.len().into(),
        ("len", [Value::String(text)]) => text.len().into(),
        ("index", [value, keys @ ..]) => keys.iter().try_fold(value.clone(), index)?,
        ("println", values) => format!("{}\n", printed(values)).into(),
        ("print", values) => printed(values).into(),
        ("printf", [Value::String(format), values @ ..]) => printf(format, values)?.into(),
        ("not", [value]) => (!truth(value)).into(),
        ("and", [first, rest @ ..]) => both(first, rest, false),
        ("or", [first, rest @ ..]) => both(first, rest, true),
        ("eq", [first, rest @ ..]) if !rest.is_empty() => {
            rest.iter().any(|other| same(first, other)).into()
        }
        ("ne", [a, b]) => (!same(a, b)).into(),
        ("lt", [a, b]) => (order(a, b)? == Ordering::Less).into(),
        ("le", [a, b]) => (order(a, b)? != Ordering::Greater).into(),
        ("gt", [a, b]) => (order(a, b)? == Ordering::Greater).into(),
        ("ge", [a, b]) => (order(a, b)? != Ordering::Less).into(),
        ("json" | "lower" | "upper" | "title" | "not" | "len", _) => {
            return Err(wrong(&format!("{{{{{name} .Field}}}}")));
        }
        ("join" | "split", _) => return Err(wrong(&format!("{{{{{name} .Field \",\"}}}}"))),
        ("truncate", _) => return Err(wrong("{{truncate .Field 12}}")),
        ("index", _) => return Err(wrong("{{index .Field \"key\"}}")),
        ("printf", _) => return Err(wrong("{{printf \"%s\" .Field}}")),
        ("eq" | "ne" | "lt" | "le" | "gt" | "ge" | "and" | "or", _) => {
            return Err(wrong(&format!("{{{{{name} .Field \"value\"}}}}")));
        }
        _ => {
            return Err(format!(
                "there is no function {name}; there are and, eq, ge, gt, index, join, json, le, len, lower, lt, ne, not, or, print, printf, println, split, title, truncate, upper"
            ));
        }
    })
}

fn both(first: &Value, rest: &[Value], wanted: bool) -> Value {
    let all = || std::iter::once(first).chain(rest);
    let found = all().find(|value| truth(value) == wanted);
    found.or(all().last()).cloned().unwrap_or_default()
}

fn title(text: &str) -> String {
    let mut start = true;
    let letter = |c: char| {
        let shown = if start {
            c.to_uppercase().collect()
        } else {
            c.to_string()
        };
        start = c.is_whitespace();
        shown
    };
    text.chars().map(letter).collect()
}

/// With a space between two that are no text, as Go has it.
fn printed(values: &[Value]) -> String {
    let mut out = String::new();
    for (at, value) in values.iter().enumerate() {
        let spaced = at > 0 && !value.is_string() && !values[at - 1].is_string();
        if spaced {
            out.push(' ');
        }
        out.push_str(&shown(value));
    }
    out
}

fn printf(format: &str, values: &[Value]) -> Result<String, String> {
    let mut values = values.iter();
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut spec: Vec<char> = Vec::new();
        let verb = loop {
            match chars.next() {
                Some(c @ ('0'..='9' | '-' | '.' | '+')) if spec.len() < 8 => spec.push(c),
                Some(c) => break c,
                None => return Err("printf: a % at the end".into()),
            }
        };
        if verb == '%' {
            out.push('%');
            continue;
        }
        let value = values.next().ok_or("printf: more % than values")?;
        let text = match verb {
            's' | 'v' | 'd' | 't' => shown(value),
            'q' => serde_json::to_string(&shown(value)).map_err(|e| e.to_string())?,
            'x' => match value.as_u64() {
                Some(number) => format!("{number:x}"),
                None => shown(value).bytes().map(|b| format!("{b:02x}")).collect(),
            },
            'f' => match value.as_f64() {
                Some(number) => format!("{number:.*}", precision(&spec).unwrap_or(6)),
                None => return Err(format!("printf: {} is no number", shown(value))),
            },
            other => {
                return Err(format!(
                    "printf: unknown %{other}; use %s %v %d %q %t %x %f"
                ));
            }
        };
        let spec: String = spec.into_iter().collect();
        let (left, width) = match spec.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, spec.as_str()),
        };
        let width = width.split('.').next().unwrap_or_default();
        let width = width.parse::<usize>().unwrap_or(0).min(1000);
        out.push_str(&match left {
            true => format!("{text:<width$}"),
            false => format!("{text:>width$}"),
        });
    }
    Ok(out)
}

fn precision(spec: &[char]) -> Option<usize> {
    let spec: String = spec.iter().collect();
    let (_, precision) = spec.split_once('.')?;
    Some(precision.parse::<usize>().ok()?.min(30))
}

fn index(value: Value, key: &Value) -> Result<Value, String> {
    match (value, key) {
        // As in Go, a key that is not there is no error.
        (Value::Object(mut map), Value::String(key)) => Ok(map.remove(key).unwrap_or_default()),
        (Value::Array(items), Value::Number(at)) => {
            let at = at.as_u64().and_then(|at| usize::try_from(at).ok());
            let len = items.len();
            at.and_then(|at| items.into_iter().nth(at))
                .ok_or_else(|| format!("index out of range: there are {len}"))
        }
        (value, key) => Err(format!("cannot index {} by {}", shown(&value), shown(key))),
    }
}

fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

fn order(a: &Value, b: &Value) -> Result<Ordering, String> {
    let order = match (a, b) {
        (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
        _ => match (a.as_f64(), b.as_f64()) {
            (Some(a), Some(b)) => a.partial_cmp(&b),
            _ => None,
        },
    };
    order.ok_or_else(|| format!("cannot compare {} and {}", shown(a), shown(b)))
}
