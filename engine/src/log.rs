//! The publication log: one bounded ring that every shard reads with its own cursor.
//!
//! Publishers claim a position, write the slot and release it. Shards read the slots in sequence and in
//! place, so all of them see one total order, and publishing costs the same for any number of shards. Shared
//! by all threads of an engine. Does not know what it carries, nor groups, sockets or time.
//!
//! The life of position `p`, in slot `p % capacity`:
//!
//! 1. *free*: `gate > p - capacity`; the old value has been dropped.
//! 2. *claimed*: a publisher moved `tail` from `p` to `p + 1`. Only it may touch the slot.
//! 3. *released*: the publisher stored `sequence = p + 1`. Every shard whose cursor is at or below `p` may
//!    read it; no thread may write it.
//! 4. *passed*: every cursor is above `p`. The thread that runs `reclaim` drops the value and then moves
//!    `gate` above `p`, which is state 1 for position `p + capacity`.
//!
//! What is lock-free: publishing never waits for another publisher, but a publisher that the scheduler
//! suspends between states 2 and 3 holds back the readers at `p`. That is a few instructions; a shard that
//! meets such a position continues with its sockets. A full log makes publishers wait (asynchronously) for
//! the slowest shard, never shards for publishers.

use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};

use crossbeam_utils::CachePadded;

use crate::sync::{AtomicU32, AtomicU64, UnsafeCell, fence, plain};
use crate::wait_list::{Refused, WaitList};

/// A bit of the tail: no more positions can be claimed.
const CLOSED: u64 = 1 << 63;

/// The cursor of a shard that has ended: it holds back no publisher.
const ENDED: u64 = u64::MAX;

/// The size of an entry in bytes, for publishers that must not publish more than readers have room for.
pub(crate) trait Weigh {
    fn bytes(&self) -> u64 {
        0
    }
}

#[derive(Debug)]
pub(crate) struct Log<T: Weigh> {
    slots: Box<[Slot<T>]>,
    /// The next position to claim.
    tail: CachePadded<AtomicU64>,
    /// Every shard has passed all positions below, and their values have been dropped.
    gate: CachePadded<AtomicU64>,
    /// Bytes that publishers have reserved since the start, and bytes of the values that every shard has passed.
    reserved: CachePadded<plain::AtomicU64>,
    passed: CachePadded<plain::AtomicU64>,
    cursors: Box<[CachePadded<AtomicU64>]>,
    /// The shard that was found at the gate last. Written by the thread that reclaims.
    slowest: plain::AtomicUsize,
    /// Readers that have not ended. Without any, publishers reclaim what they push: no value is kept, no
    /// publisher waits.
    readers: AtomicU32,
    /// Number of unfinished calls of `reclaim`: the first caller does the work of all.
    reclaiming: CachePadded<AtomicU32>,
    pub(crate) waiting: WaitList,
}

#[derive(Debug)]
struct Slot<T> {
    sequence: AtomicU64,
    value: UnsafeCell<MaybeUninit<T>>,
}

// SAFETY: a slot's value is written by the one thread that claimed its position, read by
// shards only between release and pass, and dropped by the one thread inside `reclaim`
// after every shard has passed. Reads happen in place from several threads (`T: Sync`)
// and values move between threads (`T: Send`). Witness: the loom models below.
unsafe impl<T: Weigh + Send + Sync> Send for Log<T> {}
// SAFETY: as above.
unsafe impl<T: Weigh + Send + Sync> Sync for Log<T> {}

impl<T: Weigh> Log<T> {
    #[cfg(feature = "audit")]
    pub(crate) const SLOT_BYTES: usize = size_of::<Slot<T>>();

    /// A log of at least `capacity` positions (rounded up to a power of two), read by `shards` shards.
    pub(crate) fn new(capacity: usize, shards: usize, waiting_max: usize) -> (Arc<Self>, Vec<Reader<T>>) {
        let capacity = capacity.next_power_of_two();
        let slot = |_| Slot { sequence: AtomicU64::new(0), value: UnsafeCell::new(MaybeUninit::uninit()) };
        let counter = |_| CachePadded::new(AtomicU64::new(0));
        let log = Arc::new(Self {
            slots: (0..capacity).map(slot).collect(),
            tail: counter(0),
            gate: counter(0),
            reserved: CachePadded::default(),
            passed: CachePadded::default(),
            cursors: (0..shards).map(counter).collect(),
            slowest: plain::AtomicUsize::new(0),
            readers: AtomicU32::new(shards as u32),
            reclaiming: CachePadded::new(AtomicU32::new(0)),
            waiting: WaitList::new(waiting_max),
        });
        let readers = (0..shards).map(|shard| Reader { log: log.clone(), shard, next: 0 }).collect();
        (log, readers)
    }

