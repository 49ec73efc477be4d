//! What was sent, which receivers have not got it yet, and what went wrong.
//!
//! Keeps only messages that have not landed, which is at all their receivers, in the order of their numbers; so it is as
//! small as what is in flight, however long the run. An earlier message that arrives has landed before and is a
//! duplicate. Receivers are in groups, each with an order of its own: all in one for a fan-out, each in its own for an
//! echo. Knows sequence numbers and connections by index. Does not know sockets, bytes or the pace.

#[cfg(test)]
mod tests;

use std::{collections::VecDeque, time::Instant};

use super::cursor::{Cursor, Verdict};
use crate::message::FIRST_SEQ;

/// A message that every receiver has got, or that no receiver waits for any more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Landed {
    pub(crate) sender: usize,
    /// When it was sent, or should have been.
    pub(crate) sent: Instant,
    /// At least one connection has received it.
    pub(crate) seen: bool,
    /// It was given up before and has been replaced.
    pub(crate) late: bool,
}

/// Counts since the first message.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Tally {
    pub(crate) expected: u64,
    pub(crate) received: u64,
    pub(crate) landed: u64,
    pub(crate) duplicates: u64,
    /// A connection saw messages in another order than the first that saw them; in an echo, than they were sent.
    /// Exact while nothing is lost: a connection that lost a message and is the first to see the next one gives that
    /// one too early a position, and the connections that see both seem to be out of order.
    pub(crate) order_violations: u64,
    /// All agree, but one sender's messages are not in the order in which it sent them.
    pub(crate) sender_reorders: u64,
    /// Messages that were not sent, or not to this connection.
    pub(crate) strays: u64,
    /// Messages that no connection saw before all had ended.
    pub(crate) unseen: u64,
}

/// What gives a message its position in the order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Order {
    /// The first connection that sees it.
    FirstSight,
    /// Its sending.
    Sending,
}

/// Why nothing more is expected of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Leave {
    /// It ended when it should not have: what it has not received is lost.
    Lost,
    /// It is no longer watched: it need not receive anything more.
    Unwatched,
    /// The server closed it in an expected shutdown: it should have received what any other connection has received or
    /// will receive.
    Shutdown,
}

/// One message in flight.
#[derive(Debug)]
struct Entry {
    sent: Instant,
    sender: usize,
    group: u32,
    /// How many receivers have not got it.
    awaited: u32,
    /// In its group's order; given by the first connection that sees it, or by the sending.
    position: Option<u32>,
    /// How many connections a shutdown has closed before any had seen it: if one ever sees it, they have missed it.
    excused: u32,
    given_up: bool,
}

/// One receiver.
#[derive(Debug)]
struct Member {
    cursor: Cursor,
    group: u32,
    is_watched: bool,
}

/// Receivers that share an order.
#[derive(Clone, Copy, Debug, Default)]
struct Group {
    /// How many messages have a position.
    positions: u32,
    watched: u32,
    /// See `Leave::Shutdown`.
    shut_down: u32,
}

#[derive(Debug)]
pub(crate) struct DeliveryTracker {
    order: Order,
    /// Lower numbers are probes of the settling, which some connections may have missed.
    first: u64,
    /// The number of the first entry.
    base: u64,
    entries: VecDeque<Entry>,
    /// How many entries have not landed.
    in_flight: usize,
    /// All messages before this number have landed or been given up.
    given_up_to: u64,
    members: Vec<Member>,
    groups: Vec<Group>,
    /// By connection: the highest number of its own messages that has a position.
    latest: Vec<u64>,
    landed: Vec<Landed>,
    pub(crate) tally: Tally,
}

impl DeliveryTracker {
    /// `groups` are those of the connections by index; `first` is the number of the first message.
    pub(crate) fn new(order: Order, groups: &[usize], first: u64) -> Self {
        let count = groups.iter().max().map_or(0, |last| last + 1);
        let member =
            |&group: &usize| Member { cursor: Cursor::default(), group: group as u32, is_watched: true };
        let mut tracker = Self {
            order,
            first,
            base: first,
            entries: VecDeque::new(),
            in_flight: 0,
            given_up_to: first,
            members: groups.iter().map(member).collect(),
            groups: vec![Group::default(); count],
            latest: vec![0; groups.len()],
            landed: Vec::new(),
            tally: Tally::default(),
        };
        groups.iter().for_each(|&group| tracker.groups[group].watched += 1);
        tracker
    }

