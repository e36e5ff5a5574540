//! What kubelet's paths say about a volume (pkg/volume, `<root>/pods/<uid>/…`): the container runtime interface hands
//! over paths only.

use std::path::{Component, Path, PathBuf};

/// Directory that holds a pod's volumes, one directory for each plugin.
const VOLUMES: &str = "volumes";
/// Directory that holds bind mounts of `subPath`s: `<volume>/<container>/<index>`.
const SUB_PATHS: &str = "volume-subpaths";
const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
/// Volumes of small files that kubelet replaces atomically (AtomicWriter).
const FILES: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// The plugin of the volume whose directory this is.
fn plugin(path: &Path) -> Option<&str> {
    let mut parts = path.components().rev();
    let (_name, plugin, volumes) = (parts.next()?, parts.next()?, parts.next()?);
    (volumes.as_os_str() == VOLUMES)
        .then(|| plugin.as_os_str().to_str())
        .flatten()
}

/// Whether this is an emptyDir.
pub(super) fn is_empty_dir(path: &Path) -> bool {
    plugin(path) == Some(EMPTY_DIR)
}

/// Whether this is a configMap, a secret, a projected or a downward API volume.
pub(super) fn holds_api_files(path: &Path) -> bool {
    plugin(path).is_some_and(|plugin| FILES.contains(&plugin))
}

/// The emptyDir whose `subPath` this would be.
pub(super) fn empty_dir_of_sub_path(path: &Path) -> Option<PathBuf> {
    let mut parts: Vec<Component<'_>> = path.components().collect();
    let [.., sub_paths, volume, _container, _index] = parts[..] else {
        return None;
    };
    if sub_paths.as_os_str() != SUB_PATHS {
        return None;
    }
    parts.truncate(parts.len() - 4);
    let pod: PathBuf = parts.into_iter().collect();
    Some(pod.join(VOLUMES).join(EMPTY_DIR).join(volume))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_told_by_their_plugin() {
        let pod = Path::new("/var/lib/kubelet/pods/1-2");
        assert!(is_empty_dir(&pod.join("volumes/kubernetes.io~empty-dir/cache")));
        assert!(!is_empty_dir(
            &pod.join("volumes/kubernetes.io~empty-dir/cache/below")
        ));
        assert!(!is_empty_dir(&pod.join("volumes/kubernetes.io~secret/s")));
        assert!(holds_api_files(
            &pod.join("volumes/kubernetes.io~projected/kube-api-access-x")
        ));
        assert!(!holds_api_files(&pod.join("volumes/kubernetes.io~csi/x/mount")));
        assert!(!holds_api_files(Path::new("/kubernetes.io~secret/s")));
    }

    #[test]
    fn a_sub_path_leads_to_its_volume() {
        assert_eq!(
            empty_dir_of_sub_path(Path::new("/k/pods/1/volume-subpaths/cache/web/0")),
            Some("/k/pods/1/volumes/kubernetes.io~empty-dir/cache".into())
        );
        assert_eq!(
            empty_dir_of_sub_path(Path::new("/k/pods/1/volumes/x/web/0")),
            None
        );
        assert_eq!(empty_dir_of_sub_path(Path::new("/0")), None);
    }
}
