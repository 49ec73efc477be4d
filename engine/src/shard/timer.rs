//! Timers: pings, silence, closing handshakes, frames that have waited for too long.
//!
//! The wheel and the deadlines only remind; each connection's own deadlines decide what must be done. Does
//! not know why a connection ends beyond the reason that it is given.

use std::hash::{BuildHasher as _, RandomState};
use std::time::Duration;

use crate::close_reason::CloseReason;
use crate::heartbeat::Beat;
use crate::id::Slot;

use super::{RateTold, Shard, Untold};

impl Shard {
    /// Drops frames that have waited for as long as they may.
    pub(super) fn expire_waiting(&mut self) {
        let mut late = std::mem::take(&mut self.scratch.late);
        self.fanout.deadlines.expire(self.fanout.now, &mut late);
        for id in late.drain(..) {
            self.fanout.expire_frames_of(id);
        }
        self.scratch.late = late;
        self.apply_verdicts();
    }

    pub(super) fn fire_timers(&mut self) {
        let mut due = std::mem::take(&mut self.scratch.due);
        self.wheel.expire(self.fanout.now, &mut due);
        for (slot, tick) in due.drain(..) {
            // An entry of the slot's former connection has another tick, or the same tick as one of this connection.
            if let Some(connection) = self.fanout.connections.get_mut(slot)
                && connection.is_reminded(tick)
            {
                self.beat(slot);
            }
        }
        self.scratch.due = due;
        self.tell_operator();
    }

    /// Does what is due for a connection and arms its next timer.
    pub(super) fn beat(&mut self, slot: Slot) {
        let (now, listened) = (self.fanout.now, self.fanout.listened);
        self.fanout.settle(slot);
        let Some(connection) = self.fanout.connections.get(slot) else { return };
        if connection.exceeds_rate() && connection.is_idle() && connection.opening().is_none() {
            self.go_on(slot);
        }
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        if connection.ending().is_some() {
            return self.beat_ending(slot);
        }
        if connection.is_over() {
            // Its end is decided and in the list, after what was sent before.
            let due = now + connection.config().close_timeout;
            return connection.remind_at(due, &mut self.wheel);
        }
        let nonces = &mut self.nonces;
        loop {
            if let Some(reason) = connection.judge_stall(now, listened) {
                return self.end(slot, reason);
            }
            if connection.awaits().is_some_and(|awaited| listened >= awaited.by) && !connection.is_ready() {
                return self.end(slot, CloseReason::NoFirstMessage);
            }
            let end = match connection.beat(now, listened, || nonces.next()) {
                Beat::Wait(due) => {
                    let due = connection.look_at_stall(now).map_or(due, |look| look.min(due));
                    let due = connection.awaits().map_or(due, |awaited| awaited.by.min(due));
                    connection.remind_at(due, &mut self.wheel);
                    return;
                }
                Beat::Ping(payload) => {
                    connection.push_ping(&payload);
                    if connection.mark_dirty() {
                        self.fanout.flushes.mark(slot);
                    }
                    continue;
                }
                // Input has arrived that has not been read.
                Beat::Unanswered | Beat::Idle if connection.is_ready() => {
                    connection.remind_at(now, &mut self.wheel);
                    return;
                }
                Beat::Unanswered if connection.prolongs_wait(now) => continue,
                // A client whose messages wait for us is not idle.
                Beat::Idle if connection.has_unread() || connection.is_delayed() => {
                    connection.restart_silence(now);
                    continue;
                }
                Beat::Unanswered => CloseReason::PongTimeout,
                Beat::Idle => CloseReason::IdleTimeout,
                Beat::TooOld => CloseReason::MaxDuration,
                Beat::Expired => {
                    if connection.is_idle() && connection.opening().is_none() {
                        self.go_on(slot);
                    }
                    return self.beat(slot);
                }
                Beat::ExpiredUnasked => CloseReason::Expired,
            };
            return self.end(slot, end);
        }
    }

