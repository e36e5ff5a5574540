//! Directories that the containers of a pod have in common: one share for all that mount it the same way, so that
//! the guest has one cache of it.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use tokio::sync::OnceCell;

use crate::pod::lock;
use crate::storage::{HeldMount, Share};
use crate::vm::{Vm, VmError};

/// The shares that are in common, by the name that the plan gave them.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    pool: Mutex<Pool>,
}

#[derive(Debug, Default)]
struct Pool {
    entries: HashMap<String, Entry>,
    /// How many there have been: a share that goes and one that comes never have the same name in the VM, so it does
    /// not matter which of both requests arrives first.
    count: u64,
}

#[derive(Debug)]
struct Entry {
    name: String,
    users: usize,
    /// Filled once the VM has it, with what must stay as long as that.
    shown: Arc<OnceCell<Option<HeldMount>>>,
}

/// A share that a container uses.
#[derive(Debug)]
pub(crate) struct ShownShare {
    /// Its name in the VM.
    pub name: String,
    /// Its name in the pool, if it is there.
    pooled: Option<String>,
    _held: Option<HeldMount>,
}

impl Shares {
    /// Shows a share to the guest, unless another container has already brought it.
    pub async fn show(&self, vm: &Vm, mut share: Share) -> Result<ShownShare, VmError> {
        if !share.pooled {
            vm.add_share(&share.name, share.fd.as_fd(), share.cache).await?;
            return Ok(ShownShare {
                name: share.name,
                pooled: None,
                _held: share.held,
            });
        }
        let (name, shown) = self.enter(&share.name);
        let held = share.held.take();
        let add = async || {
            vm.add_share(&name, share.fd.as_fd(), share.cache).await?;
            Ok(held)
        };
        match shown.get_or_try_init(add).await {
            Ok(_) => Ok(ShownShare {
                name,
                pooled: Some(share.name),
                _held: None,
            }),
            Err(error) => {
                self.leave(&share.name);
                Err(error)
            }
        }
    }

    /// Takes a share from the guest with its last user.
    pub async fn hide(&self, vm: &Vm, share: &ShownShare) -> Result<(), VmError> {
        match &share.pooled {
            Some(key) if !self.leave(key) => Ok(()),
            _ => vm.remove_share(&share.name).await,
        }
    }

    fn enter(&self, key: &str) -> (String, Arc<OnceCell<Option<HeldMount>>>) {
        let mut pool = lock(&self.pool);
        if let Some(entry) = pool.entries.get_mut(key) {
            entry.users += 1;
            return (entry.name.clone(), Arc::clone(&entry.shown));
        }
        pool.count += 1;
        let entry = Entry {
            name: format!("{key}.{}", pool.count),
            users: 1,
            shown: Arc::default(),
        };
        let entered = (entry.name.clone(), Arc::clone(&entry.shown));
        pool.entries.insert(key.to_owned(), entry);
        entered
    }

    /// Whether that was the last user.
    fn leave(&self, key: &str) -> bool {
        let mut pool = lock(&self.pool);
        match pool.entries.get_mut(key) {
            Some(entry) if entry.users > 1 => {
                entry.users -= 1;
                false
            }
            _ => pool.entries.remove(key).is_some(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_stays_until_its_last_user_leaves_and_comes_back_under_another_name() {
        let shares = Shares::default();
        let (first, cell) = shares.enter("@1");
        let (second, same) = shares.enter("@1");
        assert_eq!(first, second);
        assert!(Arc::ptr_eq(&cell, &same));
        assert_ne!(shares.enter("@2").0, first);
        assert!(!shares.leave("@1"));
        assert!(shares.leave("@1"));
        assert_ne!(shares.enter("@1").0, first);
    }
}
