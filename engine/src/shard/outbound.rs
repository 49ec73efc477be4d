//! Output: from the outboxes to the sockets, and the memory budgets.
//!
//! One write for each connection with something queued, a bounded number of connections per turn. Does not
//! know where frames come from.

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use crate::close_reason::CloseReason;
#[cfg(all(feature = "io-uring", target_os = "linux"))]
use crate::config::EngineConfig;
use crate::connection::{Connection, Flushed};
use crate::id::Slot;
#[cfg(all(feature = "io-uring", target_os = "linux"))]
use crate::send_batch::SendBatch;
use crate::sync::plain::AtomicUsize;

use super::Shard;

/// Connections from which on they are flushed together: with fewer it saves nothing, and clients get the first of it
/// later. In the engine's own tests one, so that all of them go this way.
#[cfg(all(feature = "io-uring", target_os = "linux"))]
const SENDS_MIN: usize = if cfg!(feature = "audit") { 1 } else { 32 };

/// While the budget is exceeded, the shard checks again after the kept memory has grown by this part of the maximum.
const GROWTH: usize = 64;

/// The progress of shedding since the budget was exceeded.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Shedding {
    /// Bytes that the connections held that were ended; 0 if the last check found none.
    ended: usize,
    /// Bytes that were kept here at the last check.
    looked_at: usize,
}

impl Shard {
    /// Writes once for each connection with something queued; if there are many, some are left for the next turn.
    pub(super) fn flush_dirty(&mut self) {
        let count = self.fanout.flushes.begin(self.fanout.now, self.shutdown.is_some());
        let mut slots = std::mem::take(&mut self.scratch.slots);
        slots.clear();
        slots.extend((0..count).map_while(|_| self.fanout.flushes.next()));
        self.flush_each(&slots);
        self.scratch.slots = slots;
        self.fanout.flushes.end(count);
    }

    /// Writes once for each connection that was marked after the first `waiting` ones.
    pub(super) fn flush_since(&mut self, waiting: usize) {
        let mut slots = std::mem::take(&mut self.scratch.slots);
        slots.clear();
        slots.extend(self.fanout.flushes.take_since(waiting));
        self.flush_each(&slots);
        self.scratch.slots = slots;
    }

    fn flush_each(&mut self, slots: &[Slot]) {
        #[cfg(all(feature = "io-uring", target_os = "linux"))]
        if slots.len() >= SENDS_MIN
            && let Some(batch) = self.send_batch.take()
        {
            self.flush_together(slots, batch);
            self.gather.clear();
            return;
        }
        slots.iter().for_each(|slot| self.flush(*slot, None));
        self.gather.clear();
    }

    /// Makes the first write to each of these connections in one system call, if it can be one of several.
    #[cfg(all(feature = "io-uring", target_os = "linux"))]
    fn flush_together(&mut self, slots: &[Slot], mut batch: SendBatch) {
        let mut unsent = std::mem::take(&mut self.scratch.unsent);
        unsent.clear();
        let mut rest = slots.iter().copied();
        let failure = loop {
            for slot in rest.by_ref() {
                let connection = self.fanout.connections.get(slot);
                match connection.and_then(|connection| connection.next_send(&mut self.gather)) {
                    Some((socket, bytes)) => batch.push(slot, socket, bytes),
                    None => unsent.push(slot),
                }
                if batch.is_full() {
                    break;
                }
            }
            let submitted = batch.submit();
            // Not before: until then nothing may change what these connections send first.
            for (slot, result) in batch.results() {
                self.flush(slot, Some(result));
            }
            if submitted.is_err() || rest.len() == 0 {
                break submitted.err();
            }
        };
        unsent.iter().for_each(|slot| self.flush(*slot, None));
        self.scratch.unsent = unsent;
        match failure {
            None => self.send_batch = Some(batch),
            Some(error) => {
                tracing::warn!(shard = self.index, %error, "io_uring failed: the shard writes to each connection by itself from now on");
                // Those that have been flushed have nothing to write any more.
                slots.iter().for_each(|slot| self.flush(*slot, None));
            }
        }
    }

