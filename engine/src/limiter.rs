//! The rate limits of one connection: which of its messages pass, wait or are dropped.
//!
//! Owned by one connection, and exists only where a rate is limited: a word for each rate, and more once the client
//! has exceeded one. Pure: it is given lengths and `now`, and returns verdicts. Under `Delay` a message is counted
//! when it is the next one to be handled, in advance of its time, so several connections that share a limit are served
//! in order and none of them tries in vain. Otherwise it is counted when it arrives. Does not hold the messages
//! (`held.rs`), and does not know timers.

use std::time::Duration;

use crate::rate::{OverLimit, Rate, RateLimit, SharedRateLimit};

/// How late a delayed message may be woken for: a burst lasts at least as long, or waking late would lower the rate.
pub(crate) const SLACK: Duration = Duration::from_millis(25);
/// Time between two reports of dropped messages to a handler, so that a flood does not cost a call for each of them.
const NOTICE_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(crate) struct Limiter {
    messages: u64,
    bytes: u64,
    /// Limits that other connections count in, too, each with what must be added to our time to get its time.
    shared: Box<[(SharedRateLimit, i64)]>,
    /// None while the client has kept to its limits.
    excess: Option<Box<Excess>>,
}

/// The state of a connection whose client has exceeded a limit.
#[derive(Debug, Default)]
struct Excess {
    /// The next message, which is held, was counted, and may be handled from then on.
    until: Option<Duration>,
    /// After the end of input: when the held messages are dropped.
    give_up: Option<Duration>,
    /// A later tick of the connection's timer that is in the wheel, too.
    later_tick: Option<u64>,
    delayed: u64,
    dropped: u64,
    /// Dropped messages that the handler was not told of.
    untold: u64,
    /// When it was last told.
    told: Option<Duration>,
}

/// What happens to a message that has arrived.
#[must_use]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrived {
    /// It is within the rates, or it is counted when it is the next one.
    #[default]
    Passes,
    /// It must be held.
    Waits,
    IsDropped,
    EndsConnection,
}

/// What happens to the first held message.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    Now {
        /// It has waited for the rate.
        was_delayed: bool,
    },
    Later {
        due: Duration,
        /// It has only now turned out that it must wait.
        is_new: bool,
    },
    /// It and those after it have waited for too long after the end of input.
    Never,
}

impl Limiter {
    /// None if nothing is limited.
    pub(crate) fn new(limit: &RateLimit) -> Option<Box<Self>> {
        (limit.messages.is_some() || limit.bytes.is_some()).then(Box::default)
    }

    /// Counts in a limit that other connections share, too. `offset` is what must be added to our time to get its time.
    pub(crate) fn share(&mut self, limit: SharedRateLimit, offset: i64) {
        let before = std::mem::take(&mut self.shared);
        self.shared = before.into_iter().chain([(limit, offset)]).collect();
    }

    /// Whether a held message waits for the rate.
    #[inline]
    pub(crate) fn is_delayed(&self) -> bool {
        self.excess.as_ref().is_some_and(|excess| excess.until.is_some())
    }

    /// Whether a message waits, or the handler has not been told of dropped ones.
    pub(crate) fn is_exceeded(&self) -> bool {
        self.excess.as_ref().is_some_and(|excess| excess.until.is_some() || excess.untold > 0)
    }

    /// A message of `bytes` has arrived. `is_next`: no other message is handled before it, and the handler is idle.
    pub(crate) fn arrive(
        &mut self,
        bytes: usize,
        is_next: bool,
        now: Duration,
        limit: &RateLimit,
    ) -> Arrived {
        match limit.over_limit {
            OverLimit::Delay if !is_next => Arrived::Passes,
            OverLimit::Delay => match self.reserve(bytes, now, limit) {
                None => Arrived::Passes,
                Some(_) => {
                    self.excess.get_or_insert_default().delayed += 1;
                    Arrived::Waits
                }
            },
            over_limit => {
                if self.take(bytes, now, limit) {
                    return Arrived::Passes;
                }
                if over_limit == OverLimit::Close {
                    return Arrived::EndsConnection;
                }
                self.drop_messages(1);
                Arrived::IsDropped
            }
        }
    }

