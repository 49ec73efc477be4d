//! A shard's part in the engine's shutdown.
//!
//! Follows the engine's state step by step: reads no more messages, reports when no handler is busy, drains
//! the log, closes its connections over the window, counts the results. Also handles a shard's thread that
//! ends in another way. Does not know who asked for the shutdown.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crate::close_reason::CloseReason;
use crate::connection::Connection;
use crate::id::{ConnectionId, Slot};
use crate::shutdown::ShutdownReport;

use super::Shard;
use super::commands::drop_guarded;

/// This shard's progress in the shutdown.
#[derive(Debug)]
pub(super) struct ShardShutdown {
    /// The deadline of the whole shutdown.
    pub(super) by: Duration,
    /// When busy handlers are no longer waited for.
    closing_by: Duration,
    is_quiet: bool,
    /// When to close which connection, the last first; none while the engine drains.
    closings: Option<Vec<(Duration, ConnectionId)>>,
    pub(super) report: ShutdownReport,
}

impl ShardShutdown {
    /// A connection's socket was dropped. `is_flushed`: its client has everything that was sent to it.
    pub(super) fn count(&mut self, is_flushed: bool) {
        if is_flushed {
            self.report.flushed += 1;
        } else {
            self.report.cut_off += 1;
        }
    }

    pub(super) fn next_due(&self) -> Duration {
        match &self.closings {
            None => self.closing_by,
            Some(closings) => closings.last().map_or(self.by, |(due, _)| (*due).min(self.by)),
        }
    }
}

impl Shard {
    /// Whether the engine's shutdown is ahead of this shard's.
    pub(super) fn has_news_of_stopping(&self) -> bool {
        match &self.shutdown {
            None => self.core.shutdown.is_asked(),
            Some(stop) => stop.closings.is_none() && self.core.shutdown.is_closed(),
        }
    }

    /// Follows the engine's shutdown, as far as it has got.
    pub(super) fn advance_shutdown(&mut self) {
        let Some(plan) = self.core.shutdown.plan() else { return };
        let now = self.fanout.now;
        if self.shutdown.is_none() {
            let by = plan.by.saturating_duration_since(self.started);
            let closing_by = by.saturating_sub(plan.within / 2);
            let report = ShutdownReport::default();
            self.shutdown = Some(ShardShutdown { by, closing_by, is_quiet: false, closings: None, report });
            let draining = self.fanout.connections.iter().filter(|connection| connection.drains());
            for slot in draining.map(Connection::slot).collect::<Vec<_>>() {
                self.forget_held(slot);
                self.finish_draining(slot);
            }
            for connection in self.fanout.connections.iter_mut() {
                connection.pause();
                if connection.is_delayed() {
                    connection.remind_at(now, &mut self.wheel); // nothing that is held is handled any more
                }
            }
        }
        let Some(stop) = &mut self.shutdown else { return };
        if stop.closings.is_none() {
            if !stop.is_quiet && !self.fanout.connections.iter().any(Connection::is_busy) {
                stop.is_quiet = true;
                if self.core.shutdown.tell_quiet() {
                    self.core.close();
                }
            }
            if now >= stop.closing_by {
                self.core.close();
            }
            let mailbox = &self.core.mailboxes[self.index];
            let has_commands = self.blocked_command.is_some()
                || !self.later.is_empty()
                || !self.local.is_empty()
                || !mailbox.is_empty();
            if !self.core.shutdown.is_closed()
                || !self.reader.is_at_tail()
                || (has_commands && now < stop.closing_by)
            {
                return; // what was sent before is written first
            }
            let open = self.fanout.connections.iter().filter(|connection| connection.is_open());
            let closing = |connection: &Connection| {
                (now + plan.close_window.mul_f64(connection.slot().spread()), connection.id())
            };
            let mut closings: Vec<_> = open.map(closing).collect();
            closings.sort_unstable_by(|a, b| b.cmp(a));
            stop.closings = Some(closings);
        }
        while let Some(stop) = &mut self.shutdown
            && let Some(closings) = &mut stop.closings
            && let Some((_, id)) = closings.pop_if(|(due, _)| *due <= now)
        {
            if self.find(id).is_some() {
                self.end(id.slot(), CloseReason::Shutdown { code: plan.code });
            }
        }
    }

    /// Whether the engine's shutdown is done in this shard, or its time is over. Who
    /// [drives](crate::Engine::driven) the shard drops it then, which completes the shutdown.
    pub fn has_stopped(&self) -> bool {
        self.shutdown.as_ref().is_some_and(|stop| {
            let is_over = stop.closings.is_some() && self.fanout.connections.is_empty();
            is_over || self.fanout.now >= stop.by
        })
    }
}

impl Shard {
    /// When the engine's shutdown takes its next step in this shard; none while there is no shutdown. Not a part of
    /// [`next_due`](Self::next_due). May have passed, if the step waits for something else.
    pub fn next_stop_due(&self) -> Option<Instant> {
        self.shutdown.as_ref().map(|stop| self.started + stop.next_due())
    }

    /// At the deadline: drops sockets with what is queued for them, and abandons handlers.
    fn abandon(&mut self, report: &mut ShutdownReport) {
        let slots: Vec<Slot> = self.fanout.connections.iter().map(Connection::slot).collect();
        for slot in slots {
            if let Some(connection) = self.fanout.connections.get_mut(slot) {
                drop(connection.take_opening());
            }
            self.leave_groups(slot);
            let Some(connection) = self.fanout.connections.get_mut(slot) else { continue };
            self.fanout.metrics.ended += u64::from(connection.is_open());
            report.left_over += u64::from(connection.has_handler());
            let (has_socket, is_delivered) = (connection.has_socket(), connection.is_delivered());
            match self.discard_all(slot) {
                _ if !has_socket => {}
                0 if is_delivered => report.flushed += 1,
                _ => report.cut_off += 1,
            }
        }
        self.fanout.unfinished_bytes = 0;
        let connections = &mut self.fanout.connections;
        if catch_unwind(AssertUnwindSafe(|| connections.clear())).is_err() {
            tracing::error!("a handler panicked when it was dropped");
        }
        self.keep_within_budgets();
        self.publish_metrics();
    }
}

impl Drop for Shard {
    /// Publishers and commands must not wait for a shard that has ended.
    fn drop(&mut self) {
        self.mailbox().close();
        while let Some(command) = self.local.pop() {
            drop_guarded(command);
        }
        let mut report = self.shutdown.take().map_or_else(ShutdownReport::default, |stop| stop.report);
        if std::thread::panicking() {
            // No guarantee holds with a part of the connections lost: the whole engine stops.
            tracing::error!(shard = self.index, "a shard panicked: the engine stops; start another");
            self.core.shutdown.fail();
            self.core.stop(Duration::ZERO, Instant::now());
        } else {
            self.abandon(&mut report);
        }
        self.core.shutdown.shard_has_ended(self.index, &report);
    }
}