    /// Does what is due in a closing handshake: discards what delays the Close frame, or drops the socket.
    fn beat_ending(&mut self, slot: Slot) {
        let now = self.fanout.now;
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        let has_socket = connection.has_socket();
        let Some(ending) = connection.ending().filter(|_| has_socket) else {
            return; // only the handler is left, and its time is not limited
        };
        if now >= ending.by {
            return self.drop_socket(slot);
        }
        self.drop_socket_if_over(slot);
        let Some(connection) = self.fanout.connections.get_mut(slot).filter(|found| found.has_socket())
        else {
            return;
        };
        let Some(ending) = connection.ending_mut() else { return };
        if ending.flush_by.take_if(|by| now >= *by).is_some() && self.discard(slot) > 0 {
            if let Some(ending) = self.fanout.connections[slot].ending_mut() {
                ending.is_cut = true;
            }
            self.fanout.mark_dirty(slot);
        }
        self.arm_ending(slot);
    }

    /// Arms the timer for what is due next in a closing handshake.
    pub(super) fn arm_ending(&mut self, slot: Slot) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        let Some(ending) = connection.ending() else { return };
        let mut due = ending.flush_by.map_or(ending.by, |flush_by| flush_by.min(ending.by));
        if connection.awaits_acknowledgement() && !connection.is_bridged() {
            due = due.min(self.fanout.now + LOOK_INTERVAL); // no event announces that it has taken everything
        }
        connection.remind_at(due, &mut self.wheel);
    }

    /// Logs at intervals how many connections were ended because of their clients. Single ones are logged at `debug`.
    fn tell_operator(&mut self) {
        let Untold { since, slow, flooding, over_rate, undecodable } = self.untold;
        let is_due = since.is_zero() || self.fanout.now >= since + TELL_INTERVAL;
        if slow + flooding + undecodable > 0 && is_due {
            tracing::info!(
                shard = self.index,
                slow,
                flooding,
                over_rate,
                undecodable,
                "clients were ended as slow or misbehaving; `debug` logs each"
            );
            self.untold = Untold { since: self.fanout.now, ..Untold::default() };
        }
        self.tell_of_dropped();
    }

    /// The same for messages that were dropped because they exceeded a rate limit.
    fn tell_of_dropped(&mut self) {
        let (now, tally) = (self.fanout.now, &self.fanout.metrics.tally);
        let (delayed, dropped) = (tally.rate_delayed, tally.rate_dropped);
        let RateTold { at, delayed: told_delayed, dropped: told_dropped } = self.rate_told;
        if dropped > told_dropped && (at.is_zero() || now >= at + TELL_INTERVAL) {
            tracing::info!(
                shard = self.index,
                dropped = dropped - told_dropped,
                delayed = delayed - told_delayed,
                "messages were dropped because their clients exceeded a rate limit"
            );
            self.rate_told = RateTold { at: now, delayed, dropped };
        }
    }
}

/// Interval of the looks at a client that has ended its side, until it has taken what is left.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Time between two such log lines, at least.
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// The numbers in a shard's pings, which a client must not be able to guess: one that answered pings before
/// they arrived would count as alive and fast although it reads nothing, and it knows all numbers that were
/// sent to it. So each is a keyed hash (SipHash) of a counter, with a key that only this shard has.
#[derive(Default)]
pub(super) struct Nonces {
    key: RandomState,
    count: u64,
}

impl Nonces {
    fn next(&mut self) -> u64 {
        self.count += 1;
        self.key.hash_one(self.count)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::{BuildHasherDefault, DefaultHasher};

    use super::*;

    #[test]
    fn the_next_ping_cannot_be_guessed_from_those_before_or_on_another_shard() {
        let known = BuildHasherDefault::<DefaultHasher>::default();
        let mut seen = HashSet::new();
        for mut nonces in [Nonces::default(), Nonces::default()] {
            for count in 1..=1000_u64 {
                let nonce = nonces.next();
                assert!(seen.insert(nonce), "the number was used before, by this shard or by the other");
                assert_ne!(nonce, known.hash_one(count), "the hash has a publicly known key");
            }
        }
    }
}
