//! Tables for people, JSON for programs.

use std::io::{self, Write};

use serde::Serialize;

/// Prints rows in aligned columns; the last one is not padded.
pub(crate) fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> io::Result<()> {
    write_table(&mut io::stdout().lock(), head, rows)
}

/// Writes rows in aligned columns.
pub(crate) fn write_table<const N: usize>(
    out: &mut impl Write,
    head: [&str; N],
    rows: &[[String; N]],
) -> io::Result<()> {
    let rows: Vec<_> = rows.iter().map(|row| row.to_vec()).collect();
    write_columns(out, &head, &rows)
}

/// Writes rows in aligned columns, however many there are; the last one is not padded.
pub(crate) fn write_columns(
    out: &mut impl Write,
    head: &[&str],
    rows: &[Vec<String>],
) -> io::Result<()> {
    let columns = rows.iter().map(Vec::len).chain([head.len()]).max();
    let columns = columns.unwrap_or(0);
    let cell = |row: &[String], column: usize| row.get(column).map_or(0, |c| c.chars().count());
    let width = |column: usize| {
        let head = head.get(column).map_or(0, |h| h.chars().count());
        let cells = rows.iter().map(|row| cell(row, column));
        cells.chain([head]).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut line = |cells: &[&str]| {
        for (column, cell) in cells.iter().enumerate() {
            match widths.get(column) {
                Some(width) if column + 1 < cells.len() => write!(out, "{cell:width$}   ")?,
                _ => write!(out, "{cell}")?,
            }
        }
        writeln!(out)
    };
    line(head)?;
    for row in rows {
        line(&row.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Prints a value as indented JSON.
pub(crate) fn json(value: &impl Serialize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)
}

/// Bytes for people, in powers of 1000 as Docker shows images.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [(u64, &str); 4] = [
        (1_000_000_000_000, "TB"),
        (1_000_000_000, "GB"),
        (1_000_000, "MB"),
        (1_000, "kB"),
    ];
    for (unit, name) in UNITS {
        if n >= unit {
            let tenths = n / (unit / 10);
            return format!("{}.{} {name}", tenths / 10, tenths % 10);
        }
    }
    format!("{n} B")
}

/// Bytes for people, in powers of 1024 as Docker shows memory.
pub(crate) fn binary(n: u64) -> String {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (shift, name) in UNITS {
        if n >> shift > 0 {
            // A tenth of the unit is no whole number of bytes.
            let tenths = (u128::from(n) * 10) >> shift;
            return format!("{}.{}{name}", tenths / 10, tenths % 10);
        }
    }
    format!("{n}B")
}

/// How long ago `then` was, both in nanoseconds since the epoch.
pub(crate) fn ago(then: i64, now: i64) -> String {
    let seconds = now.saturating_sub(then) / 1_000_000_000;
    let (count, unit) = match seconds {
        ..60 => (seconds.max(0), "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

/// A moment for people, of nanoseconds since the epoch: in UTC, to the second.
pub(crate) fn time(ns: i64) -> String {
    let time = chrono::DateTime::from_timestamp_nanos(ns);
    time.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_numbers() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(123_456_789), "123.4 MB");
        assert_eq!(binary(1023), "1023B");
        assert_eq!(binary(1536), "1.5KiB");
        assert_eq!(binary((3 << 30) + (1 << 29)), "3.5GiB");
        assert_eq!(binary(u64::MAX), "16777215.9TiB");
        assert_eq!(ago(0, 61_000_000_000), "1 minute");
        assert_eq!(ago(10, 0), "0 seconds");
    }
}
