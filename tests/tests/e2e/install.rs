//! `walnut install`, into a file system that is being made.

use std::fs;

use walnut_tests::walnut;

#[test]
fn a_node_is_set_up_and_left_as_it_was() {
    let root = tempfile::tempdir().unwrap();
    let at = root.path().display().to_string();
    let config = root.path().join("etc/containerd/config.toml");
    fs::create_dir_all(config.parent().unwrap()).unwrap();
    let before = "version = 2\n\n# mine\n[plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"\n";
    fs::write(&config, before).unwrap();
    let podman = root.path().join("usr/bin/podman");
    fs::create_dir_all(podman.parent().unwrap()).unwrap();
    fs::write(&podman, "").unwrap();
    let verb = |verb: &str, more: &[&str]| {
        let mut words = vec![verb, "--root", &at, "--containerd-version", "1.6"];
        words.extend(more);
        walnut(&words).exits(0).text().to_owned()
    };

    let said = verb("install", &["--dry-run"]);
    assert!(
        said.contains("would be made") && !said.contains("is there"),
        "{said}"
    );
    assert!(
        !root.path().join("usr/local").exists() && !root.path().join("etc/containers").exists(),
        "a dry run makes nothing"
    );
    assert!(!verb("install", &[]).contains("is there"));
    // What was installed works by itself.
    let installed = root.path().join("usr/local/bin/walnut");
    let output = std::process::Command::new(&installed)
        .args(["check", "--format", "json"])
        .env_remove("WALNUT_LIB")
        .output()
        .unwrap();
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{report}");
    let lib = root.path().join("usr/local/lib/walnut");
    assert!(report.contains(&*lib.to_string_lossy()), "{report}");
    let text = fs::read_to_string(&config).unwrap();
    assert!(
        text.starts_with(before) && text.contains("io.containerd.walnut.v2"),
        "{text}"
    );
    let setting = root
        .path()
        .join("etc/containers/containers.conf.d/walnut.conf");
    let text = fs::read_to_string(&setting).unwrap();
    assert!(
        text.contains("[engine.runtimes]\nwalnut-oci = [\"/usr/local/bin/walnut-oci\"]\n"),
        "{text}"
    );
    // The other face of the program, by the name that podman calls it by.
    let features = std::process::Command::new(root.path().join("usr/local/bin/walnut-oci"))
        .arg("features")
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&features.stdout).contains("ociVersionMax"));

    let again = verb("install", &[]);
    assert!(
        !again.contains("made") && !again.contains("changed"),
        "{again}"
    );
    // One that was cut off, or spoiled, is mended.
    fs::write(lib.join("walnut-vmm"), "half").unwrap();
    let mended = verb("install", &[]);
    assert_eq!(mended.matches("changed").count(), 1, "{mended}");

    assert!(verb("uninstall", &["--dry-run"]).contains("would be removed"));
    assert!(installed.exists());
    verb("uninstall", &[]);
    assert_eq!(fs::read_to_string(&config).unwrap(), before);
    assert!(!lib.exists() && !installed.exists() && !setting.exists());
    assert!(!root.path().join("usr/local/bin/walnut-oci").is_symlink());
    verb("uninstall", &[]);
}

#[test]
fn what_cannot_be_amended_is_named_and_kept() {
    let root = tempfile::tempdir().unwrap();
    let at = root.path().display().to_string();
    let config = root.path().join("etc/containerd/config.toml");
    fs::create_dir_all(config.parent().unwrap()).unwrap();
    fs::write(&config, "version = 2\nplugins = 3\n").unwrap();
    let words = ["install", "--root", &at, "--containerd-version", "1.7"];
    walnut(&words).fails(125, "set the runtime up by hand");
    assert_eq!(
        fs::read_to_string(&config).unwrap(),
        "version = 2\nplugins = 3\n"
    );
    walnut(&["install", "--root", &at, "--containerd-version", "new"]).fails(125, "no version of");
    walnut(&["install", "--prefix", "here"]).fails(125, "absolute path");
}
