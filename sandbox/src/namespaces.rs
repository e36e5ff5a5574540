//! What a specification's namespaces mean for a VM. Paths name namespaces of the host: they are never opened, only
//! recognised by the pids of this sandbox's own host processes. The network's is in `spec`.
//!
//! A pod's containers share the guest's IPC and UTS namespaces. Their pid namespaces are each their own, the pod's,
//! another container's, or the guest's, which is all that "the host's" can mean in a VM.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use protobuf::well_known_types::empty::Empty;
use protocol::agent::create_container_request::Pid_namespace;

use crate::annotations::Role;
use crate::config::{Config, HostNetwork};
use crate::error::ErrorKind;

/// Why a container cannot have the namespaces it asks for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NamespaceError {
    /// A pod in the host's network namespace.
    #[error(
        "the pod asks for the host's network (hostNetwork: true), which a virtual machine does not have: remove \
         hostNetwork, or run the pod with another RuntimeClass; `host_network = \"none\"` in the configuration of \
         kata-rs lets such pods run without any network"
    )]
    HostNetwork,
    /// A pod in the host's IPC namespace.
    #[error(
        "the pod asks for the host's IPC namespace (hostIPC: true), which a virtual machine does not have: remove \
         hostIPC, or run the pod with another RuntimeClass"
    )]
    HostIpc,
    /// A user namespace.
    #[error(
        "user namespaces are not supported: set hostUsers: true in the pod's specification, or remove the user \
         namespace; root in the container is root of a virtual machine only"
    )]
    User,
    /// A namespace that belongs to something else on the host.
    #[error(
        "the {kind} namespace {path} cannot be joined: it is none of this pod's, and a virtual machine has none of the \
         host's"
    )]
    Foreign {
        /// `pid`, `ipc`, `uts`.
        kind: &'static str,
        /// Where the specification has it.
        path: PathBuf,
    },
    /// A namespace that another container has for itself.
    #[error(
        "the {kind} namespace of container {container} cannot be joined: join the pod's sandbox, whose {kind} namespace \
         all containers of a pod share"
    )]
    NotShared {
        /// `ipc`, `uts`.
        kind: &'static str,
        /// Whose it is.
        container: String,
    },
}

impl NamespaceError {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidArgument
    }
}

/// Who is behind a pid of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The pod's sandbox.
    Sandbox,
    /// The sandbox of a pod with `hostPID: true`.
    HostPidSandbox,
    /// This container's init.
    Container(String),
}

/// Refuses what no container of a pod can have, before anything is started for it.
///
/// # Errors
/// [`NamespaceError`].
pub fn check(spec: &Spec, config: &Config) -> Result<(), NamespaceError> {
    let of = |kind| find(spec, kind).is_some();
    if of(LinuxNamespaceType::User) {
        return Err(NamespaceError::User);
    }
    if Role::of(spec) == Role::Alone {
        return Ok(());
    }
    if !of(LinuxNamespaceType::Network) && config.host_network() == HostNetwork::Refuse {
        return Err(NamespaceError::HostNetwork);
    }
    if !of(LinuxNamespaceType::Ipc) {
        return Err(NamespaceError::HostIpc);
    }
    Ok(())
}

/// What a container's namespaces are: checks that they can be had, and returns where its processes live. `owner` says
/// who of this sandbox has a pid.
///
/// # Errors
/// [`NamespaceError`].
pub(crate) fn resolve(
    spec: &Spec,
    owner: impl Fn(u32) -> Option<Owner>,
) -> Result<Pid_namespace, NamespaceError> {
    for (kind, name) in [(LinuxNamespaceType::Ipc, "ipc"), (LinuxNamespaceType::Uts, "uts")] {
        let Some(path) = find(spec, kind).and_then(joined) else {
            continue;
        };
        match owner_of(path, name, &owner) {
            Some(Owner::Sandbox | Owner::HostPidSandbox) => {}
            Some(Owner::Container(container)) => {
                return Err(NamespaceError::NotShared {
                    kind: name,
                    container,
                });
            }
            // CRI-O keeps a pod's namespaces by files.
            None if Role::of(spec) == Role::Member && !path.starts_with("/proc") => {}
            None => return Err(foreign(name, path)),
        }
    }
    if wants_host_pids(spec) {
        return Ok(Pid_namespace::GuestPidNamespace(Empty::new()));
    }
    let Some(path) = find(spec, LinuxNamespaceType::Pid).and_then(joined) else {
        return Ok(Pid_namespace::OwnPidNamespace(Empty::new()));
    };
    // Containers of a pod in the host's pid namespace name their sandbox, which is in it.
    match owner_of(path, "pid", &owner) {
        Some(Owner::Sandbox) => Ok(Pid_namespace::PodPidNamespace(Empty::new())),
        Some(Owner::HostPidSandbox) => Ok(Pid_namespace::GuestPidNamespace(Empty::new())),
        Some(Owner::Container(container)) => Ok(Pid_namespace::PidNamespaceOf(container)),
        None => Err(foreign("pid", path)),
    }
}

