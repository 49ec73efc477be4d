//! What happens when a client is a slow consumer: it takes less than is sent to it.
//!
//! Set for a connection, overridden for one publication. Plain data with ranges; the outbox and the shard
//! apply it. Does not know either of them.

use std::time::Duration;

/// What happens to a frame for a connection whose outbox is full.
///
/// With the feature `serde`, as text: `"block"`, or a map such as `{ "drop_message": { "timeout": "100ms" } }`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case", deny_unknown_fields)
)]
#[non_exhaustive]
pub enum Policy {
    /// The frame waits until the connection has accepted it or has ended, and so does a publisher that awaits
    /// it (backpressure).
    #[default]
    Block,
    /// The frame waits at most `timeout`; then it is dropped, counted and reported. A publisher does not wait
    /// for that, except for a receipt.
    DropMessage {
        /// How long a frame waits: 0 (not at all) to 1 hour.
        #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::timeout"))]
        timeout: Duration,
    },
    /// As `DropMessage`; in addition `max_drops` consecutive drops, with no frame accepted in between, end
    /// the connection (1013).
    DropConnection {
        /// How long a frame waits: 0 (not at all) to 1 hour.
        #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::timeout"))]
        timeout: Duration,
        /// How many consecutive drops end the connection, at least 1.
        max_drops: u32,
    },
    /// The frame waits, and no publisher waits for it. The connection is ended (1013) when the average round
    /// trip over the last `rtt_samples` pongs is longer than `max_rtt`. Before the first pong it counts as
    /// healthy. A connection's own policy is checked with each pong and when a frame has to wait; that of a
    /// single message, when the message reaches the connection.
    DropOnHighRtt {
        /// The highest average allowed: 1 ms to 1 hour, and at most the connection's `pong_timeout`.
        #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::max_rtt"))]
        max_rtt: Duration,
        /// How many pongs the average covers: 1 to 1024.
        rtt_samples: usize,
    },
}

impl Policy {
    /// Whether a publisher waits for frames that have no room yet.
    pub(crate) fn blocks(&self) -> bool {
        matches!(self, Self::Block)
    }

    /// How long a frame waits for room; none means without limit.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        match self {
            Self::DropMessage { timeout } | Self::DropConnection { timeout, .. } => Some(*timeout),
            Self::Block | Self::DropOnHighRtt { .. } => None,
        }
    }

    /// How many consecutive drops end the connection; 0 means none do.
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