    /// The position after every publication that has begun. What the caller has published before is below it.
    #[inline]
    pub(crate) fn tail(&self) -> u64 {
        self.tail.load(Acquire) & !CLOSED // pairs with the claim in `try_push`
    }

    /// Refuses publications from now on. One atomic step with the claims, so that the tail read afterwards is
    /// final, and everything that was accepted is below it.
    pub(crate) fn close(&self) {
        self.tail.fetch_or(CLOSED, AcqRel); // pairs with the claim in `try_push`
        self.waiting.wake_all();
    }

    /// The number of publications that some shard has not passed yet (never too low).
    #[inline]
    pub(crate) fn in_flight(&self) -> u64 {
        // The gate first: it never overtakes the tail, so the difference cannot be negative.
        // Acquire: congestion that the shards counted before they passed is visible now.
        let gate = self.gate.load(Acquire);
        (self.tail.load(Relaxed) & !CLOSED) - gate
    }

    /// Announces a value of this many bytes. Called before [`bytes_in_flight`](Self::bytes_in_flight) is
    /// read, and undone by `unreserve` if the value is not pushed.
    pub(crate) fn reserve(&self, bytes: u64) {
        self.reserved.fetch_add(bytes, AcqRel); // of two concurrent publishers, one sees the other's bytes
    }

    pub(crate) fn unreserve(&self, bytes: u64) {
        self.reserved.fetch_sub(bytes, Relaxed); // Relaxed: if it is seen late, the sum is only too high
    }

    /// Bytes that were reserved and that some shard has not passed yet (never too low).
    pub(crate) fn bytes_in_flight(&self) -> u64 {
        // `passed` first, as above. Acquire: congestion that the shards counted before they passed is visible now.
        let passed = self.passed.load(Acquire);
        self.reserved.load(Acquire).saturating_sub(passed)
    }

    /// Whether there is no room now. Never once it is closed.
    pub(crate) fn is_full(&self) -> bool {
        let tail = self.tail.load(Relaxed); // Relaxed, Acquire: as in `try_push`
        tail & CLOSED == 0 && tail.saturating_sub(self.gate.load(Acquire)) >= self.slots.len() as u64
    }

    /// Appends `value` and returns its position. Gives it back if the log is full or closed.
    ///
    /// Ends with a `SeqCst` fence, so that what the caller reads next (which shards are interested, which are
    /// asleep) is not older than its claim.
    pub(crate) fn try_push(&self, value: T) -> Result<u64, Refused<T>> {
        let mut position = self.tail.load(Relaxed); // Relaxed: the exchange below checks it
        loop {
            if position & CLOSED != 0 {
                return Err(Refused::Closed(value));
            }
            // Acquire: pairs with `reclaim`; the slot's old value has been dropped.
            let gate = self.gate.load(Acquire);
            if position < gate {
                position = self.tail.load(Relaxed); // the tail that was read is out of date
                continue;
            }
            if position - gate >= self.slots.len() as u64 {
                return Err(Refused::Full(value));
            }
            // AcqRel: a shard that sees this claim sees everything that its publisher did before.
            match self.tail.compare_exchange_weak(position, position + 1, AcqRel, Relaxed) {
                Ok(_) => break,
                Err(current) => position = current,
            }
        }
        let slot = self.slot(position);
        // SAFETY: the claim gave the slot to this thread alone (state 2), and the gate check ensures that its
        // former value was dropped (state 1).
        slot.value.with_mut(|cell| unsafe { (*cell).write(value) });
        slot.sequence.store(position + 1, Release); // pairs with the load in `Reader::get`
        fence(SeqCst); // pairs with `reclaim_once`: its last call sees this value, or we see that no readers are left
        if self.readers.load(Relaxed) == 0 {
            self.reclaim();
        }
        Ok(position)
    }

