//! The thread of a network device: frames from the tap into the driver's buffers, and the driver's frames to the tap.
//!
//! Both directions take turns of a bounded number of frames, so that neither a guest nor a network that floods the
//! device keeps the thread from the other direction, or from the order to stop.

use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::header::{self, ETHERNET, HeaderError, MAX_FRAME, feature};
use super::posted::Posted;
use super::tap::Obstacle;
use super::{Backing, Common};
use crate::virtio::Interrupt;
use crate::virtio::queue::{Chain, DeviceQueue, Iovecs, MAX_SEGMENTS};
use crate::virtio::rate_limiter::RateLimiter;
use crate::virtio::worker::{Events, Poller, STOP, Timer};

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const COMMAND: u64 = 2;
const TAP: u64 = 3;
const PATIENCE_ENDS: u64 = 4;
const RECEIVE_RESTED: u64 = 5;
const SEND_RESTED: u64 = 6;

/// Frames of one direction before the other has its turn.
const TURN: usize = 64;
/// Frames after which the driver is told, if it wants to know, so that it works while the turn goes on.
const BATCH: usize = 8;
/// How long frames wait for a driver to post as many buffers as the longest needs.
const PATIENCE: Duration = Duration::from_millis(1);

/// An order to the thread: from now on there is this backing, or none. Answered when the old one is not used any more.
pub type Command = (Option<Arc<Backing>>, mpsc::Sender<()>);

/// What is wrong with a frame that the driver wants to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum FrameError {
    #[error("a frame to be sent has {0} bytes for the device to write")]
    Writable(usize),
    #[error("a frame to be sent has {0} bytes with its header, it must have {least} to {MAX_FRAME}", least = header::LENGTH + ETHERNET)]
    Length(usize),
    #[error("a frame to be sent has {0} pieces")]
    Pieces(usize),
    #[error(transparent)]
    Header(#[from] HeaderError),
}

/// How the thread stands to frames while the driver has too few buffers for the longest one. A driver that is slow
/// gets time to post more, so that nothing is lost; one that never posts enough gets the frames that fit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Patience {
    /// It would wait.
    Full,
    /// It waits, until the timer says so.
    Waiting,
    /// It has waited in vain.
    None,
}

/// What the thread is made of.
pub struct Server {
    receive: DeviceQueue,
    transmit: DeviceQueue,
    interrupt: Interrupt,
    features: u64,
    common: Arc<Common>,
    backing: Option<Arc<Backing>>,
    commands: mpsc::Receiver<Command>,
    poller: Poller,
    posted: Posted,
    chain: Chain,
    /// Of the frame that is being sent.
    pieces: Iovecs,
    /// Its header.
    header: Box<[u8; header::LENGTH]>,
    used: Vec<(u16, usize)>,
    receive_limiter: RateLimiter,
    send_limiter: RateLimiter,
    patience: Patience,
    timer: Timer,
    /// Whether the tap may have frames.
    readable: bool,
    /// Whether the tap may have room.
    writable: bool,
}

impl Server {
    /// A thread's worth of device. `command` is signalled when there is one in `commands`.
    ///
    /// # Errors
    /// What epoll_ctl(2) reports.
    pub fn new(
        [receive, transmit]: [DeviceQueue; 2],
        interrupt: Interrupt,
        features: u64,
        common: Arc<Common>,
        backing: Option<Arc<Backing>>,
        (commands, command): (mpsc::Receiver<Command>, &EventFd),
        poller: Poller,
    ) -> std::io::Result<Self> {
        poller.add_event(receive.notify(), RECEIVE)?;
        poller.add_event(transmit.notify(), TRANSMIT)?;
        poller.add_event(command, COMMAND)?;
        let timer = Timer::new(&poller, PATIENCE_ENDS)?;
        let receive_limiter = RateLimiter::new(&poller, RECEIVE_RESTED)?;
        let send_limiter = RateLimiter::new(&poller, SEND_RESTED)?;
        let mut server = Self {
            receive,
            transmit,
            interrupt,
            features,
            common,
            backing: None,
            commands,
            poller,
            posted: Posted::new(features & feature::MRG_RXBUF != 0),
            chain: Chain::default(),
            pieces: Iovecs::default(),
            header: Box::default(),
            used: Vec::new(),
            receive_limiter,
            send_limiter,
            patience: Patience::Full,
            timer,
            readable: false,
            writable: false,
        };
        server.connect(backing)?;
        Ok(server)
    }

