//! The process that `exec` runs.

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::{args::Exec, bundle, context::Context};

/// As OCI runtime-spec "process": from a file, or the container's own with what the
/// command line changes.
pub(super) fn process(context: &Context, args: &Exec) -> Result<Value> {
    for (name, given) in [
        ("--apparmor", args.apparmor.is_some()),
        ("--process-label", args.process_label.is_some()),
        ("--cgroup", args.cgroup.is_some()),
    ] {
        if given {
            bail!("{name} names something of the host's; the container has a kernel of its own");
        }
    }
    if args.preserve_fds > 0 {
        bail!("--preserve-fds: descriptors cannot be passed into another kernel");
    }
    let mut process = match &args.process {
        Some(file) => serde_json::from_slice(&bundle::read(file)?)
            .with_context(|| format!("read {}", file.display()))?,
        None => changed(own(context, &args.id)?, args)?,
    };
    let terminal = args.tty || (args.process.is_some() && process["terminal"] == true);
    process["terminal"] = json!(terminal);
    Ok(process)
}

/// The container's own process.
fn own(context: &Context, id: &str) -> Result<Value> {
    let file = context.bundles.config(id);
    let mut config: Value = serde_json::from_slice(&bundle::read(&file)?)
        .with_context(|| format!("read {}", file.display()))?;
    Ok(config["process"].take())
}

fn changed(mut process: Value, args: &Exec) -> Result<Value> {
    if args.command.is_empty() {
        bail!("process args cannot be empty: name a program, or give --process");
    }
    process["args"] = json!(args.command);
    if let Some(dir) = &args.cwd {
        process["cwd"] = json!(dir);
    }
    add(&mut process, "env", &args.env);
    if let Some(user) = &args.user {
        let number = |what: &str, text: &str| {
            text.parse::<u32>()
                .with_context(|| format!("parsing {text:?} as {what}"))
        };
        let (uid, gid) = match user.split_once(':') {
            Some((uid, gid)) => (uid, Some(gid)),
            None => (user.as_str(), None),
        };
        process["user"]["uid"] = json!(number("UID", uid)?);
        if let Some(gid) = gid {
            process["user"]["gid"] = json!(number("GID", gid)?);
        }
    }
    if !process["user"].is_object() {
        process["user"] = json!({"uid": 0, "gid": 0});
    }
    add(
        &mut process["user"],
        "additionalGids",
        &args.additional_gids,
    );
    if args.no_new_privs {
        process["noNewPrivileges"] = json!(true);
    }
    if !args.cap.is_empty() {
        let caps: Vec<_> = args.cap.iter().map(|cap| capability(cap)).collect();
        let sets = match process["capabilities"].is_object() {
            true => &mut process["capabilities"],
            false => {
                process["capabilities"] = json!({});
                &mut process["capabilities"]
            }
        };
        for set in [
            "bounding",
            "effective",
            "inheritable",
            "permitted",
            "ambient",
        ] {
            add(sets, set, &caps);
        }
    }
    Ok(process)
}

fn capability(name: &str) -> String {
    let upper = name.to_ascii_uppercase();
    match upper.starts_with("CAP_") {
        true => upper,
        false => format!("CAP_{upper}"),
    }
}

/// Appends to a list that may not be there.
fn add<T: serde::Serialize>(object: &mut Value, list: &str, more: &[T]) {
    if more.is_empty() {
        return;
    }
    let more = more.iter().map(|item| json!(item));
    match object[list].as_array_mut() {
        Some(list) => list.extend(more),
        None => object[list] = more.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::args::{Command, Oci};
    use clap::Parser;

    #[test]
    fn the_command_line_changes_the_containers_own() {
        let line = "walnut-oci exec -e A=1 -u 7:8 -g 9 -c net_admin --cwd /x c ls -l --color";
        let Command::Exec(args) = Oci::parse_from(line.split(' ')).command else {
            unreachable!("exec is a command");
        };
        let own = json!({"env": ["B=2"], "cwd": "/", "args": ["sh"],
            "user": {"uid": 0, "gid": 0}, "capabilities": {"bounding": ["CAP_KILL"]}});
        let changed = changed(own, &args).unwrap();
        assert_eq!(changed["args"], json!(["ls", "-l", "--color"]));
        assert_eq!(changed["env"], json!(["B=2", "A=1"]));
        assert_eq!(changed["cwd"], "/x");
        assert_eq!(
            changed["user"],
            json!({"uid": 7, "gid": 8, "additionalGids": [9]})
        );
        let caps = &changed["capabilities"];
        assert_eq!(caps["bounding"], json!(["CAP_KILL", "CAP_NET_ADMIN"]));
        assert_eq!(caps["ambient"], json!(["CAP_NET_ADMIN"]));
    }
}
