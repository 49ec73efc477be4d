//! Publishers that wait for room: in the log, or in one mailbox.
//!
//! A slow path by definition, so a plain lock suffices. The flag beside it shows to the shard, which makes
//! room all the time, at the cost of one load that no publisher waits. Bounded: above `capacity` a publisher
//! is refused instead of parked. Does not know which queue the room is in.
//!
//! The race and why it is safe: a publisher registers, raises the flag, and looks for room once more before
//! it sleeps. A thread that makes room does so first and then looks at the flag. With a `SeqCst` fence
//! between the two steps on both sides at least one of them sees the other.

use std::task::Waker;

use slab::Slab;

use crate::sync::{AtomicBool, Mutex, fence};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// Why a value was not accepted; gives it back.
#[derive(Debug)]
pub(crate) enum Refused<T> {
    Full(T),
    /// Nothing is accepted any more.
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

/// A waiting publisher's entry, so that a second poll is not counted twice. Dropping it removes it from the list.
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
    /// Counts how often the list was emptied: a registration of an earlier round is no longer in the list.
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

    /// Parks `waker` until room is made; false when the list itself is full. After true the caller must look
    /// for room once more.
    pub(crate) fn register<'a>(&'a self, registration: &mut Registration<'a>, waker: &Waker) -> bool {
        let mut queue = lock(&self.queue);
        match &registration.0 {
            Some(entry) if std::ptr::eq(entry.list, self) && entry.round == queue.round => {
                queue.wakers[entry.key].clone_from(waker);
            }
            _ if queue.wakers.len() >= self.capacity => return false,
            _ => {
                let (round, key) = (queue.round, queue.wakers.insert(waker.clone()));
                // The replaced entry is of an earlier round: dropping it removes nothing from the list.
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

    /// Whether a publisher may be waiting. A hint: only `wake_all` is exact.
    pub(crate) fn is_occupied(&self) -> bool {
        self.occupied.load(Relaxed) // Relaxed: exactness comes from the fence in `wake_all`
    }

    /// Called after room was made. Wakes all waiting publishers; one that finds no room any more parks again.
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
    /// A publisher that stops waiting makes room for another one in the list.
    fn drop(&mut self) {
        let Some(Entry { list, round, key }) = self.0.take() else { return };
        let removed = {
            let mut queue = lock(&list.queue);
            (queue.round == round).then(|| queue.wakers.try_remove(key))
        };
        drop(removed); // outside the lock: dropping a waker may run any code
    }
}

/// A waker that panics under the lock does no harm: the list is consistent at every point.
#[cfg(not(loom))]
fn lock(queue: &Mutex<Queue>) -> std::sync::MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(loom)]
fn lock(queue: &Mutex<Queue>) -> loom::sync::MutexGuard<'_, Queue> {
    queue.lock().unwrap()
}
