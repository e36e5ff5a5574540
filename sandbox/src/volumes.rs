//! Volumes that hold the host's files: watches the directories on the host, and brings the guest's copies up to date.
//!
//! Only the top of a directory is watched: there kubelet renames the link that replaces all of the content. One
//! inotify instance and one task serve all volumes of a pod. Nothing is read until the kernel tells of a change.

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use protocol::agent::FileTree;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use crate::error::ErrorKind;
use crate::pod::{Pod, lock};
use crate::storage::FilesVolume;
use crate::storage::files::{self, MAX_BYTES, Unfit};

/// The most volumes of a pod that are watched; further ones are shared.
const MAX_WATCHED: usize = 128;
/// An update is several steps within a millisecond or two: this long after the first of them it is read.
const SETTLE: Duration = Duration::from_millis(50);
/// How long after a failure the next attempt comes, and how many there are.
const RETRY: Duration = Duration::from_secs(1);
const ATTEMPTS: u32 = 5;
const CHANGES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::ONLYDIR);

/// The volumes of a pod that are watched.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    state: Mutex<State>,
    /// Told when a volume is to be read without a word from the kernel.
    wake: Notify,
}

#[derive(Debug, Default)]
struct State {
    inotify: Option<Arc<OwnedFd>>,
    watched: HashMap<String, Watched>,
    /// Names of volumes that have changed.
    changed: BTreeSet<String>,
}

#[derive(Debug)]
struct Watched {
    directory: Arc<OwnedFd>,
    watch: i32,
    /// What the guest has, once it has it.
    told: Option<Told>,
    /// A change came before the guest had the volume.
    early: bool,
    failures: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Told {
    version: u64,
    digest: u64,
}

fn digest(tree: &FileTree) -> u64 {
    let mut hasher = DefaultHasher::new();
    let owner = |owner: &protocol::agent::Owner| (owner.uid, owner.gid, owner.mode);
    owner(&tree.root).hash(&mut hasher);
    for file in &tree.files {
        (&file.path, owner(&file.owner), file.modified_ns, &file.content).hash(&mut hasher);
    }
    hasher.finish()
}

impl Volumes {
    /// Watches a directory for the volume `name` until the pod ends. To be called before it is read, in the runtime.
    ///
    /// # Errors
    /// When too many are watched already, in this pod or on this host (inotify(7), `max_user_watches`).
    pub fn watch(&self, pod: &Arc<Pod>, name: &str, directory: &Arc<OwnedFd>) -> io::Result<()> {
        let mut state = lock(&self.state);
        if state.watched.len() == MAX_WATCHED && !state.watched.contains_key(name) {
            return Err(io::Error::other("the pod has too many volumes to watch them all"));
        }
        let inotify = match &state.inotify {
            Some(inotify) => Arc::clone(inotify),
            None => {
                let made = Arc::new(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?);
                tokio::spawn(follow(Arc::downgrade(pod), Arc::clone(&made)));
                Arc::clone(state.inotify.insert(made))
            }
        };
        let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
        // The same directory again gives the same number.
        let watch = inotify::add_watch(&*inotify, path, CHANGES)?;
        if state.watched.get(name).is_none_or(|known| known.watch != watch) {
            let watched = Watched {
                directory: Arc::clone(directory),
                watch,
                told: None,
                early: false,
                failures: 0,
            };
            state.watched.insert(name.to_owned(), watched);
        }
        Ok(())
    }

    /// Takes note that the guest has got these.
    pub fn told(&self, volumes: &[FilesVolume]) {
        let mut state = lock(&self.state);
        for volume in volumes {
            let told = Told {
                version: volume.tree.version,
                digest: digest(&volume.tree),
            };
            let Some(watched) = state.watched.get_mut(&volume.name) else {
                continue;
            };
            if watched.told.is_none_or(|before| before.version < told.version) {
                watched.told = Some(told);
            }
            if std::mem::take(&mut watched.early) {
                state.changed.insert(volume.name.clone());
                self.wake.notify_one();
            }
        }
    }