    /// Drops the values that every shard has passed and wakes publishers that wait for room.
    ///
    /// Never blocks: if another thread is reclaiming, that thread repeats its work for this caller.
    pub(crate) fn reclaim(&self) {
        // AcqRel: what this caller did before (moving its cursor) is seen by the thread that reclaims for it.
        if self.reclaiming.fetch_add(1, AcqRel) > 0 {
            return;
        }
        let mut asked = 1;
        loop {
            while self.reclaim_once() {}
            match self.reclaiming.compare_exchange(asked, 0, AcqRel, Acquire) {
                Ok(_) => return,
                Err(more) => asked = more,
            }
        }
    }

    /// Moves the gate up to the slowest shard; false if it is there already.
    fn reclaim_once(&self) -> bool {
        let gate = self.gate.load(Relaxed); // Relaxed: only the reclaiming thread writes it
        fence(SeqCst); // between the gate's last store and the cursors; pairs with `Reader::advance`
        let Some(passed) = self.passed_by_all(gate) else { return false };
        let mut bytes = 0;
        for position in gate..passed {
            // SAFETY: state 4: every shard has passed (or ended), no publisher can claim the slot before the
            // gate moves, and the counter admits one thread to `reclaim`.
            self.slot(position).value.with_mut(|cell| unsafe {
                bytes += (*cell).assume_init_ref().bytes();
                (*cell).assume_init_drop();
            });
        }
        self.passed.fetch_add(bytes, Release); // pairs with the load in `bytes_in_flight`
        self.gate.store(passed, Release); // pairs with the load in `try_push`
        self.waiting.wake_all();
        true
    }

    /// The position up to which every shard has passed; none if that is the gate.
    ///
    /// Every shard calls this for the same publication, and all but the last are in vain. So it begins with the shard
    /// that was in the way before: each cursor, which another CPU writes, is read once for a publication and not by
    /// every shard.
    fn passed_by_all(&self, gate: u64) -> Option<u64> {
        let mut passed = ENDED;
        let first = self.slowest.load(Relaxed); // Relaxed: a hint
        for ahead in 0..self.cursors.len() {
            let shard = (first + ahead) % self.cursors.len();
            // Acquire: pairs with the store in `Reader::advance`; the shard no longer reads the slots below.
            let cursor = self.cursors[shard].load(Acquire);
            if cursor == gate {
                if ahead > 0 {
                    self.slowest.store(shard, Relaxed); // Relaxed: as above
                }
                return None;
            }
            passed = passed.min(cursor);
        }
        let passed = if passed == ENDED { self.released(gate) } else { passed };
        (passed > gate).then_some(passed)
    }

    /// The first position from `from` on that has not been released.
    fn released(&self, from: u64) -> u64 {
        let is_released = |position: &u64| self.slot(*position).sequence.load(Acquire) == *position + 1;
        (from..self.tail()).take_while(is_released).last().map_or(from, |last| last + 1)
    }

    /// The shards that lag by at least `distance` publications.
    pub(crate) fn laggards(&self, distance: u64) -> impl Iterator<Item = usize> + '_ {
        let tail = self.tail();
        self.cursors.iter().enumerate().filter_map(move |(shard, cursor)| {
            // Relaxed: a hint which shards to wake; a wrong guess costs one wake.
            (tail.saturating_sub(cursor.load(Relaxed)) >= distance).then_some(shard)
        })
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.slots.len() as u64
    }

    #[inline]
    fn slot(&self, position: u64) -> &Slot<T> {
        &self.slots[position as usize & (self.slots.len() - 1)]
    }
}

impl<T: Weigh> Drop for Log<T> {
    fn drop(&mut self) {
        let gate = self.gate.load(Relaxed); // Relaxed: `&mut self` excludes every other thread
        for position in gate..self.tail.load(Relaxed) & !CLOSED {
            let slot = self.slot(position);
            if slot.sequence.load(Relaxed) == position + 1 {
                // SAFETY: released and not reclaimed, and `&mut self` excludes every other thread.
                slot.value.with_mut(|cell| unsafe { (*cell).assume_init_drop() });
            }
        }
    }
}

