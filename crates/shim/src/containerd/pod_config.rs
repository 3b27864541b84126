//! What Kubernetes says of a pod (CRI v1 `PodSandboxConfig`), as far as it is of its
//! machine. containerd gives it to a shim that makes sandboxes.
//!
//! Read by hand: of its several hundred fields fifteen matter here.

use std::collections::HashMap;

use containerd_shim_protos::protobuf::{
    self, CodedInputStream, rt::skip_field_for_tag, well_known_types::any::Any,
};
use walnut_sandbox::{Error, PodLimits, PodRequest, Result};

/// The message, in its package.
const CONFIG: &str = "runtime.v1.PodSandboxConfig";
/// Annotations that are for us; others may not pass for containerd's own.
const OURS: &str = "dev.walnut.";
/// `NamespaceMode`: shared by the pod's containers.
const POD: u64 = 0;

/// Kernel settings that containerd 2 gives pods with a network of their own, so that
/// anybody in them may listen on low ports and ping.
const NETWORK_SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

/// What a pod is to be. Without a configuration, as from clients other than Kubernetes, it
/// is the usual one.
pub(crate) fn read(options: Option<&Any>, network_namespace: &str) -> Result<PodRequest> {
    let mut request = match options.filter(|any| !any.type_url.is_empty()) {
        None => PodRequest::default(),
        Some(any) => {
            let kind = any.type_url.rsplit('/').next().unwrap_or_default();
            if kind != CONFIG {
                return Err(Error::Invalid(format!(
                    "create the sandbox: its options are of an unknown kind, {kind:?}; give {CONFIG}"
                )));
            }
            let (request, shares_pids) = config(&any.value)
                .map_err(|e| Error::Invalid(format!("read the pod's configuration: {e}")))?;
            if shares_pids {
                return Err(Error::Invalid(
                    "create the sandbox: its containers are to see each other's processes, and without a pause container nothing holds a PID namespace for them; have containerd make this runtime's sandboxes (sandboxer = \"podsandbox\")".into(),
                ));
            }
            request
        }
    };
    if !network_namespace.is_empty() {
        request.network_namespace = Some(network_namespace.into());
        for (name, value) in NETWORK_SYSCTLS {
            let sysctls = &mut request.sysctls;
            sysctls.entry(name.into()).or_insert_with(|| value.into());
        }
    }
    Ok(request)
}

/// A field's value, if it is a number or bytes.
enum Value {
    Number(u64),
    Bytes(Vec<u8>),
}

