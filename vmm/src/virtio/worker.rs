//! The thread behind a device: how it waits, and how it is told to stop. What it does is the device's.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::queue::{Chain, DeviceQueue};
use crate::memory::GuestMemory;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The token under which [`Poller`] reports that the worker shall end.
pub const STOP: u64 = u64::MAX;
/// How many events one wait returns at most.
const BATCH: usize = 32;

/// Waits for events on many descriptors (epoll(7)).
///
/// An eventfd that is added edge-triggered reports every write, without ever being read.
pub struct Poller {
    epoll: Epoll,
}

impl Poller {
    /// A poller that reports [`STOP`], to every waiter, once `stop` is written.
    ///
    /// # Errors
    /// What epoll_create1(2) or epoll_ctl(2) report.
    pub fn new(stop: &EventFd) -> io::Result<Self> {
        let poller = Self { epoll: Epoll::new()? };
        poller.add(stop.as_raw_fd(), STOP, EventSet::IN)?;
        Ok(poller)
    }

    /// Adds a descriptor that is reported as `token`.
    ///
    /// # Errors
    /// What epoll_ctl(2) reports.
    pub fn add(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
    }

    /// Adds an event that is reported as `token` on every write.
    ///
    /// # Errors
    /// What epoll_ctl(2) reports.
    pub fn add_event(&self, event: &EventFd, token: u64) -> io::Result<()> {
        self.add(event.as_raw_fd(), token, EventSet::IN | EventSet::EDGE_TRIGGERED)
    }

    /// Removes a descriptor before it is closed.
    pub fn remove(&self, fd: RawFd) {
        // It can only fail when the descriptor is not there, which is what is wanted.
        let _ = self
            .epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    /// Waits until something has happened, or not at all when `block` is false.
    ///
    /// # Errors
    /// What epoll_wait(2) reports; never `EINTR`.
    pub fn wait<'a>(&self, events: &'a mut Events, block: bool) -> io::Result<&'a [EpollEvent]> {
        loop {
            match self.epoll.wait(if block { -1 } else { 0 }, &mut events.0) {
                Ok(count) => return Ok(&events.0[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// A clock that a poller reports once, some time after it was set.
pub struct Timer(OwnedFd);

impl Timer {
    /// A timer that is not set, and reported as `token`.
    ///
    /// # Errors
    /// What timerfd_create(2) or epoll_ctl(2) report.
    pub fn new(poller: &Poller, token: u64) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        // Setting it again takes back what was not read.
        poller.add(timer.as_raw_fd(), token, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
        Ok(Self(timer))
    }

    /// Sets the timer, instead of what it was set to before.
    pub fn set(&self, after: Duration) {
        // Zero would stop it.
        let after = after.max(Duration::from_nanos(1));
        let value = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: after.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        // It fails for impossible times and descriptors only.
        let _ = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &value);
    }
}

/// Room for the events of one wait.
pub struct Events([EpollEvent; BATCH]);

impl Default for Events {
    fn default() -> Self {
        Self([EpollEvent::default(); BATCH])
    }
}

/// Serves queues on the calling thread, one request at a time, until told to stop.
///
/// `request` gets the position of the queue and the chain, and returns how many bytes it has written into it.
/// Every queue's event must have been added to the poller under the queue's position.
pub fn serve(
    poller: &Poller,
    queues: &mut [DeviceQueue],
    mut request: impl FnMut(usize, &GuestMemory, &Chain) -> usize,
) {
    let mut events = Events::default();
    let mut chain = Chain::default();
    loop {
        // All of them, whatever was reported: the driver may have offered chains before this thread listened.
        for (index, queue) in queues.iter_mut().enumerate() {
            let mut used = false;
            // At most the queue's size, so that a busy queue does not starve the others or the order to stop.
            for _ in 0..queue.size() {
                if !queue.pop(&mut chain) {
                    break;
                }
                let written = request(index, queue.memory(), &chain);
                queue.push(chain.head(), written);
                used = true;
            }
            if used {
                queue.interrupt();
            }
        }
        let more = queues.iter_mut().fold(false, |more, queue| queue.rearm() | more);
        match poller.wait(&mut events, !more) {
            Ok(events) if events.iter().all(|event| event.data() != STOP) => {}
            _ => return,
        }
    }
}

/// A device's threads. Dropping it stops and joins them.
#[derive(Default)]
pub struct Workers {
    stop: Option<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Threads to be; none runs yet.
    ///
    /// # Errors
    /// What eventfd(2) reports.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            stop: Some(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            threads: Vec::new(),
        })
    }

    /// A poller for these threads. They must end when it reports [`STOP`].
    ///
    /// # Errors
    /// What epoll_create1(2) or epoll_ctl(2) report.
    pub fn poller(&self) -> io::Result<Poller> {
        match &self.stop {
            Some(stop) => Poller::new(stop),
            None => Err(io::Error::from(io::ErrorKind::NotConnected)),
        }
    }

    /// Starts one more thread. At most the first 15 bytes of the name are visible outside (pthread_setname_np(3)).
    ///
    /// # Errors
    /// What clone(2) reports.
    pub fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads
            .push(std::thread::Builder::new().name(name.to_owned()).spawn(body)?);
        Ok(())
    }

    /// Whether a thread was started and not yet stopped.
    #[must_use]
    pub fn are_running(&self) -> bool {
        !self.threads.is_empty()
    }

    /// Tells the threads to end and waits until they have.
    pub fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // An eventfd write fails only when the counter is full: the threads are being told already.
            let _ = stop.write(1);
            for thread in self.threads.drain(..) {
                if thread.join().is_err() {
                    eprintln!("kata-rs-vmm: a device thread has panicked");
                }
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edge_triggered_event_reports_every_write_without_being_read() {
        let workers = Workers::new().unwrap();
        let poller = workers.poller().unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        poller.add_event(&event, 7).unwrap();
        let mut events = Events::default();
        assert!(poller.wait(&mut events, false).unwrap().is_empty());
        for _ in 0..3 {
            event.write(1).unwrap();
            assert_eq!(poller.wait(&mut events, false).unwrap()[0].data(), 7);
            assert!(poller.wait(&mut events, false).unwrap().is_empty());
        }
    }

    #[test]
    fn stopping_ends_every_thread() {
        let mut workers = Workers::new().unwrap();
        let poller = std::sync::Arc::new(workers.poller().unwrap());
        for _ in 0..2 {
            let poller = poller.clone();
            workers
                .spawn("test", move || {
                    while poller
                        .wait(&mut Events::default(), true)
                        .unwrap()
                        .iter()
                        .all(|e| e.data() != STOP)
                    {}
                })
                .unwrap();
        }
        assert!(workers.are_running());
        workers.stop();
        assert!(!workers.are_running());
    }
}
