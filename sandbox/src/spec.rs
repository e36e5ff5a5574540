//! What a sandbox is made from, and reading it out of an OCI specification.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::annotations::Role;
use crate::config::Config;
use crate::error::Error;
use crate::namespaces;
use crate::sizing::Sizing;

/// Where the pod's host-side network is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Netns {
    /// In the network namespace of this process: the specification asks for none.
    Host,
    /// In a new network namespace, made with the container's host process.
    New,
    /// In the one at this path.
    Path(PathBuf),
}

impl Netns {
    /// What a specification asks for.
    #[must_use]
    pub fn from_oci(spec: &Spec) -> Self {
        let namespace = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.namespaces().as_ref())
            .and_then(|list| list.iter().find(|ns| ns.typ() == LinuxNamespaceType::Network));
        match namespace.map(oci_spec::runtime::LinuxNamespace::path) {
            None => Self::Host,
            Some(Some(path)) if !path.as_os_str().is_empty() => Self::Path(path.clone()),
            Some(_) => Self::New,
        }
    }
}

/// The /dev/shm of a pod whose sandbox says nothing of one, as containerd's and CRI-O's pods have it.
const DEFAULT_SHM_BYTES: u64 = 64 << 20;

/// What a sandbox is made from.
#[derive(Clone, Debug)]
pub struct SandboxSpec {
    /// Names the sandbox; its first container's id, or the pod's.
    pub id: String,
    /// The caller's namespace, in which the id is unique; told to log programs (`binary://`). May be empty.
    pub namespace: String,
    /// vCPUs and memory.
    pub sizing: Sizing,
    /// Whether it is a pod of CRI's, and not a container of its own.
    pub in_pod: bool,
    /// The pod's host name.
    pub hostname: Option<String>,
    /// The pod's network namespace on the host.
    pub netns: Netns,
    /// Where on the host the VM's resource use is counted: `linux.cgroupsPath`.
    pub cgroups_path: Option<PathBuf>,
    /// The VMM's `oom_score_adj`, -1000 to 1000 (proc_pid_oom_score_adj(5)).
    pub oom_score_adj: i32,
    /// The pod's sysctls, by dotted or slashed name.
    pub sysctls: BTreeMap<String, String>,
    /// Size in bytes of a /dev/shm that the pod's containers share; 0 when each has its own.
    pub shm_bytes: u64,
}

impl SandboxSpec {
    /// Reads it from the specification of the sandbox's first container.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the resources it asks for make no VM, [`Error::Namespace`] when it asks for what no VM has.
    pub fn from_oci(id: &str, spec: &Spec, config: &Config) -> Result<Self, Error> {
        namespaces::check(spec, config)?;
        let sizing = Sizing::from_oci(spec, config).map_err(|error| Error::Invalid(error.to_string()))?;
        Ok(Self {
            id: id.to_owned(),
            namespace: String::new(),
            sizing,
            in_pod: Role::of(spec) != Role::Alone,
            hostname: spec.hostname().clone().filter(|name| !name.is_empty()),
            netns: Netns::from_oci(spec),
            cgroups_path: spec
                .linux()
                .as_ref()
                .and_then(|linux| linux.cgroups_path().clone()),
            oom_score_adj: spec
                .process()
                .as_ref()
                .and_then(|process| process.oom_score_adj())
                .unwrap_or(0),
            sysctls: pod_sysctls(spec),
            shm_bytes: match (crate::storage::shm_bytes(spec), Role::of(spec)) {
                (0, Role::Sandbox) => DEFAULT_SHM_BYTES,
                (bytes, _) => bytes,
            },
        })
    }
}

/// The sysctls of a pod: its sandbox has no process for which they could be set later, and no others set them.
fn pod_sysctls(spec: &Spec) -> BTreeMap<String, String> {
    match (
        Role::of(spec),
        spec.linux().as_ref().and_then(|linux| linux.sysctl().as_ref()),
    ) {
        (Role::Sandbox, Some(sysctls)) => sysctls.clone().into_iter().collect(),
        _ => BTreeMap::new(),
    }
}