    /// Serves until told to stop.
    pub fn run(mut self) {
        let mut events = Events::default();
        loop {
            // Both, whatever was reported: the driver may have offered chains before this thread listened.
            let more = self.receive_frames() | self.send_frames();
            let Ok(events) = self.poller.wait(&mut events, !more) else {
                return;
            };
            let mut commanded = false;
            for event in events {
                match event.data() {
                    STOP => return,
                    COMMAND => commanded = true,
                    PATIENCE_ENDS if self.patience == Patience::Waiting => self.patience = Patience::None,
                    RECEIVE_RESTED => self.receive_limiter.rested(),
                    SEND_RESTED => self.send_limiter.rested(),
                    TAP => {
                        let happened = event.event_set();
                        self.readable |= happened.contains(EventSet::IN);
                        self.writable |= happened.contains(EventSet::OUT);
                        if happened.contains(EventSet::ERROR)
                            && self.backing.as_ref().is_some_and(|backing| backing.tap.is_gone())
                        {
                            self.lose_tap();
                        }
                    }
                    _ => {}
                }
            }
            if commanded {
                self.obey();
            }
        }
    }

    fn obey(&mut self) {
        while let Ok((backing, done)) = self.commands.try_recv() {
            self.disconnect();
            if let Err(error) = self.connect(backing) {
                eprintln!("kata-rs-vmm: a network device cannot watch its tap: {error}");
            }
            // Nobody may be waiting any more.
            let _ = done.send(());
        }
    }

    fn connect(&mut self, backing: Option<Arc<Backing>>) -> std::io::Result<()> {
        // The guest does not see a link come up that is down already.
        let backing = backing.filter(|backing| !backing.tap.is_gone());
        if let Some(backing) = &backing {
            let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
            self.poller.add(backing.tap.raw_fd(), TAP, events)?;
            self.receive_limiter.set(backing.receive_limit);
            self.send_limiter.set(backing.send_limit);
        }
        (self.readable, self.writable) = (backing.is_some(), backing.is_some());
        self.common.link_up.store(backing.is_some(), Ordering::Release);
        self.backing = backing;
        Ok(())
    }

    fn disconnect(&mut self) {
        if let Some(backing) = self.backing.take() {
            self.poller.remove(backing.tap.raw_fd());
        }
        self.common.link_up.store(false, Ordering::Release);
    }

    /// The interface was deleted under the device: the guest's cable is out.
    fn lose_tap(&mut self) {
        eprintln!("kata-rs-vmm: the tap of a network device is gone, its link is down");
        self.disconnect();
        let common = &self.common;
        self.interrupt.config_changed(|space| common.put_link(space));
    }

    /// Reads frames while the tap has some and the driver room for them, at most [`TURN`]. True when there may be more.
    fn receive_frames(&mut self) -> bool {
        for taken in 0..TURN {
            let more = self.receive_frame();
            if !more || taken % BATCH == BATCH - 1 {
                self.receive.interrupt();
            }
            if !more {
                return false;
            }
        }
        true
    }

