//! What goes out: from the outboxes to the sockets, and how much may stay behind.
//!
//! One write for each connection with something queued, a bounded number of connections a
//! turn. Does not know where frames come from.

use std::sync::atomic::Ordering::Relaxed;

use crate::close_reason::CloseReason;
use crate::connection::{Flushed, Phase};

use super::Shard;

/// Connections flushed in one turn (some 4 µs each).
const FLUSHES_PER_TURN: usize = 512;

impl Shard {
    /// How many of the `dirty` first may be flushed: with `coalesce`, none before its time is over, then all that
    /// were there by then.
    fn ripe(&mut self, dirty: usize) -> usize {
        let coalesce = self.shared.config.coalesce;
        if coalesce.is_zero() || self.stop.is_some() {
            (self.flush_due, self.flush_ripe) = (None, dirty);
        } else if dirty > 0 && self.flush_ripe == 0 {
            let due = *self.flush_due.get_or_insert(self.crowd.now + coalesce);
            if self.crowd.now >= due || self.burst >= self.burst_max {
                (self.flush_due, self.flush_ripe) = (None, dirty);
            }
        }
        self.flush_ripe
    }

    /// One write for each connection with something queued; some are left for the next turn if there are many.
    pub(super) fn flush_dirty(&mut self) {
        let count = self.ripe(self.crowd.dirty.len()).min(FLUSHES_PER_TURN);
        // Who has waited longest comes first; who is marked meanwhile comes behind.
        for _ in 0..count {
            if let Some(slot) = self.crowd.dirty.pop_front() {
                self.flush(slot);
            }
        }
        self.gather.clear();
        self.flush_ripe -= count;
        self.round_left = self.round_left.saturating_sub(count);
        if self.round_left == 0 && (count > 0 || self.crowd.dirty.is_empty()) {
            self.burst = 0;
            self.round_left = self.crowd.dirty.len();
        }
    }

    /// One write for each connection that was marked when `dirty` were marked already.
    pub(super) fn flush_since(&mut self, dirty: usize) {
        let mut slots = std::mem::take(&mut self.scratch.slots);
        slots.clear();
        slots.extend(self.crowd.dirty.drain(dirty.min(self.crowd.dirty.len())..));
        slots.iter().for_each(|slot| self.flush(*slot));
        self.gather.clear();
        self.scratch.slots = slots;
    }

    fn flush(&mut self, slot: u32) {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        connection.is_dirty = false;
        let before = connection.outbox.backlog_bytes();
        let flushed = connection.flush(&mut self.gather, &mut self.crowd.metrics);
        self.crowd.backlog_bytes -= before - connection.outbox.backlog_bytes();
        if connection.is_congested && connection.outbox.is_relieved(&connection.bounds()) {
            connection.is_congested = false;
            let blocks = connection.config.policy.blocks();
            self.crowd.groups.groups_of(slot).for_each(|group| group.remove_congested(blocks));
        }
        match flushed {
            Flushed::Rests => {}
            Flushed::HasMore => self.crowd.mark_dirty(slot),
            Flushed::Finished if connection.is_read_closed => self.drop_socket(slot),
            Flushed::Finished => self.linger(slot),
            Flushed::Failed(kind) => self.hang_up(slot, CloseReason::Transport(kind)),
        }
    }

    /// Everything has been written: what is left is the peer's to do, and it has the usual time for it.
    fn linger(&mut self, slot: u32) {
        let Some(connection) = self.crowd.connections.get_mut(slot as usize) else { return };
        let by = self.crowd.now + connection.config.close_timeout;
        if let Some(ending) = connection.ending.as_mut().filter(|ending| ending.by > by) {
            ending.by = by;
            connection.armed = self.wheel.arm(connection.id, by);
        }
    }

    /// Tells all threads how much waits here; while it is too much in all, sheds the largest backlogs first,
    /// as many as are this shard's part of the excess.
    pub(super) fn keep_within_budget(&mut self) {
        let (shared, told) = (&self.shared, self.backlog_told);
        // Relaxed: a sum, nothing hangs on it. Left alone where nothing has changed: all shards share it.
        if self.crowd.backlog_bytes > told {
            shared.backlog_bytes.fetch_add(self.crowd.backlog_bytes - told, Relaxed);
        } else if self.crowd.backlog_bytes < told {
            shared.backlog_bytes.fetch_sub(told - self.crowd.backlog_bytes, Relaxed);
        }
        self.backlog_told = self.crowd.backlog_bytes;
        let (all, max) = (shared.backlog_bytes.load(Relaxed), shared.config.backlog_bytes_max);
        if all <= max || self.crowd.backlog_bytes == 0 {
            return;
        }
        let share = (all - max) as u128 * self.crowd.backlog_bytes as u128 / all as u128;
        let target = self.crowd.backlog_bytes - share as usize;
        for id in self.crowd.largest_backlogs(target) {
            if self.find(id).is_some_and(|connection| connection.phase != Phase::Open) {
                self.discard(id.slot() as u32); // it has its reason already
            } else {
                self.end(id.slot() as u32, CloseReason::Shed);
            }
        }
    }
}
