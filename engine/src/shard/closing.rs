//! Closing: the only place that decides a connection's end, and everything that follows from it.
//!
//! In one step a connection leaves all indexes, its reason is fixed and its Close frame is queued; its
//! handler is notified when it is not busy; the socket is dropped when the closing handshake or its time is
//! over; the slot is freed when socket and handler are dropped. Does not decide when a connection must end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::close_reason::CloseReason;
use crate::connection::{Connection, Discarded, Ending};
use crate::directory::{Directory, Group};
use crate::group::Left;
use crate::id::Slot;

use super::{Shard, Step};

impl Shard {
    /// Ends a connection whose stream is over, and drops its socket.
    pub(super) fn abort(&mut self, slot: Slot, reason: CloseReason) {
        self.end(slot, reason);
        self.drop_socket(slot);
    }

    /// Ends a connection after everything that its handler has sent before.
    pub(super) fn end_in_order(&mut self, slot: Slot, reason: CloseReason) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        if reason == CloseReason::HandlerPanicked {
            connection.stop_drop_notices();
        }
        if connection.drains() {
            return self.finish_draining(slot);
        }
        if !connection.is_open() || !connection.stop_listening() {
            return;
        }
        let id = connection.id();
        self.do_later(id, Step::End(reason));
    }

    /// Decides the end of an open connection: it leaves every index at once, its client gets a Close frame,
    /// its handler is notified.
    pub(super) fn end(&mut self, slot: Slot, reason: CloseReason) {
        self.decide_end(slot, reason, false);
    }

    /// Ends an open connection, and goes on passing the client's messages to the handler until the client's Close
    /// frame arrives. The handler is notified of the end after that.
    pub(super) fn end_and_drain(&mut self, slot: Slot, reason: CloseReason) {
        self.decide_end(slot, reason, true);
    }

    /// The client sends no more to a connection that drains, or what it sends is not wanted any more.
    pub(super) fn finish_draining(&mut self, slot: Slot) {
        let Some(connection) = self.fanout.connections.get_mut(slot).filter(|found| found.drains()) else {
            return;
        };
        let before = connection.unfinished_bytes();
        connection.stop_draining();
        self.count_unfinished(slot, before);
        self.notify_closed(slot);
    }

    fn decide_end(&mut self, slot: Slot, reason: CloseReason, drains: bool) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        if !connection.is_open() {
            return;
        }
        tracing::debug!(id = %connection.id(), %reason, "connection ended");
        self.fanout.unfinished_bytes -= connection.unfinished_bytes();
        connection.begin_closing(reason.is_in_input(), drains);
        connection.directory().remove_encoding(connection.encoding());
        self.fanout.unfinished_bytes += connection.unfinished_bytes();
        let is_readable = connection.is_readable();
        self.count_end(&reason);
        let is_told = reason.close_frame().is_some();
        if !reason.flushes_first() {
            self.discard(slot);
        }
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        let now = self.fanout.now;
        let (by, close_timeout) = (now + self.core.config.coalesce, connection.config().close_timeout);
        let by = match (&reason, &self.shutdown) {
            (CloseReason::Shutdown { .. }, Some(stop)) => stop.by,
            _ => by + close_timeout,
        };
        // A backlog may delay the Close frame only so long that the frame still has time to get through.
        let flush_by = by - close_timeout.min(by.saturating_sub(now) / 2);
        // A client that has ended the stream may still read: what is queued is written, although no Close
        // frame follows.
        let is_flushed = is_told || (reason == CloseReason::Disconnected && connection.has_backlog());
        let ending = Ending { reason, by, flush_by: Some(flush_by), is_cut: false };
        connection.begin_ending(ending, is_told);
        if is_readable {
            self.mark_ready(slot);
        }
        self.leave_groups(slot);
        if is_flushed {
            self.arm_ending(slot);
            self.fanout.mark_dirty(slot);
        } else {
            self.drop_socket(slot);
        }
        self.notify_closed(slot);
    }

    fn count_end(&mut self, reason: &CloseReason) {
        let (metrics, untold) = (&mut self.fanout.metrics, &mut self.untold);
        metrics.ended += 1;
        match reason {
            CloseReason::Protocol(_) => metrics.ended_protocol += 1,
            CloseReason::ControlFlood | CloseReason::TooManyGroups => {
                metrics.ended_protocol += 1;
                untold.flooding += 1;
            }
            CloseReason::RateLimited => {
                metrics.ended_rate_limited += 1;
                untold.flooding += 1;
                untold.over_rate += 1;
            }
            CloseReason::Undecodable | CloseReason::WrongKind => {
                metrics.ended_undecodable += 1;
                untold.undecodable += 1;
            }
            CloseReason::PongTimeout | CloseReason::IdleTimeout | CloseReason::MaxDuration => {
                metrics.ended_timeout += 1;
            }
            CloseReason::SlowConsumer
            | CloseReason::TooManyDrops
            | CloseReason::HighRtt
            | CloseReason::BacklogLimit
            | CloseReason::UnfinishedLimit => {
                metrics.ended_slow += 1;
                untold.slow += 1;
            }
            CloseReason::HandlerPanicked | CloseReason::RenderFailed => metrics.ended_panic += 1,
            _ => {}
        }
    }

    /// Removes a connection from all its groups.
    pub(super) fn leave_groups(&mut self, slot: Slot) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        let (directory, congestion) = (connection.directory().clone(), connection.take_congestion());
        let user = connection.presence();
        while let Some((group, left)) = self.fanout.groups.leave_any(slot) {
            self.has_left(&directory, &group, left, congestion, user.as_ref());
        }
    }

    /// Discards everything that is queued for a connection, including the frame that is being written.
    /// Returns the number of frames.
    pub(super) fn discard_all(&mut self, slot: Slot) -> u64 {
        self.fanout.settle(slot);
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return 0 };
        let Discarded { frames, bytes } = connection.discard_all();
        self.count_discarded(frames, bytes)
    }

    /// A member was removed from this shard's index, so the directory must not count it either.
    pub(super) fn has_left(
        &self,
        directory: &Directory,
        group: &Arc<Group>,
        left: Left,
        congestion: Option<bool>,
        user: Option<&(Arc<str>, Duration)>,
    ) {
        if left == Left::WasNoMember {
            return;
        }
        if left == Left::WasLast {
            group.remove_interest(self.index);
        }
        if let Some(blocks) = congestion {
            group.remove_congested(blocks);
        }
        if let Some((user, grace)) = user
            && group.user_leaves(user, self.started + self.fanout.now + *grace)
        {
            self.tell_watcher(group.clone(), user.clone());
        }
        directory.exit(group);
    }

    /// Discards what is queued for a connection, except the frame that is being written. Returns the number
    /// of frames.
    pub(super) fn discard(&mut self, slot: Slot) -> u64 {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return 0 };
        let Discarded { frames, bytes } = connection.discard();
        self.count_discarded(frames, bytes)
    }

    fn count_discarded(&mut self, frames: u64, bytes: usize) -> u64 {
        self.fanout.backlog_bytes -= bytes;
        self.fanout.metrics.tally.discarded += frames;
        frames
    }

    /// Notifies the handler of drops, if there were any. Returns whether it has finished with that.
    pub(super) fn notify_drops(&mut self, slot: Slot) -> Poll<()> {
        while let Some(connection) = self.fanout.connections.get_mut(slot)
            && let Some(notice) = connection.take_drop_notice()
        {
            let (flow, end) = self.run_handler(slot, |handler, context| handler.on_drop(&notice, context));
            if let Some(reason) = end {
                self.end_by_handler(slot, reason);
            }
            if flow == Poll::Pending {
                return flow;
            }
        }
        Poll::Ready(())
    }

    /// Tells the handler of messages that were dropped because they exceeded a rate limit, if that is due or
    /// `is_last`. Returns whether it has finished with that.
    pub(super) fn notify_rate_limited(&mut self, slot: Slot, is_last: bool) -> Poll<()> {
        let now = self.fanout.now;
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return Poll::Ready(()) };
        if !connection.exceeds_rate() {
            return Poll::Ready(());
        }
        let notice = connection.take_rate_notice(now, is_last);
        if let Some(due) = connection.rate_due(now) {
            connection.remind_of_rate(due, &mut self.wheel);
        }
        let Some(messages) = notice else { return Poll::Ready(()) };
        self.call(slot, |handler, context| handler.on_rate_limited(messages, context))
    }

    /// Asks the handler of a connection that has expired. Returns whether it has finished with that.
    pub(super) fn notify_expired(&mut self, slot: Slot) -> Poll<()> {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return Poll::Ready(()) };
        if !connection.is_open() || !connection.take_expired() {
            return Poll::Ready(());
        }
        self.call(slot, |handler, context| handler.on_expired(context))
    }

    /// Notifies the handler of the end, as soon as it is not busy.
    pub(super) fn notify_closed(&mut self, slot: Slot) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        if !connection.is_idle() || !connection.has_handler() || connection.drains() {
            return;
        }
        if self.notify_drops(slot) == Poll::Pending || !self.hand_held(slot) {
            return; // called again when the handler is done, or when the next held message is within its rate
        }
        if self.notify_rate_limited(slot, true) == Poll::Pending {
            return;
        }
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        let Some(reason) = connection.ending().map(|ending| ending.reason.clone()) else { return };
        match self.call(slot, |handler, context| handler.on_close(&reason, context)) {
            Poll::Pending => {
                if let Some(connection) = self.fanout.connections.get_mut(slot) {
                    connection.wait_for_on_close();
                }
            }
            Poll::Ready(()) => self.release_handler(slot),
        }
    }

    /// Releases a handler that has been notified of the end.
    pub(super) fn release_handler(&mut self, slot: Slot) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        let handler = connection.take_handler();
        let shown = self.core.beacons.call(self.index, connection.directory().key());
        if catch_unwind(AssertUnwindSafe(|| drop(handler))).is_err() {
            tracing::error!(id = %connection.id(), "a handler panicked when it was dropped");
        }
        drop(shown);
        self.remove_if_over(slot);
    }

    pub(super) fn drop_socket(&mut self, slot: Slot) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        if !connection.has_socket() {
            return;
        }
        let is_delivered = connection.is_delivered();
        let discarded = self.discard_all(slot);
        if let Some(connection) = self.fanout.connections.get_mut(slot)
            && connection.drop_socket()
        {
            self.fanout.refused -= 1;
        }
        self.finish_draining(slot);
        if let Some(stop) = &mut self.shutdown {
            stop.count(discarded == 0 && is_delivered);
        }
        self.remove_if_over(slot);
    }

    /// The client has ended its side and the Close frame was written: drops the socket, unless something is on its way
    /// to the client in a bridge, or a shutdown must tell whether the client has everything.
    pub(super) fn drop_socket_if_over(&mut self, slot: Slot) {
        self.fanout.settle(slot);
        let is_over = self.fanout.connections.get(slot).is_some_and(|connection| {
            connection.is_lingering()
                && connection.is_at_end()
                && (self.shutdown.is_none() || connection.is_delivered())
        });
        if is_over {
            self.drop_socket(slot);
        }
    }

    fn remove_if_over(&mut self, slot: Slot) {
        if self.fanout.connections.get(slot).is_some_and(Connection::is_gone) {
            let connection = self.fanout.connections.remove(slot);
            self.fanout.unfinished_bytes -= connection.unfinished_bytes();
            connection.directory().ended(self.index).add(connection.tally());
        }
    }
}