    /// Reads at most one frame. False when the next event decides how it goes on.
    fn receive_frame(&mut self) -> bool {
        let Some(backing) = &self.backing else {
            return false;
        };
        if !self.readable || self.receive.is_stopped() {
            return false;
        }
        if !self.receive_limiter.allows() {
            return false;
        }
        self.posted.fill(&mut self.receive, &mut self.chain);
        if self.posted.has_enough() {
            self.patience = Patience::Full;
        } else if self.receive.rearm() {
            return true;
        } else if self.posted.is_empty() {
            return false;
        } else if self.patience != Patience::None {
            if self.patience == Patience::Full {
                self.patience = Patience::Waiting;
                self.timer.set(PATIENCE);
            }
            return false;
        }
        let counters = &self.common.counters;
        match self.posted.read(&backing.tap) {
            Ok(Some(length)) => {
                self.posted.take(&self.receive, length, &mut self.used);
                self.receive.push_all(&self.used);
                self.receive_limiter.charge(length - header::LENGTH);
                counters.received.add(length - header::LENGTH);
            }
            Ok(None) => {
                counters.receive_drops.add(0);
                self.receive_limiter.charge(0);
            }
            Err(Obstacle::NotNow) => self.readable = false,
            Err(Obstacle::Gone) => self.lose_tap(),
            Err(Obstacle::Down | Obstacle::Refused) => {
                counters.receive_errors.add(0);
                // Until the tap reports something new, so that an error that stays does not keep the thread busy.
                self.readable = false;
            }
        }
        true
    }

    /// Sends frames while the driver has some and the tap room for them, at most [`TURN`]. True when there may be more.
    fn send_frames(&mut self) -> bool {
        for taken in 0..TURN {
            let more = self.send_frame();
            if !more || taken % BATCH == BATCH - 1 {
                self.transmit.interrupt();
            }
            if !more {
                return false;
            }
        }
        true
    }

    /// Takes at most one frame from the driver. False when the next event decides how it goes on.
    fn send_frame(&mut self) -> bool {
        if self.backing.is_some() && !(self.writable && self.send_limiter.allows()) {
            return false;
        }
        if !self.transmit.pop(&mut self.chain) {
            return self.transmit.rearm();
        }
        let prepared = self.prepare();
        let counters = &self.common.counters;
        match (prepared, &self.backing) {
            (Err(error), _) => {
                self.transmit.violation(&error);
                counters.send_errors.add(0);
            }
            // Like a cable that was pulled.
            (Ok(_), None) => counters.send_drops.add(0),
            (Ok(length), Some(backing)) => match backing.tap.write(&self.pieces) {
                Ok(_) => {
                    counters.sent.add(length);
                    self.send_limiter.charge(length);
                }
                Err(Obstacle::NotNow) => {
                    self.writable = false;
                    self.transmit.unpop();
                    return false;
                }
                Err(Obstacle::Gone) => {
                    counters.send_drops.add(0);
                    self.lose_tap();
                }
                Err(Obstacle::Down) => counters.send_drops.add(0),
                Err(Obstacle::Refused) => counters.send_errors.add(0),
            },
        }
        self.transmit.push(self.chain.head(), 0);
        true
    }

    /// Checks the frame in the chain and puts its pieces together. Its length without header.
    fn prepare(&mut self) -> Result<usize, FrameError> {
        let (chain, memory) = (&self.chain, self.transmit.memory());
        if chain.writable_length() > 0 {
            return Err(FrameError::Writable(chain.writable_length()));
        }
        let total = chain.readable_length();
        if !(header::LENGTH + ETHERNET..=MAX_FRAME).contains(&total) {
            return Err(FrameError::Length(total));
        }
        let length = total - header::LENGTH;
        let mut bytes = [0; header::LENGTH];
        chain
            .read(memory, 0, &mut bytes)
            .map_err(|_| FrameError::Length(total))?;
        *self.header = header::check(bytes, length, self.features)?;
        self.pieces.clear();
        self.pieces.push_own(&mut *self.header);
        chain
            .readable_iovecs(memory, header::LENGTH, length, &mut self.pieces)
            .map_err(|_| FrameError::Length(total))?;
        match self.pieces.as_slice().len() {
            ..=MAX_SEGMENTS => Ok(length),
            pieces => Err(FrameError::Pieces(pieces)),
        }
    }
}
