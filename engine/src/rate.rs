//! Rates: how many messages and bytes may arrive in a time, and the arithmetic that holds them to it.
//!
//! GCRA, the generic cell rate algorithm: the state of one limit is one word, the *theoretical arrival time* (the time
//! at which everything that was counted so far has arrived at exactly the rate). It equals a token bucket that is
//! refilled continuously. Pure and without a clock: callers pass `now`. Settings are plain data; their ranges are in
//! `config.rs`. A limit that several connections share keeps its words in atomics. Does not know messages,
//! connections, or what happens above the limit (`limiter.rs`).

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// A rate: `count` in each `period` on average, and `burst` at once.
///
/// It is a token bucket that holds `burst` and is refilled evenly: with 10 a second, one every 100 ms. What was not
/// used is saved up to `burst`. In any time `t`, at most `burst + t × count / period` pass.
///
/// ```
/// # use shardcast_engine::Rate;
/// # use std::time::Duration;
/// let rate = Rate::per_second(10).with_burst(30); // 30 at once, 10 a second after that
/// let slow = Rate::new(1, Duration::from_secs(60)); // one a minute, and no two at once
/// assert_eq!((rate.count, rate.burst, slow.burst), (10, 30, 1));
/// ```
///
/// With the feature `serde` it is read from a map. `period` is `"1s"` and `burst` equals `count` where they are
/// missing: `{"count": 10}`, `{"count": 1, "period": "1m", "burst": 5}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(from = "WrittenRate", deny_unknown_fields)
)]
#[non_exhaustive]
pub struct Rate {
    /// How many in each period: 1 to 1,073,741,824, and at most one a nanosecond.
    pub count: u32,
    /// The period: 1 ms to 1 day.
    #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::period"))]
    pub period: Duration,
    /// How many at once after a time without any: 1 to 1,073,741,824.
    pub burst: u32,
}

impl Rate {
    /// `count` a second, and as many at once.
    #[must_use]
    pub const fn per_second(count: u32) -> Self {
        Self::new(count, Duration::from_secs(1))
    }

    /// `count` in each `period`, and as many at once.
    #[must_use]
    pub const fn new(count: u32, period: Duration) -> Self {
        Self { count, period, burst: count }
    }

    /// The same rate with another burst.
    #[must_use]
    pub const fn with_burst(self, burst: u32) -> Self {
        Self { burst, ..self }
    }

    /// How many nanoseconds of the rate `units` take, at most 146 years, so that some of them can be added.
    fn cost(&self, units: u64) -> u64 {
        let (period, count) = (self.period.as_nanos(), u64::from(self.count).max(1));
        let cost = match u64::try_from(period).ok().and_then(|period| period.checked_mul(units)) {
            Some(product) => product / count,
            None => u64::try_from(period * u128::from(units) / u128::from(count)).unwrap_or(u64::MAX),
        };
        cost.min(u64::MAX / 4)
    }

    /// Counts `units` at `now` in a limit's `word`: its next value, and the time from which on they are within the
    /// rate. A burst lasts for at least `slack`. Units that are more than a burst are within the rate when nothing
    /// before them is left to wait for, and what follows waits for all of them.
    pub(crate) fn count(&self, word: u64, units: u64, now: u64, slack: u64) -> (u64, u64) {
        let cost = self.cost(units);
        let burst = self.cost(self.burst.into()).max(slack);
        let next = word.max(now).saturating_add(cost);
        (next, next.saturating_sub(burst.max(cost)))
    }
}

/// A [`Rate`] as it is written in a file.
#[cfg(feature = "serde")]
#[derive(serde::Deserialize)]
#[serde(rename = "Rate", deny_unknown_fields)]
struct WrittenRate {
    count: u32,
    #[serde(default = "second", with = "crate::duration_text::period")]
    period: Duration,
    burst: Option<u32>,
}

#[cfg(feature = "serde")]
fn second() -> Duration {
    Duration::from_secs(1)
}

#[cfg(feature = "serde")]
impl From<WrittenRate> for Rate {
    fn from(written: WrittenRate) -> Self {
        let rate = Self::new(written.count, written.period);
        rate.with_burst(written.burst.unwrap_or(rate.burst))
    }
}

