//! One thread that watches all block devices without backing.
//!
//! A machine has many empty slots, and most stay empty: a thread for each would cost time at every start. But a
//! driver may ask an empty device too (for its serial number, say) and must get an answer. So this thread
//! starts a device's own when its queue is notified for the first time.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use vmm_sys_util::eventfd::EventFd;

use crate::virtio::worker::{Events, Poller, STOP, Workers};

/// Called once when a watched device is notified.
pub trait Wake: Send + Sync {
    /// Starts the device's own thread.
    fn wake(&self);
}

/// The thread. It ends when nobody holds the attendant any more.
pub struct Attendant {
    watch: Arc<Watch>,
    _workers: Workers,
}

struct Watch {
    poller: Poller,
    sleepers: Mutex<Sleepers>,
}

#[derive(Default)]
struct Sleepers {
    next: u64,
    by_token: HashMap<u64, Sleeper>,
}

struct Sleeper {
    /// Open as long as the sleeper is in the table.
    notify: RawFd,
    device: Weak<dyn Wake>,
}

impl Attendant {
    /// The process's attendant, which is started when there is none.
    ///
    /// # Errors
    /// When the host refuses a thread or a descriptor.
    pub fn shared() -> io::Result<Arc<Self>> {
        static SHARED: Mutex<Weak<Attendant>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(attendant) = shared.upgrade() {
            return Ok(attendant);
        }
        let mut workers = Workers::new()?;
        let watch = Arc::new(Watch {
            poller: workers.poller()?,
            sleepers: Mutex::default(),
        });
        let watching = watch.clone();
        workers.spawn("block", move || watching.run())?;
        let attendant = Arc::new(Self {
            watch,
            _workers: workers,
        });
        *shared = Arc::downgrade(&attendant);
        Ok(attendant)
    }

    /// Watches a device until its queue's event, `notify`, is signalled for the first time.
    ///
    /// `notify` must stay open until then, or until the returned token is given to [`Self::forget`].
    ///
    /// # Errors
    /// What epoll_ctl(2) reports.
    pub fn watch(&self, notify: &EventFd, device: Weak<dyn Wake>) -> io::Result<u64> {
        let mut sleepers = self.watch.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        let token = sleepers.next;
        self.watch.poller.add_event(notify, token)?;
        sleepers.next += 1;
        sleepers.by_token.insert(
            token,
            Sleeper {
                notify: notify.as_raw_fd(),
                device,
            },
        );
        Ok(token)
    }

    /// Watches a device no more.
    pub fn forget(&self, token: u64) {
        drop(self.watch.take(token));
    }
}

impl Watch {
    /// Takes a device out of the table, and its event out of the poller.
    fn take(&self, token: u64) -> Option<Weak<dyn Wake>> {
        let mut sleepers = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        let Sleeper { notify, device } = sleepers.by_token.remove(&token)?;
        self.poller.remove(notify);
        Some(device)
    }
    fn run(&self) {
        let mut events = Events::default();
        loop {
            let Ok(events) = self.poller.wait(&mut events, true) else {
                return;
            };
            for event in events {
                if event.data() == STOP {
                    return;
                }
                if let Some(device) = self.take(event.data()).and_then(|device| device.upgrade()) {
                    device.wake();
                }
            }
        }
    }
}
