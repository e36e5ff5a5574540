//! The thread of a block device that is in use: takes requests, has them done, answers them.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::backend::{Ring, Transfer};
use super::extents::Backing;
use super::request::{self, Action, DATA_OFFSET, ID_SIZE, Status};
use super::{Common, QUEUE_SIZE};
use crate::virtio::queue::{Chain, DeviceQueue, Iovecs};
use crate::virtio::rate_limiter::RateLimiter;
use crate::virtio::worker::{Events, Poller, STOP};

const NOTIFY: u64 = 0;
const COMMAND: u64 = 1;
const RING: u64 = 2;
const RESTED: u64 = 3;
/// How many requests after two were there at the same time the thread reckons with others.
const COMPANY: u32 = 64;
/// `RWF_DSYNC`: the write is on the disk when it has completed.
const RWF_DSYNC: i32 = 2;

/// An order to the thread: from now on there is this backing, or none. Answered when nothing is in flight any more
/// for what was there before.
pub type Command = (Option<Arc<Backing>>, mpsc::Sender<()>);

/// What the thread is made of.
pub struct Server {
    queue: DeviceQueue,
    common: Arc<Common>,
    backing: Option<Arc<Backing>>,
    limiter: RateLimiter,
    commands: mpsc::Receiver<Command>,
    /// Taken, but not yet possible because of requests in flight.
    waiting: VecDeque<Command>,
    ring: Option<Ring>,
    ring_tried: bool,
    /// By token. The chain is there also when nothing is in flight, to be used again.
    flying: Vec<Flying>,
    free: Vec<usize>,
    write_flags: i32,
    /// What is to be put into the ring.
    prepared: Vec<usize>,
    /// For how many more requests there may be others that would wait for them.
    company: u32,
    /// Whether the ring holds transfers that the kernel has not yet taken.
    unsubmitted: bool,
    poller: Poller,
}

struct Flying {
    chain: Chain,
    work: Option<(Box<Transfer>, Arc<Backing>)>,
}

impl Server {
    /// A thread's worth of device. `command` is signalled when there is one in `commands`.
    ///
    /// # Errors
    /// What epoll_ctl(2) reports.
    pub fn new(
        queue: DeviceQueue,
        common: Arc<Common>,
        backing: Option<Arc<Backing>>,
        commands: mpsc::Receiver<Command>,
        command: &EventFd,
        poller: Poller,
        write_through: bool,
    ) -> std::io::Result<Self> {
        poller.add_event(queue.notify(), NOTIFY)?;
        poller.add_event(command, COMMAND)?;
        let limiter = RateLimiter::new(&poller, RESTED)?;
        let mut server = Self {
            queue,
            common,
            backing: None,
            limiter,
            commands,
            waiting: VecDeque::new(),
            ring: None,
            ring_tried: false,
            flying: Vec::new(),
            free: Vec::new(),
            write_flags: if write_through { RWF_DSYNC } else { 0 },
            prepared: Vec::new(),
            company: 0,
            unsubmitted: false,
            poller,
        };
        server.connect(backing);
        Ok(server)
    }

    /// Serves until told to stop; then finishes what is in flight.
    pub fn run(mut self) {
        let mut events = Events::default();
        loop {
            self.obey();
            let (mut used, more) = self.take_requests();
            // What the page cache has is complete when this returns.
            used |= self.submit();
            used |= self.reap();
            if used {
                self.queue.interrupt();
            }
            // A command waits only for what is in flight, and the completion of that wakes the poller.
            let idle = if self.waiting.is_empty() {
                !more
            } else {
                self.in_flight() > 0
            };
            let block = idle && !self.unsubmitted;
            let Ok(events) = self.poller.wait(&mut events, block) else {
                break;
            };
            if events.iter().any(|event| event.data() == STOP) {
                break;
            }
            if events.iter().any(|event| event.data() == RESTED) {
                self.limiter.rested();
            }
        }
        self.drain();
    }

    fn in_flight(&self) -> usize {
        self.flying.len() - self.free.len()
    }

    /// Carries out commands when nothing is in flight.
    fn obey(&mut self) {
        self.waiting.extend(self.commands.try_iter());
        while self.in_flight() == 0 {
            let Some((backing, done)) = self.waiting.pop_front() else {
                return;
            };
            self.connect(backing);
            // Nobody may be waiting any more.
            let _ = done.send(());
        }
    }

