//! The queue of events for the host.
//!
//! Whoever has an event waits for its place in the queue, so none is lost and each container's come in order.

use std::sync::{Arc, Mutex, PoisonError};

use protocol::agent::event::Kind;
use protocol::agent::{Event, OutOfMemory, ProcessExited};
use tokio::sync::mpsc;

/// Events kept while nobody listens (agent.proto, `Events`).
const KEPT: usize = 1024;

/// Where events go in.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<Event>);

/// Where they come out; one listener at a time.
#[derive(Clone, Debug)]
pub struct Listener(Arc<Mutex<Option<mpsc::Receiver<Event>>>>);

/// The listener's turn; gives the queue back when dropped.
#[derive(Debug)]
pub struct Listening {
    listener: Listener,
    events: Option<mpsc::Receiver<Event>>,
}

/// A new, empty queue.
#[must_use]
pub fn queue() -> (Events, Listener) {
    let (sender, receiver) = mpsc::channel(KEPT);
    (Events(sender), Listener(Arc::new(Mutex::new(Some(receiver)))))
}

impl Events {
    /// A process has exited.
    pub async fn exited(&self, container_id: &str, exec_id: &str, status: u32) {
        self.push(Kind::Exited(ProcessExited {
            container_id: container_id.into(),
            exec_id: exec_id.into(),
            status,
            exited_at_ns: crate::clock::realtime_ns(),
            ..Default::default()
        }))
        .await;
    }

    /// The kernel has killed a process of the container for want of memory.
    pub async fn out_of_memory(&self, container_id: &str) {
        self.push(Kind::OutOfMemory(OutOfMemory {
            container_id: container_id.into(),
            ..Default::default()
        }))
        .await;
    }

    async fn push(&self, kind: Kind) {
        let event = Event {
            kind: Some(kind),
            ..Default::default()
        };
        // The queue ends only with the agent.
        let _ = self.0.send(event).await;
    }
}

impl Listener {
    /// Takes the listener's turn; None when somebody else has it.
    #[must_use]
    pub fn listen(&self) -> Option<Listening> {
        let events = self.0.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(Listening {
            listener: self.clone(),
            events: Some(events),
        })
    }
}

impl Listening {
    /// The next event; None when there will be none any more.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.as_mut()?.recv().await
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        *self.listener.0.lock().unwrap_or_else(PoisonError::into_inner) = self.events.take();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_wait_for_a_listener_and_there_is_one_at_a_time() {
        let (events, listener) = queue();
        events.exited("c", "", 7).await;
        events.out_of_memory("c").await;
        let mut first = listener.listen().unwrap();
        assert!(listener.listen().is_none());
        assert!(matches!(first.next().await.unwrap().kind, Some(Kind::Exited(exited)) if exited.status == 7));
        drop(first);
        let mut second = listener.listen().unwrap();
        assert!(matches!(
            second.next().await.unwrap().kind,
            Some(Kind::OutOfMemory(_))
        ));
    }
}
