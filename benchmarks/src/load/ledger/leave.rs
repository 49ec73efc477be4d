//! Who leaves, and what becomes of what they have not seen.

use super::Ledger;

/// Why a connection leaves.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Leaving {
    /// It should not have: what it has not received is lost.
    Lost,
    /// The client wanted it: it is owed nothing more.
    Released,
    /// The server ended it in an orderly end of all: it is owed whatever anybody else has seen or yet sees.
    Ended,
}

impl Ledger {
    /// A connection has ended, or is no receiver: what it has not received it never will.
    pub(crate) fn leave(&mut self, connection: usize, leaving: Leaving) {
        let member = &mut self.members[connection];
        if !std::mem::replace(&mut member.counted, false) {
            return;
        }
        let group = &mut self.groups[member.group as usize];
        group.present -= 1;
        group.ended += u32::from(leaving == Leaving::Ended);
        for entry in self.entries.iter_mut().filter(|entry| entry.group == member.group) {
            let seen = entry.place.is_some_and(|place| member.cursor.has_passed(place));
            if seen || entry.awaited == 0 {
                continue;
            }
            let forgiven = leaving == Leaving::Ended && entry.place.is_none();
            entry.forgiven += u32::from(forgiven);
            self.tally.expected -= u64::from(forgiven || leaving == Leaving::Released);
            entry.awaited -= 1;
            if entry.awaited == 0 {
                self.open -= 1;
                self.tally.unseen += u64::from(entry.place.is_none());
                self.landed.extend(entry.land());
            }
        }
        self.retire();
    }
}