    fn connect(&mut self, backing: Option<Arc<Backing>>) {
        let limit = backing.as_ref().map(|backing| backing.limit());
        self.limiter.set(limit.unwrap_or_default());
        self.backing = backing;
    }

    /// Takes requests while there is room for them and the limit allows them. Whether any was answered at once, and whether there are more.
    fn take_requests(&mut self) -> (bool, bool) {
        let mut used = false;
        let mut more = false;
        // Requests behind a command wait for it.
        if self.waiting.is_empty() {
            self.prepare_ring();
            for taken in 0.. {
                if taken == QUEUE_SIZE {
                    more = true;
                    break;
                }
                if !self.limiter.allows() {
                    break;
                }
                let Some(token) = self.token() else { break };
                if !self.queue.pop(&mut self.flying[token].chain) {
                    self.free.push(token);
                    if self.queue.rearm() {
                        continue;
                    }
                    break;
                }
                self.limiter
                    .charge(request::data_length(&self.flying[token].chain));
                if let Some(written) = self.begin(token) {
                    self.answer(token, written);
                    used = true;
                }
            }
        }
        (used, more)
    }

    /// Room for one more request, at most as many as the queue has descriptors.
    fn token(&mut self) -> Option<usize> {
        if let Some(token) = self.free.pop() {
            return Some(token);
        }
        if self.flying.len() == usize::from(QUEUE_SIZE) {
            return None;
        }
        self.flying.push(Flying {
            chain: Chain::default(),
            work: None,
        });
        Some(self.flying.len() - 1)
    }

    /// Makes the ring when there is something to use it for. Without it everything is done at once.
    fn prepare_ring(&mut self) {
        if self.ring_tried || self.backing.is_none() {
            return;
        }
        self.ring_tried = true;
        if self.common.ring_allowed.load(Ordering::Relaxed)
            && let Ok(ring) = Ring::new(QUEUE_SIZE)
            && self.poller.add(ring.fd(), RING, EventSet::IN).is_ok()
        {
            self.ring = Some(ring);
        }
    }

    /// Begins the request in chain `token`. How many bytes were written, if it is finished already.
    fn begin(&mut self, token: usize) -> Option<usize> {
        let chain = &self.flying[token].chain;
        let memory = self.queue.memory();
        let capacity = self.backing.as_ref().map_or(0, |backing| backing.capacity());
        let parsed = match request::parse(memory, chain, capacity) {
            Ok(parsed) => parsed,
            Err(error) => {
                self.queue.violation(&error);
                return Some(0);
            }
        };
        let action = match (parsed, &self.backing) {
            (Err(status), _) => return Some(self.conclude(token, status, 0)),
            (Ok(Action::Identify), _) => return Some(self.identify(token)),
            // Like a disk that was pulled.
            (Ok(_), None) => return Some(self.conclude(token, Status::IoError, 0)),
            (Ok(action), Some(_)) => action,
        };
        let Some(backing) = self.backing.clone() else {
            return Some(0);
        };
        if let Action::Write { offset, length } = action
            && !backing.may_write(offset, length as u64)
        {
            return Some(self.conclude(token, Status::IoError, 0));
        }
        let counters = &self.common.counters;
        let mut iovecs = Iovecs::default();
        let transfer = match action {
            Action::Read { length: 0, .. } | Action::Write { length: 0, .. } => {
                return Some(self.conclude(token, Status::Ok, 0));
            }
            Action::Read { offset, length } => {
                counters.reads.add(length);
                let found = chain.writable_iovecs(memory, 0, length, &mut iovecs);
                found.map(|()| Transfer::Read {
                    offset,
                    length,
                    iovecs,
                })
            }
            Action::Write { offset, length } => {
                counters.writes.add(length);
                let found = chain.readable_iovecs(memory, DATA_OFFSET, length, &mut iovecs);
                found.map(|()| Transfer::Write {
                    offset,
                    length,
                    iovecs,
                    flags: self.write_flags,
                })
            }
            Action::Flush => {
                counters.flushes.add(0);
                if backing.is_read_only() {
                    return Some(self.conclude(token, Status::Ok, 0));
                }
                Ok(Transfer::Sync)
            }
            Action::Discard(ranges) => {
                counters.discards.add(0);
                let status = request::first_failure(ranges.into_iter().map(|range| backing.discard(range)));
                return Some(self.conclude(token, status, 0));
            }
            Action::WriteZeroes(ranges) => {
                counters.discards.add(0);
                let status =
                    request::first_failure(ranges.into_iter().map(|range| backing.write_zeroes(range)));
                return Some(self.conclude(token, status, 0));
            }
            Action::Identify => return Some(self.identify(token)),
        };
        match transfer {
            Ok(transfer) => self.launch(token, Box::new(transfer), backing),
            Err(_) => Some(self.conclude(token, Status::IoError, 0)),
        }
    }

