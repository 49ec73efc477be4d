//! The mailbox: what is for one shard alone, and its bell.
//!
//! Shared by everybody who sends to the shard. Bounded; who finds it full waits. Beside
//! the entries lie the resumes: at most one for each connection, so they need no bound
//! of their own and never fail. Does not know what a command does, nor the log: a stamp
//! is a number to it.
//!
//! Sleeping. The shard announces that it is asleep and then looks once more for work;
//! a sender puts its work down and then looks whether the shard is asleep. A `SeqCst`
//! fence between the two steps on both sides makes one of them see the other, so work
//! never lies beside a sleeping shard. Ringing costs a system call and happens at most
//! once per sleep.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use crossbeam_queue::SegQueue;
use crossbeam_utils::CachePadded;

use crate::id::ConnectionId;
use crate::sync::{ArrayQueue, AtomicBool, fence};
use crate::wait_list::WaitList;

/// Interrupts the shard's poll.
pub(crate) trait Bell {
    fn ring(&self);
}

impl Bell for mio::Waker {
    fn ring(&self) {
        if let Err(error) = self.wake() {
            // The eventfd cannot be full and is open as long as the mailbox lives.
            tracing::error!(%error, "waking a shard failed");
        }
    }
}

#[derive(Debug)]
pub(crate) struct Entry<C> {
    /// The log position that this entry must come after.
    pub(crate) stamp: u64,
    pub(crate) command: C,
}

#[derive(Debug)]
pub(crate) struct Mailbox<C, B> {
    entries: ArrayQueue<Entry<C>>,
    resumes: SegQueue<ConnectionId>,
    asleep: CachePadded<AtomicBool>,
    closed: AtomicBool,
    bell: B,
    pub(crate) waiting: WaitList,
}

/// Why a command was not taken; gives it back.
#[derive(Debug)]
pub(crate) enum Refused<C> {
    Full(C),
    /// The shard has ended.
    Closed(C),
}

impl<C, B: Bell> Mailbox<C, B> {
    pub(crate) fn new(capacity: usize, waiting_max: usize, bell: B) -> Self {
        Self {
            entries: ArrayQueue::new(capacity),
            resumes: SegQueue::new(),
            asleep: CachePadded::new(AtomicBool::new(false)),
            closed: AtomicBool::new(false),
            bell,
            waiting: WaitList::new(waiting_max),
        }
    }

    pub(crate) fn push(&self, stamp: u64, command: C) -> Result<(), Refused<C>> {
        if self.closed.load(Relaxed) {
            return Err(Refused::Closed(command)); // Relaxed: the exact check follows below
        }
        self.entries.push(Entry { stamp, command }).map_err(|entry| Refused::Full(entry.command))?;
        self.wake();
        // After the fence in `wake`: either `close` drains this entry or we see it closed.
        if self.closed.load(Relaxed) {
            while self.pop().is_some() {}
        }
        Ok(())
    }

    pub(crate) fn resume(&self, id: ConnectionId) {
        self.resumes.push(id);
        self.wake();
    }

    /// Wakes the shard if it sleeps. What it is to find must lie there already.
    #[inline]
    pub(crate) fn wake(&self) {
        fence(SeqCst); // pairs with the fence in `fall_asleep`
        // Relaxed: the fence orders it. The swap lets one of several senders ring.
        if self.asleep.load(Relaxed) && self.asleep.swap(false, Relaxed) {
            self.bell.ring();
        }
    }

    /// The shard is about to block. True if nothing has come; then only the bell ends its sleep.
    pub(crate) fn fall_asleep(&self, is_idle: impl FnOnce() -> bool) -> bool {
        self.asleep.store(true, Relaxed);
        fence(SeqCst); // pairs with the fence in `wake`
        let idle = self.entries.is_empty() && self.resumes.is_empty() && is_idle();
        if !idle {
            self.wake_up();
        }
        idle
    }

    /// The shard is running: nobody needs to ring.
    pub(crate) fn wake_up(&self) {
        self.asleep.store(false, Relaxed); // Relaxed: a ring too many is harmless
    }

    pub(crate) fn pop(&self) -> Option<Entry<C>> {
        self.entries.pop()
    }

    pub(crate) fn pop_resume(&self) -> Option<ConnectionId> {
        self.resumes.pop()
    }

    /// Entries that lie here now; each one whose push has returned counts.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.resumes.is_empty()
    }

    /// The shard has ended: drops what lies here and refuses the rest.
    pub(crate) fn close(&self) {
        self.closed.store(true, Relaxed);
        fence(SeqCst); // pairs with the fence in `wake`, as `push` uses it
        while self.pop().is_some() {}
        self.waiting.wake_all();
    }
}

impl<C> Refused<C> {
    pub(crate) fn map<D>(self, wrap: impl FnOnce(C) -> D) -> Refused<D> {
        match self {
            Self::Full(command) => Refused::Full(wrap(command)),
            Self::Closed(command) => Refused::Closed(wrap(command)),
        }
    }
}
