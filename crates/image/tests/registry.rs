//! How registries are spoken to: logins, tokens, mirrors, certificates, broken transfers.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;

use std::{
    collections::{BTreeMap, HashMap},
    io::{BufRead, BufReader, Read as _, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use base64::Engine as _;
use common::{Registry, layout, run, tar};
use walnut_image::{Error, Event, Image, NoProgress, Progress, PullOptions, Reference, Store};

/// A request that came: its line, and what it says of itself.
#[derive(Debug, Clone)]
struct Request {
    line: String,
    headers: BTreeMap<String, String>,
}

impl Request {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// What stands before a registry.
#[derive(Debug, Default)]
struct Front {
    /// A login is wanted, for a token.
    login: Option<&'static str>,
    /// The first transfer of each blob breaks off after so many bytes.
    breaks_off: Option<usize>,
    /// It gives other blobs than it is asked for.
    lies: bool,
    seen: Mutex<Vec<Request>>,
}

const TOKEN: &str = "t0k3n";

impl Front {
    /// Serves what the registry at `upstream` has; its own port.
    fn start(self, upstream: u16) -> (Arc<Self>, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let front = Arc::new(self);
        let serving = Arc::clone(&front);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let serving = Arc::clone(&serving);
                // A client that goes away is none of the test's business.
                std::thread::spawn(move || serving.serve(stream.unwrap(), port, upstream));
            }
        });
        (front, port)
    }

    fn serve(&self, mut stream: TcpStream, port: u16, upstream: u16) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let mut headers: BTreeMap<String, String> = BTreeMap::new();
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let Some((name, value)) = header.trim_end().split_once(": ") else {
                break;
            };
            // One that comes several times is a list (RFC 9110 §5.2).
            let list = headers.entry(name.to_lowercase()).or_default();
            if !list.is_empty() {
                list.push_str(", ");
            }
            list.push_str(value);
        }
        let request = Request {
            line: line.trim_end().to_owned(),
            headers,
        };
        let again = {
            let mut seen = self.seen.lock().unwrap();
            let again = seen.iter().any(|it| it.line == request.line);
            seen.push(request.clone());
            again
        };
        let answer = |status: &str, headers: &str, body: &str| {
            let length = body.len();
            format!(
                "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n{body}"
            )
        };
        if let Some(login) = self.login {
            let basic = base64::engine::general_purpose::STANDARD.encode(login);
            let given = request.header("authorization");
            if line.starts_with("GET /token?") {
                let body = format!("{{\"token\":\"{TOKEN}\",\"expires_in\":60}}");
                let text = match given == format!("Basic {basic}") {
                    true => answer("200 OK", "", &body),
                    false => answer("401 Unauthorized", "", ""),
                };
                return stream.write_all(text.as_bytes());
            }
            if given != format!("Bearer {TOKEN}") {
                let challenge = format!(
                    "WWW-Authenticate: Bearer realm=\"http://127.0.0.1:{port}/token\",service=\"walnut\"\r\n"
                );
                return stream.write_all(answer("401 Unauthorized", &challenge, "").as_bytes());
            }
        }
        if self.lies && line.contains("/blobs/") {
            return stream.write_all(answer("200 OK", "", "something else").as_bytes());
        }
        let mut registry = TcpStream::connect(("127.0.0.1", upstream))?;
        write!(
            registry,
            "{line}Host: 127.0.0.1:{upstream}\r\nConnection: close\r\n"
        )?;
        for name in ["accept", "range"] {
            if let Some(value) = request.headers.get(name) {
                write!(registry, "{name}: {value}\r\n")?;
            }
        }
        write!(registry, "\r\n")?;
        match self
            .breaks_off
            .filter(|_| line.contains("/blobs/") && !again)
        {
            Some(bytes) => {
                let limit = u64::try_from(bytes).unwrap();
                std::io::copy(&mut registry.take(limit), &mut stream)?;
            }
            None => {
                std::io::copy(&mut registry, &mut stream)?;
            }
        }
        Ok(())
    }

    fn seen(&self, word: &str) -> Vec<Request> {
        let seen = self.seen.lock().unwrap();
        let found = seen.iter().filter(|it| it.line.contains(word));
        found.cloned().collect()
    }
}

