//! The mailbox: what is for one shard alone, and its bell.
//!
//! Shared by everybody who sends to the shard. Bounded; who finds it full waits. Beside
//! the entries lie the resumes: at most one for each connection, so they need no bound
//! of their own and never fail. Does not know what a command does, nor the log: the position that a
//! command comes after is a number to it.
//!
//! Sleeping. The shard announces that it is asleep and then looks once more for work;
//! a sender puts its work down and then looks whether the shard is asleep. A `SeqCst`
//! fence between the two steps on both sides makes one of them see the other, so work
//! never lies beside a sleeping shard. Ringing costs a system call and happens at most
//! once per sleep.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Relaxed, SeqCst};

use crossbeam_utils::CachePadded;

use crate::id::ConnectionId;
use crate::sync::{ArrayQueue, AtomicBool, SegQueue, fence};
use crate::wait_list::{Refused, WaitList};

/// Interrupts the shard's poll.
pub(crate) trait Wake {
    fn wake(&self);
}

impl Wake for mio::Waker {
    fn wake(&self) {
        if let Err(error) = self.wake() {
            // The eventfd cannot be full and is open as long as the mailbox lives.
            tracing::error!(%error, "waking a shard failed");
        }
    }
}

#[derive(Debug)]
pub(crate) struct Stamped<C> {
    /// The log position that the command must come after.
    pub(crate) after: u64,
    pub(crate) command: C,
}

#[derive(Debug)]
pub(crate) struct Mailbox<C, B> {
    entries: ArrayQueue<Stamped<C>>,
    resumes: SegQueue<ConnectionId>,
    asleep: CachePadded<AtomicBool>,
    closed: AtomicBool,
    /// Bytes of the frames that are here or about to be pushed.
    bytes: CachePadded<AtomicU64>,
    bell: B,
    pub(crate) waiting: WaitList,
}

/// Whether the resume of one connection lies in the mailbox, so that it lies there once.
#[derive(Debug)]
pub(crate) struct Queued(AtomicBool);

impl Queued {
    pub(crate) fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// True if the caller is to post the resume; false if one lies there, and its taker sees what the caller did.
    pub(crate) fn set(&self) -> bool {
        !self.0.swap(true, AcqRel)
    }

    /// The shard has taken the resume: the next one is posted again. To be called before looking at what
    /// the wakers did. A swap and not a store, because it must see what the last of them did.
    pub(crate) fn taken(&self) {
        self.0.swap(false, AcqRel);
    }
}

impl<C, B: Wake> Mailbox<C, B> {
    pub(crate) fn new(capacity: usize, waiting_max: usize, bell: B) -> Self {
        Self {
            entries: ArrayQueue::new(capacity),
            resumes: SegQueue::new(),
            asleep: CachePadded::new(AtomicBool::new(false)),
            closed: AtomicBool::new(false),
            bytes: CachePadded::new(AtomicU64::new(0)),
            bell,
            waiting: WaitList::new(waiting_max),
        }
    }

    /// Announces a frame of so many bytes, and returns how many there are with it (never too few). Taken back by
    /// `release` if the frame is not pushed, or when its outbox has it.
    pub(crate) fn reserve(&self, bytes: u64) -> u64 {
        self.bytes.fetch_add(bytes, AcqRel) + bytes // pairs with `release`; of two callers at once, one sees the other
    }

    /// These bytes are here no more, and outboxes that they have congested are counted as such.
    pub(crate) fn release(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, AcqRel); // pairs with `reserve`
    }

    pub(crate) fn push(&self, after: u64, command: C) -> Result<(), Refused<C>> {
        if self.closed.load(Relaxed) {
            return Err(Refused::Closed(command)); // Relaxed: the exact check follows below
        }
        self.entries.push(Stamped { after, command }).map_err(|entry| Refused::Full(entry.command))?;
        self.wake();
        // After the fence in `wake`: either `close` drains this entry or we see it closed.
        if self.closed.load(Relaxed) {
            while self.pop().is_some() {}
        }
        Ok(())
    }

    /// Whether there is no room now. Not once it is closed.
    pub(crate) fn is_full(&self) -> bool {
        self.entries.len() >= self.entries.capacity() && !self.closed.load(Relaxed) // Relaxed: as in `push`
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
            self.bell.wake();
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

    pub(crate) fn pop(&self) -> Option<Stamped<C>> {
        self.entries.pop()
    }

    pub(crate) fn pop_resume(&self) -> Option<ConnectionId> {
        if self.resumes.is_empty() {
            return None; // the usual case, and cheaper to see than to try: that takes a fence
        }
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
        while let Some(entry) = self.pop() {
            // A command may hold something of the application.
            if catch_unwind(AssertUnwindSafe(|| drop(entry))).is_err() {
                tracing::error!("dropping a command panicked");
            }
        }
        self.waiting.wake_all();
    }
}

#[cfg(all(test, loom))]
mod models {
    use std::sync::Arc;
    use std::task::Waker;

    use loom::thread;

    use super::*;
    use crate::id::Slot;
    use crate::log::{Log, Weigh};
    use crate::sync::sleeper::Sleeper;
    use crate::wait_list::Registration;

    impl Weigh for u32 {}

    impl Wake for Arc<Sleeper> {
        fn wake(&self) {
            Sleeper::ring(self);
        }
    }