impl Value {
    fn number(&self) -> u64 {
        match self {
            Self::Number(number) => *number,
            Self::Bytes(_) => 0,
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Number(_) => &[],
            Self::Bytes(bytes) => bytes,
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(self.bytes()).into_owned()
    }
}

/// A message's fields, in their order.
fn fields(bytes: &[u8]) -> protobuf::Result<Vec<(u32, Value)>> {
    const VARINT: u32 = 0;
    const LENGTH_DELIMITED: u32 = 2;
    let mut stream = CodedInputStream::from_bytes(bytes);
    let mut fields = Vec::new();
    while let Some(tag) = stream.read_raw_tag_or_eof()? {
        match tag & 7 {
            VARINT => fields.push((tag >> 3, Value::Number(stream.read_uint64()?))),
            LENGTH_DELIMITED => fields.push((tag >> 3, Value::Bytes(stream.read_bytes()?))),
            _ => skip_field_for_tag(tag, &mut stream)?,
        }
    }
    Ok(fields)
}

/// An entry of a `map<string, string>`.
fn entry(bytes: &[u8]) -> protobuf::Result<(String, String)> {
    let (mut key, mut value) = (String::new(), String::new());
    for (number, field) in fields(bytes)? {
        match number {
            1 => key = field.text(),
            2 => value = field.text(),
            _ => {}
        }
    }
    Ok((key, value))
}

/// `PodSandboxConfig`, and whether its containers share a PID namespace: they do unless
/// something else is said.
fn config(bytes: &[u8]) -> protobuf::Result<(PodRequest, bool)> {
    let mut request = PodRequest::default();
    let mut pids = POD;
    for (number, field) in fields(bytes)? {
        match number {
            2 => request.hostname = field.text(),
            4 => request.resolv_conf = resolv_conf(field.bytes())?,
            7 => {
                let (key, value) = entry(field.bytes())?;
                if key.starts_with(OURS) {
                    request.annotations.insert(key, value);
                }
            }
            8 => pids = linux(field.bytes(), &mut request)?,
            _ => {}
        }
    }
    Ok((request, pids == POD))
}

/// `DNSConfig`, as the file that says it.
fn resolv_conf(bytes: &[u8]) -> protobuf::Result<Option<String>> {
    let mut lists: HashMap<u32, Vec<String>> = HashMap::new();
    for (number, field) in fields(bytes)? {
        lists.entry(number).or_default().push(field.text());
    }
    let mut text = String::new();
    let mut line = |word: &str, values: &[String]| {
        if !values.is_empty() {
            text.push_str(&format!("{word} {}\n", values.join(" ")));
        }
    };
    let list = |number| lists.get(&number).map_or(&[][..], Vec::as_slice);
    line("search", list(2));
    for server in list(1) {
        line("nameserver", std::slice::from_ref(server));
    }
    line("options", list(3));
    Ok((!text.is_empty()).then_some(text))
}

/// `LinuxPodSandboxConfig`; the mode of its PID namespace.
fn linux(bytes: &[u8], request: &mut PodRequest) -> protobuf::Result<u64> {
    let mut pids = POD;
    for (number, field) in fields(bytes)? {
        match number {
            2 => {
                for (number, field) in fields(field.bytes())? {
                    if number == 1 {
                        pids = pid_mode(field.bytes())?;
                    }
                }
            }
            3 => {
                let (key, value) = entry(field.bytes())?;
                request.sysctls.insert(key, value);
            }
            5 => request.limits = limits(field.bytes())?,
            _ => {}
        }
    }
    Ok(pids)
}

/// `NamespaceOption`.
fn pid_mode(bytes: &[u8]) -> protobuf::Result<u64> {
    const PID: u32 = 2;
    let fields = fields(bytes)?;
    let mode = fields.iter().rev().find(|(number, _)| *number == PID);
    Ok(mode.map_or(POD, |(_, field)| field.number()))
}

/// `LinuxContainerResources`.
fn limits(bytes: &[u8]) -> protobuf::Result<PodLimits> {
    let mut limits = PodLimits::default();
    for (number, field) in fields(bytes)? {
        let value = field.number().cast_signed();
        match number {
            1 => limits.cpu_period = value,
            2 => limits.cpu_quota = value,
            4 => limits.memory = value,
            _ => {}
        }
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(number: u8, value: &[u8]) -> Vec<u8> {
        let mut field = vec![number << 3 | 2, u8::try_from(value.len()).unwrap()];
        field.extend(value);
        field
    }

    fn pair(number: u8, key: &str, value: &str) -> Vec<u8> {
        let entry = [bytes(1, key.as_bytes()), bytes(2, value.as_bytes())].concat();
        bytes(number, &entry)
    }

    /// A `linux` field whose PID mode is `pids`.
    fn with_pids(pids: u8, more: &[u8]) -> Vec<u8> {
        let options = [vec![1 << 3, 2], vec![2 << 3, pids]].concat();
        let security = bytes(2, &bytes(1, &options));
        bytes(8, &[&security, more].concat())
    }

    fn any(value: Vec<u8>) -> Any {
        Any {
            type_url: format!("type.googleapis.com/{CONFIG}"),
            value,
            ..Any::default()
        }
    }

    #[test]
    fn what_kubernetes_says_of_a_pod_is_understood() {
        let dns = [
            bytes(1, b"10.0.0.1"),
            bytes(1, b"10.0.0.2"),
            bytes(2, b"svc.local"),
            bytes(3, b"ndots:5"),
        ];
        let limits = [vec![1 << 3, 100], vec![2 << 3, 50], vec![4 << 3, 7]].concat();
        let linux = [pair(3, "net.core.somaxconn", "9"), bytes(5, &limits)].concat();
        let config = [
            bytes(1, &bytes(1, b"name")),
            bytes(2, b"web"),
            bytes(4, &dns.concat()),
            pair(7, "dev.walnut.vcpus", "2"),
            pair(7, "io.kubernetes.cri.sandbox-memory", "1"),
            with_pids(1, &linux),
        ];
        let request = read(Some(&any(config.concat())), "").unwrap();
        let want = PodRequest {
            hostname: "web".into(),
            sysctls: HashMap::from([("net.core.somaxconn".into(), "9".into())]),
            annotations: HashMap::from([("dev.walnut.vcpus".into(), "2".into())]),
            network_namespace: None,
            resolv_conf: Some(
                "search svc.local\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
                    .into(),
            ),
            limits: PodLimits {
                memory: 7,
                cpu_quota: 50,
                cpu_period: 100,
            },
        };
        assert_eq!(request, want);
    }

    #[test]
    fn a_network_of_its_own_is_kept_and_open_to_everybody_in_the_pod() {
        let port = "net.ipv4.ip_unprivileged_port_start";
        let linux = with_pids(1, &pair(3, port, "80"));
        let request = read(Some(&any(linux)), "/var/run/netns/x").unwrap();
        let path = request.network_namespace.unwrap();
        assert_eq!(path.to_str(), Some("/var/run/netns/x"));
        assert_eq!(request.sysctls[port], "80");
        let ping = &request.sysctls["net.ipv4.ping_group_range"];
        assert_eq!(ping, "0 2147483647");
        for nothing in [None, Some(&Any::default())] {
            assert_eq!(read(nothing, "").unwrap(), PodRequest::default());
        }
    }

    #[test]
    fn what_cannot_be_had_is_refused() {
        let mut other = any(vec![]);
        other.type_url = "my.Pod".into();
        let cut = any(vec![2 << 3 | 2, 9, b'x']);
        for (any, why) in [
            (other, "my.Pod"),
            (cut, "the pod's configuration"),
            (any(vec![]), "podsandbox"),
            (any(with_pids(0, &[])), "podsandbox"),
        ] {
            let error = read(Some(&any), "").unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert!(read(Some(&any(with_pids(2, &[]))), "").is_ok());
    }
}
