use std::{fs, path::Path};

use super::{
    amendment::Amendment,
    containerd::{self, Version},
    step::{State, Step},
};

const DEBIAN: &str = r#"version = 2

# where Debian has its plugins
[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
      conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.internal.v1.opt"]
    path = "/var/lib/containerd"
"#;

#[test]
fn debians_file_keeps_all_it_says() {
    let with = Amendment::Runtime.add(DEBIAN).unwrap();
    for line in DEBIAN.lines() {
        assert!(with.contains(line), "{line}: {with}");
    }
    assert!(
        with.contains("runtimes.walnut]\nruntime_type = \"io.containerd.walnut.v2\""),
        "{with}"
    );
    assert_eq!(
        Amendment::Runtime.add(&with).unwrap(),
        with,
        "once is enough"
    );
    assert!(!Amendment::Runtime.is_absent(&with));
    let without = Amendment::Runtime.remove(&with).unwrap();
    assert_eq!(without, DEBIAN);
}

#[test]
fn what_an_administrator_adds_stays() {
    let with = Amendment::Runtime.add(DEBIAN).unwrap();
    let more = with.replace(
        "privileged_without_host_devices = true",
        "privileged_without_host_devices = true\nsnapshotter = \"native\"",
    );
    assert_eq!(Amendment::Runtime.add(&more).unwrap(), more);
    let changed = with.replace("io.containerd.walnut.v2", "io.containerd.runc.v2");
    assert_eq!(Amendment::Runtime.add(&changed).unwrap(), with);
}

#[test]
fn a_file_of_ours_alone_goes_and_odd_ones_are_refused() {
    let made = Amendment::Runtime.add("").unwrap();
    assert!(made.starts_with("version = 2\n"), "{made}");
    assert_eq!(Amendment::Runtime.remove(&made).unwrap(), "");
    for (text, says) in [
        ("[plugins.cri]\n", "version is 1"),
        ("version = 2\nplugins = 3\n", "by hand"),
        ("version = ", "not TOML"),
        ("version = 9\n", "version is 9"),
    ] {
        let error = format!("{:#}", Amendment::Runtime.add(text).unwrap_err());
        assert!(error.contains(says), "{text}: {error}");
    }
    let import = Amendment::Import("/etc/containerd/conf.d/*.toml".into());
    let with = import.add("version = 3\nimports = [\"/x\"]\n").unwrap();
    assert!(
        with.contains("\"/x\", \"/etc/containerd/conf.d/*.toml\""),
        "{with}"
    );
    assert_eq!(
        import.remove(&with).unwrap(),
        "version = 3\nimports = [\"/x\"]\n"
    );
}

#[test]
fn each_containerd_is_told_in_its_own_way() {
    let kinds = |version: &str| -> Vec<String> {
        let version = Version::parse(version).unwrap();
        let config = Path::new("/etc/containerd/config.toml");
        containerd::steps(version, config, Path::to_owned)
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect()
    };
    let amended = ["the runtime walnut in /etc/containerd/config.toml"];
    let drop_in = "/etc/containerd/conf.d/walnut.toml";
    let import = "the import of /etc/containerd/conf.d/*.toml in /etc/containerd/config.toml";
    assert_eq!(kinds("1.6.20~ds1"), amended);
    assert_eq!(kinds("1.7.24"), amended);
    assert_eq!(kinds("v2.1.0"), [drop_in, import]);
    assert_eq!(kinds("2.10"), [drop_in]);
    assert!(Version::parse("two").is_err());
}

#[test]
fn steps_are_made_found_and_undone() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    fs::write(&from, "program").unwrap();
    let steps = [
        Step::Copy {
            from: from.clone(),
            to: dir.path().join("lib/program"),
            mode: 0o755,
        },
        Step::Link {
            at: dir.path().join("bin/program"),
            to: "../lib/program".into(),
        },
        Step::Text {
            to: dir.path().join("conf.d/x.conf"),
            text: "x\n".into(),
        },
        Step::Amend {
            file: dir.path().join("config.toml"),
            with: Amendment::Runtime,
        },
    ];
    for step in &steps {
        assert_eq!(step.state().unwrap(), State::Absent, "{step}");
        assert!(step.is_gone().unwrap());
        step.make().unwrap();
        assert_eq!(step.state().unwrap(), State::Done, "{step}");
        // Again, over what is there.
        step.make().unwrap();
        assert_eq!(step.state().unwrap(), State::Done, "{step}");
    }
    assert_eq!(
        fs::read(dir.path().join("bin/program")).unwrap(),
        b"program"
    );
    fs::write(&from, "changed").unwrap();
    assert_eq!(steps[0].state().unwrap(), State::Other);
    for step in &steps {
        step.undo().unwrap();
        assert!(step.is_gone().unwrap(), "{step}");
    }
    let left = walk(dir.path());
    assert_eq!(left, ["from"], "nothing else is left");
}

fn walk(dir: &Path) -> Vec<String> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(walk(&path));
        } else {
            files.push(path.file_name().unwrap().to_string_lossy().into_owned());
        }
    }
    files
}

#[test]
fn what_deploy_shows_is_what_is_installed() {
    assert_eq!(
        Amendment::Runtime.add("").unwrap(),
        include_str!("../../../../deploy/containerd/containerd-1.x.toml")
    );
    let new = Version::parse("2.2").unwrap();
    let steps = containerd::steps(new, Path::new("/c/config.toml"), Path::to_path_buf).unwrap();
    let [Step::Text { text, .. }] = steps.as_slice() else {
        unreachable!("a drop-in is enough: {steps:?}");
    };
    let shown = include_str!("../../../../deploy/containerd/containerd-2.x.toml");
    assert_eq!(text, shown);
}
