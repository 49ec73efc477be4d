//! A connection's internal state. Only for the engine's own tests, behind the feature `audit`.

use std::time::Duration;

use crate::outbox::Outbox;
use crate::receipt::Origin;
use crate::tally::DropCause;

use super::Connection;

/// State that is otherwise private to the connection.
pub(crate) struct Inside<'a> {
    pub(crate) outbox: &'a Outbox<Origin>,
    pub(crate) is_writable: bool,
    pub(crate) is_dirty: bool,
    pub(crate) is_congested: bool,
    pub(crate) close_frame_pending: bool,
    /// Messages are held although the handler could be called with them.
    pub(crate) keeps_messages: bool,
    /// Drops that were not yet reported to the handler.
    pub(crate) untold: u64,
    /// When a message that waits for its rate is due.
    pub(crate) delayed_until: Option<Duration>,
    /// The tick of its timer.
    pub(crate) timer_tick: u64,
}

impl Connection {
    pub(crate) fn inside(&self) -> Inside<'_> {
        Inside {
            outbox: &self.outbox,
            is_writable: self.is_writable,
            is_dirty: self.is_dirty,
            is_congested: self.is_congested,
            close_frame_pending: self.close_frame_pending,
            keeps_messages: self.held.is_some() && self.is_listening(),
            untold: self.counts.losses().map_or(0, |losses| losses.notices.frames()),
            delayed_until: self.rate_due(Duration::MAX).filter(|_| self.is_delayed()),
            timer_tick: self.timer_tick,
        }
    }

    /// Makes it count this many lost frames, half of them for each cause.
    pub(crate) fn pretend_losses(&mut self, frames: u64) {
        self.counts.offered += frames;
        let losses = self.counts.lose();
        losses.dropped[DropCause::Timeout] += frames / 2;
        losses.dropped[DropCause::Overflow] += frames / 2;
        losses.in_a_row = losses.in_a_row.saturating_add(u32::try_from(frames).unwrap_or(u32::MAX));
    }
}
