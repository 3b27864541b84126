//! Real programs of a real image.

use walnut_tests::{Detached, run, until};

#[test]
fn the_guest_has_a_kernel_of_its_own() {
    let done = run(&["IMAGE", "uname", "-r"]).exits(0);
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(done.text(), host.trim());
    assert!(done.text().ends_with("-walnut"), "{done:#?}");
}

#[test]
fn python_computes_and_exits_with_its_code() {
    let done = run(&["IMAGE", "python3", "-c", "print(2**100); exit(7)"]).exits(7);
    assert_eq!(done.text(), "1267650600228229401496703205376");
}

#[test]
fn nginx_serves_a_page_and_stops_gracefully() {
    let web = Detached::start(&["IMAGE", "nginx", "-g", "daemon off;"]);
    let fetch = "import urllib.request as u; print(u.urlopen('http://127.0.0.1/').read().decode())";
    let mut page = String::new();
    until("nginx answers", || {
        let done = web.exec(&["python3", "-c", fetch]);
        page = done.text().to_owned();
        done.code == 0
    });
    assert!(page.contains("<h1>Walnut</h1>"), "{page}");
    walnut_tests::walnut(&["stop", &web.name]).exits(0);
    assert_eq!(web.ended()["exit_code"], 0, "nginx ends well on SIGTERM");
}

#[test]
fn redis_passes_its_own_benchmark() {
    let redis = Detached::start(&["IMAGE", "redis-server", "--save", ""]);
    until("redis answers", || {
        redis.exec(&["redis-cli", "ping"]).text() == "PONG"
    });
    let done = redis
        .exec(&[
            "redis-benchmark",
            "--csv",
            "-n",
            "1000",
            "-t",
            "set,get,lpush",
        ])
        .exits(0);
    for test in ["SET", "GET", "LPUSH"] {
        let rate = done
            .text()
            .lines()
            .find_map(|line| line.strip_prefix(&format!("\"{test}\",\"")))
            .and_then(|rest| rest.split('"').next())
            .and_then(|rate| rate.parse::<f64>().ok());
        assert!(rate.is_some_and(|r| r > 0.0), "{test} in {done:#?}");
    }
    assert_eq!(redis.exec(&["redis-cli", "get", "nothing"]).text(), "");
}
