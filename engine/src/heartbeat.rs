//! Liveness of one connection: pings, answers, round trips, silence.
//!
//! Pure: it is given events with their times, and returns what must be done. A client is judged by what it
//! does, never by what this side does. The time for an answer runs from the moment at which the ping was
//! written, and is judged by when input had arrived, not by when it was read. Every whole message, every ping
//! and the ping's pong is an answer, since a client that sends is alive; only the pong gives a round trip.
//! The connection knows whether the wait may be extended, because an answer may be in flight; how often is
//! bounded here. Does not know sockets or frames.

use std::collections::VecDeque;
use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

use crate::config::ConnectionConfig;
use crate::wheel::TICK;

/// How often in a row the wait for an answer is extended at most: with the default timeout, for some 40 minutes.
const EXTENSIONS_MAX: u8 = 250;
/// Bytes of an unfinished message that extend the wait by a timeout. Fewer do not, or a client that sends a
/// byte now and then would keep its connection for days.
const EXTENSION_BYTES: u32 = 256;
/// The part of `max_connection_duration` over which connections of the same age are ended.
const DURATION_JITTER: f32 = 0.1;
/// Pings are delayed by at most this part of the interval and by at most `GRAIN_MAX`, to share wakes. A longer time
/// would make rounds of pings on a shard with 100,000 connections so long that messages wait for them.
const GRAINS_MIN: u32 = 64;
const GRAIN_MAX: Duration = Duration::from_millis(100);

/// Times are measured from the shard's start, and kept in microseconds: there is one of these per connection.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    /// When input last arrived.
    heard: u64,
    /// When the last ping was due, and once it is written, when it was written.
    pinged: u64,
    /// The start of the wait for the answer: the writing of the ping, or the last extension.
    waits_from: u64,
    /// The last ping's number, until its pong arrives.
    nonce: Option<NonZeroU64>,
    rtt_last: Option<NonZeroU32>,
    rtt_average: Option<NonZeroU32>,
    /// Boxed, because most connections need none of it.
    special: Option<Box<Special>>,
    /// Bytes that arrived since the last whole message, control frame or extension.
    bytes: u32,
    extensions: u8,
    ping: Ping,
    reading: Reading,
    /// The client has taken something since our ping was written, or since the wait for its answer was last extended.
    pub(crate) has_moved: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ping {
    Answered,
    /// Due, but not passed to the kernel yet.
    Queued,
    Sent,
    /// The client sends no more, so it is not pinged.
    Over,
}

/// Whether this side has read without a pause since the last ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    Steady,
    /// Nothing has been read since it paused.
    Paused,
    /// Until the next ping the time of a pong says nothing about the network.
    Resumed,
}

#[derive(Debug, Default)]
struct Special {
    /// When the connection opened, minus its jitter.
    opened: u64,
    /// When the last message arrived.
    message: u64,
    /// When the connection expires.
    expires: Option<u64>,
    /// It has expired, and its handler was not asked yet.
    has_expired: bool,
    /// The last round trips in microseconds, the oldest first.
    samples: VecDeque<u32>,
    samples_max: usize,
}

/// Round-trip times of a connection, from pings to their pongs. They include the network and the client, but
/// not the time for which this side was busy: a pong that was read late counts from the earliest time at
/// which it may have arrived.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Rtt {
    /// The last one; none before the first pong.
    pub last: Option<Duration>,
    /// The moving average; each new round trip has a weight of one eighth.
    pub average: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beat {
    /// Nothing to do before then.
    Wait(Duration),
    /// Send a ping with this payload.
    Ping([u8; 8]),
    /// The ping's time is over.
    Unanswered,
    Idle,
    TooOld,
    /// It has expired, and its handler decides whether it ends.
    Expired,
    /// The handler could not be asked in time.
    ExpiredUnasked,
}

