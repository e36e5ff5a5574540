//! The pod: its settings, and its containers by id.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::agent::create_container_request::Pid_namespace;
use protocol::agent::{ConfigureSandboxRequest, CreateContainerRequest, GuestInfoResponse, Network, Volume};
use rustix::fs::{CWD, OFlags, open};
use rustix::io::Errno;
use tokio::sync::Notify;

use crate::clock;
use crate::container::child::Step;
use crate::container::mount::{self, FileSystem};
use crate::container::{Container, Engine, blocking, check_id, sysctl};
use crate::cpus;
use crate::error::Error;
use crate::events::Listener;
use crate::network;

/// Where containers that share the pod's /dev/shm find it in the guest.
const SHARED_MEMORY: &str = "/dev/shm";

/// The pod.
pub struct Sandbox {
    engine: Arc<Engine>,
    /// Events of all containers.
    pub events: Listener,
    containers: Mutex<HashMap<String, Slot>>,
    configured: AtomicBool,
    network: network::State,
    /// Told when the host wants the guest to end.
    pub ending: Notify,
    times: Times,
}

/// Microseconds since the kernel's start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// When main began.
    pub main_us: u64,
    /// When Hello had been sent.
    pub hello_us: u64,
}

/// An id is taken from the beginning of creation to the end of deletion.
enum Slot {
    Creating,
    Ready(Arc<Container>),
    Deleting,
}

