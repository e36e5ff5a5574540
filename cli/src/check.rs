//! `check`: whether this host can run microVMs, each finding with its cure.

mod containerd;
mod modules;

use std::fs::{self, File};
use std::io;
use std::path::Path;

use sandbox::Config;
use serde::Serialize;

use crate::error::Error;

use self::modules::Modules;

/// The oldest host kernel whose mount and pidfd system calls are all there (fsopen, clone3, openat2, mount_setattr).
const OLDEST_KERNEL: (u32, u32) = (5, 12);

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    subject: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do about it, unless all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    cure: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Good,
    /// Works, but not as well as it could.
    Warning,
    /// Containers will not run.
    Bad,
}

#[derive(Serialize)]
struct Report {
    fit: bool,
    findings: Vec<Finding>,
}

/// Prints the findings; the status is 1 when containers will not run.
pub fn check(json: bool) -> Result<u8, Error> {
    let mut findings = vec![
        user(),
        processor(),
        kvm(),
        kernel(),
        overlay(),
        cgroup(),
        memory(),
        descriptors(),
        tap(),
    ];
    findings.extend(kernel_parts(&Modules::of_this_host()));
    match Config::load(None) {
        Ok(config) => {
            findings.extend(files(&config));
            findings.extend(containerd::findings(config.task_api()));
        }
        Err(error) => findings.push(finding(
            "configuration",
            Verdict::Bad,
            error.to_string(),
            "correct the file named",
        )),
    }
    let report = Report {
        fit: findings.iter().all(|finding| finding.verdict != Verdict::Bad),
        findings,
    };
    if json {
        let text = serde_json::to_string_pretty(&report)
            .map_err(|error| Error::host("cannot write the findings")(error.into()))?;
        println!("{text}");
    } else {
        for finding in &report.findings {
            let mark = match finding.verdict {
                Verdict::Good => "ok  ",
                Verdict::Warning => "warn",
                Verdict::Bad => "BAD ",
            };
            println!("{mark}  {:<16} {}", finding.subject, finding.found);
            if let Some(cure) = &finding.cure {
                println!("      {:<16} -> {cure}", "");
            }
        }
    }
    Ok(u8::from(!report.fit))
}

fn finding(subject: &'static str, verdict: Verdict, found: impl Into<String>, cure: &str) -> Finding {
    let cure = (verdict != Verdict::Good).then(|| cure.to_owned());
    Finding {
        subject,
        verdict,
        found: found.into(),
        cure,
    }
}

fn user() -> Finding {
    let uid = rustix::process::geteuid();
    let verdict = if uid.is_root() {
        Verdict::Good
    } else {
        Verdict::Bad
    };
    finding(
        "user",
        verdict,
        format!("uid {}", uid.as_raw()),
        "run kata-rs as root (sudo)",
    )
}

fn processor() -> Finding {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |name: &str| {
        flags
            .lines()
            .find(|line| line.starts_with("flags"))
            .is_some_and(|line| line.split(' ').any(|flag| flag == name))
    };
    let (verdict, found) = match (has("svm"), has("vmx")) {
        (true, _) => (Verdict::Good, "AMD-V (svm)"),
        (_, true) => (Verdict::Good, "VT-x (vmx)"),
        _ => (Verdict::Warning, "neither svm nor vmx is announced"),
    };
    finding(
        "processor",
        verdict,
        found,
        "enable virtualisation in the firmware, or nested virtualisation for this VM",
    )
}

fn kvm() -> Finding {
    let path = Path::new("/dev/kvm");
    let kind = ["kvm_amd", "kvm_intel"]
        .into_iter()
        .find(|module| Path::new("/sys/module").join(module).exists());
    match File::options().read(true).write(true).open(path) {
        Ok(_) => match kind {
            Some(module) => finding("kvm", Verdict::Good, format!("/dev/kvm by {module}"), ""),
            None => finding(
                "kvm",
                Verdict::Warning,
                "/dev/kvm by neither kvm_amd nor kvm_intel",
                "a KVM in software may not run the guest kernel: use a host with hardware virtualisation",
            ),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => finding(
            "kvm",
            Verdict::Bad,
            "/dev/kvm does not exist",
            "load the module: modprobe kvm_amd or modprobe kvm_intel; it fails when the firmware has virtualisation off",
        ),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => finding(
            "kvm",
            Verdict::Bad,
            "/dev/kvm may not be opened for reading and writing",
            "add the user to the group that owns it: usermod -aG kvm USER",
        ),
        Err(error) => finding(
            "kvm",
            Verdict::Bad,
            format!("/dev/kvm: {error}"),
            "see the kernel's log: dmesg | grep -i kvm",
        ),
    }
}

fn kernel() -> Finding {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let verdict = match version(&release) {
        Some(version) if version >= OLDEST_KERNEL => Verdict::Good,
        _ => Verdict::Bad,
    };
    let (major, minor) = OLDEST_KERNEL;
    finding(
        "kernel",
        verdict,
        release,
        &format!("use Linux {major}.{minor} or newer"),
    )
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn overlay() -> Finding {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known
        .lines()
        .any(|line| line.trim_start_matches("nodev").trim() == "overlay")
    {
        return finding("overlayfs", Verdict::Good, "present", "");
    }
    finding(
        "overlayfs",
        Verdict::Warning,
        "not loaded",
        "it is loaded on first use; if that fails: modprobe overlay",
    )
}

fn cgroup() -> Finding {
    match fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") {
        Ok(controllers) => finding("cgroup v2", Verdict::Good, controllers.trim(), ""),
        Err(_) => finding(
            "cgroup v2",
            Verdict::Warning,
            "not at /sys/fs/cgroup",
            "the VMM's own resources are not accounted; boot with systemd.unified_cgroup_hierarchy=1",
        ),
    }
}

fn memory() -> Finding {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = info
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .trim()
                .strip_suffix(" kB")?
                .trim()
                .parse::<u64>()
                .ok()
        })
        .map_or(0, |kib| kib / 1024);
    let verdict = if available >= 256 {
        Verdict::Good
    } else {
        Verdict::Warning
    };
    finding(
        "memory",
        verdict,
        format!("{available} MiB available"),
        "a small VM touches about 100 MiB: free some memory",
    )
}