impl Heartbeat {
    /// `stagger`, in [0, 1), spreads first pings over the interval (0 is a whole interval from now), and the
    /// ends of connections that reach their maximum duration.
    pub(crate) fn new(now: Duration, stagger: f32, config: &ConnectionConfig) -> Self {
        let lead = micros(config.heartbeat_interval.unwrap_or_default().mul_f32(stagger));
        let now = micros(now);
        let pinged = now.wrapping_sub(lead); // may be before the shard's start
        let (samples_max, duration) = (config.policy.rtt_samples(), config.max_connection_duration);
        let is_special = samples_max.is_some() || duration.is_some() || config.message_timeout.is_some();
        let jitter = duration.map_or(0, |max| micros(max.mul_f32(stagger * DURATION_JITTER)));
        let special = || {
            let (opened, samples_max) = (now.wrapping_sub(jitter), samples_max.unwrap_or(0));
            Box::new(Special { opened, message: now, samples_max, ..Special::default() })
        };
        Self {
            heard: now,
            pinged,
            waits_from: now,
            nonce: None,
            rtt_last: None,
            rtt_average: None,
            special: is_special.then(special),
            bytes: 0,
            extensions: 0,
            ping: Ping::Answered,
            reading: Reading::Steady,
            has_moved: false,
        }
    }