/// A registry with `demo:1`, and a node that has nothing yet.
struct Node {
    dir: tempfile::TempDir,
    registry: Registry,
}

impl Node {
    fn new() -> Self {
        Self::with(Registry::start())
    }

    fn with(registry: Registry) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer.tar");
        let mut state = 1u32;
        let noise = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        });
        let data: Vec<u8> = noise.take(300_000).collect();
        tar(&path, &[("noise", &data)]);
        let oci = layout(dir.path(), "demo", &[path]);
        registry.push(&oci, "demo", "demo:1", &[]);
        Self { dir, registry }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Says where images of `registry` may be had.
    fn hosts(&self, registry: &str, text: &str) {
        self.write(&format!("certs.d/{registry}/hosts.toml"), text);
    }

    fn login(&self, registry: &str, login: &str) {
        let auth = base64::engine::general_purpose::STANDARD.encode(login);
        let text = format!("{{\"auths\":{{\"{registry}\":{{\"auth\":\"{auth}\"}}}}}}");
        self.write("config.json", &text);
    }

    /// Pulls `demo:1` into an empty store.
    async fn pull(&self, registry: &str) -> Result<Image, Error> {
        let dir = tempfile::tempdir_in(self.dir.path()).unwrap();
        let store = Store::open(dir.path()).unwrap();
        self.pull_to(&store, registry).await
    }

    async fn pull_to(&self, store: &Store, registry: &str) -> Result<Image, Error> {
        let reference: Reference = format!("{registry}/demo:1").parse().unwrap();
        store.pull(&reference, &self.options(), &NoProgress).await
    }

    fn options(&self) -> PullOptions {
        PullOptions {
            credentials: vec![self.path("config.json")],
            hosts: vec![self.path("certs.d")],
            ..PullOptions::default()
        }
    }
}

#[tokio::test]
async fn a_token_is_fetched_with_the_login_of_the_configuration() {
    let node = Node::new();
    let front = Front {
        login: Some("me:secret"),
        ..Front::default()
    };
    let (front, port) = front.start(node.registry.port);
    let name = format!("127.0.0.1:{port}");

    let error = node.pull(&name).await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
    node.login(&name, "me:wrong");
    let error = node.pull(&name).await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
    assert!(error.to_string().contains("token service"), "{error}");

    let before = front.seen("/token").len();
    node.login(&name, "me:secret");
    node.pull(&name).await.unwrap();
    let tokens = front.seen("/token");
    let scope = "scope=repository%3Ademo%3Apull";
    assert_eq!(tokens.len(), before + 1, "one token serves all requests");
    assert!(
        tokens.iter().all(|it| it.line.contains(scope)),
        "{tokens:?}"
    );
    assert!(tokens.iter().all(|it| it.line.contains("service=walnut")));
}

#[tokio::test]
async fn a_transfer_that_breaks_off_goes_on_where_it_was() {
    let node = Node::new();
    let front = Front {
        breaks_off: Some(50_000),
        ..Front::default()
    };
    let (front, port) = front.start(node.registry.port);
    node.pull(&format!("127.0.0.1:{port}")).await.unwrap();
    let parts = front.seen("/blobs/");
    let ranges: Vec<u64> = parts
        .iter()
        .filter_map(|it| it.header("range").strip_prefix("bytes=")?.strip_suffix('-'))
        .map(|from| from.parse().unwrap())
        .collect();
    // The answer's head is among the bytes after which it broke off.
    assert_eq!(ranges.len(), 1, "{parts:?}");
    assert!((40_000..50_000).contains(&ranges[0]), "{ranges:?}");
}