/// One shard's cursor. There is exactly one per shard, and it is not `Clone`.
#[derive(Debug)]
pub(crate) struct Reader<T: Weigh> {
    log: Arc<Log<T>>,
    shard: usize,
    next: u64,
}

impl<T: Weigh> Reader<T> {
    /// The position that this shard reads next.
    #[inline]
    pub(crate) fn position(&self) -> u64 {
        self.next
    }

    /// Whether this shard has passed every publication that has begun.
    #[inline]
    pub(crate) fn is_at_tail(&self) -> bool {
        self.next == self.log.tail()
    }

    /// The publication `ahead` positions after the cursor, if it has been released.
    #[inline]
    pub(crate) fn get(&self, ahead: u64) -> Option<&T> {
        let position = self.next + ahead;
        let slot = self.log.slot(position);
        if slot.sequence.load(Acquire) != position + 1 {
            return None; // Acquire pairs with the release in `try_push`
        }
        // SAFETY: released (state 3), and it stays released while this cursor is at or below it: `advance`
        // takes `&mut self`, so no reference returned here outlives it.
        slot.value.with(|cell| Some(unsafe { (*cell).assume_init_ref() }))
    }

    /// Passes `count` publications.
    pub(crate) fn advance(&mut self, count: u64) {
        let before = self.next;
        self.next += count;
        self.log.cursors[self.shard].store(self.next, Release); // pairs with the load in `reclaim`
        fence(SeqCst); // pairs with `reclaim_once`: that call sees this cursor, or we see the gate at `before`
        // Only the slowest shard can move the gate.
        if before <= self.log.gate.load(Relaxed) {
            self.log.reclaim();
        }
    }
}

impl<T: Weigh> Drop for Reader<T> {
    /// A shard that ends must not hold back publishers for ever.
    fn drop(&mut self) {
        self.log.cursors[self.shard].store(ENDED, Release);
        // AcqRel: a thread that sees no readers left sees that every cursor has ended.
        self.log.readers.fetch_sub(1, AcqRel);
        self.log.reclaim();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// Small enough for Miri, which detects what loom does not: access to memory that is not owned.
    const PER_PUBLISHER: u32 = if cfg!(miri) { 20 } else { 5_000 };
    const PUBLISHERS: u32 = 3;

    struct Value {
        publisher: u32,
        /// On the heap, so that Miri detects a value that is dropped twice or too early.
        number: Box<u32>,
        drops: Arc<AtomicUsize>,
    }

    impl Weigh for Value {}

    impl Drop for Value {
        fn drop(&mut self) {
            self.drops.fetch_add(1, Relaxed);
        }
    }

    #[test]
    fn every_shard_reads_every_value_once_and_in_one_order() {
        let drops = Arc::new(AtomicUsize::new(0));
        let (log, readers) = Log::new(4, 3, 1);
        let all = (PUBLISHERS * PER_PUBLISHER) as usize;
        let publish = |publisher| {
            for number in 0..PER_PUBLISHER {
                let mut value = Value { publisher, number: Box::new(number), drops: drops.clone() };
                while let Err(Refused::Full(refused)) = log.try_push(value) {
                    value = refused;
                    std::thread::yield_now();
                }
            }
        };
        let read = |mut reader: Reader<Value>| {
            let mut seen = Vec::new();
            while seen.len() < all {
                // In batches as large as what is released.
                let ready = (0..4).map_while(|ahead| reader.get(ahead));
                let before = seen.len();
                seen.extend(ready.map(|value| (value.publisher, *value.number)));
                match seen.len() - before {
                    0 => std::thread::yield_now(),
                    count => reader.advance(count as u64),
                }
            }
            seen
        };
        let seen: Vec<_> = std::thread::scope(|scope| {
            (0..PUBLISHERS).for_each(|publisher| drop(scope.spawn(move || publish(publisher))));
            let readers: Vec<_> =
                readers.into_iter().map(|reader| scope.spawn(move || read(reader))).collect();
            readers.into_iter().map(|reader| reader.join().expect("a reader panicked")).collect()
        });
        assert!(seen.iter().all(|order| *order == seen[0]), "readers disagree about the order");
        for publisher in 0..PUBLISHERS {
            let numbers = seen[0].iter().filter(|(from, _)| *from == publisher).map(|(_, number)| *number);
            assert!(numbers.eq(0..PER_PUBLISHER));
        }
        drop(log);
        assert_eq!(drops.load(Relaxed), all);
    }

    /// Otherwise 64 shards that pass one publication read 64 x 64 cursors, each written by another CPU.
    #[cfg(feature = "audit")]
    #[test]
    fn a_publication_costs_each_shard_the_same_however_many_shards_there_are() {
        let loads = |shards| {
            let (log, mut readers) = Log::new(8, shards, 1);
            let drops = Arc::new(AtomicUsize::new(0));
            let used = crate::sync::counted::record(|| {
                for number in 0..20 {
                    let pushed =
                        log.try_push(Value { publisher: 0, number: Box::new(number), drops: drops.clone() });
                    assert!(pushed.is_ok());
                    readers.iter_mut().for_each(|reader| reader.advance(1));
                }
            });
            assert_eq!(drops.load(Relaxed), 20, "each is reclaimed once all have passed it");
            used.loads as f64 / (20 * shards) as f64
        };
        let (few, many) = (loads(4), loads(256));
        assert!(many <= few, "{few} loads with 4 shards, {many} with 256");
    }

    #[test]
    fn a_full_log_returns_the_value_and_its_drop_drops_the_rest() {
        let drops = Arc::new(AtomicUsize::new(0));
        let (log, readers) = Log::new(2, 2, 1);
        let value = |number| Value { publisher: 0, number: Box::new(number), drops: drops.clone() };
        assert_eq!(log.try_push(value(0)).ok(), Some(0));
        assert_eq!(log.try_push(value(1)).ok(), Some(1));
        assert!(matches!(log.try_push(value(2)), Err(Refused::Full(value)) if *value.number == 2));
        assert_eq!(log.laggards(1).collect::<Vec<_>>(), [0, 1]);
        log.close();
        assert!(matches!(log.try_push(value(3)), Err(Refused::Closed(value)) if *value.number == 3));
        assert_eq!((drops.load(Relaxed), log.in_flight(), log.tail()), (2, 2, 2));
        drop((readers, log));
        assert_eq!(drops.load(Relaxed), 4);
    }
}

#[cfg(all(test, loom))]
mod models {
    use std::sync::atomic::AtomicUsize;
    use std::task::Waker;

