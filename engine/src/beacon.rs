//! Beacons: what a running shard shows to other threads.
//!
//! One for each shard: since when its turn has been running, and which handler call it is in. Written by the
//! shard alone, with plain stores to a cache line of its own, and read by the watchdog and by readers of metrics,
//! because a blocked shard cannot report itself. Knows the names of namespaces, for log lines. Reads no clock.
//!
//! Sleeping. When all shards have slept for a while, the watchdog sleeps, too. It announces that and then looks
//! once more whether a shard has woken; a shard that wakes publishes its turn and then looks whether the watchdog
//! sleeps. A `SeqCst` fence between the two steps on both sides makes at least one of them see the other.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::Thread;
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;

use crate::id::GroupKey;
use crate::sync::plain::{AtomicBool, AtomicU64};

#[derive(Debug)]
pub(crate) struct Beacons {
    since: Instant,
    each: Box<[Beacon]>,
    is_watchdog_asleep: CachePadded<AtomicBool>,
    watchdog: OnceLock<Thread>,
    names: Mutex<Names>,
}

#[derive(Debug, Default)]
struct Beacon {
    signals: CachePadded<Signals>,
    /// Calls that blocked the shard for too long, as counted by the watchdog.
    blocked: CachePadded<AtomicU64>,
}

#[derive(Debug, Default)]
struct Signals {
    /// Odd during a call; each call has another number.
    calls: AtomicU64,
    /// The namespace of the handler that is being called, or was called last.
    namespace: AtomicU64,
    /// Microseconds from `since` to the beginning of the turn, plus 1; 0 while the shard sleeps.
    turn: AtomicU64,
}

/// Names of namespaces, for as long as their handles exist.
#[derive(Debug, Default)]
struct Names {
    each: Vec<(GroupKey, Weak<str>)>,
    /// The length at which names without a handle are removed.
    tidy_at: usize,
}

/// A handler call in progress, until this is dropped.
#[must_use]
pub(crate) struct Call<'a>(&'a AtomicU64);

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.store(self.0.load(Relaxed) + 1, Relaxed); // Relaxed: a sample; no other data depends on it
    }
}

impl Beacons {
    pub(crate) fn new(shards: usize, since: Instant) -> Self {
        Self {
            since,
            each: (0..shards).map(|_| Beacon::default()).collect(),
            is_watchdog_asleep: CachePadded::new(AtomicBool::new(false)),
            watchdog: OnceLock::new(),
            names: Mutex::default(),
        }
    }

    /// Registers the name of a namespace. It is forgotten when the caller drops `name`.
    pub(crate) fn name(&self, namespace: GroupKey, name: &Arc<str>) {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.each.len() >= names.tidy_at {
            names.each.retain(|(_, name)| name.strong_count() > 0);
            names.tidy_at = names.each.len() * 2 + 16;
        }
        names.each.push((namespace, Arc::downgrade(name)));
    }

    pub(crate) fn name_of(&self, namespace: GroupKey) -> Option<Arc<str>> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.each.iter().find(|(key, _)| *key == namespace)?.1.upgrade()
    }

    /// Must be called before a shard runs.
    pub(crate) fn set_watchdog(&self, thread: Thread) {
        let _ = self.watchdog.set(thread);
    }
}

/// Called by the shard.
impl Beacons {
    /// Marks that a handler of this namespace is being called, until the result is dropped.
    #[inline]
    pub(crate) fn call(&self, shard: usize, namespace: GroupKey) -> Call<'_> {
        let signals = &self.each[shard].signals;
        signals.namespace.store(namespace.0, Relaxed);
        // Release: a thread that sees this number sees its namespace. Only one thread writes, so a load and a
        // store suffice.
        signals.calls.store(signals.calls.load(Relaxed) + 1, Release);
        Call(&signals.calls)
    }

    /// A turn begins.
    pub(crate) fn turn(&self, shard: usize, now: Instant) {
        let micros = now.saturating_duration_since(self.since).as_micros() as u64 + 1;
        let turn = &self.each[shard].signals.turn;
        let has_slept = turn.load(Relaxed) == 0;
        turn.store(micros, Relaxed); // Relaxed: a sample; where it wakes the watchdog, the fence orders it
        if has_slept {
            fence(SeqCst); // pairs with the fence in `fall_asleep`
            if self.is_watchdog_asleep.load(Relaxed)
                && self.is_watchdog_asleep.swap(false, Relaxed)
                && let Some(watchdog) = self.watchdog.get()
            {
                watchdog.unpark();
            }
        }
    }

    /// The shard is about to sleep.
    pub(crate) fn sleep(&self, shard: usize) {
        self.each[shard].signals.turn.store(0, Relaxed); // Relaxed: a sample
    }
}

/// Called by other threads.
impl Beacons {
    /// Since when the shard's turn has been running; none while it sleeps.
    pub(crate) fn turn_of(&self, shard: usize) -> Option<Instant> {
        let micros = self.each[shard].signals.turn.load(Relaxed).checked_sub(1)?; // Relaxed: a sample
        Some(self.since + Duration::from_micros(micros))
    }

    /// The call in progress: its number, and its handler's namespace.
    pub(crate) fn call_of(&self, shard: usize) -> Option<(u64, GroupKey)> {
        let signals = &self.each[shard].signals;
        let call = signals.calls.load(Acquire); // pairs with `call`
        (call % 2 == 1).then(|| (call, GroupKey(signals.namespace.load(Relaxed))))
    }

    pub(crate) fn blocked(&self, shard: usize) -> u64 {
        self.each[shard].blocked.load(Relaxed) // Relaxed: a counter
    }

    /// Called by the watchdog only.
    pub(crate) fn count_blocked(&self, shard: usize) {
        self.each[shard].blocked.fetch_add(1, Relaxed); // Relaxed: a counter
    }

    pub(crate) fn all_sleep(&self) -> bool {
        (0..self.each.len()).all(|shard| self.turn_of(shard).is_none())
    }

    /// The watchdog is about to sleep until a shard wakes; false if one is awake.
    pub(crate) fn fall_asleep(&self) -> bool {
        self.is_watchdog_asleep.store(true, Relaxed);
        fence(SeqCst); // pairs with the fence in `turn`
        let all_sleep = self.all_sleep();
        if !all_sleep {
            self.is_watchdog_asleep.store(false, Relaxed);
        }
        all_sleep
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_seen_until_it_is_over_and_differs_from_the_next() {
        let beacons = Beacons::new(2, Instant::now());
        assert_eq!(beacons.call_of(1), None);
        let call = beacons.call(1, GroupKey(7));
        let (first, namespace) = beacons.call_of(1).expect("it goes on");
        assert_eq!((namespace, beacons.call_of(0)), (GroupKey(7), None));
        drop(call);
        assert_eq!(beacons.call_of(1), None);
        let _call = beacons.call(1, GroupKey(8));
        assert_ne!(beacons.call_of(1).map(|(call, _)| call), Some(first));
    }

    #[test]
    fn names_are_kept_as_long_as_their_namespaces() {
        let beacons = Beacons::new(1, Instant::now());
        let kept: Arc<str> = "kept".into();
        beacons.name(GroupKey(0), &kept);
        for key in 1..10_000 {
            beacons.name(GroupKey(key), &"gone".into());
        }
        assert_eq!(beacons.name_of(GroupKey(0)), Some(kept.clone()));
        assert_eq!(beacons.name_of(GroupKey(1)), None);
        let names = beacons.names.lock().expect("no test panicked");
        assert!(names.each.len() < 64, "{}", names.each.len());
    }
}
