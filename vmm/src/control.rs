//! The control channel: requests of the sandbox in, responses and the end of the VM out.
//!
//! One thread, which waits for the sandbox and for the VM's end; nothing else in the process talks to the
//! sandbox. When the sandbox is gone the VM ends.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use protocol::channel::{self, Received};
use protocol::vmm::{
    CONTROL_VERSION, Event, ExitCause, Failure, FailureKind, FromVmm, Reply, Request, RequestBody, Response,
};
use rustix::event::{PollFd, PollFlags, poll};
use serde::Deserialize;

use crate::exit::{ExitSlot, chain};
use crate::machine::{Descriptors, Error, Machine};
use crate::metrics;
use crate::timeline::{Recorder, Stage};

/// The VM has ended, or never began.
pub struct Ended {
    /// Why.
    pub cause: ExitCause,
    /// The machine, which the caller may drop in an orderly way or leave to the kernel.
    pub machine: Option<Machine>,
}

/// Serves the sandbox until the VM ends or the sandbox closes the channel.
///
/// # Errors
/// When the host refuses what the loop itself needs, or the channel breaks.
pub fn serve(channel: OwnedFd, timeline: Arc<Recorder>) -> io::Result<Ended> {
    let exit = Arc::new(ExitSlot::new()?);
    let mut session = Session {
        channel,
        exit,
        timeline,
        machine: None,
        configured: false,
        started_ns: 0,
        id: String::new(),
    };
    let cause = session.run()?;
    Ok(Ended {
        cause,
        machine: session.machine,
    })
}

struct Session {
    channel: OwnedFd,
    exit: Arc<ExitSlot>,
    timeline: Arc<Recorder>,
    machine: Option<Machine>,
    configured: bool,
    started_ns: u64,
    id: String,
}

/// Only what must be understood of a request whose version is not known yet.
#[derive(Deserialize)]
struct Envelope {
    id: u64,
    body: serde_json::Value,
}

