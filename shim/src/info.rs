//! What this runtime says of itself: `-version`, and `-info`, which tells containerd (and through it the kubelet) what
//! may be asked of a container.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message as _, MessageField};
use sandbox::capabilities;
use serde_json::json;

use crate::RUNTIME_NAME;

/// The type containerd gives the OCI features structure (runtime-spec, features.md), in JSON.
const FEATURES_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Mounts of a root file system that containerd (2.2 and later, core/mount/manager) leaves to the runtime, as a list of
/// transformations and types.
const ALLOW_MOUNTS: &str = "containerd.io/runtime-allow-mounts";

/// All that its erofs snapshotter uses: layers reach the guest as files, and nothing is mounted, made or formatted on
/// the host.
const ALLOWED_MOUNTS: &str = "mkfs/*,mkdir/*,format/*,erofs";

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum InfoError {
    /// The answer cannot be encoded.
    #[error("cannot encode the runtime's information: {0}")]
    Encode(#[from] protobuf::Error),
}

/// The answer to `-version`.
pub fn version() -> String {
    format!(
        "containerd-shim-kata-rs-v2:\n  Version: {}\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// The answer to `-info`. The options on standard input change nothing about it.
pub fn runtime_info() -> Result<Vec<u8>, InfoError> {
    let info = RuntimeInfo {
        name: RUNTIME_NAME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES_TYPE_URL.to_owned(),
            value: features().to_string().into_bytes(),
            ..Any::default()
        }),
        annotations: [(ALLOW_MOUNTS.to_owned(), ALLOWED_MOUNTS.to_owned())].into(),
        ..RuntimeInfo::default()
    };
    Ok(info.write_to_bytes()?)
}

/// What a container may ask for. Only what the sandbox and its agent do is listed: the kubelet relies on it.
fn features() -> serde_json::Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": ["prestart", "createRuntime", "createContainer", "poststart", "poststop"],
        "mountOptions": MOUNT_OPTIONS.as_slice(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "capabilities": capabilities::NAMES.as_slice(),
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"
                ],
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"]
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}}
        }
    })
}

/// Option words of mounts that sandbox and agent understand. `shared` is not among them: nothing that is mounted in
/// the guest can appear on the host.
const MOUNT_OPTIONS: [&str; 49] = [
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "unbindable",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_valid_and_promise_nothing_untrue() {
        let info = RuntimeInfo::parse_from_bytes(&runtime_info().unwrap()).unwrap();
        assert_eq!(info.name, "io.containerd.kata-rs.v2");
        // What containerd splits at commas and compares with `TRANSFORMATION/*` and the type.
        let allowed = &info.annotations["containerd.io/runtime-allow-mounts"];
        assert_eq!(
            allowed.split(',').collect::<Vec<_>>(),
            ["mkfs/*", "mkdir/*", "format/*", "erofs"]
        );
        assert_eq!(info.features.type_url, FEATURES_TYPE_URL);
        let features: oci_spec::runtime::Features = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features.oci_version_min(), "1.0.0");
        let options = features.mount_options().as_ref().unwrap();
        // What the kubelet looks for before it promises recursive read-only mounts.
        assert!(options.iter().any(|option| option == "rro"));
        assert!(!options.iter().any(|option| option.ends_with("shared")));
        let linux = features.linux().as_ref().unwrap();
        assert!(linux.seccomp().as_ref().unwrap().enabled().unwrap());
        assert!(!linux.apparmor().as_ref().unwrap().enabled().unwrap());
    }
}
