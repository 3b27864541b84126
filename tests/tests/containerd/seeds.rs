//! What a containerd has on disk when it has the images: unpacking them takes longer than most
//! tests. The first caller makes it, for every version of containerd one.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use walnut_tests::client::{finish, image, programs_image};

use crate::{
    daemon::{
        Daemon, IMAGE, KUBERNETES, KUBERNETES_IMAGE, Kind, NAMESPACE, PAUSE_IMAGE, PROGRAMS_IMAGE,
        roots,
    },
    programs::program,
};

/// The test image, for `ctr` and for Kubernetes, and what pods begin with.
pub(crate) fn usual() -> PathBuf {
    seed(&image(), None, |daemon| {
        daemon.import(NAMESPACE, without_tag(IMAGE), &image());
        daemon.import(KUBERNETES, without_tag(KUBERNETES_IMAGE), &image());
        daemon.import(KUBERNETES, PAUSE_IMAGE, &pause_image(daemon.scratch()));
    })
}

/// The same, and Kubernetes' image with node, systemd and programs of Go's.
pub(crate) fn with_programs() -> PathBuf {
    let image = programs_image();
    seed(&image, Some(&usual()), |daemon| {
        daemon.import(KUBERNETES, without_tag(PROGRAMS_IMAGE), &image);
    })
}

fn without_tag(image: &str) -> &str {
    image.trim_end_matches(":latest")
}

/// A seed that is named after an image, made from another one by `make`.
fn seed(image: &Path, from: Option<&Path>, make: impl FnOnce(&Daemon)) -> PathBuf {
    let version = finish(Command::new(program("containerd")).arg("--version"), b"").exits(0);
    let word = |c: char| if c.is_alphanumeric() { c } else { '-' };
    let version: String = version.stdout.trim().chars().map(word).collect();
    // Where daemons have their files, for it shares its own with them.
    let seed = roots()
        .join(image.file_name().unwrap())
        .with_extension(version);
    fs::create_dir_all(roots()).unwrap();
    let lock = fs::File::create(seed.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if !seed.exists() {
        let daemon = Daemon::launch(Kind::Kubernetes, from);
        make(&daemon);
        daemon.become_seed(&seed);
    }
    seed
}

/// Copies a daemon's directory. Its files are shared but for its databases, which are all
/// that it writes to in place.
pub(crate) fn copy(seed: &Path, to: &Path) {
    let run = |command: &mut Command| drop(finish(command, b"").exits(0));
    run(Command::new("cp")
        .args(["--archive", "--link"])
        .arg(seed)
        .arg(to));
    let script = r#"find "$0" -name '*.db' -exec cp --archive {} {}.own \; -exec mv {}.own {} \;"#;
    run(Command::new("sh").args(["-c", script]).arg(to));
}

/// An image whose only program sleeps.
fn pause_image(dir: &Path) -> PathBuf {
    let (layout, file) = (dir.join("pause"), dir.join("pause.tar"));
    let tag = format!("{}:latest", layout.display());
    let layout = layout.to_str().unwrap();
    let steps: [&[&str]; 5] = [
        &["umoci", "init", "--layout", layout],
        &["umoci", "new", "--image", &tag],
        &[
            "umoci",
            "insert",
            "--image",
            &tag,
            "/bin/busybox",
            "/bin/sleep",
        ],
        &[
            "umoci",
            "config",
            "--image",
            &tag,
            "--config.entrypoint",
            "/bin/sleep",
            "--config.entrypoint",
            "infinity",
        ],
        &["tar", "-C", layout, "-cf", file.to_str().unwrap(), "."],
    ];
    for step in steps {
        finish(Command::new(step[0]).args(&step[1..]), b"").exits(0);
    }
    file
}
