//! Supervisors that are replaced by other programs.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::client::{finish, repository};

/// A shim that is another one than the built: by a byte behind its end. Its name is `mark`.
pub fn another_shim(dir: &Path, mark: &str) -> PathBuf {
    let built = repository().join("out/lib/walnut/containerd-shim-walnut-v2");
    let (new, shim) = (dir.join(format!("{mark}.new")), dir.join(mark));
    fs::copy(built, &new).expect("copy the shim");
    let mut file = OpenOptions::new()
        .append(true)
        .open(&new)
        .expect("open the copy");
    file.write_all(mark.as_bytes()).expect("change the copy");
    drop(file);
    // As an installation does: a program that runs is not written to.
    fs::rename(&new, &shim).expect("put it in place");
    shim
}

/// A program that says of itself what `about` is, and of a state what `check` does.
pub fn pretender(dir: &Path, name: &str, about: &str, check: &str) -> PathBuf {
    let program = dir.join(name);
    let script = format!(
        "#!/bin/sh\ncase \"$2\" in\n--about) echo '{about}' ;;\n--check) {check} ;;\nesac\n"
    );
    fs::write(&program, script).expect("write a program");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("make it one");
    program
}

/// `walnut upgrade` with these directories; its exit code, and what it says of each.
#[track_caller]
pub fn upgrade(root: &Path, run: &Path, args: &[&str]) -> (i32, Vec<Value>) {
    let mut command = Command::new(repository().join("out/bin/walnut"));
    command
        .args(["upgrade", "--format", "json"])
        .args(args)
        .env("WALNUT_ROOT", root)
        .env("WALNUT_RUN", run)
        .env_remove("WALNUT_LIB");
    let done = finish(&mut command, b"");
    let rows = serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {done:#?}"));
    (done.code, rows)
}

/// Has one supervisor become `program`; how it was called before and is now.
#[track_caller]
pub fn upgraded(root: &Path, run: &Path, name: &str, program: &Path) -> (String, String) {
    let program = program.to_str().expect("a plain path");
    let (code, rows) = upgrade(root, run, &["--program", program, name]);
    assert_eq!((code, rows.len()), (0, 1), "{rows:#?}");
    assert_eq!(rows[0]["result"], "upgraded", "{rows:#?}");
    let build = |end: &str| rows[0][end]["build"].as_str().expect("a build").to_owned();
    let (from, to) = (build("from"), build("to"));
    assert_ne!(from, to);
    (from, to)
}

/// Why a supervisor does not become `program`.
#[track_caller]
pub fn refused(root: &Path, run: &Path, name: &str, program: &Path) -> String {
    let program = program.to_str().expect("a plain path");
    let (code, rows) = upgrade(root, run, &["--program", program, name]);
    assert_eq!((code, rows.len()), (125, 1), "{rows:#?}");
    assert_eq!(rows[0]["result"], "unchanged", "{rows:#?}");
    rows[0]["reason"].as_str().expect("a reason").to_owned()
}

/// Panics unless the lines count up from 0, every number once; how many there are.
#[track_caller]
pub fn counted(text: &str) -> usize {
    let mut lines = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
    let mut count = 0;
    for line in &mut lines {
        assert_eq!(line.trim_end(), count.to_string(), "after {count} lines");
        count += 1;
    }
    count
}
