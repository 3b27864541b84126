//! The specification's rules, with plugins that are shell scripts and write down what they
//! are given.

use std::fs;

use serde_json::json;

use super::*;

struct Plugins {
    dir: tempfile::TempDir,
    path: Vec<PathBuf>,
}

impl Plugins {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = vec![dir.path().join("absent"), dir.path().to_owned()];
        Self { dir, path }
    }

    /// A plugin that appends what it is given to `calls` and then does this.
    fn with(self, name: &str, does: &str) -> Self {
        let calls = self.dir.path().join("calls");
        let script = format!(
            "#!/bin/sh\nconfig=$(cat)\necho \"{name} $CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $config\" >>{}\n{does}\n",
            calls.display()
        );
        let file = self.dir.path().join(name);
        // Executed is a copy that this process never wrote to: a child that another test forks
        // meanwhile has what is open for writing, and then nobody can execute it.
        let draft = self.dir.path().join(format!("{name}.draft"));
        fs::write(&draft, script).unwrap();
        let mut install = std::process::Command::new("install");
        let made = install.args(["-m", "0755"]).arg(&draft).arg(&file).status();
        assert!(made.unwrap().success());
        fs::remove_file(&draft).unwrap();
        self
    }

    fn cni(&self) -> Cni<'_> {
        Cni {
            path: &self.path,
            lock: None,
        }
    }

    /// Name, command and configuration of each call.
    fn calls(&self) -> Vec<(String, Value)> {
        let text = fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default();
        text.lines()
            .map(|line| {
                let (head, config) = line.split_once(" {").unwrap();
                let config = format!("{{{config}");
                (head.to_owned(), serde_json::from_str(&config).unwrap())
            })
            .collect()
    }
}

fn list() -> ConfList {
    let list = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [
        {"type": "one", "ipam": {"type": "addresses"}, "capabilities": {"mac": true, "ips": false}},
        {"type": "two", "capabilities": {"portMappings": true}},
    ]});
    ConfList::new(list, "net").unwrap()
}

fn attachment<'a>(list: &'a ConfList, capabilities: &'a Map<String, Value>) -> Attachment<'a> {
    Attachment {
        list,
        container: "c1",
        namespace: Some("/run/netns/x".as_ref()),
        interface: "eth0",
        capabilities,
        result: None,
    }
}

