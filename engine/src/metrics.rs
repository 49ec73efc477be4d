//! Counters: what was offered, written, discarded, and why connections ended.
//!
//! Each shard owns its counters and adds to them without sharing; once per turn it
//! publishes them, so that a reader on another thread costs the loop nothing. They add
//! up: offered = written + dropped + discarded + pending, for a connection and for their sum.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use crossbeam_utils::CachePadded;

use crate::heartbeat::Rtt;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What one shard, or the whole engine, has counted since its start. All in frames or
        /// events, but for the gauges `connections` and `pending`.
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
    /// Connections ended because the peer broke the framing rules.
    ended_protocol,
    /// Connections ended because a message could not be decoded.
    ended_undecodable,
    /// Connections ended because they stopped answering pings, fell idle or grew too old.
    ended_timeout,
    /// Connections ended because too much waited for them.
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
    /// Loop lag in microseconds: what the longest of the last turns took, less an eighth for each turn since. A gauge;
    /// the sum over shards says little. Stays 0 where shards are driven by hand.
    lag_micros,
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

/// What one connection counts while it lives.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Counts {
    pub(crate) offered: u64,
    pub(crate) written: u64,
    pub(crate) dropped_timeout: u32,
    pub(crate) dropped_overflow: u32,
    pub(crate) discarded: u64,
    pub(crate) received: u64,
}