/// How much a client may send, and what happens to what it sends above that. By default nothing is limited.
///
/// Whole messages are counted, before the application sees anything of them: each as one message and as the bytes of
/// its payload. Both rates must be kept. A message that is longer than the burst of `bytes` is within the rate if no
/// earlier message is still being paid for; the next one waits for all of it. Pings, pongs and Close frames are not
/// counted; they have a limit of their own
/// ([`control_frames_per_second`](crate::ConnectionConfig::control_frames_per_second)). Nor is a first message that
/// opens its connection ([`FirstMessage`](crate::FirstMessage)).
///
/// ```
/// # use shardcast_engine::{ConnectionConfig, OverLimit, Rate, RateLimit};
/// let rate_limit = RateLimit {
///     messages: Some(Rate::per_second(10).with_burst(30)),
///     bytes: Some(Rate::per_second(64 << 10)),
///     over_limit: OverLimit::Drop,
///     ..RateLimit::default()
/// };
/// let config = ConnectionConfig { rate_limit, ..ConnectionConfig::default() };
/// assert!(config.validate().is_ok());
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct RateLimit {
    /// Messages of one connection. Default: none, which means no limit.
    pub messages: Option<Rate>,
    /// Bytes of payload of one connection's messages. Default: none, which means no limit.
    pub bytes: Option<Rate>,
    /// Messages of all connections of one user together, in one namespace. Default: none, which means no limit. A
    /// connection without a user is not counted. The rates of a user are those of the first connection that it opens,
    /// and what was counted is kept when it reconnects.
    pub user_messages: Option<Rate>,
    /// Bytes of payload of the messages of all connections of one user together, as
    /// [`user_messages`](Self::user_messages). Default: none, which means no limit.
    pub user_bytes: Option<Rate>,
    /// What happens above a limit: the connection's own, its user's or a [shared](SharedRateLimit) one. Default:
    /// [`OverLimit::Delay`].
    pub over_limit: OverLimit,
    #[doc(hidden)]
    #[cfg_attr(feature = "serde", serde(skip))]
    pub __non_exhaustive: (),
}

/// What happens to a message that exceeds a [`RateLimit`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum OverLimit {
    /// The message waits until it is within the rate, and those after it wait behind it, in order. Up to 16 KiB of
    /// them are read ahead, so that pings are answered and a Close frame is seen; after that the connection is not
    /// read, and TCP makes the client wait. Nothing is lost. The times are kept in steps of 25 ms, so a burst of less
    /// than the rate allows in 25 ms counts as that much.
    ///
    /// What still waits when the client closes or ends its stream is handled at the same rate, for at most
    /// [`close_timeout`](crate::ConnectionConfig::close_timeout); the rest is dropped as under
    /// [`Drop`](Self::Drop).
    #[default]
    Delay,
    /// The message is dropped and counted ([`Tally::rate_dropped`](crate::Tally::rate_dropped)), and the handler is
    /// told how many were ([`Handler::on_rate_limited`](crate::Handler::on_rate_limited)).
    Drop,
    /// The connection ends with [`CloseReason::RateLimited`](crate::CloseReason::RateLimited) (1008), after the
    /// messages before were handled.
    Close,
}

/// A limit that several connections share, whichever shards they are on: for instance, all connections that use one API
/// key. For the connections of one user, use [`RateLimit::user_messages`].
///
/// The application keeps one limit per API key, and gives a clone of it to each connection that the limit covers
/// ([`NewConnection::rate_limit`](crate::NewConnection::rate_limit)). It is counted in addition to the
/// connection's own [`RateLimit`], whose `over_limit` says what happens to a message that exceeds either. Under
/// [`OverLimit::Delay`] the connections take turns in the order in which their messages arrive.
///
/// Two words that all clones share, without a lock. Connections on different shards are counted by their shards' own
/// clocks, which differ by less than a turn of a shard.
#[derive(Debug, Clone)]
pub struct SharedRateLimit(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    messages: Option<(Rate, AtomicU64)>,
    bytes: Option<(Rate, AtomicU64)>,
    /// From when the words' times are measured: the start of the first shard that has used it.
    epoch: OnceLock<Instant>,
}

