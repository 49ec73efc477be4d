//! The connections, what is expected of each, and its status.
//!
//! Keeps the three consistent: whoever changes one changes the others here. Does not know when or why.

use std::time::Instant;

use super::{
    client_pool::ClientPool,
    delivery_tracker::{DeliveryTracker, Leave},
};

/// What a connection counts as.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Status {
    /// Every delivery is checked.
    Watched,
    /// Slow or stalled: no delivery is expected.
    Unwatched,
    /// Was watched; the server has sent its Close frame and must close TCP.
    Closing,
    /// No socket.
    Disconnected,
}

#[derive(Debug)]
pub(crate) struct Clients {
    pub(crate) pool: ClientPool,
    pub(crate) tracker: DeliveryTracker,
    statuses: Vec<Status>,
    /// How many are watched or closing.
    connected: usize,
}

impl Clients {
    /// Watches all that are open.
    pub(crate) fn new(pool: ClientPool, tracker: DeliveryTracker) -> Self {
        let count = pool.len();
        let mut clients = Self { pool, tracker, statuses: vec![Status::Watched; count], connected: count };
        for index in 0..count {
            if !clients.pool.is_open(index) {
                clients.unwatch(index, Leave::Lost, Status::Disconnected);
            }
        }
        clients
    }

    #[inline]
    pub(crate) fn status(&self, index: usize) -> Status {
        self.statuses[index]
    }

    /// How many sockets of watched connections there are, the closing ones included.
    pub(crate) fn connected(&self) -> usize {
        self.connected
    }

    pub(crate) fn count(&self, status: Status) -> usize {
        self.statuses.iter().filter(|&&other| other == status).count()
    }

    /// Expects nothing more of a watched connection.
    pub(crate) fn unwatch(&mut self, index: usize, leave: Leave, status: Status) {
        self.tracker.leave(index, leave);
        self.set_status(index, status);
    }

    /// Changes the status of a connection that is not watched.
    pub(crate) fn set_status(&mut self, index: usize, status: Status) {
        let connected = |status| usize::from(matches!(status, Status::Watched | Status::Closing));
        self.connected = self.connected + connected(status) - connected(self.statuses[index]);
        self.statuses[index] = status;
    }

    /// Sends one message from `sender`; `due` is when it was sent or should have been.
    pub(crate) fn send(&mut self, sender: usize, due: Instant, write: impl FnOnce(&mut Vec<u8>, u64)) {
        let seq = self.tracker.send(sender, due);
        self.pool.queue(sender, |out| write(out, seq));
    }
}
