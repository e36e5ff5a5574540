//! A pod's configuration as `CreateSandbox` brings it, put into the form it has without the Sandbox service: the
//! specification of a sandbox container, and files for what CRI mounts into each container. So one way leads on from
//! here, whoever keeps the pod's sandbox.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use protobuf::Message as _;
use serde_json::{Value, json};

use crate::cri::{DNSConfig, LinuxPodSandboxConfig, NamespaceMode, PodSandboxConfig};
use crate::record;

/// The type of a pod's configuration in an `Any`.
const TYPE: &str = "runtime.v1.PodSandboxConfig";

/// What each container of the pod is given at these places unless its specification has something there.
const FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// Names this host's own, for a pod whose configuration has none.
const HOST_RESOLV_CONF: &str = "/etc/resolv.conf";

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum PodConfigError {
    /// It is something else.
    #[error("the options of CreateSandbox are a {0:?}: they must be a {TYPE}")]
    Type(String),
    /// It does not decode.
    #[error("the options of CreateSandbox are no {TYPE}: {0}")]
    Malformed(#[source] protobuf::Error),
    /// A file for the containers cannot be written.
    #[error("cannot write {name} into the sandbox's bundle: {source}")]
    File {
        /// Which.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Reads a pod's configuration. A caller that sends none wants the defaults.
pub fn read(request: &CreateSandboxRequest) -> Result<PodSandboxConfig, PodConfigError> {
    let Some(any) = request.options.as_ref().filter(|any| !any.type_url.is_empty()) else {
        return Ok(PodSandboxConfig::default());
    };
    if any.type_url.rsplit('/').next() != Some(TYPE) {
        return Err(PodConfigError::Type(any.type_url.clone()));
    }
    PodSandboxConfig::parse_from_bytes(&any.value).map_err(PodConfigError::Malformed)
}

/// The specification of the pod's sandbox container, as containerd's `podsandbox` writes it.
pub fn spec(request: &CreateSandboxRequest, config: &PodSandboxConfig) -> Value {
    let linux = config.linux.clone().unwrap_or_default();
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "hostname": config.hostname,
        "annotations": annotations(request, config, &linux),
        "linux": {
            "namespaces": namespaces(request, &linux),
            "sysctl": sysctls(&linux),
        },
    });
    if !linux.cgroup_parent.is_empty() {
        spec["linux"]["cgroupsPath"] = cgroups_path(&linux.cgroup_parent, &request.sandbox_id).into();
    }
    spec
}

/// The pod's annotations, and CRI's own, which nobody may write.
fn annotations(
    request: &CreateSandboxRequest,
    config: &PodSandboxConfig,
    linux: &LinuxPodSandboxConfig,
) -> BTreeMap<String, String> {
    let pods = config.annotations.iter().chain(&request.annotations);
    let mut all: BTreeMap<String, String> = pods
        .filter(|(key, _)| !key.starts_with("io.kubernetes.cri"))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let mut cri = |key: &str, value: String| all.insert(format!("io.kubernetes.cri.{key}"), value);
    cri("container-type", "sandbox".to_owned());
    cri("sandbox-id", request.sandbox_id.clone());
    if let Some(metadata) = config.metadata.as_ref() {
        cri("sandbox-name", metadata.name.clone());
        cri("sandbox-namespace", metadata.namespace.clone());
        cri("sandbox-uid", metadata.uid.clone());
    }
    if let Some(resources) = linux.resources.as_ref() {
        cri("sandbox-cpu-period", resources.cpu_period.to_string());
        cri("sandbox-cpu-quota", resources.cpu_quota.to_string());
        cri("sandbox-cpu-shares", resources.cpu_shares.to_string());
        cri("sandbox-memory", resources.memory_limit_in_bytes.to_string());
    }
    all
}

fn namespaces(request: &CreateSandboxRequest, linux: &LinuxPodSandboxConfig) -> Vec<Value> {
    let options = linux
        .security_context
        .as_ref()
        .and_then(|context| context.namespace_options.as_ref());
    let of_host = |mode: Option<protobuf::EnumOrUnknown<NamespaceMode>>| {
        mode.is_some_and(|mode| mode.enum_value() == Ok(NamespaceMode::NODE))
    };
    let mut list = vec![json!({ "type": "mount" })];
    if !of_host(options.map(|options| options.network)) {
        list.push(json!({ "type": "uts" }));
        list.push(match request.netns_path.as_str() {
            "" => json!({ "type": "network" }),
            path => json!({ "type": "network", "path": path }),
        });
    }
    if !of_host(options.map(|options| options.pid)) {
        list.push(json!({ "type": "pid" }));
    }
    if !of_host(options.map(|options| options.ipc)) {
        list.push(json!({ "type": "ipc" }));
    }
    let users = options.and_then(|options| options.userns_options.as_ref());
    if users.is_some_and(|users| users.mode.enum_value() != Ok(NamespaceMode::NODE)) {
        list.push(json!({ "type": "user" }));
    }
    list
}

/// The pod's kernel parameters, with those that containerd and Docker give every container: any user may listen on any
/// port and send pings.
fn sysctls(linux: &LinuxPodSandboxConfig) -> HashMap<String, String> {
    let mut all = linux.sysctls.clone();
    for (name, value) in [
        ("net.ipv4.ip_unprivileged_port_start", "0"),
        ("net.ipv4.ping_group_range", "0 2147483647"),
    ] {
        all.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    }
    all
}

/// As containerd's CRI names a container's cgroup: in systemd's way below a slice, else as a directory.
fn cgroups_path(parent: &str, id: &str) -> String {
    match parent.trim_end_matches('/').rsplit('/').next() {
        Some(slice) if slice.ends_with(".slice") => format!("{slice}:cri-containerd:{id}"),
        _ => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

/// Writes the files that containers are given.
pub fn write_files(bundle: &Path, config: &PodSandboxConfig) -> Result<(), PodConfigError> {
    let hostname = match config.hostname.as_str() {
        "" => rustix::system::uname().nodename().to_string_lossy().into_owned(),
        name => name.to_owned(),
    };
    let hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
    let resolv_conf = match config.dns_config.as_ref() {
        Some(dns) => resolv_conf(dns),
        None => std::fs::read_to_string(HOST_RESOLV_CONF).unwrap_or_default(),
    };
    for (name, text) in FILES
        .into_iter()
        .zip([&format!("{hostname}\n"), hosts, &resolv_conf])
    {
        record::replace(bundle, name, text.as_bytes())
            .map_err(|source| PodConfigError::File { name, source })?;
    }
    Ok(())
}

/// resolv.conf(5).
fn resolv_conf(dns: &DNSConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

/// Adds the pod's files and its /dev/shm to a container's specification, where that has nothing of its own. A
/// specification that cannot be read is left to the one who reads it next.
pub fn complete(spec_json: Vec<u8>, bundle: &Path) -> Vec<u8> {
    let Ok(mut spec) = serde_json::from_slice::<Value>(&spec_json) else {
        return spec_json;
    };
    let mode = match spec["root"]["readonly"].as_bool() {
        Some(true) => "ro",
        _ => "rw",
    };
    let Some(spec_members) = spec.as_object_mut() else {
        return spec_json;
    };
    let Some(mounts) = spec_members
        .entry("mounts")
        .or_insert_with(|| json!([]))
        .as_array_mut()
    else {
        return spec_json;
    };
    let mut add = |target: String, mount: Value| {
        if !mounts.iter().any(|mount| mount["destination"] == target.as_str()) {
            mounts.push(mount);
        }
    };
    for name in FILES {
        let target = format!("/etc/{name}");
        let mount = json!({
            "destination": target,
            "type": "bind",
            "source": bundle.join(name),
            "options": ["rbind", "rprivate", mode],
        });
        add(target, mount);
    }
    let shm = json!({
        "destination": "/dev/shm",
        "type": "tmpfs",
        "source": "shm",
        "options": ["nosuid", "noexec", "nodev", "mode=1777"],
    });
    add("/dev/shm".to_owned(), shm);
    serde_json::to_vec(&spec).unwrap_or(spec_json)
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;
    use protobuf::well_known_types::any::Any;

    use super::*;
    use crate::cri::{LinuxContainerResources, UserNamespace};

    fn request(config: &PodSandboxConfig) -> CreateSandboxRequest {
        CreateSandboxRequest {
            sandbox_id: "pod".into(),
            netns_path: "/run/netns/n".into(),
            options: MessageField::some(Any {
                type_url: TYPE.into(),
                value: config.write_to_bytes().unwrap(),
                ..Any::default()
            }),
            ..CreateSandboxRequest::default()
        }
    }

    fn kinds(spec: &Value) -> Vec<&str> {
        let list = spec["linux"]["namespaces"].as_array().unwrap();
        list.iter().map(|one| one["type"].as_str().unwrap()).collect()
    }

    #[test]
    fn a_configuration_becomes_a_sandbox_containers_specification() {
        let mut config = PodSandboxConfig {
            hostname: "h".into(),
            linux: MessageField::some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/pod1".into(),
                sysctls: HashMap::from([("net.ipv4.ping_group_range".into(), "0 0".into())]),
                resources: MessageField::some(LinuxContainerResources {
                    cpu_period: 100_000,
                    cpu_quota: 250_000,
                    memory_limit_in_bytes: 268_435_456,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        config.annotations.insert("io.kata-rs.x".into(), "y".into());
        config
            .annotations
            .insert("io.kubernetes.cri.sandbox-memory".into(), "1".into());
        let request = request(&config);
        let spec = spec(&request, &read(&request).unwrap());
        let annotations = &spec["annotations"];
        assert_eq!(annotations["io.kubernetes.cri.container-type"], "sandbox");
        assert_eq!(annotations["io.kubernetes.cri.sandbox-memory"], "268435456");
        assert_eq!(annotations["io.kata-rs.x"], "y");
        assert_eq!(spec["linux"]["cgroupsPath"], "/kubepods/pod1/pod");
        assert_eq!(kinds(&spec), ["mount", "uts", "network", "pid", "ipc"]);
        assert_eq!(spec["linux"]["namespaces"][2]["path"], "/run/netns/n");
        let sysctls = &spec["linux"]["sysctl"];
        assert_eq!(sysctls["net.ipv4.ping_group_range"], "0 0");
        assert_eq!(sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
        serde_json::from_value::<oci_spec::runtime::Spec>(spec).unwrap();
    }

    #[test]
    fn namespaces_of_the_host_are_left_out_and_users_are_named() {
        let mut config = PodSandboxConfig::default();
        let options = config
            .linux
            .mut_or_insert_default()
            .security_context
            .mut_or_insert_default()
            .namespace_options
            .mut_or_insert_default();
        options.network = NamespaceMode::NODE.into();
        options.ipc = NamespaceMode::NODE.into();
        options.pid = NamespaceMode::NODE.into();
        options.userns_options = MessageField::some(UserNamespace {
            mode: NamespaceMode::POD.into(),
            ..Default::default()
        });
        let request = request(&config);
        assert_eq!(kinds(&spec(&request, &config)), ["mount", "user"]);
    }

    #[test]
    fn other_options_are_refused_and_none_are_the_defaults() {
        let mut other = request(&PodSandboxConfig::default());
        other.options.mut_or_insert_default().type_url = "x.Y".into();
        assert!(matches!(read(&other), Err(PodConfigError::Type(_))));
        let mut broken = request(&PodSandboxConfig::default());
        broken.options.mut_or_insert_default().value = b"\x12\x7f".to_vec();
        assert!(matches!(read(&broken), Err(PodConfigError::Malformed(_))));
        assert_eq!(
            read(&CreateSandboxRequest::default()).unwrap(),
            PodSandboxConfig::default()
        );
    }

    #[test]
    fn cgroups_are_named_as_containerd_names_them() {
        assert_eq!(
            cgroups_path("/kubepods/burstable/pod1/", "c"),
            "/kubepods/burstable/pod1/c"
        );
        assert_eq!(
            cgroups_path("/kubepods.slice/kubepods-pod1.slice", "c"),
            "kubepods-pod1.slice:cri-containerd:c"
        );
    }

    #[test]
    fn containers_get_the_pods_files_where_they_have_none() {
        let dir = tempfile::tempdir().unwrap();
        let config = PodSandboxConfig {
            hostname: "h".into(),
            dns_config: MessageField::some(DNSConfig {
                servers: vec!["10.0.0.1".into(), "10.0.0.2".into()],
                searches: vec!["a.b".into(), "c".into()],
                options: vec!["ndots:5".into()],
                ..Default::default()
            }),
            ..Default::default()
        };
        write_files(dir.path(), &config).unwrap();
        let text = |name| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(text("hostname"), "h\n");
        assert_eq!(
            text("resolv.conf"),
            "search a.b c\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
        let given = br#"{"root":{"readonly":true},"mounts":[{"destination":"/etc/hosts","source":"/mine"}]}"#;
        let spec: Value = serde_json::from_slice(&complete(given.to_vec(), dir.path())).unwrap();
        let mounts = spec["mounts"].as_array().unwrap();
        let targets: Vec<&str> = mounts
            .iter()
            .map(|mount| mount["destination"].as_str().unwrap())
            .collect();
        assert_eq!(
            targets,
            ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm"]
        );
        assert_eq!(mounts[0]["source"], "/mine");
        assert_eq!(mounts[1]["options"][2], "ro");
        for broken in [&b"{"[..], b"[]", br#"{"mounts":1}"#] {
            assert_eq!(complete(broken.to_vec(), dir.path()), broken);
        }
    }
}