#[test]
fn results_go_from_plugin_to_plugin_and_back() {
    let plugins = Plugins::new()
        .with("one", r#"[ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"1.0.0","ips":[{"address":"192.0.2.5/24"}]}'"#)
        .with("two", r#"[ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"1.0.0","last":1}'"#);
    let capabilities = json!({"mac": "02:00:00:00:00:01", "portMappings": [1], "ips": ["x"]});
    let capabilities = capabilities.as_object().unwrap();
    let list = list();
    let mut attachment = attachment(&list, capabilities);
    let mut made = None;
    plugins.cni().add(&attachment, &mut made).unwrap();
    let result = made.unwrap();
    assert_eq!(result["last"], 1);
    attachment.result = Some(&result);
    plugins.cni().check(&attachment).unwrap();
    attachment.namespace = None;
    plugins.cni().del(&attachment).unwrap();
    let calls = plugins.calls();
    let heads: Vec<_> = calls.iter().map(|(head, _)| head.as_str()).collect();
    assert_eq!(
        heads,
        [
            "one ADD c1 /run/netns/x eth0",
            "two ADD c1 /run/netns/x eth0",
            "one CHECK c1 /run/netns/x eth0",
            "two CHECK c1 /run/netns/x eth0",
            "two DEL c1  eth0",
            "one DEL c1  eth0",
        ]
    );
    let first = &calls[0].1;
    assert_eq!(first["name"], "net");
    assert_eq!(first["cniVersion"], "1.0.0");
    // Only what it says that it is capable of, and nothing of a runtime's own.
    assert_eq!(first["runtimeConfig"], json!({"mac": "02:00:00:00:00:01"}));
    assert_eq!(first.get("capabilities"), None);
    assert_eq!(first.get("prevResult"), None);
    let second = &calls[1].1;
    assert_eq!(second["prevResult"]["ips"][0]["address"], "192.0.2.5/24");
    assert_eq!(second["runtimeConfig"], json!({"portMappings": [1]}));
    for (_, config) in &calls[2..] {
        assert_eq!(
            config["prevResult"],
            json!({"cniVersion": "1.0.0", "last": 1})
        );
    }
}

#[test]
fn what_a_plugin_says_is_the_reason() {
    let refuses = r#"printf %s '{"cniVersion":"1.0.0","code":11,"msg":"try again","details":"two\nlines"}'; exit 1"#;
    let plugins = Plugins::new()
        .with("one", r#"echo '{"cniVersion":"1.0.0"}'"#)
        .with("two", refuses);
    let (list, none) = (list(), Map::new());
    let attachment = attachment(&list, &none);
    let mut made = None;
    let said = plugins.cni().add(&attachment, &mut made).unwrap_err();
    let said = said.to_string();
    // What is to be taken away again.
    assert_eq!(made, Some(json!({"cniVersion": "1.0.0"})));
    for part in [
        "network net",
        "plugin two",
        "try again: two lines (code 11)",
    ] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(said.lines().count(), 1, "{said}");
    // The others are asked all the same.
    plugins.cni().del(&attachment).unwrap_err();
    let last = plugins.calls().pop().unwrap().0;
    assert!(last.starts_with("one DEL"), "{last}");

    for (does, says) in [
        ("echo broken >&2; exit 3", "broken"),
        ("exit 3", "exit status: 3"),
        ("echo no JSON", "not JSON"),
    ] {
        let plugins = Plugins::new().with("one", does);
        let said = plugins
            .cni()
            .add(&attachment, &mut None)
            .unwrap_err()
            .to_string();
        assert!(said.contains(says), "{said}");
    }
}

#[test]
fn a_missing_plugin_is_named_with_its_package() {
    let plugins = Plugins::new().with("one", "echo '{}'");
    let (list, none) = (list(), Map::new());
    assert_eq!(list.programs(), ["one", "addresses", "two"]);
    let said = plugins
        .cni()
        .add(&attachment(&list, &none), &mut None)
        .unwrap_err();
    let said = said.to_string();
    assert!(
        said.contains("plugin two") && said.contains("containernetworking-plugins"),
        "{said}"
    );
}

#[test]
fn who_waits_for_the_lock_waits_for_plugins() {
    let plugins = Plugins::new().with(
        "one",
        "sleep infinity <&- >&- 2>&- & echo $! >\"$0.pid\"; echo '{}'",
    );
    let list = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "one"}]});
    let (list, none) = (ConfList::new(list, "net").unwrap(), Map::new());
    let path = plugins.dir.path().join("lock");
    let lock = fs::File::create(&path).unwrap();
    lock.lock().unwrap();
    let cni = Cni {
        path: &plugins.path,
        lock: Some(std::os::fd::AsFd::as_fd(&lock)),
    };
    cni.add(&attachment(&list, &none), &mut None).unwrap();
    drop(lock);
    // A child of the plugin's has it.
    fs::File::open(&path).unwrap().try_lock().unwrap_err();
    let pid = fs::read_to_string(plugins.dir.path().join("one.pid")).unwrap();
    let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    fs::File::open(&path).unwrap().lock().unwrap();
}

#[test]
fn bad_lists_and_names_are_refused() {
    for text in [
        "[]",
        "{",
        r#"{"plugins":[{"type":"a"}]}"#,
        r#"{"name":"n"}"#,
        r#"{"name":"n","plugins":[]}"#,
        r#"{"name":"n","plugins":[{}]}"#,
        r#"{"name":"n","plugins":[{"type":"../sh"}]}"#,
    ] {
        assert!(ConfList::parse(text.as_bytes(), "n").is_err(), "{text}");
    }
    for name in ["", "a/b", "a b", "..", "sixteen-letters-"] {
        assert!(check_interface(name).is_err(), "{name}");
    }
    check_interface("eth0").unwrap();
}
