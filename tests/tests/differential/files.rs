//! Root file system, mounts and devices.

use std::fs;

use serde_json::json;

use crate::case::{Case, case, same};

const BIND: &str = "bind";

/// Binds a directory or file of the host's, which is in the bundle.
fn bound(name: &'static str, script: &str, options: &'static [&'static str]) -> Case {
    case(name, script).with_files(move |config, bundle| {
        let shared = bundle.join("shared");
        fs::create_dir_all(shared.join("below")).unwrap();
        fs::write(shared.join("file"), "of the host\n").unwrap();
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(
            json!({"destination": "/mnt", "type": BIND, "source": shared, "options": options}),
        );
    })
}

#[test]
fn root_and_mounts() {
    // Its options, without those that a file system adds by itself.
    let options = |at: &str| {
        format!(
            "for o in ro rw nosuid nodev noexec noatime relatime; do grep ' {at} ' /proc/self/mounts | tail -n 1 | cut -d' ' -f4 | tr , '\\n' | grep -x $o; done"
        )
    };
    let tmpfs =
        |name, script: &str, options: &[&str]| case(name, script).mount("/mnt", "tmpfs", options);
    let all =
        "set -- /mnt; ls $1; cat $1/file; echo new >$1/new; echo $?; ls $1; rm $1/file; echo $?";
    same(vec![
        case("a root to write to", "echo a >/it; cat /it; mkdir /d; rm /it; ls -d /d"),
        case("one to read", "echo a >/it; echo $?; mkdir /d; rm /etc/passwd; ls /etc").set("/root/readonly", json!(true)),
        case("a temporary one in it", "echo a >/tmp/a; cat /tmp/a")
            .set("/root/readonly", json!(true)).mount("/tmp", "tmpfs", &["mode=1777"]),
        case("permissions", "stat -c '%a %u %g %F' /bin /tmp /etc/passwd /bin/sh"),
        case("links", "ln -s /etc/passwd /l; readlink /l; ln /etc/passwd /h; stat -c %h /etc/passwd"),
        case("special files", "mkfifo /p; (echo through >/p &); cat /p; stat -c %F /p"),
        case("holes", "truncate -s 10M /it; stat -c '%s %b' /it"),
        case("a file without its name", "exec 3>/it; rm /it; echo a >&3; echo $?; ls /proc/self/fd/3 >/dev/null; echo $?"),
        tmpfs("a size", "df -k /mnt | tail -n 1 | awk '{print $2}'; dd if=/dev/zero of=/mnt/a bs=1k count=2000 2>/dev/null; echo $?", &["size=1m"]),
        tmpfs("a mode and an owner", "stat -c '%a %u %g' /mnt", &["mode=0711", "uid=1000", "gid=2000"]),
        tmpfs("no programs", "cp /bin/busybox /mnt/sh; /mnt/sh -c true; echo $?", &["noexec"]),
        tmpfs("no devices", "mknod /mnt/n c 1 3; cat /mnt/n; echo $?", &["nodev"]),
        tmpfs("to read", "touch /mnt/a; echo $?", &["ro"]),
        tmpfs("options are seen", &options("/mnt"), &["nosuid", "nodev", "noexec", "noatime"]),
        case("options of /proc", options("/proc")),
        case("of /dev", options("/dev")),
        case("of /dev/shm", options("/dev/shm")),
        case("of /sys", options("/sys")),
        case("of the root", options("/")),
        case("of a root to read", options("/")).set("/root/readonly", json!(true)),
        bound("a directory of the host", all, &[BIND]),
        bound("with all below", all, &["rbind"]),
        bound("to read", all, &[BIND, "ro"]),
        bound("its options", &options("/mnt"), &["rbind", "ro", "nosuid", "nodev", "noexec"]),
        bound("and no programs", "cp /bin/busybox /mnt/sh; /mnt/sh -c true; echo $?", &[BIND, "noexec"]),
        case("a file of the host", "cat /etc/passwd; echo a >/etc/passwd; cat /etc/passwd").with_files(|config, bundle| {
            fs::write(bundle.join("one"), "bound\n").unwrap();
            let mounts = config["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/etc/passwd", "source": bundle.join("one"), "options": [BIND]}));
        }),
        case("places that are made", "stat -c '%F %u %g' /a /a/b /a/b/c; stat -c %a /a/b/c; touch /a/b/c/d").mount("/a/b/c", "tmpfs", &[]),
        case("their modes", "stat -c %a /a").mount("/a/b", "tmpfs", &[])
            .differs("Directories that are made for a mount have the mode 755, as runc makes them"),
        case("at a relative place", "stat -c %F /mnt").mount("mnt", "tmpfs", &[]),
        tmpfs("how many files", "touch /mnt/a /mnt/b /mnt/c /mnt/d; echo $?", &["nr_inodes=4"]),
        tmpfs("what it hides", "ls /mnt", &["rw"]).with_files(|_, bundle| {
            fs::create_dir(bundle.join("rootfs/mnt")).unwrap();
            fs::write(bundle.join("rootfs/mnt/hidden"), "").unwrap();
        }),
        tmpfs(
            "what it begins with",
            "stat -c '%n %a %u %g %s %F' /mnt /mnt/* /mnt/dir/*; readlink /mnt/link; cat /mnt/copied",
            &["tmpcopyup"],
        )
        .with_files(|_, bundle| {
            let mnt = bundle.join("rootfs/mnt");
            fs::create_dir_all(mnt.join("dir/below")).unwrap();
            fs::write(mnt.join("copied"), "copied\n").unwrap();
            fs::write(mnt.join("dir/mine"), "").unwrap();
            std::os::unix::fs::chown(mnt.join("dir/mine"), Some(1000), Some(2000)).unwrap();
            std::os::unix::fs::symlink("copied", mnt.join("link")).unwrap();
        }),
        tmpfs("of nothing", "ls -a /mnt", &["tmpcopyup"]),
        tmpfs("the mode of what it hides", "stat -c '%a %u' /mnt", &[]).with_files(|_, bundle| {
            let mnt = bundle.join("rootfs/mnt");
            fs::create_dir(&mnt).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            fs::set_permissions(&mnt, mode).unwrap();
        }),
        bound("its changes are seen by nobody", "umount /mnt/below; echo $?", &["rbind", "rprivate"]),
        bound("nor the host's", "ls /mnt", &["rbind", "rslave"]),
        bound("access times", &options("/mnt"), &["rbind", "noatime"]),
        bound("to read with all below", all, &["rbind", "ro"]),
        bound("as it was", all, &["rbind", "rw"]),
        bound("no set-user-ID", &options("/mnt"), &["rbind", "nosuid", "nodev"]),
        case("one in another", "ls /a; touch /a/b/c; ls /a/b").mount("/a", "tmpfs", &[]).mount("/a/b", "tmpfs", &[]),
        case("one over another", "ls /a").mount("/a", "tmpfs", &[]).mount("/a", "tmpfs", &["ro"]),
        case("through a link", "ls -d /real; touch /real/a; ls /link/").with_files(|config, bundle| {
            let root = bundle.join("rootfs");
            fs::create_dir(root.join("real")).unwrap();
            std::os::unix::fs::symlink("/real", root.join("link")).unwrap();
            let mounts = config["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/link", "type": "tmpfs", "source": "tmpfs"}));
        }),
        case("what is not there", "true").with(|config| {
            let mounts = config["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/mnt", "source": "/no/such", "options": [BIND]}));
        }).only_code(),
        case("a file system of no such kind", "true").mount("/mnt", "nosuchfs", &[]).only_code(),
        case("message queues", "ls -d /dev/mqueue; touch /dev/mqueue/a; cat /dev/mqueue/a; rm /dev/mqueue/a"),
        case("mounting is not allowed", "mount -t tmpfs none /mnt; echo $?; umount /proc; echo $?"),
    ]);
}

