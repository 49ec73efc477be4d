//! What is due: pings, silence, closing handshakes, frames that have waited long enough.
//!
//! The wheel and the deadlines only remind; what is to be done, each connection's own times
//! say. Does not know why a connection ends beyond the reason it is given.

use crate::close_reason::CloseReason;
use crate::frame::ControlFrame;
use crate::heartbeat::Beat;

use super::Shard;

impl Shard {
    /// Drops frames that have waited as long as they may.
    pub(super) fn drop_late(&mut self) {
        let mut late = std::mem::take(&mut self.scratch.late);
        self.crowd.deadlines.expire(self.crowd.now, &mut late);
        for id in late.drain(..) {
            self.crowd.drop_late(id);
        }
        self.scratch.late = late;
        self.carry_out_ends();
    }

    pub(super) fn remind(&mut self) {
        let mut due = std::mem::take(&mut self.scratch.due);
        self.wheel.expire(self.crowd.now, &mut due);
        for (id, tick) in due.drain(..) {
            if self.find(id).is_some_and(|connection| connection.armed == tick) {
                self.beat(id.slot() as u32);
            }
        }
        self.scratch.due = due;
    }

    /// Does what is due for a connection and arms its next reminder.
    pub(super) fn beat(&mut self, slot: u32) {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        let id = connection.id;
        if let Some(by) = connection.ending.as_ref().map(|ending| ending.by) {
            if connection.socket.is_none() {
                return; // only the handler is left, and it has the time it needs
            }
            if self.crowd.now >= by {
                self.drop_socket(slot);
            } else {
                connection.armed = self.wheel.arm(id, by);
            }
            return;
        }
        let config = connection.config.clone();
        let nonces = &mut self.nonces;
        loop {
            let end = match connection.heartbeat.beat(self.crowd.now, &config, || next_nonce(nonces)) {
                Beat::Wait(due) => {
                    connection.armed = self.wheel.arm(id, due);
                    return;
                }
                Beat::Ping(payload) => {
                    connection.outbox.push_control(ControlFrame::ping(&payload).as_bytes());
                    if connection.is_writable && !std::mem::replace(&mut connection.is_dirty, true) {
                        self.crowd.dirty.push_back(slot);
                    }
                    continue;
                }
                Beat::NoPong if connection.may_be_stuck() => {
                    connection.heartbeat.stirred(self.crowd.now);
                    continue;
                }
                Beat::NoPong => CloseReason::PongTimeout,
                Beat::Idle => CloseReason::IdleTimeout,
                Beat::TooOld => CloseReason::MaxDuration,
            };
            return self.end(slot, end);
        }
    }
}

/// SplitMix64: unpredictable enough that a peer cannot answer a ping that it has not seen.
fn next_nonce(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}
