//! Counters: what was offered, written, discarded, and why connections ended.
//!
//! Each shard owns its counters and adds to them without sharing; once per turn it
//! publishes them, so that a reader on another thread costs the loop nothing. They add
//! up: offered = written + dropped + discarded + pending, for a connection and for their sum.

use std::time::Duration;

use crossbeam_utils::CachePadded;

use crate::drop_notice::{DropNotice, DropNotices};
use crate::heartbeat::Rtt;
use crate::tally::{self, Counter, Drops, SharedTally, Tally, counters};

counters! {
    /// What one shard, or the whole engine, has counted since its start. All in frames or
    /// events, except gauges, which say what is there now.
    pub struct Metrics, shared as SharedMetrics {
        /// Connections that are here now, those in their closing handshake included.
        connections: u64,
        /// Connections taken over since the start.
        adopted: u64,
        /// Connections that ended.
        ended: u64,
        /// Connections ended because the peer broke the framing rules or sent too many control frames, or because they
        /// joined too many groups.
        ended_protocol: u64,
        /// Connections ended because a message could not be decoded.
        ended_undecodable: u64,
        /// Connections ended because they stopped answering pings, fell idle or grew too old.
        ended_timeout: u64,
        /// Connections ended because the peer was slow, or what waited for it or came from it took too much memory.
        ended_slow: u64,
        /// Connections ended because their handler, or the encoding of a message for them, panicked.
        ended_panic: u64,
        /// What became of the frames that were meant for connections, those that have ended included.
        tally: Tally,
        /// Bytes that wait in outboxes now; a frame counts once for each connection.
        pending_bytes: u64,
        /// Bytes that outboxes keep in memory now. What is sent to many counts once for each shard.
        retained_bytes: u64,
        /// Bytes of memory for messages that are incomplete or wait for their handler now.
        unfinished_bytes: u64,
        /// Writes to sockets.
        writes: u64,
        /// Bytes given to the kernel.
        bytes_written: u64,
        /// Publications read from the log.
        publications: u64,
        /// Turns of the loop.
        turns: u64,
        /// Loop lag in microseconds: what the longest of the last turns took, less an eighth for each turn since, or what
        /// the turn that goes on now has taken, if that is more. A gauge; the sum over shards says little. Stays 0 where
        /// shards are driven by hand.
        lag_micros: u64,
        /// Calls of handlers that held their shard for longer than [`EngineConfig::blocked_after`](crate::EngineConfig):
        /// each counts once, while it goes on. Stays 0 where shards are driven by hand.
        blocked: u64,
    }
}

/// What a shard has counted, as others see it.
#[derive(Debug, Default)]
pub(crate) struct PublishedMetrics(CachePadded<SharedMetrics>);

impl PublishedMetrics {
    /// Called by the owner only, once per turn.
    pub(crate) fn publish(&self, metrics: &Metrics) {
        metrics.store(&self.0);
    }

    pub(crate) fn read(&self) -> Metrics {
        Metrics::load(&self.0)
    }
}

/// What one connection has counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ConnectionMetrics {
    /// What became of the frames that were meant for it.
    pub tally: Tally,
    /// Bytes that wait in its outbox.
    pub pending_bytes: u64,
    /// Round-trip times of its pings.
    pub rtt: Rtt,
}

/// What the connections of a group, or of a whole namespace, have counted together.
///
/// For a group: its present members, each with all that it has counted since it connected. For everyone: all
/// connections since the start, those that have ended included.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct GroupMetrics {
    /// Connections now; for everyone, those in their closing handshake included.
    pub connections: u64,
    /// What became of the frames that were meant for them.
    pub tally: Tally,
    /// Bytes that wait in their outboxes.
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

/// What the ended connections of one namespace have counted on one shard, which alone uses it.
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

/// What one connection counts while it lives. Not a `Tally`, because most connections lose nothing.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) offered: u64,
    pub(crate) written: u64,
    pub(crate) received: u64,
    losses: Option<Box<Losses>>,
}

/// What one connection has lost.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    pub(crate) dropped: Drops,
    pub(crate) discarded: u64,
    /// Frames dropped since one was last taken.
    pub(crate) in_a_row: u32,
    /// What of it the handler has not been told yet.
    pub(crate) notices: DropNotices,
}

impl Counts {
    pub(crate) fn tally(&self) -> Tally {
        let Self { offered, written, received, .. } = *self;
        let (dropped, discarded) =
            self.losses.as_ref().map_or_else(Default::default, |losses| (losses.dropped, losses.discarded));
        Tally { offered, written, dropped, discarded, received }
    }

    pub(crate) fn losses(&self) -> Option<&Losses> {
        self.losses.as_deref()
    }

    pub(crate) fn lose(&mut self) -> &mut Losses {
        self.losses.get_or_insert_default()
    }

    /// Frames were discarded, if there were any.
    pub(crate) fn discard(&mut self, frames: u64) {
        if frames > 0 {
            self.lose().discarded += frames;
        }
    }

    /// A frame was taken: later drops are a new row.
    #[inline]
    pub(crate) fn took(&mut self) {
        if let Some(losses) = &mut self.losses {
            losses.in_a_row = 0;
        }
    }

    /// Takes the oldest drops that the handler has not been told of.
    pub(crate) fn take_drop_notice(&mut self) -> Option<DropNotice> {
        self.losses.as_mut()?.notices.take_first()
    }
}