    /// The handler is idle, and the first held message has `bytes`. `grace`, once no more input follows: how long
    /// held messages may wait from now on.
    pub(crate) fn take_turn(
        &mut self,
        bytes: usize,
        grace: Option<Duration>,
        now: Duration,
        limit: &RateLimit,
    ) -> Turn {
        if limit.over_limit != OverLimit::Delay {
            return Turn::Now { was_delayed: false }; // counted when it arrived
        }
        let waiting = self.excess.as_ref().and_then(|excess| excess.until);
        let Some(until) = waiting.or_else(|| self.reserve(bytes, now, limit)) else {
            return Turn::Now { was_delayed: false };
        };
        let excess = self.excess.get_or_insert_default();
        if until <= now {
            excess.until = None;
            return Turn::Now { was_delayed: true };
        }
        let give_up = grace.map(|grace| *excess.give_up.get_or_insert(now + grace));
        match give_up {
            Some(give_up) if give_up <= now => Turn::Never,
            _ => {
                let is_new = waiting.is_none();
                excess.delayed += u64::from(is_new);
                Turn::Later { due: give_up.map_or(until, |give_up| give_up.min(until)), is_new }
            }
        }
    }

    /// Messages were dropped for the rate.
    pub(crate) fn drop_messages(&mut self, messages: u64) {
        let excess = self.excess.get_or_insert_default();
        excess.dropped += messages;
        excess.untold += messages;
    }

    /// No message is held any more.
    pub(crate) fn forget_held(&mut self) {
        if let Some(excess) = &mut self.excess {
            excess.until = None;
        }
    }

    /// The handler is not told of dropped messages any more.
    pub(crate) fn stop_notices(&mut self) {
        if let Some(excess) = &mut self.excess {
            excess.untold = 0;
        }
    }

    /// How many dropped messages the handler must be told of now; `is_last`: there will be no other time.
    pub(crate) fn take_notice(&mut self, now: Duration, is_last: bool) -> Option<u64> {
        self.notice_due().filter(|due| is_last || *due <= now)?;
        let excess = self.excess.as_mut()?;
        excess.told = Some(now);
        Some(std::mem::take(&mut excess.untold))
    }

    /// When the handler must be told of dropped messages.
    fn notice_due(&self) -> Option<Duration> {
        let excess = self.excess.as_ref().filter(|excess| excess.untold > 0)?;
        Some(excess.told.map_or(Duration::ZERO, |told| told + NOTICE_INTERVAL))
    }

    /// When something is due next: the message that waits, or a report to the handler that is not due yet.
    pub(crate) fn next_due(&self, now: Duration) -> Option<Duration> {
        let excess = self.excess.as_ref()?;
        let waits = excess.until.map(|until| excess.give_up.map_or(until, |give_up| give_up.min(until)));
        waits.into_iter().chain(self.notice_due().filter(|due| *due > now)).min()
    }

    /// Messages that had to wait, and messages that were dropped.
    pub(crate) fn counts(&self) -> (u64, u64) {
        self.excess.as_ref().map_or((0, 0), |excess| (excess.delayed, excess.dropped))
    }

    /// The timer was set to an earlier tick than `later`, which remains in the wheel.
    pub(crate) fn keep_tick(&mut self, later: u64) {
        self.excess.get_or_insert_default().later_tick.get_or_insert(later);
    }

    /// The timer has fired at `tick`: the later one that is still in the wheel.
    pub(crate) fn take_later_tick(&mut self, tick: u64) -> Option<u64> {
        self.excess.as_mut()?.later_tick.take().filter(|later| *later > tick)
    }

    /// Counts a message in advance; if it must wait, returns until when.
    fn reserve(&mut self, bytes: usize, now: Duration, limit: &RateLimit) -> Option<Duration> {
        let (bytes, nanos, slack) = (bytes as u64, as_nanos(now), as_nanos(SLACK));
        let mut ready = 0;
        for (rate, word, units) in self.words(bytes, limit) {
            let (next, from) = rate.count(*word, units, nanos, slack);
            *word = next;
            ready = ready.max(from);
        }
        for (shared, offset) in &self.shared {
            let from = shared.reserve(bytes, nanos.saturating_add_signed(*offset), slack);
            ready = ready.max(from.saturating_add_signed(-offset));
        }
        if ready <= nanos {
            return None;
        }
        let excess = self.excess.get_or_insert_default();
        excess.until = Some(Duration::from_nanos(ready));
        excess.until
    }

