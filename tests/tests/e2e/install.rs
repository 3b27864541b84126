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
    for program in ["usr/bin/podman", "usr/sbin/dockerd"] {
        let program = root.path().join(program);
        fs::create_dir_all(program.parent().unwrap()).unwrap();
        fs::write(&program, "").unwrap();
    }
    let docker = root.path().join("etc/docker/daemon.json");
    fs::create_dir_all(docker.parent().unwrap()).unwrap();
    let docker_before = "{\n  \"log-driver\": \"local\"\n}\n";
    fs::write(&docker, docker_before).unwrap();
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
    let text = fs::read_to_string(&docker).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["log-driver"], "local");
    assert_eq!(
        value["runtimes"]["walnut-oci"]["path"],
        "/usr/local/bin/walnut-oci"
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
    assert_eq!(fs::read_to_string(&docker).unwrap(), docker_before);
    assert!(!lib.exists() && !installed.exists() && !setting.exists());
    assert!(!root.path().join("usr/local/bin/walnut-oci").is_symlink());
    verb("uninstall", &[]);
}

#[test]
fn docker_is_left_alone_where_it_is_told_by_options_or_not_wanted() {
    let root = tempfile::tempdir().unwrap();
    let at = root.path().display().to_string();
    let docker = root.path().join("etc/docker/daemon.json");
    let install = |more: &[&str]| {
        let mut words = vec!["install", "--root", &at, "--no-containerd", "--no-podman"];
        words.extend(more);
        walnut(&words).exits(0).text().to_owned()
    };
    assert!(install(&[]).contains("docker is not installed"));
    let file = |name: &str, text: &str| {
        let file = root.path().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
    };
    file("usr/bin/dockerd", "");
    assert!(!install(&["--no-docker"]).contains("docker"));
    file(
        "etc/systemd/system/docker.service.d/mine.conf",
        "[Service]\nExecStart=\nExecStart=/usr/sbin/dockerd --add-runtime crun=/usr/bin/crun\n",
    );
    let said = install(&[]);
    assert!(
        said.contains("mine.conf") && said.contains("--add-runtime walnut-oci="),
        "{said}"
    );
    // dockerd would not start with a setting in both places.
    assert!(!docker.exists());
    file(
        "etc/systemd/system/docker.service.d/mine.conf",
        "# --add-runtime\n",
    );
    assert!(install(&[]).contains("the runtime walnut-oci in"));
    assert!(docker.exists());
    file("etc/docker/daemon.json", "{");
    let words = ["install", "--root", &at, "--no-containerd", "--no-podman"];
    walnut(&words).fails(125, "daemon.json: it is not JSON");
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
