//! What a rate limit means for a connection: which messages are held, and when it is reminded of them.
//!
//! The limiter decides; here its verdicts meet the held messages, the heartbeat and the timer. A connection without
//! limits has no limiter, and pays one comparison for each message. Does not know when it is this connection's turn.

use std::time::{Duration, Instant};

use crate::held::Held;
use crate::id::Slot;
use crate::limiter::{Arrived, SLACK, Turn};
use crate::rate::SharedRateLimit;
use crate::wheel::{NO_TICK, TICK, Wheel};

use super::Connection;

const _: () = assert!(TICK.as_nanos() <= SLACK.as_nanos(), "a reminder is at most a tick late");

/// What may be done with the held messages.
#[derive(Debug)]
pub(crate) enum NextHeld {
    /// Nothing, or there are none.
    None,
    /// The first one may be passed to the handler. They must be given back.
    Messages(Box<Held>),
    /// The first one exceeds the rate until `due`. `is_new`: that was not known before.
    Later { due: Duration, is_new: bool },
    /// So many were dropped: they had waited for too long after the end of input.
    Dropped(u64),
}

impl Connection {
    /// Counts this connection's messages in a limit that it shares. `started` is when the shard's time began.
    pub(crate) fn share_rate_limit(&mut self, limit: SharedRateLimit, started: Instant) {
        let offset = limit.offset(started);
        self.limiter.get_or_insert_default().share(limit, offset);
    }

    /// Whether a held message waits for its rate.
    pub(crate) fn is_delayed(&self) -> bool {
        self.limiter.as_ref().is_some_and(|limiter| limiter.is_delayed())
    }

    /// Whether a message waits for its rate, or the handler was not told of dropped ones.
    pub(crate) fn exceeds_rate(&self) -> bool {
        self.limiter.as_ref().is_some_and(|limiter| limiter.is_exceeded())
    }

    /// Counts a message that has arrived. `is_next`: the handler can be called with it.
    #[inline]
    pub(super) fn limit_rate(&mut self, bytes: usize, is_next: bool, now: Duration) -> Arrived {
        match &mut self.limiter {
            None => Arrived::Passes,
            Some(limiter) => limiter.arrive(bytes, is_next, now, &self.config.rate_limit),
        }
    }

    /// The held messages, if the handler may be called with the first one.
    pub(crate) fn take_held(&mut self, now: Duration) -> NextHeld {
        if !self.takes_held() {
            return NextHeld::None;
        }
        let Some(mut held) = self.held.take() else { return NextHeld::None };
        let is_input_over = self.is_input_over || !self.is_receiving();
        let grace = is_input_over.then_some(self.config.close_timeout);
        let (Some(limiter), Some(bytes)) = (&mut self.limiter, held.next_message_bytes()) else {
            return NextHeld::Messages(held);
        };
        match limiter.take_turn(bytes, grace, now, &self.config.rate_limit) {
            Turn::Now { was_delayed } => {
                if was_delayed {
                    self.heartbeat.restart_silence(now); // it waited for us
                }
                NextHeld::Messages(held)
            }
            Turn::Later { due, is_new } => {
                self.held = Some(held);
                NextHeld::Later { due, is_new }
            }
            Turn::Never => {
                let messages = std::iter::from_fn(|| held.pop().map(|input| input.is_message()));
                let dropped = messages.filter(|is_message| *is_message).count() as u64;
                limiter.drop_messages(dropped);
                limiter.forget_held();
                NextHeld::Dropped(dropped)
            }
        }
    }

    /// How many messages were dropped that the handler must be told of now; `is_last`: it will not be told later.
    pub(crate) fn take_rate_notice(&mut self, now: Duration, is_last: bool) -> Option<u64> {
        if !is_last && !self.is_listening() {
            return None;
        }
        self.limiter.as_mut()?.take_notice(now, is_last)
    }

    /// When something is due for its rate limit.
    pub(crate) fn rate_due(&self, now: Duration) -> Option<Duration> {
        self.limiter.as_ref()?.next_due(now)
    }

    /// Sets its timer to `due` for its rate limit, unless it fires earlier already. The reminder that this precedes
    /// remains in the wheel and is used again: a client that is delayed all the time would otherwise leave one behind
    /// each time.
    pub(crate) fn remind_of_rate(&mut self, due: Duration, wheel: &mut Wheel<Slot>) {
        let before = self.timer_tick;
        wheel.arm_earlier(self.slot(), due, &mut self.timer_tick);
        if let Some(limiter) = &mut self.limiter
            && before != NO_TICK
            && before != self.timer_tick
        {
            limiter.keep_tick(before);
        }
    }
}
