//! When to check connections for frames that have waited for too long.
//!
//! Owned by one shard. One timer for each item, the earliest that was set: so the memory depends on the
//! number of items, however many frames wait. When its timer fires, an item looks at what it has, which may
//! be nothing any more, and sets a timer for the rest. Knows no clock, and not what its timers are for.

use std::collections::BTreeSet;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::time::Duration;

use rustc_hash::FxHashMap;

#[derive(Debug)]
pub(crate) struct Deadlines<T> {
    /// When each item's timer is due; each is in `queue` once.
    due: FxHashMap<T, Duration>,
    queue: BTreeSet<(Duration, T)>,
}

impl<T: Copy + Ord + Hash> Deadlines<T> {
    pub(crate) fn new() -> Self {
        Self { due: FxHashMap::default(), queue: BTreeSet::new() }
    }

    /// Sets the timer of `item` to `due`, unless it is due earlier already.
    pub(crate) fn push(&mut self, due: Duration, item: T) {
        match self.due.entry(item) {
            Entry::Occupied(entry) if *entry.get() <= due => return,
            Entry::Occupied(mut entry) => {
                self.queue.remove(&(entry.insert(due), item));
            }
            Entry::Vacant(entry) => {
                entry.insert(due);
            }
        }
        self.queue.insert((due, item));
    }

    /// Moves the items that are due by `now` to `due`.
    pub(crate) fn expire(&mut self, now: Duration, due: &mut Vec<T>) {
        while let Some((_, item)) = self.queue.first().copied().filter(|(at, _)| *at <= now) {
            self.queue.pop_first();
            self.due.remove(&item);
            due.push(item);
        }
    }

    #[cfg(feature = "audit")]
    pub(crate) fn is_reminded(&self, item: T, by: Duration) -> bool {
        self.due.get(&item).is_some_and(|due| *due <= by && self.queue.contains(&(*due, item)))
    }

    #[cfg(feature = "audit")]
    pub(crate) fn audit_len(&self) -> usize {
        assert_eq!(self.queue.len(), self.due.len());
        self.queue.len()
    }

    /// When the next timer is due.
    pub(crate) fn next(&self) -> Option<Duration> {
        self.queue.first().map(|(due, _)| *due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn each_item_is_due_at_the_earliest_time_that_was_set() {
        let mut deadlines = Deadlines::new();
        deadlines.push(MS(100), 'a');
        deadlines.push(MS(30), 'b');
        deadlines.push(MS(120), 'c');
        deadlines.push(MS(110), 'c');
        deadlines.push(MS(120), 'c');
        let mut due = Vec::new();
        assert_eq!(deadlines.next(), Some(MS(30)));
        deadlines.expire(MS(30), &mut due);
        assert_eq!((due.as_slice(), deadlines.next()), (&['b'][..], Some(MS(100))));
        deadlines.push(MS(115), 'b');
        deadlines.expire(MS(500), &mut due);
        assert_eq!((due.as_slice(), deadlines.next()), (&['b', 'a', 'c', 'b'][..], None));
    }

    #[test]
    fn each_item_has_one_timer_however_often_it_is_set() {
        let mut deadlines = Deadlines::new();
        let mut due = Vec::new();
        for round in 0..1000 {
            for item in ['a', 'b'] {
                deadlines.push(MS(1_000_000 + round), item);
                deadlines.push(MS(1_000_000 - round), item);
                deadlines.push(MS(10 * round + 5), item);
            }
            deadlines.expire(MS(10 * round + 5), &mut due);
            assert!(deadlines.queue.len() <= 2 && deadlines.due.len() == deadlines.queue.len());
        }
    }
}