    fn launch(&mut self, token: usize, transfer: Box<Transfer>, backing: Arc<Backing>) -> Option<usize> {
        if self.ring.is_some() {
            self.flying[token].work = Some((transfer, backing));
            self.prepared.push(token);
            return None;
        }
        let status = transfer.run(&backing);
        Some(self.conclude(token, status, transfer.bytes_read()))
    }

    /// Hands transfers to the kernel. When it has no room for them now, they stay in the ring for the next time.
    /// Whether any was answered at once.
    fn submit(&mut self) -> bool {
        let mut used = false;
        if self.in_flight() > 1 {
            self.company = COMPANY;
        }
        let prepared = std::mem::take(&mut self.prepared);
        for &token in &prepared {
            let Some((transfer, backing)) = self.flying[token].work.take() else {
                continue;
            };
            if self.company == 0 && transfer.waits(&backing) {
                // A thread of io_uring's would only wait in this one's place, and be one hand-over more each way.
                self.common.counters.reads_waited_for.add(0);
                let status = transfer.run(&backing);
                // Before the answer, so that what the driver does next does not count.
                if self.queue.rearm() {
                    self.company = COMPANY;
                }
                self.finish(token, &transfer, status);
                used = true;
                continue;
            }
            self.company = self.company.saturating_sub(1);
            let pushed = match &mut self.ring {
                // SAFETY: transfer and backing are kept, on the heap, in `flying` until the ring has reported the
                // token, and guest memory is held by the queue; `drain` waits for all tokens before either goes.
                Some(ring) => unsafe { ring.push(&transfer, &backing, token as u64) }.is_ok(),
                None => false,
            };
            if pushed {
                self.flying[token].work = Some((transfer, backing));
                self.unsubmitted = true;
            } else {
                let status = transfer.run(&backing);
                self.finish(token, &transfer, status);
                used = true;
            }
        }
        self.prepared = prepared;
        self.prepared.clear();
        if let (true, Some(ring)) = (self.unsubmitted, &mut self.ring) {
            self.unsubmitted = ring.submit(0).is_err();
        }
        used
    }

    /// Answers a transfer.
    fn finish(&mut self, token: usize, transfer: &Transfer, status: Status) {
        let written = self.conclude(token, status, transfer.bytes_read());
        self.answer(token, written);
    }

    /// Answers what the ring has completed. Whether there was anything.
    fn reap(&mut self) -> bool {
        let mut used = false;
        while let Some((token, result)) = self.ring.as_mut().and_then(Ring::reap) {
            let token = token as usize;
            let Some((transfer, backing)) = self.flying.get_mut(token).and_then(|flying| flying.work.take())
            else {
                continue;
            };
            let status = transfer.completed(&backing, result);
            self.finish(token, &transfer, status);
            used = true;
        }
        used
    }

    /// Puts the status into the chain: how many bytes were written, with `data` before it if all went well.
    fn conclude(&self, token: usize, status: Status, data: usize) -> usize {
        if status == Status::IoError {
            self.common.counters.errors.add(0);
        }
        request::put_status(self.queue.memory(), &self.flying[token].chain, status);
        if status == Status::Ok { data + 1 } else { 1 }
    }

    fn identify(&self, token: usize) -> usize {
        let chain = &self.flying[token].chain;
        let length = (chain.writable_length() - 1).min(ID_SIZE);
        match chain.write(self.queue.memory(), 0, &self.common.id[..length]) {
            Ok(()) => self.conclude(token, Status::Ok, length),
            Err(_) => self.conclude(token, Status::IoError, 0),
        }
    }

    fn answer(&mut self, token: usize, written: usize) {
        self.queue.push(self.flying[token].chain.head(), written);
        self.free.push(token);
    }

    /// Waits for everything in flight. Guest memory must not go before.
    fn drain(&mut self) {
        while self.in_flight() > 0 {
            let Some(ring) = &mut self.ring else { return };
            if ring.submit(1).is_err() {
                // The kernel is out of something for a moment.
                std::thread::yield_now();
            }
            self.reap();
        }
        self.obey();
        self.queue.interrupt();
    }
}
