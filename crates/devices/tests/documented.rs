//! The table in docs/hostile-guests.md names tests: all of them exist.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::Path;

const DOCUMENT: &str = "docs/hostile-guests.md";

/// Whether there is a test function of this name in a source text.
fn has(source: &str, test: &str) -> bool {
    let definition = format!("fn {test}(");
    source.match_indices(&definition).any(|(at, _)| {
        // Its attributes: the lines before it that begin as such.
        let before = source[..at]
            .lines()
            .rev()
            .skip_while(|line| !line.starts_with("#[") && !line.trim_start().starts_with("#["));
        let mut attributes = before.take_while(|line| line.trim_start().starts_with("#["));
        attributes.any(|line| line.contains("test"))
    })
}

#[test]
fn every_test_named_in_the_table_of_hostile_guests_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let read = |file: &str| {
        let path = root.join(file);
        std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{DOCUMENT} names {file}: {e}"))
    };
    let document = read(DOCUMENT);
    // A row is `| class | tests | ... |`; tests are code: `file.rs::name`.
    let rows: Vec<_> = document
        .lines()
        .filter(|line| line.starts_with("| **"))
        .collect();
    assert_eq!(rows.len(), 13, "a row for each class");
    let mut names = 0;
    for (number, row) in (1..).zip(rows) {
        assert!(row.starts_with(&format!("| **{number}** ")), "{row}");
        let code: Vec<_> = row.split('`').skip(1).step_by(2).collect();
        let tests = code.iter().filter_map(|code| code.split_once(".rs::"));
        let mut of_row = 0;
        for (file, test) in tests {
            let file = format!("{file}.rs");
            assert!(has(&read(&file), test), "{file} has no test {test}");
            of_row += 1;
        }
        // What is not there yet is said to be so.
        assert!(of_row > 0 || row.contains("not yet"), "{row}");
        for target in code.iter().filter_map(|code| code.strip_prefix("fuzz ")) {
            read(&format!("fuzz/fuzz_targets/{target}.rs"));
        }
        names += of_row;
    }
    assert!(names >= 40, "{names} tests");
}

/// Every target is built, is run, and has its row in docs/fuzzing.md.
#[test]
fn every_fuzz_target_is_documented() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let document = std::fs::read_to_string(root.join("docs/fuzzing.md")).unwrap();
    let manifest = std::fs::read_to_string(root.join("fuzz/Cargo.toml")).unwrap();
    let mut targets = 0;
    for entry in std::fs::read_dir(root.join("fuzz/fuzz_targets")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert!(document.contains(&format!("| `{name}` |")), "{name}");
        assert!(
            manifest.contains(&format!("fuzz_targets/{name}.rs")),
            "{name}"
        );
        targets += 1;
    }
    assert_eq!(targets, document.matches("\n| `").count());
}
