//! What the callers' annotations say of a container: which part of a pod it is.
//!
//! Sizes are read by `sizing`.

use std::collections::HashMap;

use oci_spec::runtime::Spec;

/// containerd's CRI and CRI-O each have their own name for the same mark (containerd,
/// `internal/cri/annotations`; CRI-O, `pkg/annotations`).
const CONTAINER_TYPE: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];

/// What a container is to its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It belongs to no pod of CRI's.
    Alone,
    /// The one that CRI calls the pod's sandbox: elsewhere it runs `pause`, here the VM is the sandbox.
    Sandbox,
    /// One of the pod's containers.
    Member,
}

impl Role {
    /// What a specification's annotations say. A mark with another value counts as a container's.
    #[must_use]
    pub fn of(spec: &Spec) -> Self {
        spec.annotations()
            .as_ref()
            .map_or(Self::Alone, Self::from_annotations)
    }

    pub(crate) fn from_annotations(annotations: &HashMap<String, String>) -> Self {
        match CONTAINER_TYPE.iter().find_map(|key| annotations.get(*key)) {
            None => Self::Alone,
            Some(kind) if kind == "sandbox" => Self::Sandbox,
            Some(_) => Self::Member,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(annotations: &str) -> Role {
        let spec = format!(r#"{{"ociVersion":"1.2.0","annotations":{annotations}}}"#);
        Role::of(&serde_json::from_str(&spec).unwrap())
    }

    #[test]
    fn both_callers_marks_are_known() {
        assert_eq!(role("{}"), Role::Alone);
        assert_eq!(role(r#"{"io.containerd.runc.v2.group":"g"}"#), Role::Alone);
        for key in CONTAINER_TYPE {
            assert_eq!(role(&format!(r#"{{"{key}":"sandbox"}}"#)), Role::Sandbox);
            assert_eq!(role(&format!(r#"{{"{key}":"container"}}"#)), Role::Member);
        }
    }
}