/// Whether a specification asks for the host's pid namespace: by none of its own, or by that of the host's first
/// process, for callers that cannot leave it out (`ctr run --with-ns`).
pub(crate) fn wants_host_pids(spec: &Spec) -> bool {
    find(spec, LinuxNamespaceType::Pid)
        .is_none_or(|namespace| joined(namespace) == Some(Path::new("/proc/1/ns/pid")))
}

fn foreign(kind: &'static str, path: &Path) -> NamespaceError {
    NamespaceError::Foreign {
        kind,
        path: path.to_owned(),
    }
}

fn find(spec: &Spec, kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
    let list = spec.linux().as_ref()?.namespaces().as_ref()?;
    list.iter().find(|namespace| namespace.typ() == kind)
}

/// The path of a namespace that exists already.
fn joined(namespace: &LinuxNamespace) -> Option<&Path> {
    let path = namespace.path().as_deref()?;
    (!path.as_os_str().is_empty()).then_some(path)
}

/// Who is behind `/proc/<pid>/ns/<name>`.
fn owner_of(path: &Path, name: &str, owner: impl Fn(u32) -> Option<Owner>) -> Option<Owner> {
    let pid = path.strip_prefix("/proc").ok()?.to_str()?.strip_suffix(name)?;
    owner(pid.strip_suffix("/ns/")?.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(kind: &str, namespaces: &str) -> Spec {
        let annotations = match kind {
            "" => "{}".to_owned(),
            kind => format!(r#"{{"io.kubernetes.cri.container-type":"{kind}"}}"#),
        };
        serde_json::from_str(&format!(
            r#"{{"ociVersion":"1.2.0","annotations":{annotations},"linux":{{"namespaces":{namespaces}}}}}"#
        ))
        .unwrap()
    }

    fn owner(pid: u32) -> Option<Owner> {
        match pid {
            10 => Some(Owner::Sandbox),
            9 => Some(Owner::HostPidSandbox),
            11 => Some(Owner::Container("c".into())),
            _ => None,
        }
    }

    #[test]
    fn pid_namespaces_are_recognised_by_the_pids_of_this_sandbox() {
        let pid = |list: &str| resolve(&spec("container", list), owner);
        let at = |path: &str| pid(&format!(r#"[{{"type":"pid","path":"{path}"}}]"#));
        let own = Pid_namespace::OwnPidNamespace(Empty::new());
        assert_eq!(pid(r#"[{"type":"pid"}]"#), Ok(own.clone()));
        assert_eq!(at(""), Ok(own));
        let guests = Pid_namespace::GuestPidNamespace(Empty::new());
        assert_eq!(pid("[]"), Ok(guests.clone()));
        assert_eq!(at("/proc/1/ns/pid"), Ok(guests.clone()));
        assert_eq!(
            at("/proc/10/ns/pid"),
            Ok(Pid_namespace::PodPidNamespace(Empty::new()))
        );
        assert_eq!(at("/proc/9/ns/pid"), Ok(guests));
        assert_eq!(
            at("/proc/11/ns/pid"),
            Ok(Pid_namespace::PidNamespaceOf("c".into()))
        );
        for path in [
            "/proc/12/ns/pid",
            "/proc/1/ns/net",
            "/proc/10/ns/net",
            "/proc/10/../10/ns/pid",
            "/proc/x/ns/pid",
            "/run/pidns/x",
        ] {
            let error = at(path).unwrap_err();
            assert!(error.to_string().contains(path), "{error}");
        }
    }

    #[test]
    fn ipc_and_uts_namespaces_are_the_pods_or_nobodys() {
        let at = |kind: &str, path: &str| {
            let list = format!(r#"[{{"type":"pid"}},{{"type":"ipc","path":"{path}"}}]"#);
            resolve(&spec(kind, &list), owner)
        };
        assert!(at("container", "/proc/10/ns/ipc").is_ok());
        assert!(at("container", "/var/run/ipcns/0b7e").is_ok());
        assert!(at("", "/var/run/ipcns/0b7e").is_err());
        assert!(at("container", "/proc/1/ns/ipc").is_err());
        assert!(matches!(
            at("container", "/proc/11/ns/ipc"),
            Err(NamespaceError::NotShared { container, .. }) if container == "c"
        ));
    }

    #[test]
    fn what_a_vm_does_not_have_is_refused_with_the_cure() {
        let config = Config::default();
        let refused = |kind: &str, list: &str| check(&spec(kind, list), &config).unwrap_err().to_string();
        for kind in ["sandbox", "container"] {
            assert!(refused(kind, r#"[{"type":"ipc"}]"#).contains("host_network"));
            assert!(refused(kind, r#"[{"type":"network"}]"#).contains("remove hostIPC"));
        }
        assert!(refused("", r#"[{"type":"user"}]"#).contains("hostUsers: true"));
        assert_eq!(check(&spec("", "[]"), &config), Ok(()));
        let allowing = Config::parse("host_network = \"none\"", "test").unwrap();
        assert_eq!(check(&spec("sandbox", r#"[{"type":"ipc"}]"#), &allowing), Ok(()));
    }
}
