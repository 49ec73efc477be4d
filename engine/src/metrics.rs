//! Counters: frames offered, written and discarded, and why connections ended.
//!
//! Each shard owns its counters and updates them without sharing; once per turn it publishes them, so that a
//! reader on another thread costs the loop nothing. For a connection and for any sum of connections, offered
//! = written + dropped + discarded + pending.

use std::time::Duration;

use crossbeam_utils::CachePadded;

use crate::drop_notice::{DropNotice, DropNotices};
use crate::heartbeat::Rtt;
use crate::tally::{self, Counter, Drops, SharedTally, Tally, counters};

counters! {
    /// The counters of one shard, or of the whole engine, since its start. In frames or events, except
    /// gauges, which give the current value.
    pub struct Metrics, shared as SharedMetrics {
        /// Open connections, including those in their closing handshake. A gauge.
        connections: u64,
        /// Connections adopted.
        adopted: u64,
        /// Connections that ended.
        ended: u64,
        /// Connections ended because the client broke the framing rules or sent too many control frames, or
        /// because they joined too many groups.
        ended_protocol: u64,
        /// Connections ended because a message could not be decoded.
        ended_undecodable: u64,
        /// Connections ended by a timeout: unanswered ping, idle time, maximum duration.
        ended_timeout: u64,
        /// Connections ended because the client was a slow consumer, or because their backlog or their
        /// unfinished messages took too much memory.
        ended_slow: u64,
        /// Connections ended because the client exceeded its rate limit.
        ended_rate_limited: u64,
        /// Connections ended because their handler, or the encoding of a message for them, panicked.
        ended_panic: u64,
        /// Outcomes of the frames that were offered to connections, including connections that have ended.
        tally: Tally,
        /// Bytes that wait in outboxes or are in bridges; a frame counts once for each connection. A gauge.
        pending_bytes: u64,
        /// Bytes that outboxes keep in memory; a frame for many connections counts once for each shard. A gauge.
        retained_bytes: u64,
        /// Bytes of memory for messages that are incomplete or wait for their handler. A gauge.
        unfinished_bytes: u64,
        /// Writes to sockets.
        writes: u64,
        /// Bytes given to the kernel; on a [bridge](crate::Socket::bridge), passed on.
        bytes_written: u64,
        /// Publications read from the log.
        publications: u64,
        /// Turns of the loop.
        turns: u64,
        /// Times that another thread woke the shard from its sleep, for a publication, a command or a handler that
        /// was resumed. Each costs both threads a system call.
        wakes: u64,
        /// Loop lag in microseconds: the duration of the longest recent turn, less an eighth for each turn
        /// since, or the duration of the current turn so far, if that is more. A gauge; the sum over shards
        /// says little. Stays 0 where the caller drives the shards.
        lag_micros: u64,
        /// Handler calls that blocked their shard for longer than
        /// [`EngineConfig::blocked_after`](crate::EngineConfig): each counts once, while it is still running.
        /// Stays 0 where the caller drives the shards.
        blocked: u64,
    }
}

/// A shard's counters as other threads see them.
#[derive(Debug, Default)]
pub(crate) struct PublishedMetrics(CachePadded<SharedMetrics>);

impl PublishedMetrics {
    /// Called only by the shard that owns them, once per turn.
    pub(crate) fn publish(&self, metrics: &Metrics) {
        metrics.store(&self.0);
    }

    pub(crate) fn read(&self) -> Metrics {
        Metrics::load(&self.0)
    }
}

/// The counters of one connection.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ConnectionMetrics {
    /// Outcomes of the frames that were offered to it.
    pub tally: Tally,
    /// Bytes that wait in its outbox or are in its bridge.
    pub pending_bytes: u64,
    /// Round-trip times of its pings.
    pub rtt: Rtt,
}

