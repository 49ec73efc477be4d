//! The receipt: the outcome of one publication, and the publisher that waits for it.
//!
//! A ticket is held by each shard that had members when the message was published, until the shard has read it, and by
//! each frame that waits for room. When the last ticket is dropped, every recipient has accepted the frame or has
//! disconnected, and the publisher is woken. What became of the frame is counted only for a publisher that wants to know;
//! only its message must be delivered apart from its neighbours in the log. Made only for publishers that wait: on the
//! fast path there is none. Does not know the log, outboxes or connections.

use std::sync::atomic::Ordering::{AcqRel, Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

use smallvec::SmallVec;

use crate::position::Position;
use crate::shard_set::ShardSet;
use crate::sync::plain::{AtomicU64, AtomicUsize};
use crate::tally::{Counter, DropCause, Drops, SharedDrops};

/// The outcome of one publication.
#[must_use = "a receipt says how many connections did not accept the message at once"]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Receipt {
    /// Connections that the publication addressed. One that joins during the call may get the message without being
    /// counted.
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
#[derive(Debug)]
pub(crate) struct Ticket(Arc<State>);

/// The tickets of the shards that a publication in the log concerns, until these take them. A shard that ends before it
/// has read the publication never takes its own: it is dropped with the publication.
#[derive(Debug)]
pub(crate) struct ShardTickets {
    state: Arc<State>,
    shards: ShardSet,
    /// The shards that have not taken theirs, in the form of `shards`.
    left: SmallVec<[AtomicU64; 1]>,
}

#[derive(Debug)]
struct State {
    wants_outcome: bool,
    /// Tickets that have not been dropped.
    tickets: AtomicUsize,
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

/// `wants_outcome`: the publisher also waits for frames that it would otherwise not wait for, and gets their numbers.
pub(crate) fn ticket(wants_outcome: bool) -> (Ticket, Awaited) {
    let state = Arc::new(State {
        wants_outcome,
        tickets: AtomicUsize::new(1),
        recipients: AtomicU64::default(),
        delayed: AtomicU64::default(),
        dropped: SharedDrops::default(),
        disconnected: AtomicU64::default(),
        end: Mutex::default(),
    });
    (Ticket(state.clone()), Awaited(state))
}

impl Ticket {
    pub(crate) fn wants_outcome(&self) -> bool {
        self.0.wants_outcome
    }

    pub(crate) fn count(&self, recipients: u64, delayed: u64) {
        // Relaxed: the values are read after `reached` was seen under the lock.
        self.0.recipients.fetch_add(recipients, Relaxed);
        self.0.delayed.fetch_add(delayed, Relaxed);
    }

    pub(crate) fn count_drop(&self, cause: DropCause) {
        self.0.dropped[cause].fetch_add(1, Relaxed); // Relaxed: as above
    }

    pub(crate) fn count_disconnected(&self) {
        self.0.disconnected.fetch_add(1, Relaxed); // Relaxed: as above
    }
}

impl Clone for Ticket {
    fn clone(&self) -> Self {
        self.0.tickets.fetch_add(1, Relaxed); // Relaxed: this ticket keeps the number above zero
        Self(self.0.clone())
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.give_back(1);
    }
}

impl ShardTickets {
    /// One ticket for each of these shards, in place of `ticket`.
    pub(crate) fn new(ticket: Ticket, shards: ShardSet) -> Box<Self> {
        let state = ticket.0.clone();
        state.tickets.fetch_add(shards.len(), Relaxed); // Relaxed: `ticket` keeps the number above zero
        let left = shards.words().iter().map(|word| AtomicU64::new(*word)).collect();
        Box::new(Self { state, shards, left })
    }

    /// As [`Ticket::wants_outcome`].
    pub(crate) fn want_outcome(&self) -> bool {
        self.state.wants_outcome
    }

    /// The shards that the publisher waits for.
    pub(crate) fn shards(&self) -> &ShardSet {
        &self.shards
    }

    /// The ticket of this shard; none if it had no members when the message was published.
    pub(crate) fn take(&self, shard: usize) -> Option<Ticket> {
        let (word, bit) = ShardSet::bit(shard);
        let left = self.left.get(word)?;
        // Relaxed: only the shard itself takes it, and the log orders that before the drop.
        let is_left = left.load(Relaxed) & bit != 0 && left.fetch_and(!bit, Relaxed) & bit != 0;
        is_left.then(|| Ticket(self.state.clone()))
    }
}

impl Drop for ShardTickets {
    fn drop(&mut self) {
        let left: u32 = self.left.iter_mut().map(|word| word.get_mut().count_ones()).sum();
        if left > 0 {
            self.state.give_back(left as usize);
        }
    }
}

impl State {
    /// The publisher is woken when all tickets have been given back.
    fn give_back(&self, tickets: usize) {
        // AcqRel: the last one sees what the others have counted.
        if self.tickets.fetch_sub(tickets, AcqRel) > tickets {
            return;
        }
        let waker = {
            let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
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
        if !self.0.wants_outcome {
            return Poll::Ready(Receipt::default()); // its position is the publisher's
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

#[cfg(test)]
mod tests {
    use super::*;

    fn is_ready(awaited: &Awaited) -> bool {
        awaited.poll(Waker::noop()).is_ready()
    }

    fn shards(of: &[usize]) -> ShardSet {
        of.iter().copied().collect()
    }

    #[test]
    fn the_publisher_waits_for_the_last_concerned_shard_and_for_each_waiting_frame() {
        let (ticket, awaited) = ticket(true);
        let tickets = ShardTickets::new(ticket, shards(&[3, 130]));
        assert!([0, 2, 64, 4000].iter().all(|shard| tickets.take(*shard).is_none()), "they had no members");
        let (first, last) = (tickets.take(3).expect("it had"), tickets.take(130).expect("it had"));
        assert!(tickets.take(3).is_none(), "it has taken it");
        let frame = last.clone();
        drop((first, last));
        assert!(!is_ready(&awaited), "a frame waits");
        drop(frame);
        assert!(is_ready(&awaited), "although other shards have not read it");
    }

    #[test]
    fn a_shard_that_ends_before_it_has_read_a_publication_holds_no_publisher_back() {
        let (ticket, awaited) = ticket(false);
        let tickets = ShardTickets::new(ticket, shards(&[0, 1]));
        drop(tickets.take(0));
        assert!(!is_ready(&awaited));
        drop(tickets);
        assert!(is_ready(&awaited));
    }

    #[test]
    fn without_a_concerned_shard_there_is_nothing_to_wait_for() {
        let (ticket, awaited) = ticket(true);
        let _tickets = ShardTickets::new(ticket, shards(&[]));
        assert!(is_ready(&awaited));
    }
}