impl SharedRateLimit {
    /// The caller has checked the rates.
    pub(crate) fn of(messages: Option<Rate>, bytes: Option<Rate>) -> Self {
        let with_word = |rate: Option<Rate>| rate.map(|rate| (rate, AtomicU64::new(0)));
        let (messages, bytes) = (with_word(messages), with_word(bytes));
        Self(Arc::new(Shared { messages, bytes, epoch: OnceLock::new() }))
    }

    /// How many nanoseconds must be added to the time since `started` to get the time of the words.
    pub(crate) fn offset(&self, started: Instant) -> i64 {
        let epoch = *self.0.epoch.get_or_init(|| started);
        let nanos = |time: Duration| i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
        match started.checked_duration_since(epoch) {
            Some(later) => nanos(later),
            None => -nanos(epoch - started),
        }
    }

    /// Counts a message in any case; returns the time from which on it is within the rates.
    pub(crate) fn reserve(&self, bytes: u64, now: u64, slack: u64) -> u64 {
        self.words(bytes)
            .map(|(rate, word, units)| {
                let mut ready = 0;
                // Relaxed: a word of its own; no other data depends on it.
                let _ = word.fetch_update(Relaxed, Relaxed, |word| {
                    let (next, from) = rate.count(word, units, now, slack);
                    ready = from;
                    Some(next)
                });
                ready
            })
            .fold(0, u64::max)
    }

    /// Counts a message if it is within the rates; false if it is not.
    pub(crate) fn take(&self, bytes: u64, now: u64) -> bool {
        let take = |(rate, word, units): (&Rate, &AtomicU64, u64)| {
            let counted = |word| {
                let (next, ready) = rate.count(word, units, now, 0);
                (ready <= now).then_some(next)
            };
            word.fetch_update(Relaxed, Relaxed, counted).is_ok() // Relaxed: as above
        };
        let taken = self.words(bytes).take_while(|word| take(*word)).count();
        if taken == self.words(bytes).count() {
            return true;
        }
        self.give_back_words(bytes, taken);
        false
    }

    /// Takes back what [`take`](Self::take) has counted.
    pub(crate) fn give_back(&self, bytes: u64) {
        self.give_back_words(bytes, usize::MAX);
    }

    fn give_back_words(&self, bytes: u64, words: usize) {
        for (rate, word, units) in self.words(bytes).take(words) {
            let cost = rate.cost(units);
            let _ = word.fetch_update(Relaxed, Relaxed, |word| Some(word.saturating_sub(cost)));
        }
    }

    /// Whether somebody else has it, too.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Whether everything that was counted has arrived at the rate: it is as good as a new one.
    pub(crate) fn is_paid(&self, now: Instant) -> bool {
        let Some(epoch) = self.0.epoch.get() else { return true };
        let now = u64::try_from(now.saturating_duration_since(*epoch).as_nanos()).unwrap_or(u64::MAX);
        self.words(0).all(|(_, word, _)| word.load(Relaxed) <= now) // Relaxed: as above
    }

