//! The flush schedule: whose outbox is written next, and how far the log may run ahead of that.
//!
//! Pure, and owned by one shard: it is given the items that have something to write, and the time. The item that
//! has waited longest comes first, and a turn flushes a bounded number. With a coalescing time, nothing is
//! flushed until the first in the queue has waited that long; then everything in the queue is. A *round* is over
//! when all items that waited at its beginning have been flushed. In a round the log may run until an outbox
//! holds a quarter of what the smallest one takes. So an outbox holds at most those of two rounds, and a client that
//! keeps up never finds it full because its flush is late. Publications to small groups fill outboxes slowly: more of
//! them are run than of those to all, or their frames would be written one by one. A round takes several turns, so that
//! sockets are read meanwhile. Does not know outboxes or sockets.

use std::collections::VecDeque;
use std::time::Duration;

/// Flushes in one turn (some 4 µs each). What is read between two turns joins what waits for the rest of the round, so
/// writes carry more than if a round were one turn.
const FLUSHES_PER_TURN: usize = 64;
/// Frames for each outbox in a round; fewer if outboxes are small.
const FRAMES_PER_ROUND: u64 = 256;
/// Publications in a round, however few each of them reaches.
const PUBLICATIONS_PER_ROUND: u64 = 4096;

#[derive(Debug)]
pub(crate) struct FlushSchedule<T> {
    waiting: VecDeque<T>,
    coalesce: Duration,
    /// When the coalescing time ends; none while the queue is empty or flushing has begun.
    due: Option<Duration>,
    /// Length of the prefix of `waiting` whose coalescing time is over.
    flushable: usize,
    /// Length of the prefix of `waiting` that this round has still to flush.
    left_in_round: usize,
    /// Publications run in this round.
    publications: u64,
    /// Frames in the fullest of the outboxes that they have reached and whose clients accept writes.
    fullest: u64,
    /// Frames for each outbox in a round.
    frames_max: u64,
}

impl<T> FlushSchedule<T> {
    pub(crate) fn new(coalesce: Duration) -> Self {
        Self {
            waiting: VecDeque::new(),
            coalesce,
            due: None,
            flushable: 0,
            left_in_round: 0,
            publications: 0,
            fullest: 0,
            frames_max: FRAMES_PER_ROUND,
        }
    }

    /// An outbox of this many frames was opened: the log may not run further ahead than it allows.
    pub(crate) fn adopt_outbox(&mut self, frames: usize) {
        self.frames_max = self.frames_max.min(frames as u64 / 4).max(1);
    }

    /// Queues an item that has something to write and does not wait yet.
    #[inline]
    pub(crate) fn mark(&mut self, item: T) {
        self.waiting.push_back(item);
    }

    /// The number of items that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether an item can be flushed at once.
    pub(crate) fn has_work(&self) -> bool {
        self.flushable > 0 || (self.due.is_none() && !self.waiting.is_empty())
    }

    /// When the coalescing time ends, if it is running.
    pub(crate) fn due(&self) -> Option<Duration> {
        self.due
    }

    /// Begins the flushing of a turn; returns how many items to take by `next`. `is_urgent` ends the coalescing time.
    pub(crate) fn begin(&mut self, now: Duration, is_urgent: bool) -> usize {
        let waiting = self.waiting.len();
        if self.coalesce.is_zero() || is_urgent {
            (self.due, self.flushable) = (None, waiting);
        } else if waiting > 0 && self.flushable == 0 {
            let due = *self.due.get_or_insert(now + self.coalesce);
            if now >= due || self.room() == 0 {
                (self.due, self.flushable) = (None, waiting);
            }
        }
        self.flushable.min(FLUSHES_PER_TURN)
    }

    /// The next item to flush.
    pub(crate) fn next(&mut self) -> Option<T> {
        self.waiting.pop_front()
    }

    /// Ends the flushing of a turn, which has flushed this many.
    pub(crate) fn end(&mut self, flushed: usize) {
        self.flushable -= flushed;
        self.left_in_round = self.left_in_round.saturating_sub(flushed);
        if self.left_in_round == 0 && (flushed > 0 || self.waiting.is_empty()) {
            (self.publications, self.fullest) = (0, 0);
            self.left_in_round = self.waiting.len();
        }
    }