    use loom::thread;

    use super::*;
    use crate::sync::sleeper::Sleeper;
    use crate::wait_list::Registration;

    /// Counts drops, without loom's knowledge: no ordering depends on the counter.
    struct Value(u32, Arc<AtomicUsize>);

    impl Weigh for Value {}

    impl Drop for Value {
        fn drop(&mut self) {
            self.1.fetch_add(1, Relaxed);
        }
    }

    /// Publishes as a publisher does: waits while the log is full, and wakes the readers afterwards.
    fn push(log: &Log<Value>, sleepers: &[Arc<Sleeper>], mut value: Value) {
        let sleeper = Sleeper::new();
        let waker = Waker::from(sleeper.clone());
        loop {
            let mut registration = Registration::default();
            for registered in [false, true] {
                match log.try_push(value) {
                    Ok(_) => return sleepers.iter().for_each(|sleeper| sleeper.notify()),
                    Err(Refused::Full(refused)) => value = refused,
                    Err(Refused::Closed(_)) => panic!("nobody closes"),
                }
                if !registered {
                    assert!(log.waiting.register(&mut registration, &waker));
                }
            }
            sleeper.sleep();
        }
    }

    fn read(reader: &mut Reader<Value>, sleeper: &Sleeper, count: usize) -> Vec<u32> {
        let mut seen = Vec::new();
        while seen.len() < count {
            match reader.get(0) {
                Some(value) => {
                    seen.push(value.0);
                    reader.advance(1);
                }
                None => sleeper.sleep(),
            }
        }
        seen
    }

    /// One thread for each publisher, which publishes its values one after the other.
    fn publish(
        log: &Arc<Log<Value>>,
        sleepers: &[Arc<Sleeper>],
        drops: &Arc<AtomicUsize>,
        publishers: &[&'static [u32]],
    ) -> Vec<thread::JoinHandle<()>> {
        let spawn = |values: &&'static [u32]| {
            let (log, sleepers, drops, values) = (log.clone(), sleepers.to_vec(), drops.clone(), *values);
            thread::spawn(move || {
                values.iter().for_each(|value| push(&log, &sleepers, Value(*value, drops.clone())))
            })
        };
        publishers.iter().map(spawn).collect()
    }