    /// Each rate with its word, and how many units of it a message of this length is.
    fn words(&self, bytes: u64) -> impl Iterator<Item = (&Rate, &AtomicU64, u64)> {
        let messages = self.0.messages.as_ref().map(|(rate, word)| (rate, word, 1));
        let bytes = self.0.bytes.as_ref().map(|(rate, word)| (rate, word, bytes));
        messages.into_iter().chain(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A token bucket as a textbook has it: tokens that are refilled and taken. A token is counted in the nanoseconds
    /// that it takes to be refilled.
    struct TokenBucket {
        nanos_per_token: u64,
        burst: u64,
        /// Below zero after units that were more than a burst.
        filled: i128,
        at: u64,
    }

    impl TokenBucket {
        fn refill(&mut self, now: u64) {
            let full = i128::from(self.burst * self.nanos_per_token);
            self.filled = (self.filled + i128::from(now - self.at)).min(full);
            self.at = now;
        }

        fn take(&mut self, units: u64, now: u64) -> bool {
            self.refill(now);
            let needed = i128::from(units.min(self.burst) * self.nanos_per_token);
            let has_enough = self.filled >= needed;
            if has_enough {
                self.filled -= i128::from(units * self.nanos_per_token);
            }
            has_enough
        }
    }

    proptest! {
        #[test]
        fn the_word_admits_exactly_what_a_token_bucket_admits(
            (nanos_per_token, count, burst) in (1_u64..5_000_000, 1_u32..1000, 1_u32..100),
            arrivals in prop::collection::vec((0_u64..20_000_000, 0_u64..200), 1..200),
        ) {
            let rate = Rate::new(count, Duration::from_nanos(nanos_per_token * u64::from(count))).with_burst(burst);
            let burst = u64::from(burst);
            let filled = i128::from(burst * nanos_per_token);
            let mut bucket = TokenBucket { nanos_per_token, burst, filled, at: 0 };
            let (mut word, mut now) = (0, 0);
            for (wait, units) in arrivals {
                now += wait;
                let (next, ready) = rate.count(word, units, now, 0);
                prop_assert_eq!(ready <= now, bucket.take(units, now));
                if ready <= now {
                    word = next;
                } else {
                    // It is admitted at the time that was told, and not a nanosecond earlier.
                    prop_assert!(rate.count(word, units, ready - 1, 0).1 > ready - 1);
                    prop_assert!(rate.count(word, units, ready, 0).1 <= ready);
                }
            }
        }

        #[test]
        fn a_shared_limit_counts_all_of_a_message_or_nothing(
            arrivals in prop::collection::vec((0_u64..60, 0_u64..60), 1..100)
        ) {
            let messages = Rate::per_second(20).with_burst(3);
            let bytes = Rate::per_second(500).with_burst(100);
            let shared = SharedRateLimit::of(Some(messages), Some(bytes));
            let (mut message_word, mut byte_word, mut now) = (0, 0, 0);
            for (wait, length) in arrivals {
                now += wait * 1_000_000;
                let (next_message, message_ready) = messages.count(message_word, 1, now, 0);
                let (next_byte, byte_ready) = bytes.count(byte_word, length, now, 0);
                let is_within = message_ready <= now && byte_ready <= now;
                if is_within {
                    (message_word, byte_word) = (next_message, next_byte);
                }
                prop_assert_eq!(shared.take(length, now), is_within);
            }
        }
    }

    #[test]
    fn units_that_are_reserved_wait_for_each_other() {
        let shared = SharedRateLimit::of(Some(Rate::per_second(10).with_burst(2)), None);
        let ready: Vec<u64> = (0..5).map(|_| shared.reserve(1, 0, 0) / 1_000_000).collect();
        assert_eq!(ready, [0, 0, 100, 200, 300]);
    }

    #[test]
    fn what_is_more_than_a_burst_passes_alone_and_is_paid_for_afterwards() {
        let rate = Rate::per_second(1000).with_burst(100);
        let second = 1_000_000_000;
        let (word, ready) = rate.count(0, 5000, second, 0);
        assert_eq!(ready, second, "nothing before it is left to wait for");
        let (_, ready) = rate.count(word, 100, second, 0);
        assert_eq!(ready, 6 * second, "the next one waits for all of it");
        let (_, ready) = rate.count(word, 5000, second, 0);
        assert_eq!(ready, 6 * second);
    }

    #[test]
    fn extreme_settings_do_not_overflow() {
        let day = Duration::from_secs(24 * 60 * 60);
        let (word, ready) = Rate::new(1, day).count(0, 1 << 30, 7, 0);
        assert_eq!(ready, 7);
        assert_eq!(Rate::new(1, day).count(word, 1 << 30, 7, 0).1, word);
    }

    #[test]
    fn shards_that_began_at_different_times_share_one_clock() {
        let shared = SharedRateLimit::of(None, None);
        let first = Instant::now();
        let second = first + Duration::from_secs(3);
        assert_eq!((shared.offset(second), shared.offset(first)), (0, -3_000_000_000));
        assert_eq!(shared.offset(second + Duration::from_nanos(5)), 5);
    }
}
