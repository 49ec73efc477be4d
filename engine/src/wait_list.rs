//! Publishers that wait for room: in the log, or in one mailbox.
//!
//! A slow path by definition, so a plain lock serves. The flag beside it lets the
//! shard, which makes room all the time, see at the cost of one load that nobody
//! waits. Bounded: past `capacity` a publisher is refused instead of parked.
//! Does not know what the room is in.
//!
//! The race and why it is safe: a publisher registers, raises the flag, and looks
//! for room once more before it sleeps. Whoever makes room does so first and then
//! looks at the flag. With a `SeqCst` fence between the two steps on both sides at
//! least one of them sees the other.

use std::task::Waker;

use slab::Slab;

use crate::sync::{AtomicBool, Mutex, fence};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// Why something was not taken; gives it back.
#[derive(Debug)]
pub(crate) enum Refused<T> {
    Full(T),
    /// Nothing is taken any more.
    Closed(T),
}

impl<T> Refused<T> {
    pub(crate) fn map<U>(self, wrap: impl FnOnce(T) -> U) -> Refused<U> {
        match self {
            Self::Full(value) => Refused::Full(wrap(value)),
            Self::Closed(value) => Refused::Closed(wrap(value)),
        }
    }
}

/// A waiting publisher's entry, so that a second poll is not counted twice. Dropping it takes it out of the list.
#[derive(Debug, Default)]
pub(crate) struct Registration<'a>(Option<Entry<'a>>);

#[derive(Debug)]
struct Entry<'a> {
    list: &'a WaitList,
    round: u64,
    key: usize,
}

#[derive(Debug)]
pub(crate) struct WaitList {
    capacity: usize,
    occupied: AtomicBool,
    queue: Mutex<Queue>,
}

#[derive(Debug)]
struct Queue {
    /// Counts how often the list was emptied: a registration of an earlier round is void.
    round: u64,
    wakers: Slab<Waker>,
}

impl WaitList {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            occupied: AtomicBool::new(false),
            queue: Mutex::new(Queue { round: 0, wakers: Slab::new() }),
        }
    }

    /// Parks `waker` until room is made; false when the list itself is full.
    /// After true the caller must look for room once more.
    pub(crate) fn register<'a>(&'a self, registration: &mut Registration<'a>, waker: &Waker) -> bool {
        let mut queue = lock(&self.queue);
        match &registration.0 {
            Some(entry) if std::ptr::eq(entry.list, self) && entry.round == queue.round => {
                queue.wakers[entry.key].clone_from(waker);
            }
            _ if queue.wakers.len() >= self.capacity => return false,
            _ => {
                let (round, key) = (queue.round, queue.wakers.insert(waker.clone()));
                // The entry that it replaces is of an earlier round: dropping that takes nothing out.
                let former = registration.0.replace(Entry { list: self, round, key });
                debug_assert!(former.is_none_or(|former| former.round < round));
            }
        }
        // Relaxed: the fence below orders it before the caller's second look.
        self.occupied.store(true, Relaxed);
        drop(queue);
        fence(SeqCst); // pairs with the fence in `wake_all`
        true
    }

    /// Whether somebody may be waiting. A hint: only `wake_all` is exact.
    pub(crate) fn is_occupied(&self) -> bool {
        self.occupied.load(Relaxed) // Relaxed: exactness comes from the fence in `wake_all`
    }

    /// Called after room was made. Wakes everybody: who finds the room gone parks again.
    pub(crate) fn wake_all(&self) {
        fence(SeqCst); // pairs with the fence in `register`
        if !self.is_occupied() {
            return;
        }
        let wakers = {
            let mut queue = lock(&self.queue);
            self.occupied.store(false, Relaxed); // Relaxed: under the lock
            queue.round += 1;
            std::mem::take(&mut queue.wakers)
        };
        for (_, waker) in wakers {
            waker.wake();
        }
    }
}

impl Drop for Registration<'_> {
    /// A publisher that gives up waiting makes room for another.
    fn drop(&mut self) {
        let Some(Entry { list, round, key }) = self.0.take() else { return };
        let removed = {
            let mut queue = lock(&list.queue);
            (queue.round == round).then(|| queue.wakers.try_remove(key))
        };
        drop(removed); // outside the lock: a waker may do anything when it is dropped
    }
}

/// A waker that panics poisons nothing of ours: the list is whole at every point.
#[cfg(not(loom))]
fn lock(queue: &Mutex<Queue>) -> std::sync::MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(loom)]
fn lock(queue: &Mutex<Queue>) -> loom::sync::MutexGuard<'_, Queue> {
    queue.lock().unwrap()
}
