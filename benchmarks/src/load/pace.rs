//! When the next message is due, and which connection sends it.
//!
//! A closed loop keeps a number of messages in flight and measures a server's maximum; an open loop sends by the clock
//! whatever the server does, and its latencies count from the time when a message was due, so that a stall counts for
//! all messages that it delays. Knows time and indexes. Does not know sockets or messages.

use std::time::{Duration, Instant};

/// A shorter wait is done by polling, because epoll counts in milliseconds.
const SPIN_BELOW: Duration = Duration::from_millis(2);

/// When to send.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pace {
    /// A new message for each that has landed.
    Closed { in_flight: usize },
    /// One message per interval since the start.
    Open { interval: Duration, start: Instant, sent: u32 },
}

impl Pace {
    pub(crate) fn new(in_flight: usize, rate: Option<f64>, now: Instant) -> Self {
        match rate {
            Some(rate) => Self::Open { interval: Duration::from_secs_f64(1.0 / rate), start: now, sent: 0 },
            None => Self::Closed { in_flight },
        }
    }

    /// Starts the clock of an open loop.
    pub(crate) fn begin(&mut self, now: Instant) {
        if let Self::Open { start, sent, .. } = self {
            (*start, *sent) = (now, 0);
        }
    }

    /// The time at which a message of the open loop was due, if one is by `now`.
    pub(crate) fn due(&mut self, now: Instant) -> Option<Instant> {
        let due = self.next_due().filter(|due| *due <= now)?;
        if let Self::Open { sent, .. } = self {
            *sent += 1;
        }
        Some(due)
    }

    /// When the next message of the open loop is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        match self {
            Self::Closed { .. } => None,
            Self::Open { interval, start, sent } => Some(*start + *interval * *sent),
        }
    }

    /// The longest wait for the server: until `deadline`, or until a message is due.
    pub(crate) fn wait_max(&self, now: Instant, deadline: Instant) -> Duration {
        let until = self.next_due().map_or(deadline, |due| deadline.min(due));
        let wait = until.saturating_duration_since(now);
        match self {
            Self::Open { .. } if wait < SPIN_BELOW => Duration::ZERO,
            _ => wait,
        }
    }
}

/// The senders, in turn.
#[derive(Debug)]
pub(crate) struct Senders {
    indexes: Vec<usize>,
    turn: usize,
}

impl Senders {
    pub(crate) fn new(indexes: Vec<usize>) -> Self {
        Self { indexes, turn: 0 }
    }

    /// A sender has another index from now on.
    pub(crate) fn rename(&mut self, from: usize, to: usize) {
        self.indexes.iter_mut().filter(|index| **index == from).for_each(|index| *index = to);
    }

    /// The next that `is_open`; `None` when there is none.
    pub(crate) fn next(&mut self, is_open: impl Fn(usize) -> bool) -> Option<usize> {
        for _ in 0..self.indexes.len() {
            let index = self.indexes[self.turn];
            self.turn = (self.turn + 1) % self.indexes.len();
            if is_open(index) {
                return Some(index);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_loop_catches_up_and_counts_from_the_intended_times() {
        let start = Instant::now();
        let mut pace = Pace::new(1, Some(1000.0), start);
        let late = start + Duration::from_micros(2500);
        let due: Vec<_> = std::iter::from_fn(|| pace.due(late)).map(|due| due - start).collect();
        assert_eq!(due, [0, 1, 2].map(Duration::from_millis));
        assert_eq!(pace.wait_max(late, late + Duration::from_secs(1)), Duration::ZERO);
    }

    #[test]
    fn senders_take_turns_and_closed_ones_are_skipped() {
        let mut senders = Senders::new(vec![0, 250, 500, 750]);
        let turns: Vec<_> = (0..4).map(|_| senders.next(|index| index != 250)).collect();
        assert_eq!(turns, [Some(0), Some(500), Some(750), Some(0)]);
        assert_eq!(senders.next(|_| false), None);
    }
}