    /// Takes the kernel's news; whether there is something to do.
    fn hear(&self, inotify: &OwnedFd) -> bool {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(inotify, &mut buffer);
        let mut state = lock(&self.state);
        let state = &mut *state;
        // It ends with EAGAIN; another error would come again for ever, and nothing is lost but an update.
        while let Ok(event) = events.next() {
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                state.changed.extend(state.watched.keys().cloned());
                continue;
            }
            // Content that nothing leads to yet is of no interest; that it is gone, is.
            let name = event
                .file_name()
                .map(std::ffi::CStr::to_bytes)
                .unwrap_or_default();
            let unfinished =
                name.starts_with(b"..") && name != b"..data" && !event.events().contains(ReadFlags::DELETE);
            if unfinished || event.events().contains(ReadFlags::IGNORED) {
                continue;
            }
            let watched = state
                .watched
                .iter()
                .find(|(_, watched)| watched.watch == event.wd());
            state.changed.extend(watched.map(|(name, _)| name.clone()));
        }
        !state.changed.is_empty()
    }

    fn next(&self) -> Option<(String, Arc<OwnedFd>)> {
        let mut state = lock(&self.state);
        while let Some(name) = state.changed.pop_first() {
            if let Some(watched) = state.watched.get(&name) {
                let directory = Arc::clone(&watched.directory);
                return Some((name, directory));
            }
        }
        None
    }

    fn differs(&self, name: &str, tree: &FileTree) -> bool {
        let state = lock(&self.state);
        let told = state.watched.get(name).and_then(|watched| watched.told);
        told.is_none_or(|told| told.digest != digest(tree))
    }

    /// Notes how telling the guest went; whether to try again.
    fn settle(&self, name: &str, told: Result<Told, ErrorKind>) -> bool {
        let mut state = lock(&self.state);
        let Some(watched) = state.watched.get_mut(name) else {
            return false;
        };
        match told {
            Ok(told) => {
                watched.told = Some(told);
                watched.failures = 0;
                false
            }
            Err(ErrorKind::NotFound) if watched.told.is_none() => {
                watched.early = true;
                false
            }
            Err(_) => {
                watched.failures += 1;
                let again = watched.failures < ATTEMPTS;
                if again {
                    state.changed.insert(name.to_owned());
                } else {
                    watched.failures = 0;
                }
                again
            }
        }
    }
}

/// Follows the changes of a pod's volumes until the pod ends.
async fn follow(pod: Weak<Pod>, inotify: Arc<OwnedFd>) {
    // SAFETY: the descriptor stays open as long as this registration: the task holds it.
    let registered = unsafe { AsyncFd::register(inotify) };
    let inotify = match registered {
        Ok(inotify) => inotify,
        Err(error) => {
            tracing::warn!(%error, "changes of volumes cannot be followed");
            return;
        }
    };
    loop {
        let Some(strong) = pod.upgrade() else { return };
        let mut pause = SETTLE;
        tokio::select! {
            ready = inotify.readable() => match ready {
                Ok(mut ready) => {
                    ready.clear_ready();
                    if !strong.volumes.hear(inotify.get_ref()) {
                        continue;
                    }
                }
                Err(_) => return,
            },
            () = strong.volumes.wake.notified() => {}
            _ = strong.exited() => return,
        }
        loop {
            tokio::time::sleep(pause).await;
            let mut again = false;
            let _ = strong.volumes.hear(inotify.get_ref());
            while let Some((name, directory)) = strong.volumes.next() {
                if strong.is_gone() {
                    return;
                }
                if refresh(&strong, &name, directory).await {
                    again = true;
                    break;
                }
            }
            if !again {
                break;
            }
            pause = RETRY;
        }
    }
}