    /// Bytes have arrived.
    #[inline]
    pub(crate) fn heard(&mut self, now: Duration, bytes: usize) {
        self.heard = micros(now);
        if self.reading == Reading::Paused && bytes > 0 {
            self.resumed(now);
        }
        self.bytes = self.bytes.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// A whole message, a ping or the ping's pong has arrived: the client is alive.
    #[inline]
    pub(crate) fn answered(&mut self) {
        if self.ping == Ping::Sent {
            self.ping = Ping::Answered;
        }
        (self.bytes, self.extensions) = (0, 0);
    }

    /// An unsolicited pong has arrived. It is neither an answer nor part of an unfinished message.
    pub(crate) fn ignored(&mut self) {
        self.bytes = 0;
    }

    /// A whole message has arrived.
    #[inline]
    pub(crate) fn heard_message(&mut self, now: Duration) {
        if let Some(special) = &mut self.special {
            special.message = micros(now);
        }
    }

    /// Reading has paused, so input may be read later than it arrives.
    pub(crate) fn paused(&mut self) {
        self.reading = Reading::Paused;
    }

    /// Input is read again.
    fn resumed(&mut self, now: Duration) {
        self.reading = Reading::Resumed;
        self.restart_silence(now);
    }

    /// Input from the client was left unread: the time in which it must send something starts again.
    pub(crate) fn restart_silence(&mut self, now: Duration) {
        self.heard = micros(now);
        self.heard_message(now);
    }

    /// The client has ended its side of the stream.
    pub(crate) fn input_is_over(&mut self) {
        self.ping = Ping::Over;
    }

    pub(crate) fn has_queued_ping(&self) -> bool {
        self.ping == Ping::Queued
    }

    pub(crate) fn awaits_answer(&self) -> bool {
        self.ping == Ping::Sent
    }

    /// Since when the ping waits to be written.
    pub(crate) fn queued_since(&self) -> Duration {
        Duration::from_micros(self.pinged)
    }

    /// The queued ping was passed to the kernel.
    pub(crate) fn sent(&mut self, now: Duration) {
        self.ping = Ping::Sent;
        self.pinged = micros(now);
        self.waits_from = self.pinged;
        self.reading = Reading::Steady;
        (self.bytes, self.extensions) = (0, 0);
    }

    /// Whether enough of an unfinished message has arrived since the last call to extend the wait.
    pub(crate) fn takes_input(&mut self) -> bool {
        let is_enough = self.bytes >= EXTENSION_BYTES;
        self.bytes = 0;
        is_enough
    }

    /// The client has received the ping only now.
    pub(crate) fn restart(&mut self, now: Duration) {
        self.waits_from = micros(now);
    }

    /// Waits another timeout for the answer; false if that has been done too often.
    pub(crate) fn prolong(&mut self, now: Duration) -> bool {
        self.waits_from = micros(now);
        self.extensions = self.extensions.saturating_add(1);
        self.extensions <= EXTENSIONS_MAX
    }

    /// A pong that arrived at `arrived`. Returns whether it answers our ping.
    pub(crate) fn pong(&mut self, arrived: Duration, payload: &[u8]) -> bool {
        if self.nonce.is_none_or(|nonce| nonce.get().to_be_bytes() != payload) {
            return false;
        }
        self.nonce = None;
        if self.ping == Ping::Queued {
            // It was written, but something after it was not, so the time of writing is not known.
            self.ping = Ping::Answered;
            return true;
        }
        if std::mem::replace(&mut self.reading, Reading::Steady) != Reading::Steady {
            return true;
        }
        let rtt = u32::try_from(micros(arrived).saturating_sub(self.pinged)).unwrap_or(u32::MAX);
        let average = self.rtt_average.map_or(rtt, |average| {
            let weighted = u64::from(average.get()) * 7 + u64::from(rtt);
            (weighted / 8) as u32 // an average of two u32
        });
        self.rtt_last = Some(NonZeroU32::new(rtt).unwrap_or(NonZeroU32::MIN));
        self.rtt_average = Some(NonZeroU32::new(average).unwrap_or(NonZeroU32::MIN));
        if let Some(special) = self.special.as_deref_mut().filter(|special| special.samples_max > 0) {
            if special.samples.len() >= special.samples_max {
                special.samples.pop_front();
            }
            special.samples.push_back(rtt);
        }
        true
    }

    /// Whether the average of the last `samples` round trips is above `max`; false before the first pong.
    /// This number of round trips is kept from now on; at the first call there is only the last one.
    pub(crate) fn is_rtt_above(&mut self, max: Duration, samples: usize) -> bool {
        let Some(last) = self.rtt_last else { return false };
        let special = self.special.get_or_insert_default();
        special.samples_max = special.samples_max.max(samples);
        if special.samples.is_empty() {
            special.samples.push_back(last.get());
        }
        let count = special.samples.len().min(samples).max(1);
        let sum: u64 = special.samples.iter().rev().take(count).map(|sample| u64::from(*sample)).sum();
        Duration::from_micros(sum / count as u64) > max
    }

    pub(crate) fn rtt(&self) -> Rtt {
        let duration = |micros: NonZeroU32| Duration::from_micros(micros.get().into());
        Rtt { last: self.rtt_last.map(duration), average: self.rtt_average.map(duration) }
    }

    /// Sets when the connection expires.
    pub(crate) fn expire_at(&mut self, at: Option<Duration>) {
        if at.is_some() || self.special.is_some() {
            let special = self.special.get_or_insert_default();
            (special.expires, special.has_expired) = (at.map(micros), false);
        }
    }

    /// Whether the connection has expired since the last call.
    pub(crate) fn take_expired(&mut self) -> bool {
        self.special.as_mut().is_some_and(|special| {
            if special.has_expired {
                special.expires = None;
            }
            std::mem::take(&mut special.has_expired)
        })
    }

    /// What is due at `now`, when everything that had arrived by `listened` has been read. Calls `nonce` if a
    /// ping is due.
    pub(crate) fn beat(
        &mut self,
        now: Duration,
        listened: Duration,
        config: &ConnectionConfig,
        nonce: impl FnOnce() -> u64,
    ) -> Beat {
        let since = |start: u64, wait: Duration| Duration::from_micros(start) + wait;
        let mut next = Duration::MAX;
        if let Some(special) = &mut self.special {
            match special.expires {
                Some(expires) if micros(now) >= expires => {
                    // The second time nobody is asked.
                    special.expires = Some(micros(now + config.close_timeout));
                    let was_expired = std::mem::replace(&mut special.has_expired, true);
                    return if was_expired { Beat::ExpiredUnasked } else { Beat::Expired };
                }
                Some(expires) => next = next.min(Duration::from_micros(expires)),
                None => {}
            }
            if let Some(max) = config.max_connection_duration {
                // Wrapping: the jitter may reach back before the shard's start.
                let age = micros(now).wrapping_sub(special.opened);
                let left = micros(max).saturating_sub(age);
                if left == 0 {
                    return Beat::TooOld;
                }
                next = next.min(now + Duration::from_micros(left));
            }
            if let Some(timeout) = config.message_timeout.filter(|_| self.ping != Ping::Over) {
                let end = since(special.message, timeout);
                if listened >= end {
                    return Beat::Idle;
                }
                next = next.min(end);
            }
        }
        if let Some(timeout) = config.idle_timeout.filter(|_| self.ping != Ping::Over) {
            let end = since(self.heard, timeout);
            if listened >= end {
                return Beat::Idle;
            }
            next = next.min(end);
        }
        let due = config.heartbeat_interval.map_or(Duration::MAX, |interval| {
            let due = self.pinged.wrapping_add(micros(interval));
            Duration::from_micros(due.checked_next_multiple_of(grain(interval)).unwrap_or(due))
        });
        match self.ping {
            Ping::Over => Beat::Wait(next),
            Ping::Answered if now < due => Beat::Wait(next.min(due)),
            Ping::Answered => {
                let nonce = NonZeroU64::new(nonce()).unwrap_or(NonZeroU64::MIN);
                self.nonce = Some(nonce);
                self.pinged = micros(now);
                self.ping = Ping::Queued;
                Beat::Ping(nonce.get().to_be_bytes())
            }
            Ping::Queued => {
                let next = next.min(now + config.pong_timeout);
                Beat::Wait(if now < due { next.min(due) } else { next })
            }
            Ping::Sent => {
                let end = since(self.waits_from, config.pong_timeout);
                if listened >= end {
                    return Beat::Unanswered;
                }
                // Not later than the next ping is due: this one may be answered by then.
                Beat::Wait(if now < due { next.min(end).min(due) } else { next.min(end) })
            }
        }
    }
}

/// Pings are due at multiples of this time, in microseconds, so that those of many connections share a wake of their
/// shard and a round of writes. A multiple of the wheel's tick, or one where the wheel rounds more than this.
fn grain(interval: Duration) -> u64 {
    let ticks = (interval / GRAINS_MIN).min(GRAIN_MAX).as_nanos() / TICK.as_nanos();
    (micros(TICK) * ticks as u64).max(1) // at most `GRAIN_MAX`
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Policy;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn config() -> ConnectionConfig {
        let (heartbeat_interval, pong_timeout) = (Some(MS(1000)), MS(300));
        ConnectionConfig { heartbeat_interval, pong_timeout, ..ConnectionConfig::default() }
    }

    fn beat(beats: &mut Heartbeat, now: u64) -> Beat {
        beats.beat(MS(now), MS(now), &config(), || 7)
    }

    /// A heartbeat whose first ping was written at `now`.
    fn pinged(now: u64) -> Heartbeat {
        let mut beats = Heartbeat::new(MS(now - 1000), 0.0, &config());
        assert_eq!(beat(&mut beats, now), Beat::Ping(7u64.to_be_bytes()));
        beats.sent(MS(now));
        beats
    }

    #[test]
    fn pings_of_connections_that_opened_apart_are_due_together_and_never_early() {
        let config = ConnectionConfig { heartbeat_interval: Some(MS(15_000)), ..config() };
        let mut dues = std::collections::BTreeSet::new();
        for opened in 0..1000 {
            let mut beats = Heartbeat::new(MS(opened), 0.0, &config);
            let Beat::Wait(due) = beats.beat(MS(opened), MS(opened), &config, || 7) else {
                panic!("no ping is due when a connection opens");
            };
            let late = due.checked_sub(MS(opened + 15_000)).expect("never before the interval is over");
            assert!(late < GRAIN_MAX, "{late:?} late");
            assert!(matches!(beats.beat(due, due, &config, || 7), Beat::Ping(_)));
            dues.insert(due);
        }
        assert_eq!(dues.len(), 11, "a second of connections at a hundred milliseconds each: {dues:?}");
        assert_eq!(grain(MS(1000)), 1, "short intervals are as exact as the wheel");
    }

    #[test]
    fn only_the_pong_of_the_last_ping_is_a_round_trip() {
        let mut beats = pinged(5500);
        assert!(!beats.pong(MS(5510), b"") && !beats.pong(MS(5510), &8u64.to_be_bytes()));
        assert_eq!((beats.rtt(), beat(&mut beats, 5799)), (Rtt::default(), Beat::Wait(MS(5800))));
        assert!(beats.pong(MS(5540), &7u64.to_be_bytes()));
        beats.answered();
        assert_eq!(beats.rtt().last, Some(MS(40)));
        assert_eq!(beat(&mut beats, 5800), Beat::Wait(MS(6500)));
        assert!(!beats.pong(MS(5850), &7u64.to_be_bytes()));
        assert_eq!(beats.rtt().last, Some(MS(40)));
    }

    #[test]
    fn first_pings_are_spread_over_the_interval_from_the_first_moment_on() {
        let first = |stagger| match beat(&mut Heartbeat::new(MS(0), stagger, &config()), 0) {
            Beat::Wait(due) => due,
            other => panic!("{other:?}"),
        };
        assert_eq!([0.0, 0.5, 0.75].map(first), [MS(1000), MS(500), MS(250)]);
    }

    #[test]
    fn the_time_for_an_answer_runs_from_the_writing_of_the_ping() {
        let mut beats = Heartbeat::new(MS(4000), 0.0, &config());
        assert!(matches!(beat(&mut beats, 5000), Beat::Ping(_)));
        assert!(matches!(beat(&mut beats, 5400), Beat::Wait(_)), "it is queued still");
        beats.sent(MS(5400));
        assert_eq!(beat(&mut beats, 5699), Beat::Wait(MS(5700)));
        assert_eq!(beat(&mut beats, 5700), Beat::Unanswered);
    }

    #[test]
    fn a_client_whose_input_was_not_read_is_not_silent() {
        let mut beats = pinged(5000);
        assert_eq!(beats.beat(MS(9000), MS(5299), &config(), || 7), Beat::Wait(MS(5300)));
        assert_eq!(beats.beat(MS(9000), MS(5300), &config(), || 7), Beat::Unanswered);
        let config = ConnectionConfig { idle_timeout: Some(MS(500)), ..config() };
        beats.heard(MS(8000), 1);
        assert_eq!(beats.beat(MS(9000), MS(5299), &config, || 7), Beat::Wait(MS(5300)));
        beats.answered();
        assert_eq!(beats.beat(MS(9000), MS(8500), &config, || 7), Beat::Idle);
    }

    #[test]
    fn any_message_is_an_answer_and_a_late_pong_is_still_a_round_trip() {
        let mut beats = pinged(5000);
        beats.heard(MS(5200), 6);
        beats.answered();
        assert_eq!(beat(&mut beats, 5300), Beat::Wait(MS(6000)));
        assert!(beats.pong(MS(5900), &7u64.to_be_bytes()));
        assert_eq!(beats.rtt().last, Some(MS(900)));
    }

    #[test]
    fn a_wait_is_extended_a_bounded_number_of_times_and_by_enough_bytes_only() {
        let mut beats = pinged(5000);
        for round in 1..=u64::from(EXTENSIONS_MAX) {
            assert_eq!(beat(&mut beats, 5000 + 300 * round), Beat::Unanswered);
            beats.heard(MS(5000), EXTENSION_BYTES as usize);
            assert!(beats.takes_input() && beats.prolong(MS(5000 + 300 * round)));
        }
        beats.heard(MS(5000), EXTENSION_BYTES as usize - 1);
        assert!(!beats.takes_input() && !beats.prolong(MS(90_000)));
        beats.answered();
        assert!(beats.prolong(MS(90_000)), "an answer begins anew");
    }

    #[test]
    fn a_pong_that_was_read_late_is_no_round_trip() {
        let mut beats = pinged(5000);
        beats.paused();
        assert!(beats.pong(MS(5900), &7u64.to_be_bytes()));
        assert_eq!(beats.rtt(), Rtt::default());
    }

    #[test]
    fn a_window_of_round_trips_is_kept_from_the_first_query_on() {
        let mut beats = pinged(5000);
        assert!(!beats.is_rtt_above(MS(1), 2), "none before the first pong");
        for (at, rtt) in [(5000, 10), (6000, 100), (7000, 200)] {
            if at > 5000 {
                assert!(matches!(beat(&mut beats, at), Beat::Ping(_)));
                beats.sent(MS(at));
            }
            beats.pong(MS(at + rtt), &7u64.to_be_bytes());
            beats.answered();
            beats.is_rtt_above(MS(1), 2);
        }
        assert!(beats.is_rtt_above(MS(149), 2) && !beats.is_rtt_above(MS(150), 2), "(100 + 200) / 2");
        assert!(beats.is_rtt_above(MS(199), 1) && !beats.is_rtt_above(MS(200), 1));
    }

    #[test]
    fn a_silent_and_an_old_connection_end() {
        let config = ConnectionConfig {
            idle_timeout: Some(MS(400)),
            max_connection_duration: Some(MS(900)),
            ..config()
        };
        let mut beats = Heartbeat::new(MS(5000), 0.0, &config);
        let beat = |beats: &mut Heartbeat, now| beats.beat(MS(now), MS(now), &config, || 7);
        assert_eq!(beat(&mut beats, 5000), Beat::Wait(MS(5400)));
        beats.heard(MS(5300), 1);
        assert_eq!(beat(&mut beats, 5400), Beat::Wait(MS(5700)));
        assert_eq!(beat(&mut beats, 5700), Beat::Idle);
        beats.heard(MS(5899), 1);
        assert_eq!(beat(&mut beats, 5900), Beat::TooOld);
    }

    #[test]
    fn connections_of_one_age_reach_their_end_over_a_tenth_of_it() {
        let config = ConnectionConfig { max_connection_duration: Some(MS(1000)), ..config() };
        let end = |stagger| {
            let mut beats = Heartbeat::new(MS(50), stagger, &config);
            let is_over = |now: &u64| beats.beat(MS(*now), MS(*now), &config, || 7) == Beat::TooOld;
            (50..2000).find(is_over).expect("it ends")
        };
        assert_eq!([0.0, 0.5].map(end), [1050, 1000]);
        assert!((951..960).contains(&end(0.98)));
    }

    #[test]
    fn a_client_that_only_answers_pings_is_ended_by_a_message_timeout() {
        let config = ConnectionConfig { message_timeout: Some(MS(1500)), ..config() };
        let mut beats = Heartbeat::new(MS(0), 0.0, &config);
        beats.heard(MS(1400), 6);
        beats.answered();
        assert_eq!(beats.beat(MS(1499), MS(1499), &config, || 7), Beat::Ping(7u64.to_be_bytes()));
        assert_eq!(beats.beat(MS(1500), MS(1500), &config, || 7), Beat::Idle);
        beats.heard_message(MS(1500));
        assert_eq!(beats.beat(MS(1500), MS(1500), &config, || 7), Beat::Wait(MS(1800)));
    }

    #[test]
    fn a_pong_is_an_answer_even_if_bytes_after_its_ping_are_still_queued() {
        let mut beats = Heartbeat::new(MS(0), 0.0, &config());
        assert_eq!(beat(&mut beats, 1000), Beat::Ping(7u64.to_be_bytes()));
        assert!(beats.pong(MS(1200), &7u64.to_be_bytes()));
        assert_eq!(beats.rtt().last, None, "when the ping was written is not known");
        assert!(!beats.has_queued_ping(), "it need not be answered again");
        assert_eq!(beat(&mut beats, 1200), Beat::Wait(MS(2000)));
    }

    #[test]
    fn the_window_of_a_policy_covers_its_samples() {
        let policy = Policy::DropOnHighRtt { max_rtt: MS(50), rtt_samples: 3 };
        let config = ConnectionConfig { policy, ..config() };
        let mut beats = Heartbeat::new(MS(0), 0.0, &config);
        for (round, rtt) in [30, 30, 30, 120, 120].into_iter().enumerate() {
            let at = 1000 * (round as u64 + 1);
            assert!(matches!(beats.beat(MS(at), MS(at), &config, || 7), Beat::Ping(_)));
            beats.sent(MS(at));
            beats.pong(MS(at + rtt), &7u64.to_be_bytes());
            beats.answered();
            // 30, 30, 30; then (30 + 30 + 120) / 3 = 60
            assert_eq!(beats.is_rtt_above(MS(50), 3), round >= 3);
        }
    }
}