fn descriptors() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let verdict = if limit.is_none_or(|limit| limit >= 65_536) {
        Verdict::Good
    } else {
        Verdict::Warning
    };
    let found = limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
    finding(
        "open files",
        verdict,
        found,
        "shared directories need many descriptors: ulimit -Hn 1048576 (LimitNOFILE=)",
    )
}

fn tap() -> Finding {
    let path = Path::new("/dev/net/tun");
    match File::options().read(true).write(true).open(path) {
        Ok(_) => finding("network", Verdict::Good, path.display().to_string(), ""),
        Err(error) => finding(
            "network",
            Verdict::Warning,
            format!("{}: {error}", path.display()),
            "containers get no network; modprobe tun",
        ),
    }
}

/// What of the kernel only some containers need, and who.
fn kernel_parts(modules: &Modules) -> Vec<Finding> {
    let part = |subject, names: &[&str], found: &str, need: &str| {
        let missing = modules.missing(names);
        if missing.is_empty() {
            return finding(subject, Verdict::Good, found, "");
        }
        finding(
            subject,
            Verdict::Warning,
            format!("the kernel has no {}", missing.join(", ")),
            &format!("{need}: install the kernel's full set of modules"),
        )
    };
    vec![
        part(
            "redirection",
            &["sch_ingress", "cls_u32", "act_mirred"],
            "traffic control can redirect packets",
            "containers get no network",
        ),
        part(
            "port forwarding",
            &["nf_tables", "nft_chain_nat", "nft_redir"],
            "nftables can redirect connections",
            "kubectl port-forward does not work",
        ),
        part(
            "erofs",
            &["erofs"],
            "the kernel has it",
            "containerd's erofs snapshotter does not work",
        ),
    ]
}

fn files(config: &Config) -> Vec<Finding> {
    let file = |subject, path: &Path, cure: &str| match File::open(path) {
        Ok(_) => finding(subject, Verdict::Good, path.display().to_string(), ""),
        Err(error) => finding(
            subject,
            Verdict::Bad,
            format!("{}: {error}", path.display()),
            cure,
        ),
    };
    vec![
        file(
            "guest kernel",
            config.kernel(),
            "make kernel && make install, or set `kernel` in the configuration",
        ),
        file(
            "guest image",
            config.guest_image(),
            "make image && make install, or set `guest_image` in the configuration",
        ),
        file("VMM", config.vmm(), "make install"),
        file("task process", config.task(), "make install"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_the_kernel_lacks_is_named_with_what_needs_it() {
        for finding in kernel_parts(&Modules::of_this_host()) {
            assert_ne!(finding.verdict, Verdict::Bad, "{finding:?}");
            assert_eq!(
                finding.verdict == Verdict::Good,
                finding.cure.is_none(),
                "{finding:?}"
            );
        }
    }

    #[test]
    fn kernel_releases_are_compared_by_number() {
        assert_eq!(version("6.12.41+deb13-amd64"), Some((6, 12)));
        assert_eq!(version("5.4.0"), Some((5, 4)));
        assert!(version("5.4.0").unwrap() < OLDEST_KERNEL && version("6.1-x").unwrap() > OLDEST_KERNEL);
        assert_eq!(version("strange"), None);
    }

    #[test]
    fn a_bad_finding_names_its_cure_and_a_good_one_none() {
        assert_eq!(finding("x", Verdict::Bad, "y", "z").cure.as_deref(), Some("z"));
        assert!(finding("x", Verdict::Good, "y", "z").cure.is_none());
    }
}
