//! The ledger: what was sent, who still owes having seen it, and what went wrong.
//!
//! Holds only messages that have not landed everywhere, in the order of their numbers, so it stays as small as what
//! is in flight however long the run. Everything before it has landed at all receivers, which makes a message from
//! there a duplicate. Knows numbers and connections by index. Does not know sockets, bytes or the pace of sending.

use std::{collections::VecDeque, time::Instant};

use super::{
    Mode,
    order::{Cursor, Verdict},
};
use crate::message::FIRST_SEQ;

/// A message that every receiver has got.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Landed {
    pub(crate) sender: usize,
    /// When it was sent, or should have been.
    pub(crate) sent: Instant,
}

/// What has been counted since the first message.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Tally {
    pub(crate) expected: u64,
    pub(crate) received: u64,
    pub(crate) landed: u64,
    pub(crate) duplicates: u64,
    /// A connection saw messages in another order than the first that saw them; for an echo, than they were sent.
    pub(crate) order_violations: u64,
    /// All agree, but one sender's messages are not in the order in which it sent them.
    pub(crate) sender_reorders: u64,
    /// Messages that nobody sent, or that are somebody else's.
    pub(crate) strays: u64,
}

/// One message on its way.
#[derive(Debug)]
struct Entry {
    sent: Instant,
    sender: usize,
    awaited: u32,
    /// Given by the first connection that sees it; for an echo, by the sending.
    place: Option<u32>,
}

/// All messages on their way.
#[derive(Debug)]
pub(crate) struct Ledger {
    mode: Mode,
    /// Numbers below are probes of the settling, which some connections may rightly have missed.
    first: u64,
    /// The number of the first entry.
    base: u64,
    entries: VecDeque<Entry>,
    cursors: Vec<Cursor>,
    /// In fan-out: how many messages have a place.
    placed: u32,
    /// By connection. In fan-out: the latest number of its own that was placed. In echo: how many it sent.
    own: Vec<u64>,
    present: u32,
    landed: Vec<Landed>,
    pub(crate) tally: Tally,
}

impl Ledger {
    pub(crate) fn new(mode: Mode, connections: usize, first: u64) -> Self {
        Self {
            mode,
            first,
            base: first,
            entries: VecDeque::new(),
            cursors: vec![Cursor::default(); connections],
            placed: 0,
            own: vec![0; connections],
            present: connections as u32,
            landed: Vec::new(),
            tally: Tally::default(),
        }
    }

    /// Enters a message that `sender` sends; returns its number.
    pub(crate) fn send(&mut self, sender: usize, sent: Instant) -> u64 {
        let (awaited, place) = if self.mode == Mode::Echo {
            let place = self.own[sender] as u32;
            self.own[sender] += 1;
            (1, Some(place))
        } else {
            (self.present, None)
        };
        self.tally.expected += u64::from(awaited);
        self.entries.push_back(Entry { sent, sender, awaited, place });
        self.base + self.entries.len() as u64 - 1
    }

    /// Enters that a connection has received a number.
    #[inline]
    pub(crate) fn arrive(&mut self, connection: usize, seq: u64) {
        let Some(entry) = seq.checked_sub(self.base).and_then(|index| self.entries.get_mut(index as usize))
        else {
            return self.arrive_unlisted(seq);
        };
        if self.mode == Mode::Echo && entry.sender != connection {
            self.tally.strays += 1;
            return;
        }
        let place = *entry.place.get_or_insert_with(|| {
            let latest = &mut self.own[entry.sender];
            self.tally.sender_reorders += u64::from(seq < *latest);
            *latest = seq.max(*latest);
            self.placed += 1;
            self.placed - 1
        });
        match self.cursors[connection].pass(place) {
            Verdict::Forward => {}
            Verdict::OutOfOrder => self.tally.order_violations += 1,
            Verdict::Duplicate => {
                self.tally.duplicates += 1;
                return;
            }
        }
        self.tally.received += 1;
        entry.awaited -= 1;
        if entry.awaited == 0 {
            self.landed.push(Landed { sender: entry.sender, sent: entry.sent });
            self.retire();
        }
    }

    /// A connection has ended: what it has not received it never will.
    pub(crate) fn leave(&mut self, connection: usize) {
        self.present -= 1;
        let cursor = &self.cursors[connection];
        for entry in &mut self.entries {
            let concerned = self.mode == Mode::Fanout || entry.sender == connection;
            let seen = entry.place.is_some_and(|place| cursor.has_passed(place));
            if concerned && !seen && entry.awaited > 0 {
                entry.awaited -= 1;
                if entry.awaited == 0 {
                    self.landed.push(Landed { sender: entry.sender, sent: entry.sent });
                }
            }
        }
        self.retire();
    }

    /// Takes the messages that have landed since the last call.
    pub(crate) fn take_landed(&mut self) -> Option<Landed> {
        let landed = self.landed.pop();
        self.tally.landed += u64::from(landed.is_some());
        landed
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.entries.is_empty()
    }