    /// `sent` is the result of the first write if it was made already.
    fn flush(&mut self, slot: Slot, sent: Option<io::Result<usize>>) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        connection.clear_dirty();
        let (before, ping) = (connection.backlog_bytes(), connection.ping_to_write());
        let flushed = connection.flush(sent, &mut self.gather, &mut self.fanout.metrics, self.fanout.now);
        self.fanout.backlog_bytes -= before - connection.backlog_bytes();
        if let Some(is_ahead) = ping
            && connection.has_no_control()
        {
            self.note_ping(slot, is_ahead);
        }
        self.fanout.relieve(slot);
        match flushed {
            Flushed::Rests => {}
            Flushed::Refused => {
                self.refusals += 1;
                self.fanout.refused += 1;
                let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
                if let Some(due) = connection.look_at_stall(self.fanout.now) {
                    connection.remind_at(due, &mut self.wheel);
                }
            }
            Flushed::HasMore => self.fanout.mark_dirty(slot),
            Flushed::Finished => {
                self.drop_socket_if_over(slot);
                if self.fanout.connections.get(slot).is_some_and(Connection::has_socket) {
                    self.linger(slot);
                }
            }
            Flushed::Failed(kind) => self.abort(slot, CloseReason::Transport(kind)),
        }
    }

    /// A ping has been written: its time runs from now.
    #[cold]
    fn note_ping(&mut self, slot: Slot, is_ahead: bool) {
        let now = self.clock();
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        connection.ping_sent(now, is_ahead);
        let due = now + connection.config().pong_timeout;
        connection.remind_at(due, &mut self.wheel);
    }

    /// Everything has been written: the client has the usual time to end its stream.
    fn linger(&mut self, slot: Slot) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        let by = self.fanout.now + connection.config().close_timeout;
        if let Some(ending) = connection.ending_mut().filter(|ending| ending.by > by) {
            ending.by = by;
        }
        self.arm_ending(slot);
    }

    /// Adds the memory that is kept here to the shared sums. While they exceed their budgets, ends the
    /// connections that hold the most, until this shard's part of the excess is gone. A backlog counts only
    /// if the socket has refused a write: otherwise its flush is merely due, and the client is not slow.
    pub(super) fn keep_within_budgets(&mut self) {
        let excess = self.tell_retained();
        if excess == 0 {
            self.shedding = Shedding::default();
        } else if self.fanout.refused > 0 {
            self.shed_backlog(excess);
        }
        let (max, held) = (self.core.config.unfinished_bytes_max, self.fanout.unfinished_bytes);
        let excess = self::excess(&self.core.unfinished_bytes, &mut self.unfinished_told, held, max);
        if excess > 0 {
            self.shed(excess, CloseReason::UnfinishedLimit, Connection::unfinished_bytes);
        }
    }

    /// Adds the bytes that outboxes keep here to the shared sum; returns this shard's part of the excess.
    fn tell_retained(&mut self) -> usize {
        let (max, held) = (self.core.config.backlog_bytes_max, self.fanout.retained.bytes());
        excess(&self.core.retained_bytes, &mut self.retained_told, held, max)
    }

    /// Ends connections for their backlogs, if something has changed since the last check, which visits all
    /// connections.
    fn shed_backlog(&mut self, excess: usize) {
        let held = self.fanout.retained.bytes();
        let growth = self.core.config.backlog_bytes_max / GROWTH / self.core.mailboxes.len();
        let Shedding { ended, looked_at } = self.shedding;
        if std::mem::take(&mut self.refusals) == 0 && held < looked_at + growth && ended == 0 {
            return;
        }
        // A shared chunk is freed only when its last holder is closed. So while nothing has been freed, each
        // further check closes as much again.
        let before = if held < looked_at { 0 } else { ended };
        let ended = self.shed(excess.max(before), CloseReason::BacklogLimit, Connection::refused_bytes);
        let ended = if ended == 0 { 0 } else { before + ended };
        self.shedding = Shedding { ended, looked_at: held };
        self.tell_retained(); // before another shard ends connections for memory that is free now
    }

    /// Ends the connections that hold the most, until they together hold `excess`; returns how much they
    /// hold. A connection that has ended already loses what it still holds: messages for its handler, or,
    /// with its socket, the frame that was being written.
    fn shed(&mut self, excess: usize, reason: CloseReason, held: impl Fn(&Connection) -> usize) -> usize {
        let (largest, sum) = self.fanout.largest(excess, held);
        for id in largest {
            let slot = id.slot();
            let Some(connection) = self.fanout.connections.get_mut(slot) else { continue };
            if connection.is_open() {
                self.end(slot, reason.clone());
                continue;
            }
            if reason == CloseReason::UnfinishedLimit {
                self.forget_held(slot);
            } else {
                self.drop_socket(slot);
            }
        }
        sum
    }
}

/// What a shard writes with, if io_uring is wanted and possible. Tells the log about it once for an engine.
#[cfg(all(feature = "io-uring", target_os = "linux"))]
pub(super) fn open_send_batch(config: &EngineConfig, shard: usize) -> Option<SendBatch> {
    if !config.io_uring {
        return None;
    }
    let opened = SendBatch::open();
    match &opened {
        Ok(_) if shard == 0 => tracing::debug!("io_uring is in use"),
        Err(error) if shard == 0 => {
            tracing::info!(%error, "io_uring is not available: the shards write to each connection by itself");
        }
        _ => {}
    }
    opened.ok()
}

/// Updates the sum `all` with what is `held` here. Returns this shard's part of what exceeds `max`.
fn excess(all: &AtomicUsize, told: &mut usize, held: usize, max: usize) -> usize {
    // Relaxed: a sum; no other data depends on it. Not written if nothing has changed, because all shards share it.
    if held > *told {
        all.fetch_add(held - *told, Relaxed);
    } else if held < *told {
        all.fetch_sub(*told - held, Relaxed);
    }
    *told = held;
    let all = all.load(Relaxed);
    if all <= max {
        return 0;
    }
    ((all - max) as u128 * held as u128 / all as u128) as usize
}