#[test]
fn devices() {
    let device = json!({"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 1000, "gid": 2000});
    same(vec![
        case("those that there are", "ls /dev"),
        case(
            "whose they are",
            "stat -c '%n %u %g %a' /dev /dev/shm /dev/pts /dev/mqueue",
        ),
        case(
            "what they are",
            "stat -c '%n %F %t:%T %a' /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty",
        ),
        case(
            "links among them",
            "for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done; readlink /dev/core || echo none",
        ),
        case("null", "echo a >/dev/null; cat /dev/null"),
        case("zero", "head -c 4 /dev/zero | md5sum"),
        case("full", "echo a >/dev/full; echo $?"),
        case(
            "random",
            "head -c 16 /dev/urandom | wc -c; head -c 16 /dev/random | wc -c",
        ),
        case("a terminal's", "cat /dev/tty; echo $?"),
        case(
            "pseudo-terminals",
            "ls /dev/pts; stat -c '%a' /dev/pts/ptmx",
        ),
        case(
            "one more",
            "stat -c '%F %t:%T %a %u %g' /dev/mine; echo a >/dev/mine; echo $?",
        )
        .set("/linux/devices", json!([device]))
        .add(
            "/linux/resources/devices",
            json!({"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}),
        ),
        case(
            "one that is made",
            "mknod /dev/it c 1 3 && echo a >/dev/it; echo $?",
        ),
        case(
            "one that is not allowed",
            "mknod /it c 1 1 && cat /it; echo $?",
        ),
        case(
            "tun",
            "ls /dev/net/tun /dev/fuse /dev/kmsg /dev/mem 2>&1; echo $?",
        ),
        case(
            "the log of the kernel",
            "mknod /it c 1 11 && head -c 1 /it; echo $?",
        ),
        case(
            "memory of the kernel",
            "mknod /it c 1 2 && head -c 1 /it; echo $?",
        ),
        case("blocks", "mknod /it b 7 0 && cat /it; echo $?"),
    ]);
}
