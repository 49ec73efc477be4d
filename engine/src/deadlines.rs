//! When frames that wait for room have waited long enough.
//!
//! Owned by one shard. All frames that may wait equally long are dropped in the order in
//! which they came, so one queue for each length of time serves, with no timer for a
//! frame and no search. Entries are reminders: whoever is reminded may have nothing to
//! drop any more. Knows no clock, and not what it reminds of.

use std::collections::VecDeque;
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Deadlines<T> {
    /// One queue for each timeout that is in use: few.
    queues: Vec<(Duration, VecDeque<(Duration, T)>)>,
}

impl<T: Copy + PartialEq> Deadlines<T> {
    pub(crate) fn new() -> Self {
        Self { queues: Vec::new() }
    }

    /// Reminds of `item` at `now` + `timeout`.
    pub(crate) fn push(&mut self, now: Duration, timeout: Duration, item: T) {
        let due = now + timeout;
        let place = self.queues.iter().position(|(length, _)| *length == timeout).unwrap_or_else(|| {
            self.queues.push((timeout, VecDeque::new()));
            self.queues.len() - 1
        });
        let queue = &mut self.queues[place].1;
        // A burst for one item needs one reminder.
        if queue.back() != Some(&(due, item)) {
            queue.push_back((due, item));
        }
    }

    /// Moves what is due by `now` to `due`.
    pub(crate) fn expire(&mut self, now: Duration, due: &mut Vec<T>) {
        for (_, queue) in &mut self.queues {
            while queue.front().is_some_and(|(at, _)| *at <= now) {
                due.extend(queue.pop_front().map(|(_, item)| item));
            }
        }
        self.queues.retain(|(_, queue)| !queue.is_empty());
    }

    /// When the next one is due.
    pub(crate) fn next(&self) -> Option<Duration> {
        self.queues.iter().filter_map(|(_, queue)| queue.front()).map(|(due, _)| *due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn each_is_reminded_of_when_its_own_time_is_over() {
        let mut deadlines = Deadlines::new();
        deadlines.push(MS(0), MS(100), 'a');
        deadlines.push(MS(10), MS(20), 'b');
        deadlines.push(MS(20), MS(100), 'c');
        deadlines.push(MS(20), MS(100), 'c');
        let mut due = Vec::new();
        assert_eq!(deadlines.next(), Some(MS(30)));
        deadlines.expire(MS(30), &mut due);
        assert_eq!((due.as_slice(), deadlines.next()), (&['b'][..], Some(MS(100))));
        deadlines.expire(MS(500), &mut due);
        assert_eq!((due.as_slice(), deadlines.next()), (&['b', 'a', 'c'][..], None));
        assert!(deadlines.queues.is_empty());
    }
}
