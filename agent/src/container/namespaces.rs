//! Which namespaces a container gets (namespaces(7)), from the specification's list.
//!
//! The guest belongs to one pod: its own network, IPC and UTS namespaces are the pod's. A namespace that the
//! specification wants joined is therefore the guest's; one that it wants new is new, but for the network, whose
//! interfaces are in the guest's own namespace. Only pid needs more, since the guest's own pid namespace holds the
//! agent: a joined one is the pod's, made when first needed.

use protocol::agent::create_container_request::Pid_namespace;

use super::spec::{self, SpecError};

/// Where a container's processes live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pid {
    /// In a pid namespace of its own.
    Own,
    /// In the one that containers of the pod share.
    Pod,
    /// In the guest's, beside the agent.
    Guest,
    /// In another container's.
    Container,
}

/// What a container gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespaces {
    /// Flags of clone3(2).
    pub flags: u64,
    pub pid: Pid,
    /// Whether its host name is its own.
    pub own_uts: bool,
    /// Whether its cgroup is the root of what it sees. Not by clone3: the namespace's root would be the agent's.
    pub own_cgroup: bool,
}

impl Namespaces {
    /// Reads the list. `pid` is the host's word on the pid namespace, which goes before the list's.
    ///
    /// # Errors
    /// [`SpecError`] for namespaces that are not supported, unknown or given twice.
    pub fn new(list: &[spec::Namespace], pid: Option<&Pid_namespace>) -> Result<Self, SpecError> {
        let mut this = Self {
            // A container has a mount namespace in any case: its mounts are nobody else's.
            flags: libc::CLONE_NEWNS as u64,
            pid: Pid::Guest,
            own_uts: false,
            own_cgroup: false,
        };
        for (index, namespace) in list.iter().enumerate() {
            let member = format!("linux.namespaces[{index}]");
            if list[..index].iter().any(|other| other.kind == namespace.kind) {
                return Err(SpecError::invalid(
                    member,
                    format!("{:?} is given twice", namespace.kind),
                ));
            }
            let new = namespace.path.is_empty();
            match namespace.kind.as_str() {
                "pid" if new => this.pid = Pid::Own,
                "pid" => this.pid = Pid::Pod,
                "ipc" if new => this.flags |= libc::CLONE_NEWIPC as u64,
                "uts" if new => {
                    this.own_uts = true;
                    this.flags |= libc::CLONE_NEWUTS as u64;
                }
                "cgroup" => this.own_cgroup = new,
                "mount" | "network" | "ipc" | "uts" => {}
                "user" | "time" => {
                    return Err(SpecError::unsupported(
                        member,
                        format!("{:?} is not supported in the guest: remove it", namespace.kind),
                    ));
                }
                other => {
                    return Err(SpecError::invalid(
                        member,
                        format!("{other:?} is no namespace of Linux"),
                    ));
                }
            }
        }
        match pid {
            None => {}
            Some(Pid_namespace::OwnPidNamespace(_)) => this.pid = Pid::Own,
            Some(Pid_namespace::PodPidNamespace(_)) => this.pid = Pid::Pod,
            Some(Pid_namespace::GuestPidNamespace(_)) => this.pid = Pid::Guest,
            Some(Pid_namespace::PidNamespaceOf(_)) => this.pid = Pid::Container,
            Some(_) => {
                return Err(SpecError::unsupported(
                    "pid_namespace",
                    "this agent does not know it",
                ));
            }
        }
        if this.pid == Pid::Own {
            this.flags |= libc::CLONE_NEWPID as u64;
        }
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Namespaces, SpecError> {
        Namespaces::new(&serde_json::from_str::<Vec<spec::Namespace>>(json).unwrap(), None)
    }

    #[test]
    fn new_ones_are_made_and_joined_ones_are_the_pods() {
        let own = read(r#"[{"type":"pid"},{"type":"network"},{"type":"ipc"},{"type":"uts"},{"type":"mount"},{"type":"cgroup"}]"#).unwrap();
        assert_eq!(own.pid, Pid::Own);
        assert!(own.own_uts && own.own_cgroup);
        assert_eq!(
            own.flags,
            (libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS) as u64
        );
        let joined = read(
            r#"[{"type":"pid","path":"/proc/7/ns/pid"},{"type":"ipc","path":"/proc/7/ns/ipc"},
                {"type":"uts","path":"/proc/7/ns/uts"},{"type":"network","path":"/run/netns/x"},{"type":"mount"}]"#,
        )
        .unwrap();
        assert_eq!(joined.pid, Pid::Pod);
        assert!(!joined.own_uts && !joined.own_cgroup);
        assert_eq!(joined.flags, libc::CLONE_NEWNS as u64);
        assert_eq!(read("[]").unwrap().pid, Pid::Guest);
    }

    #[test]
    fn the_hosts_word_on_the_pid_namespace_goes_before_the_lists() {
        let told = |pid| Namespaces::new(&[], Some(&pid)).unwrap();
        let own = told(Pid_namespace::OwnPidNamespace(Default::default()));
        assert_eq!(own.pid, Pid::Own);
        assert_ne!(own.flags & libc::CLONE_NEWPID as u64, 0);
        let list: Vec<spec::Namespace> = serde_json::from_str(r#"[{"type":"pid"}]"#).unwrap();
        let other = Pid_namespace::PidNamespaceOf("c".into());
        let joined = Namespaces::new(&list, Some(&other)).unwrap();
        assert_eq!(joined.pid, Pid::Container);
        assert_eq!(joined.flags & libc::CLONE_NEWPID as u64, 0);
    }

    #[test]
    fn what_is_not_done_or_not_known_is_refused() {
        for (json, word) in [
            (r#"[{"type":"user"}]"#, "not supported"),
            (
                r#"[{"type":"pid"},{"type":"pid"}]"#,
                "namespaces[1]: \"pid\" is given twice",
            ),
            (r#"[{"type":"disk"}]"#, "no namespace"),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
