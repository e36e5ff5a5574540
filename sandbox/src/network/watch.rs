//! Notices that an interface of a pod is not there any more while its VM runs: CNI's DEL, a hand, or an interface that
//! was moved to another namespace.

use std::io;

use netlink::route::{LinkHeader, RTM_DELLINK, RTM_GETLINK, RTMGRP_LINK};
use netlink::{Error, Family, Message, Socket};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What listens in a namespace. It stays there, whatever thread it is used on.
#[derive(Debug)]
pub(crate) struct Listener {
    events: Socket,
    questions: Socket,
}

impl Listener {
    /// Begins to listen in the calling thread's namespace: from here on nothing is missed.
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            events: Socket::listen(Family::Route, RTMGRP_LINK)?,
            questions: Socket::open(Family::Route)?,
        })
    }

    /// To be waited for.
    pub fn watch(self) -> io::Result<Watch> {
        // SAFETY: a socket refers to the same open descriptor until it is dropped, and AsyncFd owns it.
        let events = unsafe { AsyncFd::register_with_interest(self.events, Interest::READABLE) }?;
        Ok(Watch {
            events,
            questions: self.questions,
        })
    }
}

/// A [`Listener`] on this runtime.
#[derive(Debug)]
pub(crate) struct Watch {
    events: AsyncFd<Socket>,
    questions: Socket,
}

impl Watch {
    /// Waits until links of the namespace have gone, and says which of these are not there.
    pub async fn lost(&mut self, links: &[u32]) -> io::Result<Vec<u32>> {
        loop {
            let mut ready = self.events.readable_mut().await?;
            let gone = match ready.get_inner_mut().events() {
                Ok(events) => {
                    ready.clear_ready();
                    events.iter().any(|event| event.kind == RTM_DELLINK)
                }
                // Something was lost, and there is more to read.
                Err(error) if error.errno == Errno::NOBUFS => true,
                Err(error) => return Err(error.into()),
            };
            // A bridge says the same of a port that it lets go: what is there is the kernel's list.
            if gone {
                let lost = self.missing(links)?;
                if !lost.is_empty() {
                    return Ok(lost);
                }
            }
        }
    }

    fn missing(&mut self, links: &[u32]) -> Result<Vec<u32>, Error> {
        let request = Message::new(RTM_GETLINK, 0, &LinkHeader::default().encode());
        let there = self.questions.dump(&request)?;
        let there: Vec<u32> = there
            .iter()
            .filter_map(|reply| Some(LinkHeader::decode(reply.header()?).index))
            .collect();
        Ok(links
            .iter()
            .copied()
            .filter(|index| !there.contains(index))
            .collect())
    }
}