impl Sandbox {
    /// An empty pod.
    #[must_use]
    pub fn new(engine: Arc<Engine>, events: Listener, network: network::State, times: Times) -> Self {
        Self {
            engine,
            events,
            containers: Mutex::default(),
            configured: AtomicBool::new(false),
            network,
            ending: Notify::new(),
            times,
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies the pod's settings, once.
    ///
    /// # Errors
    /// [`Error::State`] the second time, others with the setting.
    pub async fn configure(&self, request: ConfigureSandboxRequest) -> Result<(), Error> {
        if self.configured.swap(true, Ordering::SeqCst) {
            return Err(Error::State("the guest is already configured".into()));
        }
        let kernel = |what: &'static str| {
            move |source| Error::Kernel {
                what: what.into(),
                source,
            }
        };
        if request.realtime_ns != 0 {
            clock::set(request.realtime_ns).map_err(kernel("set the clock"))?;
        }
        if !request.entropy.is_empty() {
            clock::add_entropy(&request.entropy).map_err(kernel("add entropy"))?;
        }
        if !request.hostname.is_empty() {
            rustix::system::sethostname(request.hostname.as_bytes()).map_err(kernel("set the host name"))?;
        }
        // Before the sysctls, which may name an interface.
        let network = request.network.into_option().unwrap_or_default();
        self.network.apply(network).await?;
        for (name, value) in &request.sysctls {
            let member = format!("sysctls[{name:?}]");
            if let Step::Write { path, data, .. } = sysctl(&member, name, value)? {
                write(&path, &data).map_err(|source| Error::Kernel {
                    what: format!("set kernel parameter {name} to {value:?}"),
                    source,
                })?;
            }
        }
        if request.shm_bytes != 0 {
            mount_shared_memory(request.shm_bytes).map_err(kernel("mount the pod's /dev/shm"))?;
        }
        Ok(())
    }

    /// Makes the network what it shall be from now on.
    ///
    /// # Errors
    /// [`Error::State`] before the pod is configured, [`Error::Network`].
    pub async fn update_network(&self, network: Network) -> Result<(), Error> {
        self.check_configured()?;
        Ok(self.network.apply(network).await?)
    }

    fn check_configured(&self) -> Result<(), Error> {
        if self.configured.load(Ordering::SeqCst) {
            Ok(())
        } else {
            Err(Error::State("the guest is not configured yet".into()))
        }
    }

    /// Makes a container; gives its init's pid.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::State`] before the pod is configured, and those of [`Container::create`].
    pub async fn create(&self, request: CreateContainerRequest) -> Result<i32, Error> {
        let id = request.container_id.clone();
        check_id(&id)?;
        self.check_configured()?;
        let neighbour = match &request.pid_namespace {
            Some(Pid_namespace::PidNamespaceOf(other)) => Some(self.pid_namespace_of(other)?),
            _ => None,
        };
        match self.containers().entry(id.clone()) {
            Entry::Occupied(_) => return Err(Error::Exists(format!("container {id:?}"))),
            Entry::Vacant(vacant) => vacant.insert(Slot::Creating),
        };
        match Container::create(&self.engine, request, neighbour).await {
            Ok(container) => {
                let pid = container.init_pid();
                self.containers().insert(id, Slot::Ready(container));
                Ok(pid)
            }
            Err(error) => {
                self.containers().remove(&id);
                Err(error)
            }
        }
    }

    fn pid_namespace_of(&self, id: &str) -> Result<OwnedFd, Error> {
        match self.container(id) {
            Ok(container) => container.pid_namespace(),
            Err(_) => Err(Error::State(format!(
                "container {id:?}, whose pid namespace is to be joined, does not exist"
            ))),
        }
    }

    /// A container by id.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match self.containers().get(id) {
            Some(Slot::Ready(container)) => Ok(Arc::clone(container)),
            _ => Err(Error::NotFound(format!("container {id:?}"))),
        }
    }

    /// Removes a container.
    ///
    /// # Errors
    /// [`Error::NotFound`], and those of [`Container::delete`]; the container is gone from the list all the same.
    pub async fn delete(&self, id: &str) -> Result<(), Error> {
        let container = {
            let mut containers = self.containers();
            match containers.get_mut(id) {
                Some(slot @ Slot::Ready(_)) => match std::mem::replace(slot, Slot::Deleting) {
                    Slot::Ready(container) => container,
                    Slot::Creating | Slot::Deleting => {
                        return Err(Error::NotFound(format!("container {id:?}")));
                    }
                },
                _ => return Err(Error::NotFound(format!("container {id:?}"))),
            }
        };
        let result = container.delete().await;
        self.containers().remove(id);
        result
    }

    /// Brings a volume's files up to date.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub async fn update_volume(&self, volume: Volume) -> Result<(), Error> {
        let engine = Arc::clone(&self.engine);
        blocking(move || Ok(engine.layout.volumes.update(&volume)?)).await
    }

    /// Kills and removes every container.
    pub async fn delete_all(&self) {
        let ids: Vec<String> = self.containers().keys().cloned().collect();
        // The guest ends either way.
        for id in ids {
            let _ = self.delete(&id).await;
        }
    }

    /// What this guest is.
    #[must_use]
    pub fn guest_info(&self) -> GuestInfoResponse {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let memory = text("/proc/meminfo");
        let bytes = |key: &str| {
            let line = memory
                .lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
            kilobytes.unwrap_or(0) * 1024
        };
        GuestInfoResponse {
            agent_release: env!("CARGO_PKG_VERSION").into(),
            kernel_release: kernel_release(),
            boot_id: text("/proc/sys/kernel/random/boot_id").trim().into(),
            online_cpus: cpus::online(),
            memory_total_bytes: bytes("MemTotal"),
            memory_available_bytes: bytes("MemAvailable"),
            controllers: std::fs::read_to_string(self.engine.cgroup_mount.join("cgroup.controllers"))
                .unwrap_or_default()
                .split_whitespace()
                .map(String::from)
                .collect(),
            agent_main_us: self.times.main_us,
            agent_hello_us: self.times.hello_us,
            ..Default::default()
        }
    }
}

/// uname -r.
#[must_use]
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn write(path: &std::ffi::CStr, data: &[u8]) -> Result<(), Errno> {
    let file = open(path, OFlags::WRONLY | OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
    rustix::io::write(&file, data).map(drop)
}

fn mount_shared_memory(bytes: u64) -> Result<(), Errno> {
    let options = [
        format!("size={bytes}"),
        "mode=1777".into(),
        "nosuid".into(),
        "nodev".into(),
        "noexec".into(),
    ];
    let file_system = FileSystem {
        kind: c"tmpfs".into(),
        source: c"shm".into(),
        options: mount::parse(&options, false).map_err(|_| Errno::INVAL)?,
    };
    let tree = file_system.make().map_err(|error| error.errno)?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let place = rustix::fs::openat(CWD, Path::new(SHARED_MEMORY), flags, rustix::fs::Mode::empty())?;
    mount::attach(tree.as_fd(), place.as_fd(), &[])
}
