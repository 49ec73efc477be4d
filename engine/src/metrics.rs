//! Counters: what was offered, written, discarded, and why connections ended.
//!
//! Each shard owns its counters and adds to them without sharing; once per turn it
//! publishes them, so that a reader on another thread costs the loop nothing. They add
//! up: offered = written + dropped + discarded + pending, for a connection and for their sum.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crossbeam_utils::CachePadded;

use crate::heartbeat::Rtt;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What one shard, or the whole engine, has counted since its start. All in frames or
        /// events, except gauges, which say what is there now.
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Metrics { $($(#[$doc])* pub $name: u64,)* }

        impl std::ops::AddAssign for Metrics {
            fn add_assign(&mut self, other: Self) {
                $(self.$name += other.$name;)*
            }
        }

        #[derive(Debug, Default)]
        struct Published { $($name: AtomicU64,)* }

        impl PublishedMetrics {
            /// Called by the owner only, once per turn.
            pub(crate) fn publish(&self, metrics: &Metrics) {
                // Relaxed: each counter stands alone; a reader wants recent values, not one instant.
                $(self.0.$name.store(metrics.$name, Relaxed);)*
            }

            pub(crate) fn read(&self) -> Metrics {
                Metrics { $($name: self.0.$name.load(Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Connections that are here now, those in their closing handshake included.
    connections,
    /// Connections taken over since the start.
    adopted,
    /// Connections that ended.
    ended,
    /// Connections ended because the peer broke the framing rules or sent too many control frames, or because they
    /// joined too many groups.
    ended_protocol,
    /// Connections ended because a message could not be decoded.
    ended_undecodable,
    /// Connections ended because they stopped answering pings, fell idle or grew too old.
    ended_timeout,
    /// Connections ended because the peer was slow, or what waited for it or came from it took too much memory.
    ended_slow,
    /// Connections ended because their handler panicked.
    ended_panic,
    /// Frames meant for a connection.
    offered,
    /// Frames given to the kernel whole.
    written,
    /// Frames dropped because they had waited as long as they may.
    dropped_timeout,
    /// Frames dropped at once: by their policy they may not wait, or no more may.
    dropped_overflow,
    /// Frames that had not been written when their connection ended.
    discarded,
    /// Frames that wait in outboxes now.
    pending,
    /// Bytes that wait in outboxes now; a frame counts once for each connection.
    pending_bytes,
    /// Bytes that outboxes keep in memory now. What is sent to many counts once for each shard.
    retained_bytes,
    /// Bytes of memory for messages that are incomplete or wait for their handler now.
    unfinished_bytes,
    /// Writes to sockets.
    writes,
    /// Bytes given to the kernel.
    bytes_written,
    /// Messages handed to handlers.
    received,
    /// Publications read from the log.
    publications,
    /// Turns of the loop.
    turns,
    /// Loop lag in microseconds: what the longest of the last turns took, less an eighth for each turn since, or what
    /// the turn that goes on now has taken, if that is more. A gauge; the sum over shards says little. Stays 0 where
    /// shards are driven by hand.
    lag_micros,
    /// Calls of handlers that held their shard for longer than [`EngineConfig::blocked_after`](crate::EngineConfig):
    /// each counts once, while it goes on. Stays 0 where shards are driven by hand.
    blocked,
}

#[derive(Debug, Default)]
pub(crate) struct PublishedMetrics(CachePadded<Published>);

/// What one connection has counted. Offered = written + dropped (by cause) + discarded + pending.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionMetrics {
    /// Frames meant for this connection.
    pub offered: u64,
    /// Frames given to the kernel whole.
    pub written: u64,
    /// Frames dropped because they had waited as long as they may.
    pub dropped_timeout: u64,
    /// Frames dropped at once: by their policy they may not wait, or no more may.
    pub dropped_overflow: u64,
    /// Frames that had not been written when it ended.
    pub discarded: u64,
    /// Frames that wait in its outbox.
    pub pending: u64,
    /// Their bytes.
    pub pending_bytes: u64,
    /// Messages received from the peer and handed to the handler.
    pub received: u64,
    /// Round-trip times of its pings.
    pub rtt: Rtt,
}

/// What the connections of a group, or of a whole namespace, have counted together.
///
/// For a group: its present members, each with all that it has counted since it connected. For everyone: all
/// connections since the start, those that have ended included.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupMetrics {
    /// Connections now; for everyone, those in their closing handshake included.
    pub connections: u64,
    /// Frames meant for them.
    pub offered: u64,
    /// Frames given to the kernel whole.
    pub written: u64,
    /// Frames dropped because they had waited as long as they may.
    pub dropped_timeout: u64,
    /// Frames dropped at once: by their policy they may not wait, or no more may.
    pub dropped_overflow: u64,
    /// Frames that had not been written when their connection ended.
    pub discarded: u64,
    /// Frames that wait in their outboxes.
    pub pending: u64,
    /// Their bytes.
    pub pending_bytes: u64,
    /// Messages received and handed to handlers.
    pub received: u64,
    /// The highest of the connections' average round trips; none before the first pong.
    pub rtt_highest: Option<Duration>,
    rtt_sum: Duration,
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
            offered: one.offered,
            written: one.written,
            dropped_timeout: one.dropped_timeout,
            dropped_overflow: one.dropped_overflow,
            discarded: one.discarded,
            pending: one.pending,
            pending_bytes: one.pending_bytes,
            received: one.received,
            rtt_highest: one.rtt.average,
            rtt_sum: one.rtt.average.unwrap_or_default(),
            rtt_count: one.rtt.average.is_some().into(),
        }
    }
}

impl std::ops::AddAssign for GroupMetrics {
    fn add_assign(&mut self, other: Self) {
        self.connections += other.connections;
        self.offered += other.offered;
        self.written += other.written;
        self.dropped_timeout += other.dropped_timeout;
        self.dropped_overflow += other.dropped_overflow;
        self.discarded += other.discarded;
        self.pending += other.pending;
        self.pending_bytes += other.pending_bytes;
        self.received += other.received;
        self.rtt_highest = self.rtt_highest.max(other.rtt_highest);
        self.rtt_sum += other.rtt_sum;
        self.rtt_count += other.rtt_count;
    }
}

/// What the ended connections of one namespace have counted on one shard.
#[derive(Debug, Default)]
pub(crate) struct EndedCounts(CachePadded<Ended>);

#[derive(Debug, Default)]
struct Ended {
    offered: AtomicU64,
    written: AtomicU64,
    dropped_timeout: AtomicU64,
    dropped_overflow: AtomicU64,
    discarded: AtomicU64,
    received: AtomicU64,
}

impl EndedCounts {
    /// Called by the shard only.
    pub(crate) fn add(&self, counts: &Counts) {
        // Relaxed, load and store: written by one thread, and read by the same.
        let add = |sum: &AtomicU64, count: u64| sum.store(sum.load(Relaxed) + count, Relaxed);
        let Losses { dropped_timeout, dropped_overflow, discarded, .. } = counts.losses();
        add(&self.0.offered, counts.offered);
        add(&self.0.written, counts.written);
        add(&self.0.dropped_timeout, dropped_timeout);
        add(&self.0.dropped_overflow, dropped_overflow);
        add(&self.0.discarded, discarded);
        add(&self.0.received, counts.received);
    }

    /// Called by the shard only.
    pub(crate) fn sum(&self) -> GroupMetrics {
        let Ended { offered, written, dropped_timeout, dropped_overflow, discarded, received } = &*self.0;
        GroupMetrics {
            offered: offered.load(Relaxed), // Relaxed: as above
            written: written.load(Relaxed),
            dropped_timeout: dropped_timeout.load(Relaxed),
            dropped_overflow: dropped_overflow.load(Relaxed),
            discarded: discarded.load(Relaxed),
            received: received.load(Relaxed),
            ..GroupMetrics::default()
        }
    }
}

/// What one connection counts while it lives.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) offered: u64,
    pub(crate) written: u64,
    pub(crate) received: u64,
    /// Boxed, because most connections lose nothing.
    losses: Option<Box<Losses>>,
}

/// What one connection has lost.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Losses {
    pub(crate) dropped_timeout: u64,
    pub(crate) dropped_overflow: u64,
    pub(crate) discarded: u64,
    /// Frames dropped since one was last taken.
    pub(crate) in_a_row: u32,
    /// Frames dropped that the handler has not been told of.
    pub(crate) untold: u32,
}

impl Counts {
    pub(crate) fn losses(&self) -> Losses {
        self.losses.as_deref().copied().unwrap_or_default()
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

    /// Takes the number of drops that the handler has not been told of: it is told now.
    pub(crate) fn tell_drops(&mut self) -> u32 {
        self.losses.as_mut().map_or(0, |losses| std::mem::take(&mut losses.untold))
    }
}
