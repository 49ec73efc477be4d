//! The signs of life of one connection: pings, pongs, round trips, silence.
//!
//! Pure: it is told what happened and when, and answers what to do. A ping carries a
//! nonce, and only the answer with that nonce counts. While a handler is busy nobody reads
//! answers; then anything that arrives after the ping is one. A full socket that drains
//! answers nothing, but prolongs the wait for the pong, which may be stuck behind it.
//! Does not know sockets or frames.

use std::collections::VecDeque;
use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

use crate::config::ConnectionConfig;

/// Times are measured from the shard's start, and kept in microseconds: there is one of these per connection.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    opened: u64,
    /// When the last frame arrived.
    heard: u64,
    /// When the last ping went out, and its nonce while it is unanswered.
    pinged: u64,
    nonce: Option<NonZeroU64>,
    /// The last sign of life that is not an answer.
    stirred: u64,
    rtt_last: Option<NonZeroU32>,
    rtt_average: Option<NonZeroU32>,
    /// Where a policy asks for their average; boxed, because most do not.
    samples: Option<Box<Samples>>,
}

/// The last round trips in microseconds, the oldest first.
#[derive(Debug)]
struct Samples(VecDeque<u32>);

/// Round-trip times of a connection, from pings to their pongs.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Rtt {
    /// The last one; none before the first pong.
    pub last: Option<Duration>,
    /// Their moving average: each new one counts an eighth.
    pub average: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beat {
    /// Nothing to do before then.
    Wait(Duration),
    /// Send a ping with this payload.
    Ping([u8; 8]),
    NoPong,
    Idle,
    TooOld,
}

impl Heartbeat {
    /// `stagger`, in [0, 1), spreads first pings over the interval: 0 is a whole interval from now.
    pub(crate) fn new(now: Duration, stagger: f32, config: &ConnectionConfig) -> Self {
        let lead = micros(config.heartbeat_interval.mul_f32(stagger));
        let now = micros(now);
        let pinged = now.wrapping_sub(lead); // may lie before the shard's start
        let (nonce, rtt_last, rtt_average) = (None, None, None);
        let samples =
            config.policy.rtt_samples().map(|count| Box::new(Samples(VecDeque::with_capacity(count))));
        Self { opened: now, heard: now, pinged, nonce, stirred: now, rtt_last, rtt_average, samples }
    }

    /// Something has arrived and was read.
    pub(crate) fn heard(&mut self, now: Duration) {
        self.heard = micros(now);
    }

    /// Something has arrived, but the handler is busy and nobody reads it: it may be the pong, and whoever sends is
    /// not dead. The ping counts as answered, though its round trip was not measured.
    pub(crate) fn heard_unread(&mut self, now: Duration) {
        self.heard = micros(now);
        self.nonce = None;
    }

    /// The peer's kernel is alive, whatever the peer is.
    pub(crate) fn stirred(&mut self, now: Duration) {
        self.stirred = micros(now);
    }

    pub(crate) fn pong(&mut self, now: Duration, payload: &[u8]) {
        if self.nonce.is_none_or(|nonce| nonce.get().to_be_bytes() != payload) {
            return;
        }
        self.nonce = None;
        let rtt = u32::try_from(micros(now).saturating_sub(self.pinged)).unwrap_or(u32::MAX);
        let average = self.rtt_average.map_or(rtt, |average| {
            let weighted = u64::from(average.get()) * 7 + u64::from(rtt);
            (weighted / 8) as u32 // an average of two u32
        });
        if let Some(Samples(samples)) = self.samples.as_deref_mut() {
            if samples.len() == samples.capacity() {
                samples.pop_front();
            }
            samples.push_back(rtt);
        }
        self.rtt_last = Some(NonZeroU32::new(rtt).unwrap_or(NonZeroU32::MIN));
        self.rtt_average = Some(NonZeroU32::new(average).unwrap_or(NonZeroU32::MIN));
    }

    /// Whether the average over the policy's window is above `max`; false before the first pong.
    pub(crate) fn is_rtt_above(&self, max: Duration) -> bool {
        match self.samples.as_deref() {
            Some(Samples(samples)) if !samples.is_empty() => {
                let sum: u64 = samples.iter().map(|sample| u64::from(*sample)).sum();
                Duration::from_micros(sum / samples.len() as u64) > max
            }
            _ => self.rtt().average.is_some_and(|average| average > max),
        }
    }

    pub(crate) fn rtt(&self) -> Rtt {
        let duration = |micros: NonZeroU32| Duration::from_micros(micros.get().into());
        Rtt { last: self.rtt_last.map(duration), average: self.rtt_average.map(duration) }
    }