impl Session {
    fn run(&mut self) -> io::Result<ExitCause> {
        loop {
            if let Some(cause) = self.exit.cause() {
                self.report_end(&cause);
                return Ok(cause);
            }
            let memory = self
                .machine
                .as_ref()
                .and_then(|machine| machine.handles().memory());
            let exit = PollFd::from_borrowed_fd(borrow(self.exit.event()), PollFlags::IN);
            let plugged = match memory {
                Some(memory) => PollFd::from_borrowed_fd(borrow(memory.reached()), PollFlags::IN),
                None => exit.clone(),
            };
            let mut ready = [PollFd::new(&self.channel, PollFlags::IN), exit, plugged];
            match poll(&mut ready, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if let Some(memory) = memory
                && memory.reached().read().is_ok()
            {
                let bytes = memory.plugged();
                self.send(&FromVmm::Event(Event::PluggedMemory { bytes }))?;
            }
            if ready[0].revents().is_empty() {
                continue;
            }
            match channel::receive(&self.channel) {
                Ok(Received::Message(bytes, fds)) => self.answer(&bytes, fds)?,
                Ok(Received::Closed) => return Ok(ExitCause::Requested),
                // The sandbox died with our answer unread.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(ExitCause::Requested);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn answer(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> io::Result<()> {
        let (id, result) = match self.parse(bytes) {
            Err((id, failure)) => (id, Err(failure)),
            Ok(Request { id, body }) => {
                let result = self.handle(body, Descriptors::new(fds));
                (
                    id,
                    result.map_err(|error| Failure {
                        kind: error.kind(),
                        message: chain(&error),
                    }),
                )
            }
        };
        self.send(&FromVmm::Response(Response { id, result }))
    }

    fn parse(&self, bytes: &[u8]) -> Result<Request, (u64, Failure)> {
        let invalid = |message: String| Failure {
            kind: FailureKind::Invalid,
            message,
        };
        let envelope: Envelope = serde_json::from_slice(bytes)
            .map_err(|error| (0, invalid(format!("the request cannot be understood: {error}"))))?;
        let id = envelope.id;
        if !self.configured {
            let version = envelope
                .body
                .get("configure")
                .and_then(|body| body.get("version"));
            if let Some(version) = version
                && version != CONTROL_VERSION
            {
                let message = format!(
                    "the sandbox speaks version {version} of the control protocol, this VMM version \
                     {CONTROL_VERSION}: install runtime and VMM of one release"
                );
                return Err((
                    id,
                    Failure {
                        kind: FailureKind::Version,
                        message,
                    },
                ));
            }
        }
        serde_json::from_slice(bytes)
            .map_err(|error| (id, invalid(format!("the request cannot be understood: {error}"))))
    }

    fn handle(&mut self, body: RequestBody, mut descriptors: Descriptors) -> Result<Reply, Error> {
        if let RequestBody::Configure { version: _, config } = body {
            if self.configured {
                return Err(Error::State("the VM has been configured already"));
            }
            self.configured = true;
            self.started_ns = config.started_ns;
            self.id.clone_from(&config.id);
            self.timeline.record(Stage::Configured);
            self.machine = Some(Machine::build(&config, descriptors, &self.exit, &self.timeline)?);
            return Ok(Reply::Done);
        }
        match body {
            RequestBody::Timeline => return Ok(Reply::Timeline(self.timeline.report(self.started_ns))),
            RequestBody::Shutdown => {
                self.exit.end(ExitCause::Requested);
                return Ok(Reply::Done);
            }
            _ => {}
        }
        let machine = self
            .machine
            .as_mut()
            .ok_or(Error::State("the VM must be configured first"))?;
        match body {
            RequestBody::Boot => machine.boot()?,
            RequestBody::Pause => machine.pause()?,
            RequestBody::Resume => machine.resume()?,
            RequestBody::Metrics => return Ok(Reply::Metrics(metrics::gather(machine)?)),
            RequestBody::AttachBlock { slot, backing } => {
                machine.handles().attach_block(slot, &backing, &mut descriptors)?;
            }
            RequestBody::DetachBlock { slot } => machine.handles().detach_block(slot)?,
            RequestBody::AddShare(share) => machine.handles().add_share(&share, &mut descriptors)?,
            RequestBody::RemoveShare { name } => machine.handles().remove_share(&name)?,
            RequestBody::AttachNet { slot, backing } => {
                machine.handles().attach_net(slot, &backing, &mut descriptors)?;
            }
            RequestBody::DetachNet { slot } => machine.handles().detach_net(slot)?,
            RequestBody::SetVcpus { count } => machine.set_vcpus(count)?,
            RequestBody::SetPluggedMemory { mib } => machine.handles().set_plugged_memory(mib)?,
            RequestBody::SetBalloon { target_mib } => machine.handles().set_balloon(target_mib)?,
            RequestBody::Configure { .. } | RequestBody::Timeline | RequestBody::Shutdown => {}
        }
        Ok(Reply::Done)
    }

    fn report_end(&self, cause: &ExitCause) {
        if !matches!(cause, ExitCause::GuestShutdown | ExitCause::Requested) {
            eprintln!("kata-rs-vmm: VM {} has ended: {cause:?}", self.id);
        }
        let console = self
            .machine
            .as_ref()
            .map(|machine| machine.handles().console_text())
            .unwrap_or_default();
        // A sandbox that is gone does not want to know any more.
        let _ = self.send(&FromVmm::Event(Event::Exited {
            cause: cause.clone(),
            console,
        }));
    }

    fn send(&self, message: &FromVmm) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        match channel::send(&self.channel, &bytes, &[]) {
            // The channel's end of file follows and ends the VM.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other,
        }
    }
}

fn borrow(event: &vmm_sys_util::eventfd::EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the event it is borrowed from.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
