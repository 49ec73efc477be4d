//! The seam between the engine and the provider of its atomics.
//!
//! In the log, the mailbox and the wait list threads meet in an order that matters. These take their atomics,
//! cells, queues and locks from here, so that loom can substitute its own and try every interleaving. Other
//! shared state consists of counters and maps, each correct by itself: its atomics are in [`plain`], which loom leaves
//! alone. With the feature `audit` all of them can be counted.

#[cfg(all(feature = "audit", not(loom)))]
pub(crate) mod counted;

#[cfg(loom)]
pub(crate) use self::modelled::*;
#[cfg(not(loom))]
pub(crate) use self::real::*;

pub(crate) mod plain {
    #[cfg(all(feature = "audit", not(loom)))]
    pub(crate) use super::counted::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize};
    #[cfg(any(not(feature = "audit"), loom))]
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize};
}

#[cfg(not(loom))]
mod real {
    pub(crate) use crossbeam_queue::{ArrayQueue, SegQueue};
    pub(crate) use std::sync::Mutex;
    pub(crate) use std::sync::atomic::fence;

    pub(crate) use super::plain::{AtomicBool, AtomicU32, AtomicU64};

    /// `std`'s cell with loom's closure interface.
    #[derive(Debug)]
    pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(std::cell::UnsafeCell::new(value))
        }

        #[inline]
        pub(crate) fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
            read(self.0.get())
        }

        #[inline]
        pub(crate) fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
            write(self.0.get())
        }
    }
}

#[cfg(loom)]
mod modelled {
    use std::collections::VecDeque;
    use std::sync::atomic::Ordering::{Acquire, Release};

    pub(crate) use loom::cell::UnsafeCell;
    pub(crate) use loom::sync::Mutex;
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, fence};

    /// A stand-in, because loom cannot see into crossbeam's queues. Reading the length takes no lock and may
    /// be out of date, as in crossbeam; a lock there would hide a missing fence elsewhere.
    #[derive(Debug)]
    pub(crate) struct ArrayQueue<T> {
        capacity: usize,
        items: Mutex<VecDeque<T>>,
        len: AtomicU64,
    }

    impl<T> ArrayQueue<T> {
        pub(crate) fn new(capacity: usize) -> Self {
            Self { capacity, items: Mutex::new(VecDeque::new()), len: AtomicU64::new(0) }
        }

        pub(crate) fn push(&self, item: T) -> Result<(), T> {
            let mut items = self.items.lock().unwrap();
            if items.len() == self.capacity {
                return Err(item);
            }
            items.push_back(item);
            self.len.store(items.len() as u64, Release);
            Ok(())
        }

        pub(crate) fn pop(&self) -> Option<T> {
            let mut items = self.items.lock().unwrap();
            let item = items.pop_front()?;
            self.len.store(items.len() as u64, Release);
            Some(item)
        }

        pub(crate) fn len(&self) -> usize {
            self.len.load(Acquire) as usize
        }

        pub(crate) fn capacity(&self) -> usize {
            self.capacity
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.len() == 0
        }
    }

    /// The unbounded form.
    #[derive(Debug)]
    pub(crate) struct SegQueue<T>(ArrayQueue<T>);

    impl<T> SegQueue<T> {
        pub(crate) fn new() -> Self {
            Self(ArrayQueue::new(usize::MAX))
        }

        pub(crate) fn push(&self, item: T) {
            let _ = self.0.push(item);
        }

        pub(crate) fn pop(&self) -> Option<T> {
            self.0.pop()
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.0.is_empty()
        }
    }
}

/// What the models sleep on, in place of a shard's poll and a publisher's task.
#[cfg(all(test, loom))]
pub(crate) mod sleeper {
    use std::sync::Arc;
    use std::task::Wake;

    use loom::sync::{Condvar, Mutex};

    #[derive(Debug)]
    pub(crate) struct Sleeper {
        woken: Mutex<bool>,
        condvar: Condvar,
    }

    impl Sleeper {
        pub(crate) fn new() -> Arc<Self> {
            Arc::new(Self { woken: Mutex::new(false), condvar: Condvar::new() })
        }

        pub(crate) fn notify(&self) {
            *self.woken.lock().unwrap() = true;
            self.condvar.notify_one();
        }

        /// Sleeps until it is woken, which may have happened before. Loom reports an endless sleep as a deadlock.
        pub(crate) fn sleep(&self) {
            let mut woken = self.woken.lock().unwrap();
            while !*woken {
                woken = self.condvar.wait(woken).unwrap();
            }
            *woken = false;
        }
    }

    impl Wake for Sleeper {
        fn wake(self: Arc<Self>) {
            self.notify();
        }
    }
}
