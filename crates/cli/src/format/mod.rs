//! How lists and things are shown: tables for people, JSON and Go templates for scripts.
//!
//! A [`ListFormat`] is what `--format` of a list says; [`List`] shows rows so. A
//! [`Template`] is one of Go's, as far as scripts for Docker use them.

mod eval;
mod parse;

use std::{
    io::{self, Write},
    str::FromStr,
};

use anyhow::{Result, anyhow};
use serde_json::{Map, Value};

use crate::output;

/// A Go template (text/template).
#[derive(Debug, Clone)]
pub(crate) struct Template {
    text: String,
}

impl Template {
    /// What it says of a value.
    pub(crate) fn of(&self, value: &Value) -> Result<String> {
        let parsed = parse::parse(&self.text);
        let said = parsed.and_then(|nodes| eval::eval(&nodes, value));
        said.map_err(|e| anyhow!("--format {:?}: {e}", self.text))
    }

    /// The fields of `names` that it names, in its order.
    fn fields<'a>(&self, names: &'a [(&'a str, &'a str)]) -> Vec<&'a (&'a str, &'a str)> {
        let mut found: Vec<_> = names
            .iter()
            .filter_map(|name| Some((self.text.find(&format!(".{}", name.0))?, name)))
            .collect();
        found.sort_by_key(|(at, _)| *at);
        found.into_iter().map(|(_, name)| name).collect()
    }
}

impl FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        // On a command line they are written so.
        let text = text.replace("\\t", "\t").replace("\\n", "\n");
        parse::parse(&text)?;
        Ok(Self { text })
    }
}

/// What `--format` of a list says.
#[derive(Debug, Clone, Default)]
pub(crate) enum ListFormat {
    /// For people.
    #[default]
    Table,
    /// For programs: one JSON array.
    Json,
    /// A line for each, with a head above them if it is a table.
    Template { table: bool, template: Template },
}

impl FromStr for ListFormat {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let template = |table, text: &str| {
            let template = text.parse()?;
            Ok(Self::Template { table, template })
        };
        match text {
            "table" => Ok(Self::Table),
            "json" => Ok(Self::Json),
            _ => match text.strip_prefix("table ") {
                Some(text) => template(true, text),
                None if text.contains("{{") => template(false, text),
                None => Err(format!(
                    "{text:?} is no format; use table, json, '{{{{.Name}}}}' or 'table {{{{.Name}}}}'"
                )),
            },
        }
    }
}

/// A row, by the names that templates know its fields by.
pub(crate) type Row = Map<String, Value>;

/// A list of things of one kind.
pub(crate) struct List<'a> {
    /// Fields, and what a table calls them.
    pub(crate) fields: &'a [(&'a str, &'a str)],
    /// Those that a table has.
    pub(crate) columns: &'a [&'a str],
}

impl List<'_> {
    /// Shows rows; `json` says what of them is for programs.
    pub(crate) fn show(
        &self,
        format: &ListFormat,
        rows: &[Row],
        json: impl FnOnce() -> Result<Value>,
    ) -> Result<()> {
        let mut out = io::stdout().lock();
        self.write(&mut out, format, rows, json)
    }

    /// The same, elsewhere.
    pub(crate) fn write(
        &self,
        out: &mut impl Write,
        format: &ListFormat,
        rows: &[Row],
        json: impl FnOnce() -> Result<Value>,
    ) -> Result<()> {
        match format {
            ListFormat::Json => {
                serde_json::to_writer_pretty(&mut *out, &json()?)?;
                writeln!(out)?;
            }
            ListFormat::Table => {
                let cell = |row: &Row, name: &str| row.get(name).map(eval::shown);
                let cells = rows.iter().map(|row| {
                    let cells = self.columns.iter().map(|name| cell(row, name));
                    cells.map(Option::unwrap_or_default).collect()
                });
                let cells: Vec<Vec<String>> = cells.collect();
                let head = self.columns.iter().map(|name| self.head(name));
                output::write_columns(out, &head.collect::<Vec<_>>(), &cells)?;
            }
            ListFormat::Template { table, template } => {
                let lines = rows.iter().map(|row| template.of(&row.clone().into()));
                let lines: Vec<String> = lines.collect::<Result<_>>()?;
                if !table {
                    lines.iter().try_for_each(|line| writeln!(out, "{line}"))?;
                    return Ok(());
                }
                let head: Vec<_> = template.fields(self.fields).iter().map(|f| f.1).collect();
                let split = |line: &String| line.split('\t').map(str::to_owned).collect();
                let cells: Vec<Vec<String>> = lines.iter().map(split).collect();
                output::write_columns(out, &head, &cells)?;
            }
        }
        Ok(())
    }

    fn head(&self, name: &str) -> &str {
        let known = self.fields.iter().find(|(field, _)| *field == name);
        known.map_or("", |(_, head)| head)
    }
}