    fn join<T>(threads: Vec<thread::JoinHandle<T>>) -> Vec<T> {
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    }

    /// In the order that all see, each publisher's values have their order of publication.
    fn all_read_everything_in_one_order(publishers: &'static [&'static [u32]], readers: usize) {
        let count = publishers.iter().map(|values| values.len()).sum();
        loom::model(move || {
            let drops = Arc::new(AtomicUsize::new(0));
            let (log, mut readers) = Log::new(2, readers, 4);
            let sleepers: Vec<_> = readers.iter().map(|_| Sleeper::new()).collect();
            let threads = publish(&log, &sleepers, &drops, publishers);
            let mut first = readers.remove(0);
            let others = readers.into_iter().zip(sleepers[1..].to_vec());
            let others = others.map(|(mut reader, sleeper)| {
                thread::spawn(move || (read(&mut reader, &sleeper, count), reader))
            });
            let others: Vec<_> = others.collect();
            let seen = read(&mut first, &sleepers[0], count);
            join(threads);
            for values in publishers {
                assert!(seen.iter().filter(|value| values.contains(value)).eq(values.iter()));
            }
            // The readers still exist: values that all of them have passed must have been dropped nevertheless.
            let others = join(others);
            assert!(others.iter().all(|(other, _)| *other == seen));
            assert_eq!((drops.load(Relaxed), log.in_flight()), (count, 0));
        });
    }

    #[test]
    fn two_publishers_and_a_reader_agree() {
        all_read_everything_in_one_order(&[&[1, 2], &[3]], 1);
    }

    #[test]
    fn a_publisher_and_two_readers_agree() {
        all_read_everything_in_one_order(&[&[1, 2, 3]], 2);
    }

    #[test]
    fn two_publishers_and_two_readers_agree() {
        all_read_everything_in_one_order(&[&[1], &[2]], 2);
    }

    #[test]
    fn everything_accepted_before_a_close_is_below_the_tail_read_after_it() {
        loom::model(|| {
            let drops = Arc::new(AtomicUsize::new(0));
            let (log, mut readers) = Log::new(4, 1, 4);
            let publish = |number| {
                let (log, drops) = (log.clone(), drops.clone());
                thread::spawn(move || log.try_push(Value(number, drops)).is_ok())
            };
            let publishers = vec![publish(1), publish(2)];
            log.close();
            let tail = log.tail();
            let accepted = join(publishers).into_iter().filter(|accepted| *accepted).count();
            assert_eq!(tail, accepted as u64);
            let read = std::iter::from_fn(|| {
                let is_there = readers[0].get(0).is_some();
                is_there.then(|| readers[0].advance(1))
            });
            assert_eq!((read.count(), log.tail()), (accepted, tail));
        });
    }

    #[test]
    fn a_reader_that_ends_holds_back_no_publisher() {
        loom::model(|| {
            let drops = Arc::new(AtomicUsize::new(0));
            let (log, mut readers) = Log::new(2, 2, 4);
            let sleeper = Sleeper::new();
            let threads = publish(&log, std::slice::from_ref(&sleeper), &drops, &[&[1, 2, 3]]);
            let leaver = readers.remove(1);
            let leaver = thread::spawn(move || drop(leaver));
            assert_eq!(read(&mut readers[0], &sleeper, 3), [1, 2, 3]);
            join(threads);
            leaver.join().unwrap();
            assert_eq!((drops.load(Relaxed), log.in_flight()), (3, 0));
        });
    }

    #[test]
    fn a_log_without_readers_keeps_no_value_and_blocks_no_publisher() {
        loom::model(|| {
            let drops = Arc::new(AtomicUsize::new(0));
            let (log, readers) = Log::new(2, 1, 4);
            let threads = publish(&log, &[], &drops, &[&[1, 2], &[3]]);
            drop(readers);
            join(threads);
            assert_eq!((drops.load(Relaxed), log.in_flight()), (3, 0));
        });
    }
}