/// The sum of the counters of a group's or a whole namespace's connections.
///
/// For a group: its current members, each with its counters since it connected. For everyone: all connections
/// since the start, including those that have ended.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct GroupMetrics {
    /// Open connections; for everyone, including those in their closing handshake.
    pub connections: u64,
    /// Outcomes of the frames that were offered to them.
    pub tally: Tally,
    /// Bytes that wait in their outboxes or are in their bridges.
    pub pending_bytes: u64,
    /// The highest of the connections' average round trips; none before the first pong.
    pub rtt_highest: Option<Duration>,
    #[cfg_attr(feature = "serde", serde(skip))]
    rtt_sum: Duration,
    #[cfg_attr(feature = "serde", serde(skip))]
    rtt_count: u64,
}

impl GroupMetrics {
    /// The mean of the connections' average round trips; none before the first pong.
    pub fn rtt_average(&self) -> Option<Duration> {
        (self.rtt_count > 0).then(|| self.rtt_sum.div_f64(self.rtt_count as f64))
    }
}

impl From<ConnectionMetrics> for GroupMetrics {
    fn from(one: ConnectionMetrics) -> Self {
        Self {
            connections: 1,
            tally: one.tally,
            pending_bytes: one.pending_bytes,
            rtt_highest: one.rtt.average,
            rtt_sum: one.rtt.average.unwrap_or_default(),
            rtt_count: one.rtt.average.is_some().into(),
        }
    }
}

impl std::ops::AddAssign for GroupMetrics {
    fn add_assign(&mut self, other: Self) {
        self.connections += other.connections;
        self.tally += other.tally;
        self.pending_bytes += other.pending_bytes;
        self.rtt_highest = self.rtt_highest.max(other.rtt_highest);
        self.rtt_sum += other.rtt_sum;
        self.rtt_count += other.rtt_count;
    }
}

/// The sum of the ended connections of one namespace on one shard. Written only by that shard.
#[derive(Debug, Default)]
pub(crate) struct EndedTally(CachePadded<SharedTally>);

impl EndedTally {
    pub(crate) fn add(&self, tally: Tally) {
        tally::add::<Tally>(&self.0, tally);
    }

    pub(crate) fn sum(&self) -> GroupMetrics {
        GroupMetrics { tally: Tally::load(&self.0), ..GroupMetrics::default() }
    }
}

/// The counters of an open connection. Not a `Tally`, because most connections lose nothing.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) offered: u64,
    pub(crate) written: u64,
    pub(crate) received: u64,
    losses: Option<Box<Losses>>,
}

/// The counters of a connection's lost frames.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    pub(crate) dropped: Drops,
    pub(crate) discarded: u64,
    /// Consecutive drops: frames dropped since one was last accepted.
    pub(crate) in_a_row: u32,
    /// The drops that were not yet reported to the handler.
    pub(crate) notices: DropNotices,
}

impl Counts {
    pub(crate) fn tally(&self) -> Tally {
        let Self { offered, written, received, .. } = *self;
        let (dropped, discarded) =
            self.losses.as_ref().map_or_else(Default::default, |losses| (losses.dropped, losses.discarded));
        Tally { offered, written, dropped, discarded, received, ..Tally::default() }
    }

    #[cfg(feature = "audit")]
    pub(crate) fn losses(&self) -> Option<&Losses> {
        self.losses.as_deref()
    }

    pub(crate) fn lose(&mut self) -> &mut Losses {
        self.losses.get_or_insert_default()
    }

    /// Counts discarded frames, if there are any.
    pub(crate) fn discard(&mut self, frames: u64) {
        if frames > 0 {
            self.lose().discarded += frames;
        }
    }

    /// A frame was accepted, which ends the row of consecutive drops.
    #[inline]
    pub(crate) fn took(&mut self) {
        if let Some(losses) = &mut self.losses {
            losses.in_a_row = 0;
        }
    }

    /// Takes the oldest drops that were not yet reported to the handler.
    pub(crate) fn take_drop_notice(&mut self) -> Option<DropNotice> {
        self.losses.as_mut()?.notices.take_first()
    }
}