/// A row of what is written as JSON.
pub(crate) fn row(value: Value) -> Row {
    match value {
        Value::Object(map) => map,
        _ => Row::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn said(template: &str, value: Value) -> Result<String, String> {
        let template: Template = template.parse()?;
        template.of(&value).map_err(|e| format!("{e:#}"))
    }

    #[test]
    fn templates_say_what_go_says() {
        let value = || {
            json!({
                "Name": "web", "Count": 3, "Up": true, "None": null, "Empty": "",
                "List": ["a", "b"], "Map": {"k": "v", "n": {"deep": 1}}, "Nested": [{"A": 1}, {"A": 2}],
            })
        };
        for (template, want) in [
            ("{{.Name}}", "web"),
            ("a{{ .Name }}b", "awebb"),
            ("a {{- .Name -}} b", "awebb"),
            ("{{/* nothing */}}x", "x"),
            ("{{.Map.k}} {{.Map.n.deep}}", "v 1"),
            ("{{json .List}}", r#"["a","b"]"#),
            ("{{.Map.n | json}}", r#"{"deep":1}"#),
            (
                "{{.List}} {{.Map}} {{.None}}",
                "[a b] map[k:v n:map[deep:1]] <no value>",
            ),
            ("{{range .List}}<{{.}}>{{end}}", "<a><b>"),
            ("{{range $i, $e := .List}}{{$i}}={{$e}} {{end}}", "0=a 1=b "),
            ("{{range $k, $v := .Map}}{{$k}};{{end}}", "k;n;"),
            ("{{range .Nested}}{{.A}}{{$.Name}}{{end}}", "1web2web"),
            ("{{range .None}}x{{else}}none{{end}}", "none"),
            ("{{if .Empty}}a{{else if .Up}}b{{else}}c{{end}}", "b"),
            ("{{if and .Up (eq .Count 3)}}yes{{end}}", "yes"),
            ("{{if not .Up}}a{{else}}b{{end}}", "b"),
            ("{{with .Map}}{{.k}}{{end}}", "v"),
            ("{{index .Map \"k\"}}{{index .List 1}}", "vb"),
            ("{{(index .Nested 1).A}}", "2"),
            ("{{index .Map \"nope\"}}", "<no value>"),
            (
                "{{join .List \", \"}} {{upper .Name}} {{len .List}}",
                "a, b WEB 2",
            ),
            (
                "{{printf \"%-5s|%3d|%q\" .Name .Count .Name}}",
                "web  |  3|\"web\"",
            ),
            ("{{$x := .Name}}{{$x}}{{truncate $x 2}}", "webwe"),
            ("{{println .Name}}", "web\n"),
            ("{{.Name}}\\t{{.Count}}", "web\t3"),
            ("{{range split .Name \"e\"}}{{.}},{{end}}", "w,b,"),
            (
                "{{gt .Count 2}} {{le .Count 2}} {{ne .Name \"x\"}}",
                "true false true",
            ),
        ] {
            assert_eq!(said(template, value()).as_deref(), Ok(want), "{template}");
        }
        for (template, why) in [
            ("{{.Nmae}}", "there is no .Nmae; there are"),
            ("{{.Name", "not closed"),
            ("{{if .Up}}", "no {{end}}"),
            ("{{end}}", "no beginning"),
            ("{{}}", "says nothing"),
            ("{{jsn .Name}}", "no function jsn"),
            ("{{.Name .Count}}", "only functions"),
            ("{{(.Name}}", "has no )"),
            ("{{.Name)}}", "has no ("),
            ("{{$y}}", "undefined variable $y"),
            ("{{index .List 7}}", "out of range"),
            ("{{range .Name}}{{end}}", "can't iterate"),
            ("{{.Name.More}}", "has no .More"),
            ("{{\"x}}", "has no end"),
            ("{{printf \"%z\" .Name}}", "unknown %z"),
        ] {
            let said = said(template, value()).unwrap_err();
            assert!(said.contains(why), "{template}: {said}");
        }
        for deep in ["(", "{{if .Up}}"] {
            let text = match deep {
                "(" => format!("{{{{{}.Name", "(".repeat(10_000)) + "}}",
                _ => deep.repeat(10_000),
            };
            assert!(said(&text, value()).unwrap_err().contains("nested"));
        }
    }

    #[test]
    fn lists_are_shown_as_asked() {
        let list = List {
            fields: &[("ID", "CONTAINER ID"), ("Names", "NAMES"), ("Size", "SIZE")],
            columns: &["ID", "Names"],
        };
        let rows = [
            row(json!({"ID": "0123456789ab", "Names": "web", "Size": 1})),
            row(json!({"ID": "ba9876543210", "Names": "a-long-name", "Size": 2})),
        ];
        let shown = |format: &str| {
            let mut out = Vec::new();
            let format = format.parse().unwrap();
            let json = || Ok(json!([1]));
            list.write(&mut out, &format, &rows, json).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(
            shown("table"),
            "CONTAINER ID   NAMES\n0123456789ab   web\nba9876543210   a-long-name\n"
        );
        assert_eq!(
            shown("table {{.Names}}\\t{{.Size}}"),
            "NAMES         SIZE\nweb           1\na-long-name   2\n"
        );
        assert_eq!(shown("{{.Names}}={{.Size}}"), "web=1\na-long-name=2\n");
        assert_eq!(shown("json"), "[\n  1\n]\n");
        assert!("yaml".parse::<ListFormat>().is_err());
    }
}
