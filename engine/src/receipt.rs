//! The receipt: the outcome of one publication, and the publisher that waits for it.
//!
//! A ticket travels with the publication in the log, and a clone of it with each frame that waits for room. When the
//! last clone is dropped, every recipient has accepted the frame or has disconnected, and the publisher is woken. Made
//! only for publishers that wait: on the fast path there is none. Does not know the log, outboxes or connections.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

use crate::position::Position;
use crate::tally::{Counter, DropCause, Drops, SharedDrops};

/// The outcome of one publication.
#[must_use = "a receipt says how many connections did not accept the message at once"]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Receipt {
    /// Connections that the publication addressed.
    pub recipients: u64,
    /// Of these, connections whose outbox was full, so that the frame had to wait (or was dropped at once).
    pub delayed: u64,
    /// Connections for which the frame was dropped.
    pub dropped: Drops,
    /// Connections that ended before they accepted the frame.
    pub disconnected: u64,
    /// Position of a publication: after it. Position of a message to one connection, or of one without
    /// recipients: after everything that was published before it.
    pub position: Position,
}

impl Receipt {
    /// Connections that have accepted the frame: it is in their outbox or in the kernel.
    pub fn accepted(&self) -> u64 {
        self.recipients - self.dropped.total() - self.disconnected
    }
}

/// Held by everything that still has to process the publication.
pub(crate) type Ticket = Arc<Open>;

#[derive(Debug)]
pub(crate) struct Open {
    state: Arc<State>,
    wants_outcome: bool,
}

#[derive(Debug, Default)]
struct State {
    recipients: AtomicU64,
    delayed: AtomicU64,
    dropped: SharedDrops,
    disconnected: AtomicU64,
    end: Mutex<End>,
}

#[derive(Debug, Default)]
struct End {
    reached: bool,
    waker: Option<Waker>,
}

/// The state that a frame waiting for room keeps of its publication, until it is accepted, dropped or discarded.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) ticket: Option<Ticket>,
    /// The group that it was published to, if it was a single one.
    pub(crate) group: Option<Arc<str>>,
}

impl Origin {
    /// The connection ended before it accepted the frame.
    pub(crate) fn count_disconnected(&self) {
        if let Some(ticket) = &self.ticket {
            ticket.count_disconnected();
        }
    }
}

/// The publisher's side.
#[derive(Debug)]
pub(crate) struct Awaited(Arc<State>);

/// `wants_outcome`: the publisher also waits for frames that it would otherwise not wait for.
pub(crate) fn ticket(wants_outcome: bool) -> (Ticket, Awaited) {
    let state = Arc::new(State::default());
    (Arc::new(Open { state: state.clone(), wants_outcome }), Awaited(state))
}

impl Open {
    pub(crate) fn wants_outcome(&self) -> bool {
        self.wants_outcome
    }

    pub(crate) fn count(&self, recipients: u64, delayed: u64) {
        // Relaxed: the values are read after `reached` was seen under the lock.
        self.state.recipients.fetch_add(recipients, Relaxed);
        self.state.delayed.fetch_add(delayed, Relaxed);
    }

    pub(crate) fn count_drop(&self, cause: DropCause) {
        self.state.dropped[cause].fetch_add(1, Relaxed); // Relaxed: as above
    }

    pub(crate) fn count_disconnected(&self) {
        self.state.disconnected.fetch_add(1, Relaxed); // Relaxed: as above
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let waker = {
            let mut end = self.state.end.lock().unwrap_or_else(PoisonError::into_inner);
            end.reached = true;
            end.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Awaited {
    /// A number that differs between publishers that wait at the same time.
    pub(crate) fn number(&self) -> usize {
        std::sync::Arc::as_ptr(&self.0) as usize / size_of::<State>()
    }

    pub(crate) fn poll(&self, waker: &Waker) -> Poll<Receipt> {
        let mut end = self.0.end.lock().unwrap_or_else(PoisonError::into_inner);
        if !end.reached {
            end.waker = Some(waker.clone());
            return Poll::Pending;
        }
        let State { recipients, delayed, dropped, disconnected, .. } = &*self.0;
        Poll::Ready(Receipt {
            recipients: recipients.load(Relaxed),
            delayed: delayed.load(Relaxed),
            dropped: Drops::load(dropped),
            disconnected: disconnected.load(Relaxed),
            position: Position::default(),
        })
    }
}
