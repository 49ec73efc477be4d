//! Changes of what is counted in a namespace and of users' metadata, for an application that tells other processes.
//!
//! A bounded queue of what may have changed, made when an application asks for it. It holds names and no numbers: what
//! holds now is looked up when the changes are taken, so that many changes of one group cost one look. Beyond the bound
//! it only says that there were more. Does not know groups.

use std::sync::Arc;
use std::sync::atomic::Ordering::AcqRel;

use crate::sync::ArrayQueue;
use crate::sync::plain::AtomicBool;

/// Changes that wait until they are taken, for each namespace.
const CHANGES_MAX: usize = 16_384;

/// What has changed in a namespace: see [`Namespace::take_changes`](crate::Namespace::take_changes). The values are those
/// at the time of that call.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NamespaceChange {
    /// The number of a group's members; 0 for a group that has none any more.
    Members {
        /// The group's name.
        group: Arc<str>,
        /// Its members.
        connections: usize,
    },
    /// The number of a user's connections; 0 for a user who has none any more.
    Connections {
        /// The user's name.
        user: Arc<str>,
        /// The user's connections.
        connections: usize,
    },
    /// The metadata of a user who is present in a group was set.
    Metadata {
        /// The group; none for everyone.
        group: Option<Arc<str>>,
        /// The user's name.
        user: Arc<str>,
        /// The metadata.
        metadata: Arc<[u8]>,
    },
}

/// What may have changed since it was taken last.
#[derive(Debug)]
pub(crate) struct Changes<T> {
    waiting: ArrayQueue<T>,
    has_overflowed: AtomicBool,
}

impl<T> Changes<T> {
    pub(crate) fn new() -> Self {
        Self { waiting: ArrayQueue::new(CHANGES_MAX), has_overflowed: AtomicBool::new(false) }
    }

    /// Adds a change; false if too many wait, which `take_all` will tell.
    pub(crate) fn add(&self, change: T) -> bool {
        let has_room = self.waiting.push(change).is_ok();
        if !has_room {
            self.has_overflowed.swap(true, AcqRel); // pairs with `take_all`
        }
        has_room
    }

    /// Calls `each` for the changes that wait; false if there were more of them.
    pub(crate) fn take_all(&self, mut each: impl FnMut(T)) -> bool {
        // Before looking at anything: what overflows from now on is told the next time. Pairs with `add`.
        let is_complete = !self.has_overflowed.swap(false, AcqRel);
        // Bounded, although others go on adding.
        for change in std::iter::from_fn(|| self.waiting.pop()).take(CHANGES_MAX) {
            each(change);
        }
        is_complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_beyond_the_bound_are_told_of_once() {
        let changes = Changes::new();
        for number in 0..CHANGES_MAX {
            assert!(changes.add(number));
        }
        let mut taken = Vec::new();
        assert!(changes.take_all(|number| taken.push(number)));
        assert!(taken.into_iter().eq(0..CHANGES_MAX));
        for number in 0..=CHANGES_MAX {
            assert_eq!(changes.add(number), number < CHANGES_MAX);
        }
        let mut count = 0;
        assert!(!changes.take_all(|_| count += 1), "there were more");
        assert_eq!(count, CHANGES_MAX);
        assert!(changes.take_all(|_| panic!("all were taken")));
    }
}
