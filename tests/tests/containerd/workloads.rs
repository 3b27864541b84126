//! Programs that people run, as they come, in one pod.

use std::fs;

use k8s_cri::v1::{ContainerConfig, ContainerState, ImageSpec, Mount, PortMapping};
use walnut_tests::until;

use crate::{
    daemon::{Daemon, PROGRAMS_IMAGE},
    kubelet::{Kubelet, container_config},
};

/// Counts visits in redis.
const SERVER: &str = "
const http = require('http'), net = require('net');
const redis = net.connect(6379, '127.0.0.1');
const waiting = [];
redis.on('data', reply => waiting.shift()(String(reply)));
http.createServer((request, response) => {
  waiting.push(reply => response.end(`visit ${reply.match(/[0-9]+/)[0]} of ${request.url}\\n`));
  redis.write('INCR visits\\r\\n');
}).listen(3000, '127.0.0.1', () => console.log('listening'));
";

/// Killed by the signal that the image names, which is systemd's: SIGRTMIN+3.
const BY_IMAGE: i32 = 128 + 37;

/// Passes all but one page on.
const SITE: &str = "
server {
    listen 80 default_server;
    root /var/www/html;
    location = /index.html { }
    location / { proxy_pass http://127.0.0.1:3000; }
}
";

/// Of the image with node and programs of Go's.
pub(crate) fn of_programs(name: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        image: Some(ImageSpec {
            image: PROGRAMS_IMAGE.into(),
            ..Default::default()
        }),
        command: command.iter().map(ToString::to_string).collect(),
        ..container_config(name, "")
    }
}

/// A directory with one file, as a ConfigMap gives it.
fn config_map(daemon: &Daemon, at: &str, file: &str, text: &str) -> Mount {
    let dir = daemon.scratch().join(file).with_extension("map");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join(file), text).unwrap();
    Mount {
        container_path: at.into(),
        host_path: dir.display().to_string(),
        readonly: true,
        ..Default::default()
    }
}

/// What a page says that the node fetches.
pub(crate) fn page(daemon: &Daemon, url: &str) -> Option<String> {
    let fetch = format!(
        "import urllib.request as r; print(r.urlopen('{url}', timeout=60).read().decode(), end='')"
    );
    let done = daemon.on_the_node(&["python3", "-c", &fetch]);
    (done.code == 0).then_some(done.stdout)
}

#[test]
fn nginx_node_and_redis_serve_in_one_pod() {
    let daemon = Daemon::start_with_programs();
    let kubelet = Kubelet::new(&daemon);
    let port = PortMapping {
        container_port: 80,
        host_port: 18080,
        ..Default::default()
    };
    let pod = kubelet.run_networked_pod(&daemon, vec![port]);
    let redis = kubelet.run(&pod, "redis", "exec redis-server --save '' --appendonly no");
    until("redis answers", || {
        kubelet.exec(&redis, "redis-cli ping").stdout == b"PONG\n"
    });
    let mut server = of_programs("server", &["node", "/app/server.js"]);
    server.mounts = vec![config_map(&daemon, "/app", "server.js", SERVER)];
    let server = kubelet.run_with(&pod, server);
    let site = config_map(&daemon, "/etc/nginx/sites-enabled", "site", SITE);
    let nginx = kubelet.try_run(&pod, "nginx", "exec nginx -g 'daemon off;'", |config| {
        config.mounts = vec![site];
    });
    let nginx = nginx.unwrap();

    let base = format!("http://{}", kubelet.addresses(&pod)[0]);
    until("nginx serves its page", || {
        page(&daemon, &format!("{base}/index.html")).is_some_and(|text| text.contains("Walnut"))
    });
    // It says 502 until the server listens, which node needs a while for.
    let mut first = None;
    until("the server answers through nginx", || {
        first = page(&daemon, &format!("{base}/a"));
        first.is_some()
    });
    assert_eq!(first.unwrap(), "visit 1 of /a\n");
    let again = page(&daemon, "http://10.77.0.1:18080/b").unwrap();
    assert_eq!(again, "visit 2 of /b\n");
    let count = kubelet.exec(&redis, "redis-cli get visits");
    assert_eq!(count.stdout, b"2\n");

    // One is replaced while the others serve.
    kubelet.stop(&server).unwrap();
    assert_eq!(kubelet.status(&server).1, BY_IMAGE);
    assert!(page(&daemon, &format!("{base}/c")).is_none(), "502");
    let mut server = of_programs("server-2", &["node", "/app/server.js"]);
    let map = daemon.scratch().join("server.map");
    server.mounts = vec![Mount {
        container_path: "/app".into(),
        host_path: map.display().to_string(),
        ..Default::default()
    }];
    let server = kubelet.run_with(&pod, server);
    let mut third = None;
    until("the new server answers", || {
        third = page(&daemon, &format!("{base}/d"));
        third.is_some()
    });
    assert_eq!(third.unwrap(), "visit 3 of /d\n");

    // All end as they do elsewhere.
    for (container, code) in [(&nginx, 0), (&server, BY_IMAGE), (&redis, 0)] {
        kubelet.stop(container).unwrap();
        let (state, ended, reason) = kubelet.status(container);
        assert_eq!(state, ContainerState::ContainerExited);
        assert_eq!(ended, code, "{reason}");
    }
    kubelet.end_pod(&pod);
    daemon.assert_nothing_left();
}

#[test]
fn static_programs_of_go_run() {
    let daemon = Daemon::start_with_programs();
    let kubelet = Kubelet::new(&daemon);
    let pod = kubelet.run_pod(&daemon);
    let log = |name: &str| {
        let log = daemon.scratch().join(format!("logs/{name}.log"));
        fs::read_to_string(log).unwrap_or_default()
    };
    let ends = |name: &str, config: ContainerConfig| {
        let id = kubelet.run_with(&pod, config);
        until(&format!("{name} has ended"), || {
            kubelet.status(&id).0 == ContainerState::ContainerExited
        });
        (kubelet.status(&id).1, log(name))
    };
    // The collector runs: some hundred megabytes go through a machine of less.
    let program = "[range(300000) | tostring | explode | implode | tonumber] | add";
    let (code, log) = ends("jq", of_programs("jq", &["gojq", "-n", program]));
    assert!(
        code == 0 && log.contains(" stdout F 44999850000\n"),
        "{code}: {log}"
    );
    // What entry points use to give privileges up.
    let (code, log) = ends("su", of_programs("su", &["gosu", "nobody:games", "id"]));
    let who = "uid=65534(nobody) gid=60(games) groups=60(games)";
    assert!(code == 0 && log.contains(who), "{code}: {log}");
    let (code, log) = ends(
        "fails",
        of_programs("fails", &["gojq", "-n", "error(\"why\")"]),
    );
    assert!(code == 5 && log.contains("why"), "{code}: {log}");
    kubelet.end_pod(&pod);
    daemon.assert_nothing_left();
}