    /// What is due now. `nonce` is called if a ping is.
    pub(crate) fn beat(
        &mut self,
        now: Duration,
        config: &ConnectionConfig,
        nonce: impl FnOnce() -> u64,
    ) -> Beat {
        let since = |start: u64, wait: Duration| Duration::from_micros(start) + wait;
        let mut next = Duration::MAX;
        if let Some(max) = config.max_connection_duration {
            let end = since(self.opened, max);
            if now >= end {
                return Beat::TooOld;
            }
            next = next.min(end);
        }
        if let Some(timeout) = config.idle_timeout {
            let end = since(self.heard, timeout);
            if now >= end {
                return Beat::Idle;
            }
            next = next.min(end);
        }
        if self.nonce.is_some() {
            let end = since(self.pinged.max(self.stirred), config.pong_timeout);
            if now >= end {
                return Beat::NoPong;
            }
            return Beat::Wait(next.min(end));
        }
        let due = Duration::from_micros(self.pinged.wrapping_add(micros(config.heartbeat_interval)));
        if now < due {
            return Beat::Wait(next.min(due));
        }
        let nonce = NonZeroU64::new(nonce()).unwrap_or(NonZeroU64::MIN);
        self.nonce = Some(nonce);
        self.pinged = micros(now);
        Beat::Ping(nonce.get().to_be_bytes())
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn config() -> ConnectionConfig {
        let (heartbeat_interval, pong_timeout) = (MS(1000), MS(300));
        ConnectionConfig { heartbeat_interval, pong_timeout, ..ConnectionConfig::default() }
    }

    #[test]
    fn only_the_answer_to_the_last_ping_counts() {
        let (config, mut beats) = (config(), Heartbeat::new(MS(5000), 0.5, &config()));
        assert_eq!(beats.beat(MS(5000), &config, || 7), Beat::Wait(MS(5500)));
        assert_eq!(beats.beat(MS(5500), &config, || 7), Beat::Ping(7u64.to_be_bytes()));
        beats.pong(MS(5510), b"");
        beats.pong(MS(5510), &8u64.to_be_bytes());
        assert_eq!(
            (beats.rtt(), beats.beat(MS(5799), &config, || 9)),
            (Rtt::default(), Beat::Wait(MS(5800)))
        );
        beats.pong(MS(5540), &7u64.to_be_bytes());
        assert_eq!(beats.rtt().last, Some(MS(40)));
        assert_eq!(beats.beat(MS(5800), &config, || 9), Beat::Wait(MS(6500)));
        beats.pong(MS(5850), &7u64.to_be_bytes());
        assert_eq!(beats.rtt().last, Some(MS(40)));
    }

    #[test]
    fn first_pings_are_spread_over_the_interval_from_the_first_moment_on() {
        let first = |stagger| match Heartbeat::new(MS(0), stagger, &config()).beat(MS(0), &config(), || 7) {
            Beat::Wait(due) => due,
            other => panic!("{other:?}"),
        };
        assert_eq!([0.0, 0.5, 0.75].map(first), [MS(1000), MS(500), MS(250)]);
    }

    #[test]
    fn silence_after_a_ping_means_dead_and_a_stir_prolongs_the_wait() {
        let (config, mut beats) = (config(), Heartbeat::new(MS(4000), 0.0, &config()));
        assert_eq!(beats.beat(MS(5000), &config, || 7), Beat::Ping(7u64.to_be_bytes()));
        beats.stirred(MS(5200));
        assert_eq!(beats.beat(MS(5300), &config, || 7), Beat::Wait(MS(5500)));
        assert_eq!(beats.beat(MS(5500), &config, || 7), Beat::NoPong);
    }

    #[test]
    fn a_peer_that_is_not_read_lives_as_long_as_it_answers() {
        let (config, mut beats) = (config(), Heartbeat::new(MS(4000), 0.0, &config()));
        for round in 0..10 {
            let at = 5000 + round * 1000;
            assert!(matches!(beats.beat(MS(at), &config, || 7), Beat::Ping(_)));
            beats.heard_unread(MS(at + 100));
            assert_eq!(beats.beat(MS(at + 300), &config, || 7), Beat::Wait(MS(at + 1000)));
        }
        assert!(matches!(beats.beat(MS(15_000), &config, || 7), Beat::Ping(_)));
        assert_eq!(beats.beat(MS(15_300), &config, || 7), Beat::NoPong);
    }

    #[test]
    fn a_silent_and_an_old_connection_end() {
        let config = ConnectionConfig {
            idle_timeout: Some(MS(400)),
            max_connection_duration: Some(MS(900)),
            ..config()
        };
        let mut beats = Heartbeat::new(MS(5000), 0.1, &config);
        assert_eq!(beats.beat(MS(5000), &config, || 7), Beat::Wait(MS(5400)));
        beats.heard(MS(5300));
        assert_eq!(beats.beat(MS(5400), &config, || 7), Beat::Wait(MS(5700)));
        assert_eq!(beats.beat(MS(5700), &config, || 7), Beat::Idle);
        beats.heard(MS(5899));
        assert_eq!(beats.beat(MS(5900), &config, || 7), Beat::TooOld);
    }
}