#[tokio::test]
async fn mirrors_are_asked_in_their_order_and_the_registry_after_them() {
    let node = Node::new();
    let name = format!("127.0.0.1:{}", node.registry.port);
    let (liar, lying) = Front {
        lies: true,
        ..Front::default()
    }
    .start(node.registry.port);
    let (mirror, port) = Front::default().start(node.registry.port);
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    // Nobody answers there once it is dropped.
    let text = format!(
        "[host.\"http://{nobody}\"]\n\
         [host.\"http://127.0.0.1:{port}\"]\n\
           capabilities = [\"pull\"]\n\
           [host.\"http://127.0.0.1:{port}\".header]\n\
             x-walnut = \"here\"\n"
    );
    node.hosts(&name, &text);
    node.pull(&name).await.unwrap();
    assert!(
        mirror.seen("/manifests/1").is_empty(),
        "it is not trusted with tags"
    );
    let blobs = mirror.seen("/blobs/");
    assert_eq!(blobs.len(), 2, "{blobs:?}");
    let query = format!("ns=127.0.0.1%3A{}", node.registry.port);
    assert!(blobs.iter().all(|it| it.line.contains(&query)), "{blobs:?}");
    assert!(
        blobs.iter().all(|it| it.header("x-walnut") == "here"),
        "{blobs:?}"
    );

    // One that lies is found out.
    let text = format!("[host.\"http://127.0.0.1:{lying}\"]\ncapabilities = [\"pull\"]\n");
    node.hosts(&name, &text);
    let error = node.pull(&name).await.unwrap_err();
    assert!(
        matches!(error, Error::Mismatch { .. } | Error::Registry { .. }),
        "{error}"
    );
    assert!(!liar.seen("/blobs/").is_empty());

    node.hosts(
        &name,
        "[host.\"http://127.0.0.1:1\"]\ncapabilities = [\"fly\"]\n",
    );
    let error = node.pull(&name).await.unwrap_err().to_string();
    assert!(
        error.contains("hosts.toml") && error.contains("fly"),
        "{error}"
    );
}

/// `secret`, by bcrypt.
const HTPASSWD: &str = "me:$2b$05$8Imodg74cP9iR1yzlxPR/.Ek4aY7.bz9O7S7M1Msx1KA44uy8qJi2\n";

#[tokio::test]
async fn a_registry_behind_tls_with_a_password() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let make = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-subj",
        "/CN=walnut",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
        "-days",
        "2",
        "-keyout",
        "key.pem",
        "-out",
        "cert.pem",
    ];
    run(dir.path(), "openssl", &make);
    std::fs::write(path("htpasswd"), HTPASSWD).unwrap();
    let node = Node::new();
    // The same data behind another door.
    let data = node.registry.dir.path().join("data");
    let more = format!(
        "  tls: {{certificate: {}, key: {}}}\nauth:\n  htpasswd: {{realm: walnut, path: {}}}\n",
        path("cert.pem"),
        path("key.pem"),
        path("htpasswd")
    );
    let secure = Registry::serve(&data, &more);
    let name = format!("127.0.0.1:{}", secure.port);

    let server = format!("server = \"https://{name}\"\n");
    node.hosts(&name, &server);
    node.login(&name, "me:secret");
    let error = node.pull(&name).await.unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    node.hosts(&name, &format!("{server}ca = \"ours.crt\"\n"));
    let error = node.pull(&name).await.unwrap_err().to_string();
    assert!(error.contains("ours.crt"), "{error}");
    std::fs::copy(
        path("cert.pem"),
        node.path(&format!("certs.d/{name}/ours.crt")),
    )
    .unwrap();
    node.pull(&name).await.unwrap();
    node.login(&name, "me:other");
    let error = node.pull(&name).await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
    node.hosts(&name, &format!("{server}skip_verify = true\n"));
    node.login(&name, "me:secret");
    let store = tempfile::tempdir_in(node.dir.path()).unwrap();
    let store = Store::open(store.path()).unwrap();
    node.pull_to(&store, &name).await.unwrap();

    // Pushed under another name, and pulled by it.
    let pushed: Reference = format!("{name}/team/pushed:2").parse().unwrap();
    store.tag(&format!("{name}/demo:1"), &pushed).unwrap();
    let told = Told::default();
    let digest = store.push(&pushed, &node.options(), &told).await;
    let digest = digest.unwrap();
    told.all_was_sent();
    let other = tempfile::tempdir_in(node.dir.path()).unwrap();
    let other = Store::open(other.path()).unwrap();
    let image = other.pull(&pushed, &node.options(), &NoProgress).await;
    assert_eq!(image.unwrap().digest, digest);
    node.hosts(
        &name,
        &format!("{server}capabilities = [\"pull\", \"resolve\"]\nskip_verify = true\n"),
    );
    let error = store.push(&pushed, &node.options(), &NoProgress).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("push"), "{error}");
    node.hosts(&name, &format!("{server}skip_verify = true\n"));
    node.login(&name, "me:other");
    let error = store.push(&pushed, &node.options(), &NoProgress).await;
    assert!(
        matches!(error, Err(Error::Unauthorized { .. })),
        "{error:?}"
    );
}