    /// Adds a message from `sender` to its group; returns its number.
    pub(crate) fn send(&mut self, sender: usize, sent: Instant) -> u64 {
        let index = self.members[sender].group;
        let group = &mut self.groups[index as usize];
        let position = (self.order == Order::Sending).then(|| group.next_position());
        self.tally.expected += u64::from(group.watched);
        self.entries.push_back(Entry {
            sent,
            sender,
            group: index,
            awaited: group.watched,
            position,
            excused: group.shut_down,
            given_up: false,
        });
        self.in_flight += 1;
        self.base + self.entries.len() as u64 - 1
    }

    /// A connection has received a number.
    #[inline]
    pub(crate) fn receive(&mut self, connection: usize, seq: u64) {
        let Some(entry) = seq.checked_sub(self.base).and_then(|index| self.entries.get_mut(index as usize))
        else {
            return self.receive_unlisted(seq);
        };
        let member = &mut self.members[connection];
        if entry.group != member.group {
            self.tally.strays += 1;
            return;
        }
        let position = match entry.position {
            Some(position) => position,
            None => {
                let latest = &mut self.latest[entry.sender];
                self.tally.sender_reorders += u64::from(seq < *latest);
                *latest = seq.max(*latest);
                self.tally.expected += u64::from(entry.excused);
                *entry.position.insert(self.groups[entry.group as usize].next_position())
            }
        };
        match member.cursor.pass(position) {
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
            self.in_flight -= 1;
            self.landed.push(entry.landed());
            self.remove_landed();
        }
    }

    /// Expects nothing more of a connection.
    pub(crate) fn leave(&mut self, connection: usize, leave: Leave) {
        let member = &mut self.members[connection];
        if !std::mem::replace(&mut member.is_watched, false) {
            return;
        }
        let group = &mut self.groups[member.group as usize];
        group.watched -= 1;
        group.shut_down += u32::from(leave == Leave::Shutdown);
        for entry in self.entries.iter_mut().filter(|entry| entry.group == member.group) {
            let seen = entry.position.is_some_and(|position| member.cursor.has_passed(position));
            if seen || entry.awaited == 0 {
                continue;
            }
            let is_excused = leave == Leave::Shutdown && entry.position.is_none();
            entry.excused += u32::from(is_excused);
            self.tally.expected -= u64::from(is_excused || leave == Leave::Unwatched);
            entry.awaited -= 1;
            if entry.awaited == 0 {
                self.in_flight -= 1;
                self.tally.unseen += u64::from(entry.position.is_none());
                self.landed.push(entry.landed());
            }
        }
        self.remove_landed();
    }

    /// Takes one of the messages that have landed since the last call.
    pub(crate) fn take_landed(&mut self) -> Option<Landed> {
        let landed = self.landed.pop()?;
        self.tally.landed += u64::from(landed.seen);
        Some(landed)
    }

    /// Gives up waiting for messages sent before `deadline`: returns how many should have landed by then. They are
    /// still expected, and count as received if they arrive after all.
    pub(crate) fn give_up(&mut self, deadline: Instant) -> usize {
        let mut given_up = 0;
        self.given_up_to = self.given_up_to.max(self.base);
        while let Some(entry) = self.entries.get_mut((self.given_up_to - self.base) as usize) {
            if entry.sent > deadline {
                break;
            }
            if entry.awaited > 0 {
                entry.given_up = true;
                given_up += 1;
            }
            self.given_up_to += 1;
        }
        given_up
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.in_flight == 0
    }

    fn remove_landed(&mut self) {
        while self.entries.front().is_some_and(|entry| entry.awaited == 0) {
            self.entries.pop_front();
            self.base += 1;
        }
    }

    #[cold]
    fn receive_unlisted(&mut self, seq: u64) {
        if (self.first..self.base).contains(&seq) {
            self.tally.duplicates += 1;
        } else if !(FIRST_SEQ..self.first).contains(&seq) {
            self.tally.strays += 1;
        }
    }
}

impl Entry {
    fn landed(&self) -> Landed {
        let seen = self.position.is_some();
        Landed { sender: self.sender, sent: self.sent, seen, late: self.given_up }
    }
}

impl Group {
    fn next_position(&mut self) -> u32 {
        self.positions += 1;
        self.positions - 1
    }
}