    fn mailbox(capacity: usize) -> (Arc<Mailbox<u32, Arc<Sleeper>>>, Arc<Sleeper>) {
        let bell = Sleeper::new();
        (Arc::new(Mailbox::new(capacity, 4, bell.clone())), bell)
    }

    /// What a shard does: sleeps only where nothing is left, until the bell.
    fn sleep(mailbox: &Mailbox<u32, Arc<Sleeper>>, bell: &Sleeper, is_idle: impl FnOnce() -> bool) {
        if mailbox.fall_asleep(is_idle) {
            bell.sleep();
        }
        mailbox.wake_up();
    }

    #[test]
    fn an_entry_never_lies_beside_a_sleeping_shard() {
        loom::model(|| {
            let (mailbox, bell) = mailbox(2);
            let senders = [1, 2].map(|command| {
                let mailbox = mailbox.clone();
                thread::spawn(move || mailbox.push(0, command).expect("there is room"))
            });
            let mut sum = 0;
            while sum < 3 {
                match mailbox.pop() {
                    Some(entry) => sum += entry.command,
                    None => sleep(&mailbox, &bell, || true),
                }
            }
            senders.into_iter().for_each(|sender| sender.join().unwrap());
        });
    }

    #[test]
    fn a_resume_never_lies_beside_a_sleeping_shard() {
        loom::model(|| {
            let (mailbox, bell) = mailbox(1);
            let sender = mailbox.clone();
            let sender = thread::spawn(move || sender.resume(ConnectionId::new(0, Slot::new(7), 1)));
            while mailbox.pop_resume().is_none() {
                sleep(&mailbox, &bell, || true);
            }
            sender.join().unwrap();
        });
    }

    #[test]
    fn a_wake_while_a_resume_is_taken_is_never_lost() {
        loom::model(|| {
            let (mailbox, bell) = mailbox(1);
            let (queued, is_done) = (Arc::new(Queued::new()), Arc::new(AtomicBool::new(false)));
            let wakers = [false, true].map(|is_last| {
                let (mailbox, queued, is_done) = (mailbox.clone(), queued.clone(), is_done.clone());
                thread::spawn(move || {
                    if is_last {
                        is_done.store(true, Relaxed);
                    }
                    if queued.set() {
                        mailbox.resume(ConnectionId::new(0, Slot::new(7), 1));
                    }
                })
            });
            loop {
                if mailbox.pop_resume().is_none() {
                    sleep(&mailbox, &bell, || true);
                    continue;
                }
                queued.taken();
                if is_done.load(Relaxed) {
                    break;
                }
            }
            wakers.into_iter().for_each(|waker| waker.join().unwrap());
        });
    }

    #[test]
    fn a_publication_never_lies_beside_a_sleeping_shard() {
        loom::model(|| {
            let (mailbox, bell) = mailbox(1);
            let (log, mut readers) = Log::new(2, 1, 4);
            let mut reader = readers.remove(0);
            let publishers = [1, 2].map(|value| {
                let (log, mailbox) = (log.clone(), mailbox.clone());
                thread::spawn(move || {
                    log.try_push(value).expect("there is room");
                    mailbox.wake();
                })
            });
            let mut sum = 0;
            while sum < 3 {
                match reader.get(0) {
                    Some(value) => {
                        sum += value;
                        reader.advance(1);
                    }
                    None if reader.is_at_tail() => sleep(&mailbox, &bell, || reader.is_at_tail()),
                    None => thread::yield_now(), // claimed, not yet released
                }
            }
            publishers.into_iter().for_each(|publisher| publisher.join().unwrap());
        });
    }

    #[test]
    fn nothing_is_left_behind_in_a_closed_mailbox() {
        loom::model(|| {
            let (mailbox, _) = mailbox(2);
            let senders = [1, 2].map(|command| {
                let mailbox = mailbox.clone();
                thread::spawn(move || drop(mailbox.push(0, command)))
            });
            mailbox.close();
            senders.into_iter().for_each(|sender| sender.join().unwrap());
            assert!(mailbox.pop().is_none());
            assert!(matches!(mailbox.push(0, 3), Err(Refused::Closed(3))));
        });
    }

    #[test]
    fn who_waits_at_a_full_mailbox_is_woken_by_room_or_by_its_end() {
        for close in [false, true] {
            loom::model(move || {
                let (mailbox, bell) = mailbox(1);
                let sender = mailbox.clone();
                let sender = thread::spawn(move || {
                    let sleeper = Sleeper::new();
                    let waker = Waker::from(sleeper.clone());
                    for command in [1, 2] {
                        let mut registration = Registration::default(); // dropped, it would leave the list
                        while matches!(sender.push(0, command), Err(Refused::Full(_))) {
                            assert!(sender.waiting.register(&mut registration, &waker));
                            if !matches!(sender.push(0, command), Err(Refused::Full(_))) {
                                break;
                            }
                            sleeper.sleep();
                        }
                    }
                });
                let mut left = if close { 0 } else { 2 };
                while left > 0 {
                    match mailbox.pop() {
                        Some(_) => {
                            left -= 1;
                            mailbox.waiting.wake_all();
                        }
                        None => sleep(&mailbox, &bell, || true),
                    }
                }
                if close {
                    mailbox.close();
                }
                sender.join().unwrap();
            });
        }
    }
}
