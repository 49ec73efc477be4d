//! Who joins while messages are on their way.
//!
//! Nobody can say beforehand which message a newcomer gets first; from that one on it is owed every one that comes
//! after it in the order, also those that all others have got already, which is why some are kept for a while. Its
//! first message must have been seen by an older member: only they know what came before.

use super::{Ledger, Member, Order};
use crate::load::order::Cursor;

/// How many landed messages are kept for newcomers.
const KEPT: usize = 16 * 1024;

/// What a newcomer's first message makes of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Greeting {
    /// A member from now on: what comes next is to be entered by `arrive`.
    Welcome,
    /// No older member has seen the message: ask again later.
    Early,
    /// A probe, or so old that it is forgotten: the next message may be the first.
    Stale,
    /// Nobody sent it, or not to this group. Counted as a stray.
    Stray,
}

impl Ledger {
    /// Allows for newcomers from now on.
    pub(crate) fn expect_newcomers(&mut self) {
        debug_assert_eq!(self.order, Order::FirstSight, "an echo has nobody to join");
        self.kept = KEPT;
    }

    /// How many messages of a connection's group anybody has seen.
    pub(crate) fn placed_in_group_of(&self, connection: usize) -> u32 {
        self.groups[self.members[connection].group as usize].placed
    }

    /// Makes a connection that has left, and was replaced, a member again, `seq` being its first message.
    pub(crate) fn greet(&mut self, connection: usize, seq: u64) -> Greeting {
        let group = self.members[connection].group;
        let entry = match seq.checked_sub(self.base).map(|index| self.entries.get(index as usize)) {
            None if seq >= crate::message::FIRST_SEQ => return Greeting::Stale,
            Some(Some(entry)) if entry.group == group => entry,
            _ => {
                self.tally.strays += 1;
                return Greeting::Stray;
            }
        };
        let Some(first) = entry.place else { return Greeting::Early };
        self.members[connection] = Member { cursor: Cursor::after(first), group, counted: true };
        self.groups[group as usize].present += 1;
        self.tally.expected += 1;
        self.tally.received += 1;
        for entry in self.entries.iter_mut().filter(|entry| entry.group == group) {
            if entry.place.is_none_or(|place| place > first) {
                self.open += usize::from(entry.awaited == 0);
                entry.awaited += 1;
                self.tally.expected += 1;
            }
        }
        Greeting::Welcome
    }
}
