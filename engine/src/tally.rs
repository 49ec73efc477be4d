//! The tally: the outcomes of the frames that were offered to a connection.
//!
//! One list of counters for connections, groups, namespaces and shards alike, and one list of the causes for
//! which frames are dropped. Each counter also has a shared form, which one thread writes and others read. The
//! counters add up: offered = written + dropped + discarded + pending. Does not know who counts, nor when.

use std::ops::{AddAssign, Index, IndexMut};
use std::sync::atomic::Ordering::Relaxed;

use crate::sync::plain::AtomicU64;

/// A counter that one thread writes and others read.
pub(crate) trait Counter: Copy {
    type Shared: Default + std::fmt::Debug;

    fn store(self, shared: &Self::Shared);

    fn load(shared: &Self::Shared) -> Self;
}

impl Counter for u64 {
    type Shared = AtomicU64;

    fn store(self, shared: &AtomicU64) {
        // Relaxed: each counter is independent; a reader wants recent values, not a snapshot.
        shared.store(self, Relaxed);
    }

    fn load(shared: &AtomicU64) -> Self {
        shared.load(Relaxed) // Relaxed: as above
    }
}

/// A set of counters with its sum and its shared form.
macro_rules! counters {
    (
        $(#[$about:meta])*
        pub struct $name:ident, shared as $shared:ident {
            $($(#[$doc:meta])* $counter:ident: $type:ty,)*
        }
    ) => {
        $(#[$about])*
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize))]
        #[non_exhaustive]
        pub struct $name { $($(#[$doc])* pub $counter: $type,)* }

        impl std::ops::AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                $(self.$counter += other.$counter;)*
            }
        }

        #[derive(Debug, Default)]
        pub(crate) struct $shared { $($counter: <$type as $crate::tally::Counter>::Shared,)* }

        impl $crate::tally::Counter for $name {
            type Shared = $shared;

            fn store(self, shared: &$shared) {
                $($crate::tally::Counter::store(self.$counter, &shared.$counter);)*
            }

            fn load(shared: &$shared) -> Self {
                Self { $($counter: $crate::tally::Counter::load(&shared.$counter),)* }
            }
        }
    };
}

pub(crate) use counters;

/// The causes for which frames are dropped, each with its counter.
macro_rules! drop_causes {
    ($($(#[$doc:meta])* $cause:ident: $counter:ident,)*) => {
        /// Why a frame was dropped for a connection that stays open.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
        #[non_exhaustive]
        pub enum DropCause { $($(#[$doc])* $cause,)* }

        counters! {
            /// Frames that were dropped, by cause.
            pub struct Drops, shared as SharedDrops { $($(#[$doc])* $counter: u64,)* }
        }

        impl Drops {
            /// Each cause and its number of dropped frames.
            pub fn by_cause(&self) -> impl Iterator<Item = (DropCause, u64)> + use<> {
                [$((DropCause::$cause, self.$counter),)*].into_iter()
            }
        }

        impl Index<DropCause> for Drops {
            type Output = u64;

            fn index(&self, cause: DropCause) -> &u64 {
                match cause { $(DropCause::$cause => &self.$counter,)* }
            }
        }

        impl IndexMut<DropCause> for Drops {
            fn index_mut(&mut self, cause: DropCause) -> &mut u64 {
                match cause { $(DropCause::$cause => &mut self.$counter,)* }
            }
        }

        impl Index<DropCause> for SharedDrops {
            type Output = AtomicU64;

            fn index(&self, cause: DropCause) -> &AtomicU64 {
                match cause { $(DropCause::$cause => &self.$counter,)* }
            }
        }
    };
}

drop_causes! {
    /// The frame waited for as long as its policy allows.
    Timeout: timeout,
    /// The policy lets no frame wait, or the limit on waiting frames was reached.
    Overflow: overflow,
}

impl Drops {
    /// The number of drops for any cause.
    pub fn total(&self) -> u64 {
        self.by_cause().map(|(_, frames)| frames).sum()
    }
}

counters! {
    /// Outcomes of the frames that were offered to a connection, or to several together.
    pub struct Tally, shared as SharedTally {
        /// Frames that addressed it.
        offered: u64,
        /// Frames passed to the kernel completely; on a [bridge](crate::Socket::bridge), passed on completely.
        written: u64,
        /// Frames dropped because the client was too slow.
        dropped: Drops,
        /// Frames that had not been written when the connection ended.
        discarded: u64,
        /// Messages passed to the handler.
        received: u64,
        /// Messages that had to wait because they exceeded a rate limit.
        rate_delayed: u64,
        /// Messages that were dropped, and not passed to the handler, because they exceeded a rate limit.
        rate_dropped: u64,
    }
}

impl Tally {
    /// Frames that wait in outboxes or are in a bridge now.
    pub fn pending(&self) -> u64 {
        // Counters that another thread writes may be read at slightly different times.
        self.offered.saturating_sub(self.written + self.dropped.total() + self.discarded)
    }
}

/// Adds to a sum that only one thread writes.
pub(crate) fn add<C: Counter + AddAssign>(shared: &C::Shared, more: C) {
    let mut sum = C::load(shared);
    sum += more;
    sum.store(shared);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_of_drops_has_its_own_counter_everywhere() {
        let causes: Vec<_> = Drops::default().by_cause().map(|(cause, _)| cause).collect();
        let shared = SharedTally::default();
        let mut tally = Tally { offered: 100, ..Tally::default() };
        for (number, cause) in causes.iter().enumerate() {
            tally.dropped[*cause] += number as u64 + 1;
        }
        add(&shared, tally);
        add(&shared, tally);
        let sum = Tally::load(&shared);
        for (number, cause) in causes.iter().enumerate() {
            assert_eq!(sum.dropped[*cause], 2 * (number as u64 + 1));
        }
        assert_eq!(sum.pending() + sum.dropped.total(), sum.offered);
    }
}
