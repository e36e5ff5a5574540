//! Turns a specification into what the child does, in order. Pure, but for the descriptors it is given.
//!
//! The order is runc's where it can be seen from inside: no_new_privs and a filter that needs no privileges come last,
//! a filter that needs them before they are dropped; the working directory is entered with the agent's rights.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::Gid;
use rustix::process::{Resource, Rlimit};
use rustix::thread::ThreadNameSpaceType;

use super::capabilities::Sets;
use super::child::{Plan, Step, Terminal, User};
use super::exec::Program;
use super::namespaces::Namespaces;
use super::rootfs::{self, c_string};
use super::seccomp::Filter;
use super::spec::{self, SpecError};

/// Standard I/O of a process to be.
#[derive(Debug)]
pub enum Stdio {
    /// Its ends of three descriptors.
    Descriptors([OwnedFd; 3]),
    /// A terminal of this size.
    Terminal { rows: u16, columns: u16 },
}

/// What a container's init is made of, beside its specification.
#[derive(Debug)]
pub struct InitParts<'a> {
    pub id: &'a str,
    pub namespaces: Namespaces,
    pub rootfs: &'a Path,
    /// Prepared mounts, in order.
    pub mounts: Vec<Step>,
    /// Whether /dev is somebody else's.
    pub foreign_dev: bool,
    pub read_only_rootfs: bool,
    pub stdio: Stdio,
}

/// A container's init.
///
/// # Errors
/// [`SpecError`] with the member.
pub fn init(spec: &spec::Spec, parts: InitParts<'_>) -> Result<Plan, SpecError> {
    let process = spec
        .process
        .as_ref()
        .ok_or_else(|| SpecError::invalid("process", "is missing: there is nothing to execute"))?;
    let linux = &spec.linux;
    let mut steps = vec![Step::Session, keyring(parts.id)?];
    steps.push(oom_score(process.oom_score_adj));
    for (key, value) in &linux.sysctl {
        steps.push(sysctl(&format!("linux.sysctl[{key:?}]"), key, value)?);
    }
    if parts.namespaces.own_uts {
        for (name, step) in [
            (&spec.hostname, Step::Hostname as fn(Vec<u8>) -> Step),
            (&spec.domainname, Step::Domainname),
        ] {
            if !name.is_empty() {
                steps.push(step(name.clone().into_bytes()));
            }
        }
    }
    if parts.namespaces.own_cgroup {
        steps.push(Step::CgroupNamespace);
    }
    steps.push(Step::Root(c_string("root", &parts.rootfs.to_string_lossy())?));
    steps.extend(parts.mounts);
    steps.extend(rootfs::devices(linux, parts.foreign_dev)?);
    let cwd = working_directory(process)?;
    steps.push(Step::MakeDirectory(cwd));
    steps.push(stdio(parts.stdio, process.user.uid, true));
    // After the terminal: /dev/console is made in a root that may become read-only.
    steps.extend(rootfs::protection(linux, parts.read_only_rootfs)?);
    if let Some(personality) = &linux.personality {
        steps.push(Step::Personality(parse_personality(personality)?));
    }
    finish(
        steps,
        process,
        process.capabilities.as_ref(),
        linux.seccomp.as_ref(),
    )
}

/// What a further process is made of, beside its specification.
#[derive(Debug)]
pub struct ExecParts<'a> {
    pub id: &'a str,
    /// The container's init.
    pub init: OwnedFd,
    /// The container's specification.
    pub container: &'a spec::Spec,
    pub stdio: Stdio,
}

/// A further process of a container.
///
/// # Errors
/// [`SpecError`] with the member.
pub fn exec(process: &spec::Process, parts: ExecParts<'_>) -> Result<Plan, SpecError> {
    let mut steps = vec![Step::Session, keyring(parts.id)?];
    let of_init = parts.container.process.as_ref();
    let score = of_init.and_then(|init| init.oom_score_adj);
    steps.push(oom_score(process.oom_score_adj.or(score)));
    steps.push(Step::Join {
        init: parts.init.into(),
        types: ThreadNameSpaceType::MOUNT
            | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
            | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
            | ThreadNameSpaceType::CONTROL_GROUP,
    });
    steps.push(stdio(parts.stdio, process.user.uid, false));
    let of_init = of_init.and_then(|init| init.capabilities.as_ref());
    let capabilities = process.capabilities.as_ref().or(of_init);
    finish(
        steps,
        process,
        capabilities,
        parts.container.linux.seccomp.as_ref(),
    )
}