    /// Takes everything after the first `waiting` items of the queue.
    pub(crate) fn take_since(&mut self, waiting: usize) -> impl Iterator<Item = T> + '_ {
        self.waiting.drain(waiting.min(self.waiting.len())..)
    }

    /// The number of publications that may still be run in this round.
    #[inline]
    pub(crate) fn room(&self) -> u64 {
        // However full outboxes are that wait since the round before: what is run in one piece is joined in one piece.
        if self.publications < self.frames_max {
            return self.frames_max - self.publications;
        }
        let run_max = PUBLICATIONS_PER_ROUND.max(self.frames_max);
        self.frames_max.saturating_sub(self.fullest).min(run_max.saturating_sub(self.publications))
    }

    /// Counts publications that were run.
    #[inline]
    pub(crate) fn ran(&mut self, publications: u64) {
        self.publications += publications;
    }

    /// An outbox that was reached holds so many frames, and its client accepts writes.
    #[inline]
    pub(crate) fn reached(&mut self, frames: u64) {
        self.fullest = self.fullest.max(frames);
    }

    #[cfg(feature = "audit")]
    pub(crate) fn contains(&self, item: &T) -> bool
    where
        T: PartialEq,
    {
        self.waiting.contains(item)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Outboxes that take everything at each flush, like those of clients that keep up.
    struct Clients {
        schedule: FlushSchedule<usize>,
        frames: Vec<u64>,
        is_marked: Vec<bool>,
        now: Duration,
    }

    impl Clients {
        fn new(count: usize, outbox_frames: usize, coalesce: Duration) -> Self {
            let mut schedule = FlushSchedule::new(coalesce);
            schedule.adopt_outbox(outbox_frames);
            let (frames, is_marked) = (vec![0; count], vec![false; count]);
            Self { schedule, frames, is_marked, now: Duration::ZERO }
        }

        fn offer(&mut self, client: usize, frames: u64) {
            self.frames[client] += frames;
            if !std::mem::replace(&mut self.is_marked[client], true) {
                self.schedule.mark(client);
            }
            self.schedule.reached(self.frames[client]);
        }

        /// Runs as much of the log as may be run, up to `backlog`, to the clients that are members; returns how much.
        fn run_log(&mut self, backlog: u64, is_member: impl Fn(usize) -> bool) -> u64 {
            let run = backlog.min(self.schedule.room());
            if run > 0 {
                (0..self.frames.len())
                    .filter(|client| is_member(*client))
                    .for_each(|client| self.offer(client, run));
                self.schedule.ran(run);
            }
            run
        }

        /// Flushes one turn; the first client has more to write after each flush if it `has_more`.
        fn flush(&mut self, has_more: bool) {
            let count = self.schedule.begin(self.now, false);
            for _ in 0..count {
                let client = self.schedule.next().expect("as many as it said");
                (self.frames[client], self.is_marked[client]) = (0, false);
                if client == 0 && has_more {
                    self.offer(0, 0);
                }
            }
            self.schedule.end(count);
        }
    }

    proptest! {
        #[test]
        fn a_client_that_keeps_up_never_overflows_because_its_flush_is_late(
            count in 1usize..2000,
            outbox_frames in 4usize..300,
            coalesce in 0u32..20,
            turns in prop::collection::vec((0u64..1000, 1usize..7, 0u32..10), 1..60),
        ) {
            let mut clients = Clients::new(count, outbox_frames, coalesce * MS);
            let mut backlog = 0;
            for (published, every, passed) in turns {
                backlog += published;
                backlog -= clients.run_log(backlog, |client| client % every == 0);
                prop_assert!(clients.frames.iter().all(|frames| *frames <= outbox_frames as u64));
                clients.flush(false);
                clients.now += passed * MS;
            }
        }

        #[test]
        fn nor_do_messages_to_groups_of_any_size_overflow_it(
            count in 1usize..1500,
            outbox_frames in 4usize..2000,
            groups in prop::collection::vec((1usize..40, 0usize..40, 1u64..400), 1..300),
        ) {
            let mut clients = Clients::new(count, outbox_frames, Duration::ZERO);
            for (groups_of, offset, published) in groups {
                let mut left = published;
                while left > 0 {
                    let run = clients.run_log(left, |client| client % groups_of == offset % groups_of);
                    left -= run;
                    prop_assert!(clients.frames.iter().all(|frames| *frames <= outbox_frames as u64));
                    if run == 0 {
                        clients.flush(false);
                    }
                }
            }
        }

        #[test]
        fn every_outbox_is_flushed_and_the_log_makes_progress(
            count in 1usize..2000,
            outbox_frames in 1usize..300,
            coalesce in 0u32..20,
            backlog in 1u64..5000,
        ) {
            let mut clients = Clients::new(count, outbox_frames, coalesce * MS);
            let (mut left, mut turns) = (backlog, 0);
            while left > 0 || clients.schedule.waiting() > 0 {
                left -= clients.run_log(left, |_| true);
                clients.flush(left > 0);
                if !clients.schedule.has_work() && left == 0 {
                    clients.now = clients.schedule.due().unwrap_or(clients.now); // the shard sleeps until then
                }
                turns += 1;
                let rounds = backlog.div_ceil((outbox_frames as u64 / 4).clamp(1, FRAMES_PER_ROUND)) + 2;
                prop_assert!(turns <= rounds * 2 * (count.div_ceil(FLUSHES_PER_TURN) as u64 + 1), "no progress");
            }
            prop_assert!(clients.frames.iter().all(|frames| *frames == 0));
        }
    }

    #[test]
    fn all_are_flushed_when_the_first_has_waited_long_enough() {
        let mut schedule = FlushSchedule::new(5 * MS);
        schedule.mark('a');
        assert_eq!(
            (schedule.begin(MS, false), schedule.due(), schedule.has_work()),
            (0, Some(6 * MS), false)
        );
        schedule.mark('b');
        assert_eq!(schedule.begin(5 * MS, false), 0);
        schedule.end(0);
        assert_eq!(schedule.begin(6 * MS, false), 2);
        assert_eq!([schedule.next(), schedule.next(), schedule.next()], [Some('a'), Some('b'), None]);
        schedule.end(2);
        schedule.mark('c');
        assert_eq!(schedule.begin(6 * MS, true), 1, "no item waits when it is urgent");
    }

    #[test]
    fn items_queued_before_an_answer_keep_their_turn() {
        let mut schedule = FlushSchedule::new(Duration::ZERO);
        schedule.mark('a');
        let before = schedule.waiting();
        schedule.mark('b');
        assert_eq!(schedule.take_since(before).collect::<String>(), "b");
        assert_eq!(schedule.next(), Some('a'));
    }
}
