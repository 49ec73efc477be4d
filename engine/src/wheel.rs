//! The timing wheel of one shard: when to look at which connection.
//!
//! Owned by one shard. One word for each connection, in a bucket; nothing per timer. An entry is a reminder,
//! not a promise: when it fires, a connection looks at its own deadlines and is armed again. Times are
//! measured from the shard's start. Knows no clock, and not what the reminders are for.

use std::time::Duration;

const BUCKETS: u64 = 1024;
const WORDS: usize = BUCKETS as usize / 64;
/// How late a reminder may be. With the number of buckets it gives the horizon, 25 s: later times are
/// reminded of at the horizon, and again.
pub(crate) const TICK: Duration = Duration::from_millis(25);

/// In place of a tick: not armed.
pub(crate) const NO_TICK: u64 = u64::MAX;

#[derive(Debug)]
pub(crate) struct Wheel<T> {
    buckets: Box<[Vec<T>]>,
    /// A bit for each bucket that is not empty, so that finding the next one takes a few words and not all buckets.
    occupied: [u64; WORDS],
    /// The first tick that has not been expired.
    next: u64,
    armed: usize,
}

impl<T> Wheel<T> {
    pub(crate) fn new() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| Vec::new()).collect(), occupied: [0; WORDS], next: 0, armed: 0 }
    }

    /// Arms `item` for `due` or up to a tick later. Returns the tick, which distinguishes this reminder from
    /// older ones.
    pub(crate) fn arm(&mut self, item: T, due: Duration) -> u64 {
        let tick = self.tick(due);
        let bucket = (tick % BUCKETS) as usize;
        self.buckets[bucket].push(item);
        self.occupied[bucket / 64] |= 1 << (bucket % 64);
        self.armed += 1;
        tick
    }

    /// Arms `item` for `due`, unless it is armed for an earlier tick; sets `timer_tick` to the earlier of the two.
    pub(crate) fn arm_earlier(&mut self, item: T, due: Duration, timer_tick: &mut u64) {
        if self.tick(due) < *timer_tick {
            *timer_tick = self.arm(item, due);
        }
    }

    pub(crate) fn tick(&self, due: Duration) -> u64 {
        tick_after(due).clamp(self.next, self.next + BUCKETS - 1)
    }

    /// Moves everything due by `now` to `due`, each with its tick.
    pub(crate) fn expire(&mut self, now: Duration, due: &mut Vec<(T, u64)>) {
        let last = (now.as_nanos() / TICK.as_nanos()) as u64;
        if self.armed == 0 {
            self.next = self.next.max(last + 1);
            return;
        }
        // A clock that jumps passes each bucket once.
        let end = last.saturating_add(1).min(self.next + BUCKETS);
        while let Some(tick) = self.first_occupied().filter(|tick| *tick < end) {
            let bucket = (tick % BUCKETS) as usize;
            self.armed -= self.buckets[bucket].len();
            due.extend(self.buckets[bucket].drain(..).map(|item| (item, tick)));
            self.occupied[bucket / 64] &= !(1 << (bucket % 64));
        }
        self.next = self.next.max(last + 1);
    }

    #[cfg(feature = "audit")]
    pub(crate) fn audit_len(&self) -> usize {
        self.armed
    }

    #[cfg(feature = "audit")]
    pub(crate) fn has(&self, item: T, tick: u64) -> bool
    where
        T: PartialEq,
    {
        tick >= self.next && self.buckets[(tick % BUCKETS) as usize].contains(&item)
    }

    /// When the next reminder is due.
    pub(crate) fn next(&self) -> Option<Duration> {
        let tick = self.first_occupied()?;
        Some(TICK.saturating_mul(u32::try_from(tick).unwrap_or(u32::MAX)))
    }

    /// The first tick whose bucket is not empty.
    fn first_occupied(&self) -> Option<u64> {
        let (first, start) = ((self.next % BUCKETS) as usize, self.next % 64);
        // Once around the ring, the first word twice: its low bits are the last ticks.
        (0..=WORDS).find_map(|word| {
            let mask = match word {
                0 => u64::MAX << start,
                WORDS => !(u64::MAX << start),
                _ => u64::MAX,
            };
            let bits = self.occupied[(first / 64 + word) % WORDS] & mask;
            let tick = self.next - start + word as u64 * 64 + u64::from(bits.trailing_zeros());
            (bits != 0).then_some(tick)
        })
    }
}

fn tick_after(due: Duration) -> u64 {
    u64::try_from(due.as_nanos().div_ceil(TICK.as_nanos())).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_reminder_fires_once_and_at_most_a_tick_late(
            arms in prop::collection::vec((0u64..20_000, 0u64..25_000), 1..100)
        ) {
            let mut wheel = Wheel::new();
            let (mut now, mut due) = (Duration::ZERO, Vec::new());
            let mut expected = std::collections::BTreeMap::new();
            for (number, (wait, ahead)) in arms.into_iter().enumerate() {
                let at = now + Duration::from_millis(ahead);
                let tick = wheel.arm(number, at);
                expected.insert(number, (at, tick));
                // Sleep as a shard does: until the next reminder, or until `wait` is over.
                let until = now + Duration::from_millis(wait);
                while let Some(next) = wheel.next().filter(|next| *next <= until) {
                    now = now.max(next);
                    wheel.expire(now, &mut due);
                    for (number, tick) in due.drain(..) {
                        let (at, timer_tick) = expected.remove(&number).expect("once");
                        prop_assert!(tick == timer_tick && now >= at && now <= at + TICK);
                    }
                }
                now = until;
                wheel.expire(now, &mut due);
                prop_assert!(due.is_empty());
            }
            prop_assert_eq!(expected.len(), wheel.armed);
        }
    }

    #[test]
    fn a_time_beyond_the_horizon_is_reminded_of_early() {
        let mut wheel = Wheel::new();
        wheel.arm('a', Duration::from_secs(3600));
        let next = wheel.next().expect("it is armed");
        assert!(next <= Duration::from_secs(26));
        let mut due = Vec::new();
        wheel.expire(Duration::from_secs(100_000), &mut due);
        assert_eq!(due.len(), 1);
    }
}