/// Reads a volume and tells the guest if it has changed; whether to try again.
async fn refresh(pod: &Pod, name: &str, directory: Arc<OwnedFd>) -> bool {
    let read = tokio::task::spawn_blocking(move || files::read(&directory, MAX_BYTES)).await;
    let tree = match read {
        Ok(Ok(tree)) => tree,
        Ok(Err(Unfit::Shape)) => {
            tracing::warn!(
                volume = name,
                "has become too large to be brought up to date: the guest keeps its last content"
            );
            return false;
        }
        // Volumes are taken down while the VM still runs: their containers have ended.
        Ok(Err(Unfit::Io(error))) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {
            return false;
        }
        Ok(Err(Unfit::Io(error))) => {
            tracing::warn!(volume = name, %error, "cannot be read: the guest keeps its last content");
            return false;
        }
        Err(_) => return false,
    };
    if !pod.volumes.differs(name, &tree) {
        return false;
    }
    let told = Told {
        version: tree.version,
        digest: digest(&tree),
    };
    let volume = files::in_agents_words(name, tree);
    let result = match pod.agent().await {
        Ok(agent) => agent.update_volume(&volume).await,
        Err(error) => Err(error),
    };
    if let Err(error) = &result
        && error.kind() != ErrorKind::NotFound
    {
        tracing::warn!(volume = name, %error, "the guest's copy could not be brought up to date");
    }
    pod.volumes
        .settle(name, result.map(|()| told).map_err(|error| error.kind()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(version: u64) -> FilesVolume {
        let directory = rustix::fs::open(
            "/",
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        );
        FilesVolume {
            name: "v".into(),
            directory: Arc::new(directory.unwrap()),
            tree: FileTree {
                version,
                ..Default::default()
            },
        }
    }

    fn watching() -> Volumes {
        let volumes = Volumes::default();
        let watched = Watched {
            directory: volume(1).directory,
            watch: 1,
            told: None,
            early: false,
            failures: 0,
        };
        lock(&volumes.state).watched.insert("v".into(), watched);
        volumes
    }

    #[test]
    fn a_change_before_the_guest_has_the_volume_is_told_after() {
        let volumes = watching();
        assert!(volumes.differs("v", &volume(2).tree));
        assert!(!volumes.settle("v", Err(ErrorKind::NotFound)));
        assert!(volumes.next().is_none());
        volumes.told(&[volume(1)]);
        assert_eq!(volumes.next().unwrap().0, "v");
    }

    #[test]
    fn failures_are_tried_again_but_not_for_ever() {
        let volumes = watching();
        volumes.told(&[volume(1)]);
        assert!(
            !volumes.differs("v", &volume(9).tree),
            "a version alone is no change"
        );
        let mut attempts = 1;
        while volumes.settle("v", Err(ErrorKind::Internal)) {
            assert!(volumes.next().is_some());
            attempts += 1;
        }
        assert_eq!(attempts, ATTEMPTS);
        assert!(volumes.next().is_none());
    }

    #[test]
    fn content_that_nothing_leads_to_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let volumes = watching();
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
        let watch = inotify::add_watch(&inotify, directory.path(), CHANGES).unwrap();
        lock(&volumes.state).watched.get_mut("v").unwrap().watch = watch;
        std::fs::create_dir(directory.path().join("..2024")).unwrap();
        std::fs::write(directory.path().join("..2024/key"), "").unwrap();
        assert!(!volumes.hear(&inotify));
        std::os::unix::fs::symlink("..2024", directory.path().join("..data_tmp")).unwrap();
        std::fs::rename(
            directory.path().join("..data_tmp"),
            directory.path().join("..data"),
        )
        .unwrap();
        assert!(volumes.hear(&inotify));
        assert_eq!(volumes.next().unwrap().0, "v");
        std::fs::remove_dir_all(directory.path().join("..2024")).unwrap();
        assert!(
            volumes.hear(&inotify),
            "old content is removed from the guest too"
        );
    }
}
