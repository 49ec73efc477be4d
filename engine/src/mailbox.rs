//! The mailbox: commands and resumes for one shard, and the waker of the shard's poll.
//!
//! Shared by all threads that send to the shard. Commands are bounded; a sender that finds the mailbox full waits.
//! Resumes are in a queue of their own: at most one for each connection, so they need no bound and never fail. So are
//! commands from shard to shard: a shard cannot wait for room, and bounds what it sends.
//! Does not know what a command does, nor the log: the position that a command comes after is just a number here.
//!
//! Sleeping. The shard announces that it is asleep and then looks once more for work; a sender queues its
//! work and then looks whether the shard is asleep. A `SeqCst` fence between the two steps on both sides
//! makes at least one of them see the other, so a shard never sleeps while there is work. Waking costs a
//! system call and happens at most once per sleep.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};

use crossbeam_utils::CachePadded;

use crate::id::ConnectionId;
use crate::sync::plain::{AtomicU64, AtomicUsize};
use crate::sync::{ArrayQueue, AtomicBool, SegQueue, fence};
use crate::wait_list::{Refused, WaitList};

/// Interrupts the shard's poll.
pub(crate) trait Wake {
    fn wake(&self);
}

impl Wake for mio::Waker {
    fn wake(&self) {
        if let Err(error) = self.wake() {
            // The eventfd cannot be full, and it is open as long as the mailbox exists.
            tracing::error!(%error, "a shard could not be woken");
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
    /// Commands from other shards.
    internal: SegQueue<C>,
    asleep: CachePadded<AtomicBool>,
    closed: AtomicBool,
    in_flight: CachePadded<InFlight>,
    poll_waker: B,
    pub(crate) waiting: WaitList,
}

/// What is on its way to the shard's outboxes.
#[derive(Debug, Default)]
struct InFlight {
    /// Bytes of the frames that are queued here or in the shard's local queue, or about to be.
    bytes: AtomicU64,
    /// Commands in the local queue. Written by the shard alone.
    local: AtomicUsize,
}

/// Whether the resume of one connection is queued, so that it is queued once.
#[derive(Debug)]
pub(crate) struct Queued(AtomicBool);

impl Queued {
    pub(crate) fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// True if the caller must queue the resume; false if one is queued, and the shard will see what the
    /// caller did before.
    pub(crate) fn set(&self) -> bool {
        !self.0.swap(true, AcqRel)
    }

    /// The shard has taken the resume: the next one is queued again. Must be called before looking at what
    /// the wakers did. A swap and not a store, because it must see what the last of them did.
    pub(crate) fn taken(&self) {
        self.0.swap(false, AcqRel);
    }
}

impl<C, B: Wake> Mailbox<C, B> {
    pub(crate) fn new(capacity: usize, waiting_max: usize, poll_waker: B) -> Self {
        Self {
            entries: ArrayQueue::new(capacity),
            resumes: SegQueue::new(),
            internal: SegQueue::new(),
            asleep: CachePadded::new(AtomicBool::new(false)),
            closed: AtomicBool::new(false),
            in_flight: CachePadded::default(),
            poll_waker,
            waiting: WaitList::new(waiting_max),
        }
    }

    /// Announces a frame of this many bytes, and returns the sum including it (never too low). Undone by
    /// `release` if the frame is not pushed, or when its outbox has accepted it.
    pub(crate) fn reserve(&self, bytes: u64) -> u64 {
        self.in_flight.bytes.fetch_add(bytes, AcqRel) + bytes // pairs with `release`; of two callers, one sees the other
    }

    /// These bytes have left the mailbox, and outboxes that they have congested are counted as such.
    pub(crate) fn release(&self, bytes: u64) {
        self.in_flight.bytes.fetch_sub(bytes, AcqRel); // pairs with `reserve`
    }

    /// The shard's local queue holds so many commands.
    pub(crate) fn tell_local(&self, commands: usize) {
        self.in_flight.local.store(commands, Release); // pairs with `commands_in_flight`
    }

    /// Commands that are queued here or in the shard's local queue.
    pub(crate) fn commands_in_flight(&self) -> usize {
        // Acquire: congestion that was counted before a command left the local queue is visible now.
        self.len() + self.in_flight.local.load(Acquire)
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

    /// Whether there is no room now. Never once it is closed.
    pub(crate) fn is_full(&self) -> bool {
        self.entries.len() >= self.entries.capacity() && !self.closed.load(Relaxed) // Relaxed: as in `push`
    }

    pub(crate) fn resume(&self, id: ConnectionId) {
        self.resumes.push(id);
        self.wake();
    }

    /// A command from a shard, which has bounded how many of them there can be. Not ordered with the log or with
    /// other commands. Dropped if this shard has ended.
    pub(crate) fn push_internal(&self, command: C) {
        self.internal.push(command);
        self.wake();
        // After the fence in `wake`, as in `push`.
        if self.closed.load(Relaxed) {
            while self.pop_internal().is_some() {}
        }
    }

    /// Wakes the shard if it sleeps. Its work must be queued before this call.
    #[inline]
    pub(crate) fn wake(&self) {
        fence(SeqCst); // pairs with the fence in `fall_asleep`
        // Relaxed: the fence orders it. The swap lets only one of several senders wake the shard.
        if self.asleep.load(Relaxed) && self.asleep.swap(false, Relaxed) {
            self.poll_waker.wake();
        }
    }

    /// The shard is about to block. True if there is still no work; then only a wake ends its sleep.
    pub(crate) fn fall_asleep(&self, is_idle: impl FnOnce() -> bool) -> bool {
        self.asleep.store(true, Relaxed);
        fence(SeqCst); // pairs with the fence in `wake`
        let idle = self.is_empty() && is_idle();
        if !idle {
            self.wake_up();
        }
        idle
    }

    /// The shard is running: no sender needs to wake it.
    pub(crate) fn wake_up(&self) {
        self.asleep.store(false, Relaxed); // Relaxed: a superfluous wake is harmless
    }

    pub(crate) fn pop(&self) -> Option<Stamped<C>> {
        self.entries.pop()
    }

    pub(crate) fn pop_resume(&self) -> Option<ConnectionId> {
        if self.resumes.is_empty() {
            return None; // the usual case; the check is cheaper than `pop`, which has a fence
        }
        self.resumes.pop()
    }

    pub(crate) fn pop_internal(&self) -> Option<C> {
        if self.internal.is_empty() {
            return None; // as above
        }
        self.internal.pop()
    }

    /// Commands that are queued now, including each one whose push has returned.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.resumes.is_empty() && self.internal.is_empty()
    }

    /// The shard has ended: drops the queued commands and refuses further ones.
    pub(crate) fn close(&self) {
        self.closed.store(true, Relaxed);
        fence(SeqCst); // pairs with the fence in `wake`, as `push` uses it
        while self.pop_internal().is_some() {}
        while let Some(entry) = self.pop() {
            // A command may own values of the application, whose drop may panic.
            if catch_unwind(AssertUnwindSafe(|| drop(entry))).is_err() {
                tracing::error!("a command panicked when it was dropped");
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
            self.notify();
        }
    }

    fn mailbox(capacity: usize) -> (Arc<Mailbox<u32, Arc<Sleeper>>>, Arc<Sleeper>) {
        let poll_waker = Sleeper::new();
        (Arc::new(Mailbox::new(capacity, 4, poll_waker.clone())), poll_waker)
    }

    /// Sleeps as a shard does: only if there is no work, until it is woken.
    fn sleep(mailbox: &Mailbox<u32, Arc<Sleeper>>, poll_waker: &Sleeper, is_idle: impl FnOnce() -> bool) {
        if mailbox.fall_asleep(is_idle) {
            poll_waker.sleep();
        }
        mailbox.wake_up();
    }

    #[test]
    fn a_shard_never_sleeps_while_a_command_is_queued() {
        loom::model(|| {
            let (mailbox, poll_waker) = mailbox(2);
            let senders = [1, 2].map(|command| {
                let mailbox = mailbox.clone();
                thread::spawn(move || mailbox.push(0, command).expect("there is room"))
            });
            let mut sum = 0;
            while sum < 3 {
                match mailbox.pop() {
                    Some(entry) => sum += entry.command,
                    None => sleep(&mailbox, &poll_waker, || true),
                }
            }
            senders.into_iter().for_each(|sender| sender.join().unwrap());
        });
    }

    #[test]
    fn a_shard_never_sleeps_while_a_resume_is_queued() {
        loom::model(|| {
            let (mailbox, poll_waker) = mailbox(1);
            let sender = mailbox.clone();
            let sender = thread::spawn(move || sender.resume(ConnectionId::new(0, Slot::new(7), 1)));
            while mailbox.pop_resume().is_none() {
                sleep(&mailbox, &poll_waker, || true);
            }
            sender.join().unwrap();
        });
    }

    #[test]
    fn a_shard_never_sleeps_while_a_command_of_another_shard_is_queued() {
        loom::model(|| {
            let (mailbox, poll_waker) = mailbox(1);
            let sender = mailbox.clone();
            let sender = thread::spawn(move || sender.push_internal(7));
            while mailbox.pop_internal().is_none() {
                sleep(&mailbox, &poll_waker, || true);
            }
            sender.join().unwrap();
        });
    }

    #[test]
    fn a_wake_while_a_resume_is_taken_is_never_lost() {
        loom::model(|| {
            let (mailbox, poll_waker) = mailbox(1);
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
                    sleep(&mailbox, &poll_waker, || true);
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
    fn a_shard_never_sleeps_while_a_publication_is_unread() {
        loom::model(|| {
            let (mailbox, poll_waker) = mailbox(1);
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
                    None if reader.is_at_tail() => sleep(&mailbox, &poll_waker, || reader.is_at_tail()),
                    None => thread::yield_now(), // claimed, not yet released
                }
            }
            publishers.into_iter().for_each(|publisher| publisher.join().unwrap());
        });
    }

    #[test]
    fn no_command_remains_in_a_closed_mailbox() {
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
    fn a_sender_at_a_full_mailbox_is_woken_by_room_or_by_its_close() {
        for close in [false, true] {
            loom::model(move || {
                let (mailbox, poll_waker) = mailbox(1);
                let sender = mailbox.clone();
                let sender = thread::spawn(move || {
                    let sleeper = Sleeper::new();
                    let waker = Waker::from(sleeper.clone());
                    for command in [1, 2] {
                        let mut registration = Registration::default(); // kept, because its drop leaves the list
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
                        None => sleep(&mailbox, &poll_waker, || true),
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
