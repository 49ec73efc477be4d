//! What happens when a peer is too slow for what is sent to it.
//!
//! Set for a connection, overridden for one publication. Plain data with ranges; the
//! outbox and the shard carry it out. Knows nothing else.

use std::time::Duration;

/// What happens to a frame for a connection whose outbox is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// It waits, and so does the publisher that awaits it, until the connection has taken it or has gone.
    #[default]
    Block,
    /// It waits at most `timeout` (0 to 1 hour; 0 means not at all), then it is dropped, counted and reported. Who
    /// publishes does not wait for that, except for a receipt.
    DropMessage {
        /// How long it waits.
        timeout: Duration,
    },
    /// As `DropMessage`; and `max_drops` (at least 1) drops with nothing taken in between end the connection (1013).
    DropConnection {
        /// How long a frame waits.
        timeout: Duration,
        /// How many consecutive drops end the connection.
        max_drops: u32,
    },
    /// It waits, though nobody waits for it; and an average round-trip time above `max_rtt` (1 ms to 1 hour, and not
    /// above the connection's `pong_timeout`) over the last `rtt_samples` (1 to 1024) pongs ends the connection (1013).
    /// Before the first pong it counts as healthy. A connection's own policy is checked with each pong and when a frame
    /// has to wait; that of a single message, when the message reaches the connection.
    DropOnHighRtt {
        /// The highest average allowed.
        max_rtt: Duration,
        /// How many pongs the average covers.
        rtt_samples: usize,
    },
}

impl Policy {
    /// Whether a publisher waits for the frames that wait.
    pub(crate) fn blocks(&self) -> bool {
        matches!(self, Self::Block)
    }

    /// How long a frame waits for room; none is for ever.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        match self {
            Self::DropMessage { timeout } | Self::DropConnection { timeout, .. } => Some(*timeout),
            Self::Block | Self::DropOnHighRtt { .. } => None,
        }
    }

    /// How many consecutive drops end the connection; 0 is never.
    pub(crate) fn max_drops(&self) -> u32 {
        match self {
            Self::DropConnection { max_drops, .. } => *max_drops,
            _ => 0,
        }
    }

    /// The highest average round trip allowed.
    pub(crate) fn max_rtt(&self) -> Option<Duration> {
        match self {
            Self::DropOnHighRtt { max_rtt, .. } => Some(*max_rtt),
            _ => None,
        }
    }

    /// The highest average round trip allowed, and how many are averaged.
    pub(crate) fn rtt_limit(&self) -> Option<(Duration, usize)> {
        Some((self.max_rtt()?, self.rtt_samples()?))
    }

    /// How many round trips are averaged.
    pub(crate) fn rtt_samples(&self) -> Option<usize> {
        match self {
            Self::DropOnHighRtt { rtt_samples, .. } => Some(*rtt_samples),
            _ => None,
        }
    }
}