/// What all processes do last.
fn finish(
    mut steps: Vec<Step>,
    process: &spec::Process,
    capabilities: Option<&spec::Capabilities>,
    seccomp: Option<&spec::Seccomp>,
) -> Result<Plan, SpecError> {
    for (index, rlimit) in process.rlimits.iter().enumerate() {
        steps.push(limit(&format!("process.rlimits[{index}]"), rlimit)?);
    }
    let filter = seccomp.map(Filter::compile).transpose()?;
    let mut last_filter = None;
    if process.no_new_privileges {
        steps.push(Step::NoNewPrivileges);
        last_filter = filter;
    } else if let Some(filter) = filter {
        steps.push(Step::Seccomp(filter));
    }
    steps.push(Step::WorkingDirectory(working_directory(process)?));
    steps.push(Step::User(User {
        uid: process.user.uid,
        gid: process.user.gid,
        additional_gids: process
            .user
            .additional_gids
            .iter()
            .copied()
            .map(Gid::from_raw)
            .collect(),
        capabilities: capabilities.map(Sets::parse).transpose()?.unwrap_or_default(),
    }));
    // The default of OCI runtimes when the specification is silent.
    steps.push(Step::Umask(process.user.umask.unwrap_or(0o022) & 0o777));
    Ok(Plan {
        steps,
        program: Program::new(process)?,
        last_filter,
    })
}

fn keyring(id: &str) -> Result<Step, SpecError> {
    Ok(Step::Keyring(c_string("id", &format!("_ses.{id}"))?))
}

/// Always set: the agent's own score, which says never to kill it, must not be inherited.
fn oom_score(score: Option<i32>) -> Step {
    Step::Write {
        path: c"/proc/self/oom_score_adj".into(),
        data: score.unwrap_or(0).to_string().into_bytes(),
        member: "process.oomScoreAdj".into(),
    }
}