/// Runs this test again where `PATH` has the helper: a process has one environment.
#[tokio::test]
async fn a_credential_helper_is_asked() {
    const AGAIN: &str = "WALNUT_TEST_HELPER";
    let Ok(dir) = std::env::var(AGAIN) else {
        let dir = tempfile::tempdir().unwrap();
        let helper = dir.path().join("docker-credential-walnut-test");
        let script = "#!/bin/sh\nread -r server\necho \"$1 $server\" >>\"$(dirname \"$0\")/asked\"\n\
                      echo '{\"ServerURL\":\"\",\"Username\":\"me\",\"Secret\":\"secret\"}'\n";
        std::fs::write(&helper, script).unwrap();
        run(dir.path(), "chmod", &["755", helper.to_str().unwrap()]);
        let path = format!(
            "{}:{}",
            dir.path().display(),
            std::env::var("PATH").unwrap()
        );
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_credential_helper_is_asked"])
            .env("PATH", path)
            .env(AGAIN, dir.path())
            .status()
            .unwrap();
        assert!(status.success());
        return;
    };
    let node = Node::new();
    let front = Front {
        login: Some("me:secret"),
        ..Front::default()
    };
    let (_front, port) = front.start(node.registry.port);
    let name = format!("127.0.0.1:{port}");
    let text = format!("{{\"credHelpers\":{{\"{name}\":\"walnut-test\"}}}}");
    node.write("config.json", &text);
    node.pull(&name).await.unwrap();
    let asked = std::fs::read_to_string(Path::new(&dir).join("asked")).unwrap();
    assert_eq!(asked, format!("get {name}\n"));
}

/// What a push has told: bytes sent of each blob, of how many, and whether it is done.
#[derive(Default)]
struct Told(Mutex<HashMap<String, (u64, u64, bool)>>);

impl Progress for Told {
    fn event(&self, event: Event<'_>) {
        let mut blobs = self.0.lock().unwrap();
        match event {
            Event::LayerBytes {
                digest,
                done,
                total,
            } => {
                let before = blobs.insert(digest.to_string(), (done, total, false));
                assert!(before.is_none_or(|(before, _, _)| before <= done));
            }
            Event::LayerDone { digest, total } => {
                let blob = blobs.entry(digest.to_string()).or_insert((0, total, false));
                blob.2 = true;
            }
            _ => {}
        }
    }
}

impl Told {
    fn all_was_sent(&self) {
        let blobs = self.0.lock().unwrap();
        assert!(blobs.len() > 1);
        for (digest, (done, total, ended)) in blobs.iter() {
            assert!(*ended && done == total, "{digest}: {done} of {total}");
        }
    }
}
