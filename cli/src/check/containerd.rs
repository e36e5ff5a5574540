//! Whether the containerd of this host fits, and knows the runtime.

use std::fs;
use std::process::Command;

use sandbox::config::TaskApi;

use super::{Finding, Verdict, finding};

/// The name of our runtime in configurations.
const RUNTIME: &str = "kata-rs";
/// What tells a containerd about the runtime.
const CURE: &str =
    "only Kubernetes needs it: run kata-rs-configure (or deploy/install), and restart containerd";

/// k3s and RKE2 have a containerd of their own, whose configuration they write here at each start.
const RANCHER: [(&str, &str); 2] = [
    ("k3s", "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"),
    ("RKE2", "/var/lib/rancher/rke2/agent/etc/containerd/config.toml"),
];

/// One finding for each containerd; one that says so when there is none.
pub fn findings(task_api: TaskApi) -> Vec<Finding> {
    let mut findings: Vec<Finding> = RANCHER
        .into_iter()
        .filter_map(|(name, path)| {
            let text = fs::read_to_string(path).ok()?;
            let (verdict, knows) = if text.contains(RUNTIME) {
                (Verdict::Good, "knows")
            } else {
                (Verdict::Warning, "does not know")
            };
            Some(finding(
                "containerd",
                verdict,
                format!("that of {name} {knows} the runtime {RUNTIME}"),
                CURE,
            ))
        })
        .collect();
    match output(&["--version"]) {
        Some(text) => findings.push(of_path(&text, task_api)),
        None if findings.is_empty() => findings.push(finding(
            "containerd",
            Verdict::Warning,
            "not in PATH",
            "containerd 1.7 or newer runs containers with kata-rs; `kata-rs run` needs none",
        )),
        None => {}
    }
    findings
}

/// The containerd in PATH, which says that it is this version.
fn of_path(text: &str, task_api: TaskApi) -> Finding {
    let Some((major, minor, version)) = version(text) else {
        return finding(
            "containerd",
            Verdict::Warning,
            format!("its version is not understood: {}", text.trim()),
            "use containerd 1.7 or newer",
        );
    };
    if (major, minor) < (1, 7) {
        return finding(
            "containerd",
            Verdict::Warning,
            format!("version {version}"),
            "use containerd 1.7 or newer",
        );
    }
    if major == 1 && task_api != TaskApi::V2 {
        return finding(
            "containerd",
            Verdict::Warning,
            format!("version {version}, which speaks version 2 of the task API only"),
            "set task_api = \"2\" in /etc/kata-rs/config.toml",
        );
    }
    // `config dump` leaves out what containerd 2 would migrate from an older configuration; `config migrate` has it.
    let configured = [["config", "dump"], ["config", "migrate"]]
        .iter()
        .any(|words| output(words).is_some_and(|text| has_runtime(&text)));
    if configured {
        finding(
            "containerd",
            Verdict::Good,
            format!("version {version}, with the runtime {RUNTIME}"),
            "",
        )
    } else {
        finding(
            "containerd",
            Verdict::Warning,
            format!("version {version}, without the runtime {RUNTIME} in its configuration"),
            CURE,
        )
    }
}

/// What containerd prints, if it can be run and is content.
fn output(words: &[&str]) -> Option<String> {
    let output = Command::new("containerd").args(words).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a configuration has a table for our runtime.
fn has_runtime(config: &str) -> bool {
    config.lines().any(|line| {
        line.trim_end()
            .ends_with(&format!("containerd.runtimes.{RUNTIME}]"))
    })
}

/// Major and minor number and the whole version in the words of `containerd --version`.
fn version(text: &str) -> Option<(u32, u32, &str)> {
    text.split_whitespace().find_map(|word| {
        let word = word.strip_prefix('v').unwrap_or(word);
        let mut parts = word.split('.');
        let major = parts.next()?.parse().ok()?;
        let minor = parts.next()?.parse().ok()?;
        parts.next()?;
        Some((major, minor, word))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_containerds_words() {
        let debian = "containerd github.com/containerd/containerd/v2 2.1.9+unknown \n";
        assert_eq!(version(debian), Some((2, 1, "2.1.9+unknown")));
        let upstream = "containerd containerd.io v1.7.24 88bf19b\n";
        assert_eq!(version(upstream), Some((1, 7, "1.7.24")));
        assert_eq!(version("containerd"), None);
    }

    #[test]
    fn old_containerds_are_told_what_they_need() {
        let cure = |text, api| of_path(text, api).cure;
        assert!(
            cure("containerd x v1.6.20 y", TaskApi::Auto)
                .unwrap()
                .contains("1.7")
        );
        assert!(
            cure("containerd x v1.7.24 y", TaskApi::Auto)
                .unwrap()
                .contains("task_api")
        );
        assert!(cure("nonsense", TaskApi::Auto).is_some());
    }

    #[test]
    fn a_configuration_has_the_runtime_by_a_table_of_its_own() {
        assert!(has_runtime(
            "  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata-rs]\n"
        ));
        assert!(!has_runtime(
            "[plugins.'x'.containerd.runtimes.runc]\n# containerd.runtimes.kata-rs] is missing\n"
        ));
    }
}
