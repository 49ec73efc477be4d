//! The ledger: what was sent, who still owes having seen it, and what went wrong.
//!
//! Holds only messages that have not landed everywhere, in the order of their numbers, so it stays as small as what
//! is in flight however long the run. Everything before it has landed at all receivers, which makes a message from
//! there a duplicate. Receivers are in groups, each with an order of its own: everybody in one for a fan-out, each
//! in its own for an echo. Knows numbers and connections by index. Does not know sockets, bytes or the pace.

mod join;
mod leave;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, time::Instant};

pub(crate) use self::{join::Greeting, leave::Leaving};
use super::order::{Cursor, Verdict};
use crate::message::FIRST_SEQ;

/// A message that every receiver has got, or that nobody waits for any more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Landed {
    pub(crate) sender: usize,
    /// When it was sent, or should have been.
    pub(crate) sent: Instant,
    /// Somebody has seen it.
    pub(crate) seen: bool,
    /// It was given up before, and has its successor already.
    pub(crate) late: bool,
}

/// What has been counted since the first message.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Tally {
    pub(crate) expected: u64,
    pub(crate) received: u64,
    pub(crate) landed: u64,
    pub(crate) duplicates: u64,
    /// A connection saw messages in another order than the first that saw them; for an echo, than they were sent.
    /// Exact while nothing is lost: a connection that lost a message and is the first to see the next one gives that
    /// one too early a place, and those who see both are taken to be out of order.
    pub(crate) order_violations: u64,
    /// All agree, but one sender's messages are not in the order in which it sent them.
    pub(crate) sender_reorders: u64,
    /// Messages that nobody sent, or that are somebody else's.
    pub(crate) strays: u64,
    /// Messages that nobody saw before everybody had left.
    pub(crate) unseen: u64,
}

/// Who gives a message its place in the order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Order {
    /// The first connection that sees it.
    FirstSight,
    /// Its sending.
    Sending,
}

/// One message on its way.
#[derive(Debug)]
struct Entry {
    sent: Instant,
    sender: usize,
    group: u32,
    awaited: u32,
    /// In its group's order; given by the first connection that sees it, or by the sending.
    place: Option<u32>,
    /// So many left before anybody had seen it: they are owed it after all if anybody ever does.
    forgiven: u32,
    landed: bool,
    given_up: bool,
}

/// One receiver.
#[derive(Debug)]
struct Member {
    cursor: Cursor,
    group: u32,
    /// Expected to get what is sent.
    counted: bool,
}

/// Receivers who share an order.
#[derive(Clone, Copy, Debug, Default)]
struct Group {
    /// How many messages have a place.
    placed: u32,
    present: u32,
    /// Those whom the server has ended, see `Leaving::Ended`.
    ended: u32,
}

/// All messages on their way.
#[derive(Debug)]
pub(crate) struct Ledger {
    order: Order,
    /// Numbers below are probes of the settling, which some connections may rightly have missed.
    first: u64,
    /// The number of the first entry.
    base: u64,
    entries: VecDeque<Entry>,
    /// How many entries are kept though they have landed, for newcomers who are behind.
    kept: usize,
    /// How many entries have not landed.
    open: usize,
    /// No message before this number is still to be given up.
    overdue: u64,
    members: Vec<Member>,
    groups: Vec<Group>,
    /// By connection: the latest number of its own that was placed.
    latest: Vec<u64>,
    landed: Vec<Landed>,
    pub(crate) tally: Tally,
}

impl Ledger {
    /// `groups` are those of the connections by index; `first` is the number of the first message.
    pub(crate) fn new(order: Order, groups: &[usize], first: u64) -> Self {
        let count = groups.iter().max().map_or(0, |last| last + 1);
        let mut ledger = Self {
            order,
            first,
            base: first,
            entries: VecDeque::new(),
            kept: 0,
            open: 0,
            overdue: first,
            members: Vec::with_capacity(groups.len()),
            groups: vec![Group::default(); count],
            latest: vec![0; groups.len()],
            landed: Vec::new(),
            tally: Tally::default(),
        };
        for &group in groups {
            ledger.groups[group].present += 1;
            let member = Member { cursor: Cursor::default(), group: group as u32, counted: true };
            ledger.members.push(member);
        }
        ledger
    }

    /// Enters a message that `sender` sends to its group; returns its number.
    pub(crate) fn send(&mut self, sender: usize, sent: Instant) -> u64 {
        let index = self.members[sender].group;
        let group = &mut self.groups[index as usize];
        let place = (self.order == Order::Sending).then(|| group.give_place());
        self.tally.expected += u64::from(group.present);
        self.entries.push_back(Entry {
            sent,
            sender,
            group: index,
            awaited: group.present,
            place,
            forgiven: group.ended,
            landed: false,
            given_up: false,
        });
        self.open += 1;
        self.base + self.entries.len() as u64 - 1
    }

    /// Enters that a connection has received a number.
    #[inline]
    pub(crate) fn arrive(&mut self, connection: usize, seq: u64) {
        let Some(entry) = seq.checked_sub(self.base).and_then(|index| self.entries.get_mut(index as usize))
        else {
            return self.arrive_unlisted(seq);
        };
        let member = &mut self.members[connection];
        if entry.group != member.group {
            self.tally.strays += 1;
            return;
        }
        let place = match entry.place {
            Some(place) => place,
            None => {
                let latest = &mut self.latest[entry.sender];
                self.tally.sender_reorders += u64::from(seq < *latest);
                *latest = seq.max(*latest);
                self.tally.expected += u64::from(entry.forgiven);
                *entry.place.insert(self.groups[entry.group as usize].give_place())
            }
        };
        match member.cursor.pass(place) {
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
            self.open -= 1;
            self.landed.extend(entry.land());
            self.retire();
        }
    }

    /// Takes the messages that have landed since the last call.
    pub(crate) fn take_landed(&mut self) -> Option<Landed> {
        let landed = self.landed.pop()?;
        self.tally.landed += u64::from(landed.seen);
        Some(landed)
    }

    /// Gives up waiting for messages sent before `deadline`: returns how many should have landed by then. They are
    /// still counted as expected, and as received when they come after all.
    pub(crate) fn give_up(&mut self, deadline: Instant) -> usize {
        let mut given_up = 0;
        self.overdue = self.overdue.max(self.base);
        while let Some(entry) = self.entries.get_mut((self.overdue - self.base) as usize) {
            if entry.sent > deadline {
                break;
            }
            if !entry.landed {
                entry.given_up = true;
                given_up += 1;
            }
            self.overdue += 1;
        }
        given_up
    }

    /// How many messages have not landed.
    pub(crate) fn open(&self) -> usize {
        self.open
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.open == 0
    }

    fn retire(&mut self) {
        while self.entries.len() > self.kept && self.entries.front().is_some_and(|entry| entry.awaited == 0) {
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

impl Entry {
    /// Nobody waits for it any more: that is told the first time.
    fn land(&mut self) -> Option<Landed> {
        let seen = self.place.is_some();
        let landed = Landed { sender: self.sender, sent: self.sent, seen, late: self.given_up };
        (!std::mem::replace(&mut self.landed, true)).then_some(landed)
    }
}

impl Group {
    fn give_place(&mut self) -> u32 {
        self.placed += 1;
        self.placed - 1
    }
}
