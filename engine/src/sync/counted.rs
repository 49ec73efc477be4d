//! Atomics that can be counted: which cache lines a piece of work touches, and how.
//!
//! Only for the bench of what a publication costs (feature `audit`). A thread that [records](record) notes each of its
//! own operations; otherwise they are those of `std`. Not counted: fences, reference counts (`Arc`, `Bytes`), and what is
//! inside crossbeam's queues and papaya's map.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

/// Bytes of a cache line. Some processors fetch them in pairs.
const LINE_BYTES: usize = 64;

/// What a piece of work did to atomics of the engine.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct AtomicUse {
    /// Plain reads.
    pub loads: u64,
    /// Plain writes.
    pub stores: u64,
    /// Operations that read and write in one step: each owns its cache line exclusively, as a store does, and waits for it.
    pub updates: u64,
    /// The cache lines that were touched, and whether one was written.
    pub lines: BTreeMap<usize, bool>,
}

thread_local! {
    static RECORDED: RefCell<Option<AtomicUse>> = const { RefCell::new(None) };
}

/// Counts what `work` does on this thread.
pub fn record(work: impl FnOnce()) -> AtomicUse {
    RECORDED.set(Some(AtomicUse::default()));
    work();
    RECORDED.take().unwrap_or_default()
}

enum Operation {
    Load,
    Store,
    Update,
}

fn note<T>(atomic: &T, operation: Operation) {
    // A thread that ends has no record any more, but may still drop values.
    let _ = RECORDED.try_with(|recorded| {
        let mut recorded = recorded.borrow_mut();
        let Some(recorded) = &mut *recorded else { return };
        let writes = match operation {
            Operation::Load => {
                recorded.loads += 1;
                false
            }
            Operation::Store => {
                recorded.stores += 1;
                true
            }
            Operation::Update => {
                recorded.updates += 1;
                true
            }
        };
        *recorded.lines.entry(std::ptr::from_ref(atomic).addr() / LINE_BYTES).or_default() |= writes;
    });
}

macro_rules! counted {
    ($($name:ident: $value:ty { $($update:ident),* })*) => { $(
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub(crate) struct $name(std::sync::atomic::$name);

        #[allow(dead_code, reason = "each type has the same operations")]
        impl $name {
            pub(crate) const fn new(value: $value) -> Self {
                Self(std::sync::atomic::$name::new(value))
            }

            pub(crate) fn get_mut(&mut self) -> &mut $value {
                self.0.get_mut()
            }

            pub(crate) fn load(&self, ordering: Ordering) -> $value {
                note(self, Operation::Load);
                self.0.load(ordering)
            }

            pub(crate) fn store(&self, value: $value, ordering: Ordering) {
                note(self, Operation::Store);
                self.0.store(value, ordering);
            }

            pub(crate) fn fetch_update(
                &self,
                success: Ordering,
                failure: Ordering,
                change: impl FnMut($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                note(self, Operation::Update);
                self.0.fetch_update(success, failure, change)
            }

            $(pub(crate) fn $update(&self, value: $value, ordering: Ordering) -> $value {
                note(self, Operation::Update);
                self.0.$update(value, ordering)
            })*

            counted! { exchange compare_exchange $value }
            counted! { exchange compare_exchange_weak $value }
        }
    )* };
    (exchange $exchange:ident $value:ty) => {
        pub(crate) fn $exchange(
            &self,
            current: $value,
            new: $value,
            success: Ordering,
            failure: Ordering,
        ) -> Result<$value, $value> {
            note(self, Operation::Update);
            self.0.$exchange(current, new, success, failure)
        }
    };
}

counted! {
    AtomicBool: bool { swap, fetch_or, fetch_and }
    AtomicU8: u8 { swap, fetch_max }
    AtomicU32: u32 { swap, fetch_add, fetch_sub }
    AtomicU64: u64 { swap, fetch_add, fetch_sub, fetch_or, fetch_and, fetch_max, fetch_min }
    AtomicUsize: usize { swap, fetch_add, fetch_sub, fetch_max }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn a_record_has_what_its_thread_did_meanwhile() {
        let words = [const { AtomicU64::new(0) }; 16]; // two or three lines
        words[0].store(1, Relaxed);
        let seen = record(|| {
            words[0].load(Relaxed);
            words[15].fetch_add(1, Relaxed);
            words[15].load(Relaxed);
            std::thread::scope(|scope| drop(scope.spawn(|| words[8].store(1, Relaxed))));
        });
        assert_eq!((seen.loads, seen.stores, seen.updates), (2, 0, 1));
        assert_eq!(seen.lines.values().copied().collect::<Vec<_>>(), [false, true]);
    }
}
