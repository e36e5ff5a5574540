//! Writes the OCI runtime specification of a container from its image and the command line.
//!
//! Defaults are those that docker and containerd give an unprivileged container.

use serde_json::{Value, json};

use crate::arguments::Volume;
use crate::error::Error;
use crate::image::ImageConfig;
use crate::passwd::User;

/// Capabilities of an unprivileged container.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a process shall be, besides what its image says.
#[derive(Debug, Default)]
pub struct ProcessOptions<'a> {
    pub command: &'a [String],
    pub environment: &'a [String],
    pub workdir: Option<&'a str>,
    pub terminal: bool,
}

/// The specification's `process`.
///
/// # Errors
/// [`Error::NoCommand`] when neither image nor command line names one.
pub fn process(image: &ImageConfig, options: &ProcessOptions<'_>, user: &User) -> Result<Value, Error> {
    let mut args = image.entrypoint.clone();
    args.extend_from_slice(if options.command.is_empty() {
        &image.cmd
    } else {
        options.command
    });
    if args.is_empty() {
        return Err(Error::NoCommand);
    }
    let workdir = match (options.workdir, image.working_dir.as_str()) {
        (Some(path), _) => path,
        (None, "") => "/",
        (None, path) => path,
    };
    let mut process = json!({
        "terminal": options.terminal,
        "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups },
        "args": args,
        "env": environment(&image.env, options, user),
        "cwd": workdir,
        "noNewPrivileges": true,
        "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1_048_576_u64, "soft": 1024 }],
    });
    process["capabilities"] = if user.uid == 0 {
        json!({ "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES })
    } else {
        json!({ "bounding": CAPABILITIES })
    };
    Ok(process)
}

/// Later settings of a name win; a name without value passes the caller's on.
fn environment(image: &[String], options: &ProcessOptions<'_>, user: &User) -> Vec<String> {
    let mut all = vec![PATH.to_owned()];
    if let Some(home) = &user.home {
        all.push(format!("HOME={home}"));
    }
    if options.terminal {
        all.push("TERM=xterm".to_owned());
    }
    all.extend_from_slice(image);
    for setting in options.environment {
        if setting.contains('=') {
            all.push(setting.clone());
        } else if let Ok(value) = std::env::var(setting) {
            all.push(format!("{setting}={value}"));
        }
    }
    let name = |setting: &str| setting.split('=').next().unwrap_or_default().to_owned();
    let mut result: Vec<String> = Vec::new();
    for setting in all {
        match result.iter_mut().find(|known| name(known) == name(&setting)) {
            Some(known) => *known = setting,
            None => result.push(setting),
        }
    }
    result
}

/// What a container may use and see of the host.
#[derive(Debug, Default)]
pub struct Limits<'a> {
    pub cpus: Option<f64>,
    pub memory: Option<u64>,
    pub volumes: &'a [Volume],
}

/// The specification's `linux.resources`.
pub fn resources(cpus: Option<f64>, memory: Option<u64>) -> Value {
    const PERIOD: f64 = 100_000.0;
    let mut resources = json!({});
    if let Some(cpus) = cpus {
        // Checked at the command line: between 0.01 and 1024, so the product fits.
        #[allow(clippy::cast_possible_truncation, reason = "in range, see above")]
        let quota = (cpus * PERIOD).round() as i64;
        resources["cpu"] = json!({ "quota": quota, "period": 100_000 });
    }
    if let Some(memory) = memory {
        resources["memory"] = json!({ "limit": memory });
    }
    resources
}

/// The whole specification; the root file system is given apart from it.
pub fn container(name: &str, process: &Value, limits: &Limits<'_>) -> Value {
    let resources = resources(limits.cpus, limits.memory);
    let namespaces = ["pid", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({ "type": kind }));
    json!({
        "ociVersion": "1.2.0",
        "hostname": name.chars().take(63).collect::<String>(),
        "root": { "path": "rootfs", "readonly": false },
        "process": process,
        "mounts": mounts(limits.volumes),
        "linux": {
            "cgroupsPath": format!("/kata-rs/{name}"),
            "namespaces": namespaces,
            "resources": resources,
            "maskedPaths": ["/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
                "/sys/devices/virtual/powercap"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

fn mounts(volumes: &[Volume]) -> Vec<Value> {
    let kernel = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let mut mounts = vec![
        kernel("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        kernel(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        kernel(
            "/dev/pts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        kernel(
            "/dev/shm",
            "tmpfs",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        kernel("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        kernel("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        kernel(
            "/sys/fs/cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        ),
        kernel(
            "/run",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
    ];
    mounts.extend(volumes.iter().map(|volume| {
        let mode = if volume.read_only { "ro" } else { "rw" };
        json!({
            "destination": volume.target, "type": "bind", "source": volume.source,
            "options": ["rbind", "rprivate", mode],
        })
    }));
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_command_replaces_the_images_but_not_its_entry_point() {
        let image = ImageConfig {
            entrypoint: strings(&["/entry"]),
            cmd: strings(&["default"]),
            ..Default::default()
        };
        let args = |command: &[String]| {
            process(
                &image,
                &ProcessOptions {
                    command,
                    ..Default::default()
                },
                &User::default(),
            )
            .unwrap()["args"]
                .clone()
        };
        assert_eq!(args(&[]), json!(["/entry", "default"]));
        assert_eq!(args(&strings(&["other"])), json!(["/entry", "other"]));
        let nothing = process(
            &ImageConfig::default(),
            &ProcessOptions::default(),
            &User::default(),
        );
        assert!(matches!(nothing, Err(Error::NoCommand)));
    }

    #[test]
    fn the_last_setting_of_a_variable_wins() {
        let options = ProcessOptions {
            environment: &strings(&["A=cli", "KATA_RS_ABSENT"]),
            terminal: true,
            ..Default::default()
        };
        let user = User {
            home: Some("/root".into()),
            ..User::default()
        };
        let all = environment(&strings(&["A=image", "PATH=/bin"]), &options, &user);
        assert_eq!(all, ["PATH=/bin", "HOME=/root", "TERM=xterm", "A=cli"]);
    }

    #[test]
    fn the_specification_is_one() {
        let image = ImageConfig {
            cmd: strings(&["sh"]),
            ..Default::default()
        };
        let process = process(&image, &ProcessOptions::default(), &User::default()).unwrap();
        let volumes = [Volume {
            source: "/a".into(),
            target: "/b".into(),
            read_only: true,
        }];
        let limits = Limits {
            cpus: Some(1.5),
            memory: Some(64 << 20),
            volumes: &volumes,
        };
        let text = container("name", &process, &limits).to_string();
        let spec: oci_spec::runtime::Spec = serde_json::from_str(&text).unwrap();
        let resources = spec
            .linux()
            .as_ref()
            .unwrap()
            .resources()
            .as_ref()
            .unwrap()
            .clone();
        assert_eq!(resources.cpu().as_ref().unwrap().quota(), Some(150_000));
        assert_eq!(resources.memory().as_ref().unwrap().limit(), Some(64 << 20));
        assert_eq!(
            spec.mounts()
                .as_ref()
                .unwrap()
                .last()
                .unwrap()
                .destination()
                .to_str(),
            Some("/b")
        );
    }

    #[test]
    fn only_root_has_effective_capabilities() {
        let image = ImageConfig {
            cmd: strings(&["sh"]),
            ..Default::default()
        };
        let user = User {
            uid: 1000,
            ..User::default()
        };
        let process = process(&image, &ProcessOptions::default(), &user).unwrap();
        assert!(process["capabilities"].get("effective").is_none());
    }
}
