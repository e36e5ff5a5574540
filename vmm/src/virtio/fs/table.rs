//! Where the shares stand in the tree: who has which place, and when a place becomes free.

use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use fuse_backend_rs::abi::fuse_abi::{FsOptions, ROOT_ID};
use fuse_backend_rs::api::VFS_MAX_INO;
use fuse_backend_rs::api::filesystem::{DirEntry, Entry};

use super::ShareError;
use super::share::{Share, errno};

/// How many shares there can be at a time.
pub const MAX_SHARES: usize = 255;
/// Where in a node id the share's place begins.
pub const PLACE_SHIFT: u32 = 56;

/// All shares, and the file system made of them.
#[derive(Default)]
pub struct Tree {
    table: RwLock<Table>,
}

#[derive(Default)]
struct Table {
    /// By place; place 0 stays empty.
    places: Vec<Option<Arc<Share>>>,
    last_place: usize,
    generation: u64,
    /// What guest and tree have agreed upon, since the guest has mounted the tree.
    options: Option<FsOptions>,
}

impl Tree {
    /// Adds a share that `make` makes, given its generation.
    ///
    /// # Errors
    /// [`ShareError::Exists`], [`ShareError::TooMany`], and what `make` reports.
    pub fn add(
        &self,
        name: &str,
        make: impl FnOnce(u64) -> Result<Share, ShareError>,
    ) -> Result<(), ShareError> {
        let mut table = self.write();
        if table.find(name).is_some() {
            return Err(ShareError::Exists {
                name: name.to_owned(),
            });
        }
        table.places.resize(MAX_SHARES + 1, None);
        // The place that was left longest ago: the guest may still remember nodes of its last share.
        let order = (0..MAX_SHARES).map(|step| (table.last_place + step) % MAX_SHARES + 1);
        let place = order
            .into_iter()
            .find(|&place| table.places[place].is_none())
            .ok_or(ShareError::TooMany)?;
        let share = make(table.generation + 1)?;
        if let Some(options) = table.options {
            share.negotiated(options)?;
        }
        table.generation += 1;
        table.last_place = place;
        table.places[place] = Some(Arc::new(share));
        Ok(())
    }

    /// Takes a share away. Files that the guest holds open stay readable until it closes them; when it holds none,
    /// nothing of the directory is held on the host any more.
    ///
    /// # Errors
    /// [`ShareError::Absent`].
    pub fn remove(&self, name: &str) -> Result<(), ShareError> {
        let (place, share) = self.read().find(name).ok_or_else(|| ShareError::Absent {
            name: name.to_owned(),
        })?;
        share.remove();
        drop(share);
        self.reap(place);
        Ok(())
    }

    /// Drops the share at `place` if it was removed and nothing of it is open.
    fn reap(&self, place: usize) {
        let slot = |table: &Table| table.places.get(place).cloned().flatten();
        if slot(&self.read()).is_some_and(|share| share.is_finished()) {
            let mut table = self.write();
            if slot(&table).is_some_and(|share| share.is_finished()) {
                let share = table.places[place].take();
                drop(table);
                // Closing a million files must not hold the others up.
                drop(share);
            }
        }
    }

    /// Tells all shares, and those that are still to come, what guest and tree have agreed upon.
    ///
    /// # Errors
    /// What a directory reports.
    pub fn agree(&self, options: FsOptions) -> io::Result<()> {
        let mut table = self.write();
        table.options = Some(options);
        table
            .places
            .iter()
            .flatten()
            .try_for_each(|share| share.negotiated(options))
    }

    /// Forgets everything that the guest has looked up and opened.
    pub fn forget_all(&self) {
        let mut table = self.write();
        table.options = None;
        for place in &mut table.places {
            if let Some(share) = place {
                share.forget_all();
                if share.is_finished() {
                    *place = None;
                }
            }
        }
    }

    /// The share of that name, and its root's node id without the inode number.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn named(&self, name: &str) -> io::Result<(u64, Arc<Share>)> {
        let (place, share) = self.read().find(name).ok_or_else(|| errno(libc::ENOENT))?;
        Ok(((place as u64) << PLACE_SHIFT, share))
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The share that a node lies in, removed or not, and the node's number there.
    ///
    /// # Errors
    /// `EPERM` for the root, which cannot be changed; `ESTALE` when there is no such share any more.
    pub fn share(&self, node: u64) -> io::Result<(Arc<Share>, u64)> {
        match (node >> PLACE_SHIFT) as usize {
            0 if node == ROOT_ID => Err(errno(libc::EPERM)),
            place => match self.read().places.get(place) {
                Some(Some(share)) => Ok((share.clone(), node & VFS_MAX_INO)),
                _ => Err(errno(libc::ESTALE)),
            },
        }
    }

    /// Like [`Self::share`], for requests that begin something new.
    ///
    /// # Errors
    /// Also `ESTALE` when the share was removed.
    pub fn live(&self, node: u64) -> io::Result<(Arc<Share>, u64)> {
        let found = self.share(node)?;
        found.0.check()?;
        Ok(found)
    }

    /// Like [`Self::live`], for two nodes that must lie in one share.
    ///
    /// # Errors
    /// Also `EXDEV` when they do not.
    pub fn live_pair(&self, node: u64, other: u64) -> io::Result<(Arc<Share>, u64, u64)> {
        let (share, inode) = self.live(node)?;
        if node >> PLACE_SHIFT != other >> PLACE_SHIFT {
            return Err(errno(libc::EXDEV));
        }
        Ok((share, inode, other & VFS_MAX_INO))
    }

    /// Counts a closed file of the share that `node` lies in.
    pub fn close(&self, node: u64, share: Arc<Share>) {
        share.closed();
        let finished = share.is_finished();
        drop(share);
        if finished {
            self.reap((node >> PLACE_SHIFT) as usize);
        }
    }

    /// Calls `emit` with each share's name and root from the `offset`th on, until it has enough.
    ///
    /// # Errors
    /// What `emit` reports.
    pub fn list(
        &self,
        offset: u64,
        emit: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        // A copy, because looking at a root may take the host a while.
        let places: Vec<_> = self.read().places.iter().cloned().enumerate().collect();
        for (place, share) in places
            .into_iter()
            .skip(usize::try_from(offset).unwrap_or(usize::MAX))
        {
            let Some(share) = share else { continue };
            let Ok(root) = share.root() else { continue };
            let entry = join(&share, (place as u64) << PLACE_SHIFT, root);
            let listed = DirEntry {
                ino: entry.inode,
                offset: place as u64 + 1,
                type_: u32::from(libc::DT_DIR),
                name: share.name.as_bytes(),
            };
            if emit(listed, entry)? == 0 {
                break;
            }
        }
        Ok(())
    }
}

impl Table {
    fn find(&self, name: &str) -> Option<(usize, Arc<Share>)> {
        let live = |share: &Arc<Share>| share.name == name && share.check().is_ok();
        self.places
            .iter()
            .enumerate()
            .find_map(|(place, share)| Some((place, share.clone().filter(live)?)))
    }
}

/// An entry of a share as the guest sees it. `near` is any node of the same share.
pub fn join(share: &Share, near: u64, mut entry: Entry) -> Entry {
    if entry.inode != 0 {
        entry.inode = near >> PLACE_SHIFT << PLACE_SHIFT | entry.inode & VFS_MAX_INO;
        entry.attr.st_ino = entry.inode;
        entry.generation = share.generation;
    }
    entry
}
