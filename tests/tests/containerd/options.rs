//! The runtime's options, the file that they name, and pods' annotations.

use std::fs;

use walnut_tests::unique;

use crate::daemon::Daemon;

#[test]
fn a_runtime_has_the_settings_that_its_options_name() {
    let daemon = Daemon::start();
    let file = daemon.file("large.toml");
    fs::create_dir(daemon.file("large.d")).unwrap();
    fs::write(&file, "[container]\nvcpus = 2\nmemory = \"256MiB\"\n").unwrap();
    let drop_in = daemon.file("large.d/10-annotations.toml");
    fs::write(&drop_in, "annotations.allow = [\"vcpus\"]\n").unwrap();
    let with = ["--rm", "--runtime-config-path", file.to_str().unwrap()];
    let see = ["sh", "-c", "nproc; head -1 /proc/meminfo"];

    let done = daemon.run(&with, &unique("c"), &see).exits(0);
    let words: Vec<_> = done.stdout.split_whitespace().collect();
    assert_eq!(words[0], "2", "{done:#?}");
    let kib: u64 = words[2].parse().unwrap();
    assert!((128 << 10..256 << 10).contains(&kib), "{done:#?}");

    // What is allowed there is not allowed everywhere.
    let asked = ["--annotation", "dev.walnut.vcpus=3"];
    let both = [&with[..], &asked].concat();
    let done = daemon.run(&both, &unique("c"), &see).exits(0);
    assert_eq!(done.stdout.lines().next(), Some("3"), "{done:#?}");
    let refused = daemon.run(&[&["--rm"], &asked[..]].concat(), &unique("c"), &see);
    assert!(
        refused.code != 0 && refused.stderr.contains("does not allow"),
        "{refused:#?}"
    );

    for (text, why) in [
        ("[machine]\ndrver = \"vmm\"\n", "drver"),
        ("[container]\nmemory = \"1m\"\n", "container.memory"),
    ] {
        fs::write(&drop_in, text).unwrap();
        let refused = daemon.run(&with, &unique("c"), &see);
        assert!(
            refused.code != 0 && refused.stderr.contains(why),
            "{refused:#?}"
        );
    }
    let nothing = ["--rm", "--runtime-config-path", "/etc/walnut/nothing.toml"];
    let refused = daemon.run(&nothing, &unique("c"), &see);
    assert!(
        refused.code != 0 && refused.stderr.contains("nothing.toml"),
        "{refused:#?}"
    );
    daemon.assert_nothing_left();
}