    fn retire(&mut self) {
        while self.entries.front().is_some_and(|entry| entry.awaited == 0) {
            self.entries.pop_front();
            self.base += 1;
        }
    }

    #[cold]
    fn arrive_unlisted(&mut self, seq: u64) {
        if (self.first..self.base).contains(&seq) {
            self.tally.duplicates += 1;
        } else if !(FIRST_SEQ..self.first).contains(&seq) {
            self.tally.strays += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: u64 = FIRST_SEQ + 10;

    /// Three messages from connection 0; each connection sees what `seen` says, as offsets from the first.
    fn tally(mode: Mode, seen: &[&[u64]]) -> (Tally, Ledger) {
        let mut ledger = Ledger::new(mode, seen.len(), FIRST);
        for _ in 0..3 {
            ledger.send(0, Instant::now());
        }
        for (connection, offsets) in seen.iter().enumerate() {
            offsets.iter().for_each(|offset| ledger.arrive(connection, FIRST + offset));
        }
        while ledger.take_landed().is_some() {}
        (ledger.tally, ledger)
    }

    fn clean(connections: u64) -> Tally {
        Tally { expected: 3 * connections, received: 3 * connections, landed: 3, ..Tally::default() }
    }

    #[test]
    fn everything_once_in_one_order_is_clean() {
        let (tally, ledger) = tally(Mode::Fanout, &[&[0, 1, 2], &[0, 1, 2]]);
        assert_eq!(tally, clean(2));
        assert!(ledger.is_settled());
    }

    #[test]
    fn a_swap_is_caught_whichever_connection_came_first() {
        for seen in [[&[0, 1, 2], &[1, 0, 2]], [&[1, 0, 2], &[0, 1, 2]]] {
            let tally = tally(Mode::Fanout, &[seen[0], seen[1]]).0;
            assert_eq!((tally.order_violations, tally.received, tally.duplicates), (1, 6, 0));
        }
    }

    #[test]
    fn an_order_that_all_share_is_no_violation_but_not_the_senders() {
        let tally = tally(Mode::Fanout, &[&[1, 0, 2], &[1, 0, 2]]).0;
        assert_eq!(tally, Tally { sender_reorders: 1, ..clean(2) });
    }

    #[test]
    fn a_duplicate_is_caught_before_and_after_landing() {
        let early = tally(Mode::Fanout, &[&[0, 0, 1, 2], &[0, 1, 2]]).0;
        let late = tally(Mode::Fanout, &[&[0, 1, 2], &[0, 1, 2, 1]]).0;
        assert_eq!((early, late), (Tally { duplicates: 1, ..clean(2) }, Tally { duplicates: 1, ..clean(2) }));
    }

    #[test]
    fn a_loss_is_caught_and_is_no_violation_of_order() {
        let (tally, ledger) = tally(Mode::Fanout, &[&[0, 1, 2], &[0, 2]]);
        assert_eq!((tally.expected, tally.received, tally.landed, tally.order_violations), (6, 5, 2, 0));
        assert!(!ledger.is_settled());
    }

    #[test]
    fn a_duplicate_does_not_hide_a_loss() {
        let (tally, ledger) = tally(Mode::Fanout, &[&[0, 1, 2], &[0, 2, 2]]);
        assert_eq!((tally.expected - tally.received, tally.duplicates), (1, 1));
        assert!(!ledger.is_settled());
    }

    #[test]
    fn a_connection_that_leaves_is_not_waited_for_and_counts_as_a_loss() {
        let (_, mut ledger) = tally(Mode::Fanout, &[&[0, 1, 2], &[0]]);
        assert!(!ledger.is_settled());
        ledger.leave(1);
        assert!(ledger.is_settled());
        assert_eq!(ledger.tally.expected - ledger.tally.received, 2);
    }

    #[test]
    fn probes_are_ignored_and_unsent_numbers_are_strays() {
        let mut ledger = Ledger::new(Mode::Fanout, 1, FIRST);
        ledger.arrive(0, FIRST - 1);
        assert_eq!(ledger.tally, Tally::default());
        ledger.arrive(0, FIRST);
        ledger.arrive(0, 7);
        assert_eq!(ledger.tally.strays, 2);
    }

    #[test]
    fn an_echo_belongs_to_its_sender_and_keeps_the_order_of_sending() {
        assert_eq!(tally(Mode::Echo, &[&[0, 1, 2], &[]]).0, clean(1));
        assert_eq!(tally(Mode::Echo, &[&[0, 2, 1], &[]]).0.order_violations, 1);
        assert_eq!(tally(Mode::Echo, &[&[0, 1, 2], &[1]]).0.duplicates, 1);
        assert_eq!(tally(Mode::Echo, &[&[0], &[1]]).0.strays, 1);
    }
}