/// A kernel parameter as the file of /proc/sys to write. A name's first separator says which of `.` and `/` separates,
/// as for sysctl(8).
///
/// # Errors
/// [`SpecError::Invalid`] for a name that leads out of /proc/sys.
pub fn sysctl(member: &str, name: &str, value: &str) -> Result<Step, SpecError> {
    let path = match name.find(['.', '/']).and_then(|index| name.get(index..=index)) {
        Some("/") => name.to_owned(),
        _ => name
            .chars()
            .map(|character| match character {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
    };
    if name.is_empty() || path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(SpecError::invalid(
            member,
            format!("{name:?} is no kernel parameter"),
        ));
    }
    Ok(Step::Write {
        path: c_string(member, &format!("/proc/sys/{path}"))?,
        data: value.as_bytes().to_vec(),
        member: member.to_owned(),
    })
}

fn working_directory(process: &spec::Process) -> Result<std::ffi::CString, SpecError> {
    if !process.cwd.starts_with('/') {
        return Err(SpecError::invalid(
            "process.cwd",
            format!("{:?} is not an absolute path", process.cwd),
        ));
    }
    c_string("process.cwd", &process.cwd)
}

fn stdio(stdio: Stdio, uid: u32, console: bool) -> Step {
    match stdio {
        Stdio::Descriptors(fds) => Step::Stdio {
            fds: fds.map(Into::into),
            uid,
        },
        Stdio::Terminal { rows, columns } => Step::Terminal(Terminal {
            rows,
            columns,
            uid,
            console,
        }),
    }
}

fn limit(member: &str, rlimit: &spec::Rlimit) -> Result<Step, SpecError> {
    let resource = match rlimit.kind.as_str() {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        other => {
            return Err(SpecError::invalid(
                member,
                format!("{other:?} is no resource limit of Linux"),
            ));
        }
    };
    if rlimit.soft > rlimit.hard {
        return Err(SpecError::invalid(
            member,
            format!(
                "the soft limit {} is above the hard limit {}",
                rlimit.soft, rlimit.hard
            ),
        ));
    }
    let value = |value: u64| Some(value).filter(|value| *value != u64::MAX);
    Ok(Step::Limit {
        resource,
        limit: Rlimit {
            current: value(rlimit.soft),
            maximum: value(rlimit.hard),
        },
    })
}

fn parse_personality(personality: &spec::Personality) -> Result<u32, SpecError> {
    if !personality.flags.is_empty() {
        return Err(SpecError::unsupported(
            "linux.personality.flags",
            "is not supported: remove it",
        ));
    }
    match personality.domain.as_str() {
        "LINUX" => Ok(0),
        // linux/personality.h, PER_LINUX32.
        "LINUX32" => Ok(8),
        other => Err(SpecError::invalid(
            "linux.personality.domain",
            format!("{other:?} is not one of LINUX, LINUX32"),
        )),
    }
}

impl Step {
    /// What the step does, for a message that says why it could not.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Session => "begin a session".into(),
            Self::Keyring(_) => "make a session keyring".into(),
            Self::Write { path, data, member } => format!(
                "{member}: write {:?} to {}",
                String::from_utf8_lossy(data),
                path.to_string_lossy()
            ),
            Self::Hostname(name) => format!("hostname: set {:?}", String::from_utf8_lossy(name)),
            Self::Domainname(name) => format!("domainname: set {:?}", String::from_utf8_lossy(name)),
            Self::Join { .. } => "join the container's namespaces".into(),
            Self::CgroupNamespace => "make a cgroup namespace".into(),
            Self::Root(path) => format!("make {} the root", path.to_string_lossy()),
            Self::Mount { target, .. } => format!("mount at {}", target.to_string_lossy()),
            Self::Device(device) => format!(
                "make device {}/{}",
                device.directory.to_string_lossy(),
                device.name.to_string_lossy()
            ),
            Self::Link { path, .. } => format!("make link {}", path.to_string_lossy()),
            Self::Mask { path, .. } => format!("linux.maskedPaths: hide {}", path.to_string_lossy()),
            Self::ReadOnly(path) => format!("linux.readonlyPaths: make {} read-only", path.to_string_lossy()),
            Self::ReadOnlyRoot => "make the root file system read-only".into(),
            Self::RootPropagation(_) => "linux.rootfsPropagation: set it".into(),
            Self::MakeDirectory(path) => format!("process.cwd: make {}", path.to_string_lossy()),
            Self::Terminal(_) => "process.terminal: make a terminal of /dev/pts/ptmx".into(),
            Self::Stdio { .. } => "connect standard input and output".into(),
            Self::Limit { resource, .. } => format!("process.rlimits: set {resource:?}"),
            Self::Personality(_) => "linux.personality: set it".into(),
            Self::Umask(_) => "process.user.umask: set it".into(),
            Self::NoNewPrivileges => "process.noNewPrivileges: set it".into(),
            Self::Seccomp(_) => "linux.seccomp: install the filter".into(),
            Self::User(user) => format!(
                "process.user, process.capabilities: become user {} and group {}",
                user.uid, user.gid
            ),
            Self::WorkingDirectory(path) => format!("process.cwd: enter {}", path.to_string_lossy()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(process: &str, linux: &str) -> Result<Plan, SpecError> {
        let spec: spec::Spec = serde_json::from_str(&format!(
            r#"{{"hostname":"h","process":{process},"linux":{linux}}}"#
        ))
        .unwrap();
        init(
            &spec,
            InitParts {
                id: "c",
                namespaces: Namespaces::new(&spec.linux.namespaces, None).unwrap(),
                rootfs: Path::new("/r"),
                mounts: Vec::new(),
                foreign_dev: false,
                read_only_rootfs: true,
                stdio: Stdio::Terminal { rows: 0, columns: 0 },
            },
        )
    }

    fn position(plan: &Plan, wanted: impl Fn(&Step) -> bool) -> Option<usize> {
        plan.steps.iter().position(wanted)
    }

    const FILTER: &str = r#"{"namespaces":[{"type":"uts"}],"seccomp":{"defaultAction":"SCMP_ACT_ALLOW"}}"#;

    #[test]
    fn a_filter_comes_before_privileges_go_unless_none_are_needed() {
        let privileged = plan(r#"{"args":["x"],"cwd":"/"}"#, FILTER).unwrap();
        let filter = position(&privileged, |step| matches!(step, Step::Seccomp(_))).unwrap();
        let user = position(&privileged, |step| matches!(step, Step::User(_))).unwrap();
        assert!(filter < user && privileged.last_filter.is_none());
        let unprivileged = plan(r#"{"args":["x"],"cwd":"/","noNewPrivileges":true}"#, FILTER).unwrap();
        assert!(position(&unprivileged, |step| matches!(step, Step::Seccomp(_))).is_none());
        assert!(position(&unprivileged, |step| matches!(step, Step::NoNewPrivileges)).is_some());
        assert!(unprivileged.last_filter.is_some());
    }

    #[test]
    fn the_host_name_is_set_only_where_it_is_the_containers_own() {
        let own = plan(r#"{"args":["x"],"cwd":"/"}"#, FILTER).unwrap();
        assert!(position(&own, |step| matches!(step, Step::Hostname(name) if name == b"h")).is_some());
        let pods = plan(r#"{"args":["x"],"cwd":"/"}"#, "{}").unwrap();
        assert!(position(&pods, |step| matches!(step, Step::Hostname(_))).is_none());
    }

    #[test]
    fn kernel_parameters_stay_below_proc_sys() {
        let path = |name: &str| match sysctl("m", name, "1") {
            Ok(Step::Write { path, .. }) => path.into_string().unwrap(),
            other => format!("{other:?}"),
        };
        assert_eq!(path("net.ipv4.ip_forward"), "/proc/sys/net/ipv4/ip_forward");
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding"),
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding"
        );
        assert_eq!(
            path("net.ipv4.conf.eth0/1.forwarding"),
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding"
        );
        assert!(sysctl("m", "../../etc/passwd", "1").is_err());
        assert!(sysctl("m", "kernel...x", "1").is_err());
        assert!(sysctl("m", "", "1").is_err());
    }

    #[test]
    fn malformed_members_are_refused_by_name() {
        for (process, member) in [
            (r#"{"args":["x"],"cwd":"tmp"}"#, "process.cwd"),
            (r#"{"args":[],"cwd":"/"}"#, "process.args"),
            (
                r#"{"args":["x"],"cwd":"/","rlimits":[{"type":"RLIMIT_X","soft":1,"hard":1}]}"#,
                "process.rlimits[0]",
            ),
            (
                r#"{"args":["x"],"cwd":"/","rlimits":[{"type":"RLIMIT_NOFILE","soft":2,"hard":1}]}"#,
                "process.rlimits[0]",
            ),
        ] {
            let error = plan(process, "{}").unwrap_err().to_string();
            assert!(error.starts_with(member), "{error}");
        }
    }
}