    /// Counts a message if it is within all rates.
    fn take(&mut self, bytes: usize, now: Duration, limit: &RateLimit) -> bool {
        let (bytes, nanos) = (bytes as u64, as_nanos(now));
        let is_within =
            self.words(bytes, limit).all(|(rate, word, units)| rate.count(*word, units, nanos, 0).1 <= nanos);
        if !is_within {
            return false;
        }
        let takes = |(shared, offset): &&(SharedRateLimit, i64)| {
            shared.take(bytes, nanos.saturating_add_signed(*offset))
        };
        let taken = self.shared.iter().take_while(takes).count();
        if taken < self.shared.len() {
            self.shared[..taken].iter().for_each(|(shared, _)| shared.give_back(bytes));
            return false;
        }
        for (rate, word, units) in self.words(bytes, limit) {
            (*word, _) = rate.count(*word, units, nanos, 0);
        }
        true
    }

    /// Each rate with its word, and how many units of it a message of this length is.
    fn words<'a>(
        &'a mut self,
        bytes: u64,
        limit: &'a RateLimit,
    ) -> impl Iterator<Item = (&'a Rate, &'a mut u64, u64)> {
        let messages = limit.messages.as_ref().map(|rate| (rate, &mut self.messages, 1));
        let bytes = limit.bytes.as_ref().map(|rate| (rate, &mut self.bytes, bytes));
        messages.into_iter().chain(bytes)
    }
}

fn as_nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn limit(messages: Rate, over_limit: OverLimit) -> RateLimit {
        RateLimit { messages: Some(messages), over_limit, ..RateLimit::default() }
    }

    fn limiter(limit: &RateLimit) -> Limiter {
        *Limiter::new(limit).expect("something is limited")
    }

    #[test]
    fn without_a_limit_there_is_no_limiter() {
        assert!(Limiter::new(&RateLimit::default()).is_none());
        assert!(Limiter::new(&RateLimit { over_limit: OverLimit::Drop, ..RateLimit::default() }).is_none());
    }

    #[test]
    fn a_client_that_keeps_to_its_limits_costs_one_small_allocation() {
        assert!(size_of::<Limiter>() <= 40, "{} bytes", size_of::<Limiter>());
        let limit = limit(Rate::per_second(10), OverLimit::Delay);
        let mut limiter = limiter(&limit);
        for time in 0..100 {
            assert_eq!(limiter.arrive(10, true, MS(100 * time), &limit), Arrived::Passes);
        }
        assert!(limiter.excess.is_none());
    }

    #[test]
    fn a_message_is_counted_once_however_often_its_turn_is_asked_for() {
        let limit = limit(Rate::per_second(10).with_burst(1), OverLimit::Delay);
        let mut limiter = limiter(&limit);
        assert_eq!(limiter.arrive(1, true, MS(0), &limit), Arrived::Passes);
        assert_eq!(limiter.arrive(1, true, MS(0), &limit), Arrived::Waits);
        for _ in 0..3 {
            let turn = limiter.take_turn(1, None, MS(10), &limit);
            assert_eq!(turn, Turn::Later { due: MS(100), is_new: false });
        }
        assert_eq!(limiter.take_turn(1, None, MS(110), &limit), Turn::Now { was_delayed: true });
        let turn = limiter.take_turn(1, None, MS(110), &limit);
        assert_eq!(turn, Turn::Later { due: MS(200), is_new: true }, "waking late does not lower the rate");
        assert_eq!(limiter.counts(), (2, 0));
    }

    #[test]
    fn a_handler_is_told_of_dropped_messages_at_once_and_then_once_a_second() {
        let limit = limit(Rate::per_second(1), OverLimit::Drop);
        let mut limiter = limiter(&limit);
        assert_eq!(limiter.arrive(1, true, MS(0), &limit), Arrived::Passes);
        let (mut told, mut dropped) = (Vec::new(), 0);
        for time in 1..=2500 {
            dropped += u64::from(limiter.arrive(1, true, MS(time), &limit) == Arrived::IsDropped);
            told.extend(limiter.take_notice(MS(time), false).map(|count| (time, count)));
        }
        // One passes in each second.
        assert_eq!((told, dropped), (vec![(1, 1), (1001, 999), (2001, 999)], 2498));
        assert_eq!(limiter.next_due(MS(2500)), Some(MS(3001)));
        assert_eq!(limiter.take_notice(MS(2500), true), Some(499));
        assert_eq!((limiter.take_notice(MS(9999), true), limiter.counts()), (None, (0, 2498)));
    }
}
