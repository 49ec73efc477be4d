//! A shard's part in the engine's ending.
//!
//! Follows `stopping`, step by step: reads no more, reports when no handler is busy, empties
//! the log, closes its connections over the window, counts how they went. Also what happens
//! when a shard's thread ends in another way. Does not know what asked for it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crate::close_reason::CloseReason;
use crate::connection::Connection;
use crate::id::{ConnectionId, Slot};
use crate::stopping::ShutdownReport;

use super::Shard;

/// How far this shard has got with ending.
#[derive(Debug)]
pub(super) struct Stop {
    /// When everything must be over.
    pub(super) by: Duration,
    /// When handlers that are still busy are no longer waited for.
    closing_by: Duration,
    is_quiet: bool,
    /// Whom to close when, the last first; none while the engine drains.
    closings: Option<Vec<(Duration, ConnectionId)>>,
    pub(super) report: ShutdownReport,
}

impl Stop {
    /// A connection's socket is gone. `is_flushed`: its peer has everything that was sent to it.
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
    /// Whether the engine's ending has come further than this shard has followed.
    pub(super) fn has_news_of_stopping(&self) -> bool {
        match &self.stop {
            None => self.core.stopping.is_asked(),
            Some(stop) => stop.closings.is_none() && self.core.stopping.is_closed(),
        }
    }

    /// Takes part in the engine's ending, as far as it has come.
    pub(super) fn follow_stop(&mut self) {
        let Some(plan) = self.core.stopping.plan() else { return };
        let now = self.crowd.now;
        if self.stop.is_none() {
            let by = plan.by.saturating_duration_since(self.started);
            let closing_by = by.saturating_sub(plan.within / 2);
            let report = ShutdownReport::default();
            self.stop = Some(Stop { by, closing_by, is_quiet: false, closings: None, report });
            self.crowd.connections.iter_mut().for_each(Connection::pause);
        }
        let Some(stop) = &mut self.stop else { return };
        if stop.closings.is_none() {
            if !stop.is_quiet && !self.crowd.connections.iter().any(Connection::is_busy) {
                stop.is_quiet = true;
                if self.core.stopping.tell_quiet() {
                    self.core.close();
                }
            }
            if now >= stop.closing_by {
                self.core.close();
            }
            let mailbox = &self.core.mailboxes[self.index];
            let has_commands = self.held.is_some() || !self.later.is_empty() || !mailbox.is_empty();
            if !self.core.stopping.is_closed()
                || !self.reader.is_at_tail()
                || (has_commands && now < stop.closing_by)
            {
                return; // what was sent before goes out first
            }
            let open = self.crowd.connections.iter().filter(|connection| connection.is_open());
            let closing = |connection: &Connection| {
                (now + plan.spread.mul_f64(connection.slot().spread()), connection.id())
            };
            let mut closings: Vec<_> = open.map(closing).collect();
            closings.sort_unstable_by(|a, b| b.cmp(a));
            stop.closings = Some(closings);
        }
        while let Some(stop) = &mut self.stop
            && let Some(closings) = &mut stop.closings
            && let Some((_, id)) = closings.pop_if(|(due, _)| *due <= now)
        {
            if self.find(id).is_some() {
                self.end(id.slot(), CloseReason::Shutdown { code: plan.code });
            }
        }
    }

    pub(super) fn has_stopped(&self) -> bool {
        self.stop.as_ref().is_some_and(|stop| {
            let is_over = stop.closings.is_some() && self.crowd.connections.is_empty();
            is_over || self.crowd.now >= stop.by
        })
    }
}

impl Shard {
    /// What remains when the time is over: sockets are dropped with what is queued for them, handlers are abandoned.
    fn abandon(&mut self, report: &mut ShutdownReport) {
        let slots: Vec<Slot> = self.crowd.connections.iter().map(Connection::slot).collect();
        for slot in slots {
            if let Some(connection) = self.crowd.connections.get_mut(slot) {
                drop(connection.take_opening());
            }
            self.leave_groups(slot);
            let Some(connection) = self.crowd.connections.get_mut(slot) else { continue };
            self.crowd.metrics.ended += u64::from(connection.is_open());
            report.left_over += u64::from(connection.has_handler());
            let (has_socket, is_delivered) = (connection.has_socket(), connection.is_delivered());
            match self.discard_all(slot) {
                _ if !has_socket => {}
                0 if is_delivered => report.flushed += 1,
                _ => report.cut_off += 1,
            }
        }
        self.crowd.unfinished_bytes = 0;
        let connections = &mut self.crowd.connections;
        if catch_unwind(AssertUnwindSafe(|| connections.clear())).is_err() {
            tracing::error!("dropping a handler panicked");
        }
        self.keep_within_budget();
        self.publish_metrics();
    }
}

impl Drop for Shard {
    /// Nobody waits for a shard that has ended.
    fn drop(&mut self) {
        self.mailbox().close();
        let mut report = self.stop.take().map_or_else(ShutdownReport::default, |stop| stop.report);
        if std::thread::panicking() {
            // Promises cannot be kept with a part of the connections gone: the whole engine stops.
            tracing::error!(shard = self.index, "a shard panicked; the engine stops");
            self.core.stopping.fail();
            self.core.stop(Duration::ZERO, Instant::now());
        } else {
            self.abandon(&mut report);
        }
        self.core.stopping.tell_end(self.index, &report);
    }
}
