//! The local queue: commands that a shard's own thread sends to its shard, above all the replies of handlers.
//!
//! Owned by one shard and used by its thread alone, so it needs no atomics. It is short, so its memory stays in the CPU's
//! cache; the mailbox is a large ring, each push of which writes to other memory. Commands that do not fit are sent
//! through the mailbox, so no sender waits for room here. Does not know what a command does.
//!
//! Order. A command keeps the place that it would have had in the mailbox: after all commands that the mailbox had
//! accepted by then, and before all later ones. Their number never decreases, so the queue is sorted. A command is *due*
//! when the shard has taken that many commands from the mailbox, and is then executed next.
//!
//! So each sender's order is kept, whichever queue its commands use. If a thread pushes into the mailbox and thereby
//! causes a command here, that push is counted. If a command here causes a push into the mailbox, that push is later and
//! is not counted. The order with publications is that of the mailbox: a command has the same stamp, and the log's tail
//! must be read before the place. Otherwise a publication below the stamp could belong to a publisher whose earlier
//! command is not counted.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use crate::mailbox::Stamped;

/// Commands that are kept here at most; some 200 bytes each. A shard answers what it has read from 32 sockets at a time.
pub(crate) const LOCAL_COMMANDS_MAX: usize = 128;

#[derive(Debug)]
pub(crate) struct LocalQueue<C> {
    entries: RefCell<VecDeque<Local<C>>>,
    /// Commands that the shard has taken from its mailbox so far.
    taken: Cell<u64>,
}

#[derive(Debug)]
struct Local<C> {
    /// The commands of the mailbox that it comes after.
    behind: u64,
    command: Stamped<C>,
}

impl<C> LocalQueue<C> {
    pub(crate) fn new() -> Self {
        Self { entries: RefCell::new(VecDeque::new()), taken: Cell::new(0) }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.borrow().is_empty()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= LOCAL_COMMANDS_MAX
    }

    /// Adds a command after all that are in the mailbox: `queued`, which was read after the stamp.
    pub(crate) fn push(&self, command: Stamped<C>, queued: usize) {
        let behind = self.taken.get() + queued as u64;
        self.entries.borrow_mut().push_back(Local { behind, command });
    }

    /// A command was taken from the mailbox.
    pub(crate) fn took_other(&self) {
        self.taken.set(self.taken.get() + 1);
    }

    /// Whether the next command is from here and not from the mailbox.
    #[inline]
    pub(crate) fn is_due(&self) -> bool {
        self.entries.borrow().front().is_some_and(|next| next.behind <= self.taken.get())
    }

    pub(crate) fn pop(&self) -> Option<Stamped<C>> {
        let mut entries = self.entries.borrow_mut();
        let next = entries.pop_front();
        if entries.is_empty() {
            entries.clear(); // begins again at the front of its memory, which is in the cache
        }
        next.map(|next| next.command)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone, Copy)]
    enum Step {
        /// The shard's own thread sends.
        Own,
        /// Another thread sends.
        Other,
        /// The shard takes a command.
        Take,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![3 => Just(Step::Own), 2 => Just(Step::Other), 4 => Just(Step::Take)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 2000 }))]
        /// All senders take turns on one thread, so the order of sending is known.
        #[test]
        fn commands_are_taken_in_the_sequence_in_which_they_were_sent_whichever_way_they_take(
            steps in prop::collection::vec(step(), 1..400)
        ) {
            let (local, mut mailbox) = (LocalQueue::new(), VecDeque::new());
            let (mut sent, mut taken) = (0, 0);
            let take = |mailbox: &mut VecDeque<u64>| {
                if local.is_due() {
                    return local.pop().map(|stamped| stamped.command);
                }
                let command = mailbox.pop_front()?;
                local.took_other();
                Some(command)
            };
            for step in steps.into_iter().chain([Step::Take; 400]) {
                match step {
                    Step::Own if !local.is_full() => {
                        local.push(Stamped { after: 0, command: sent }, mailbox.len());
                        sent += 1;
                    }
                    Step::Own | Step::Other => {
                        mailbox.push_back(sent);
                        sent += 1;
                    }
                    Step::Take => {
                        let expected = (taken < sent).then_some(taken);
                        prop_assert_eq!(take(&mut mailbox), expected);
                        taken += u64::from(expected.is_some());
                    }
                }
                prop_assert!(local.len() <= LOCAL_COMMANDS_MAX);
            }
            prop_assert!(local.is_empty() && mailbox.is_empty() && taken == sent);
        }
    }
}
