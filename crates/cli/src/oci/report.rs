//! What went wrong, for whoever called.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
};

use chrono::{SecondsFormat, Utc};
use serde_json::json;

use super::args::{Global, LogFormat};

/// Says it on the standard error, and in the log if there is one.
pub(super) fn report(global: &Global, error: &anyhow::Error) {
    let text = format!("{error:#}");
    // Nobody may be listening.
    let _ = writeln!(io::stderr(), "{text}");
    if let Some(path) = &global.log {
        let line = line(global.log_format, &text);
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o644)
            .open(path);
        let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
        if let Err(e) = written {
            let _ = writeln!(io::stderr(), "write the log {}: {e}", path.display());
        }
    }
}

/// One line, as logrus writes it.
fn line(format: LogFormat, text: &str) -> String {
    let time = Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true);
    match format {
        LogFormat::Json => {
            format!("{}\n", json!({"level": "error", "msg": text, "time": time}))
        }
        LogFormat::Text => format!("time=\"{time}\" level=error msg={text:?}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_back() {
        let json = line(LogFormat::Json, "a \"b\"");
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(
            (&json["level"], &json["msg"]),
            (&"error".into(), &"a \"b\"".into())
        );
        let text = line(LogFormat::Text, "a \"b\"");
        assert!(
            text.ends_with("level=error msg=\"a \\\"b\\\"\"\n"),
            "{text}"
        );
    }
}
