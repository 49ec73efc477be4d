//! What can be set for a hub, with its unit, default and range.
//!
//! Read when a hub is made. The engine's part is handed on to the engine, which checks
//! its ranges. Does not know connections.

use std::time::Duration;

use shardcast_engine::ConnectionConfig;
pub use shardcast_engine::{ConfigError, EngineConfig};

/// What holds for the connections of a hub. All fields have defaults:
///
/// ```
/// # use shardcast::WsHubConfig;
/// let config = WsHubConfig { max_message_bytes: 1 << 20, ..WsHubConfig::default() };
/// assert!(config.validate().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct WsHubConfig {
    /// What happens when a client is too slow for what is sent to it. Default: [`BroadcastPolicy::Block`].
    pub policy: BroadcastPolicy,
    /// Frames that are kept for a client that reads too slowly: 1 to 16,777,216. Default: 1024. Beyond it the
    /// policy decides.
    pub outbox_frames: usize,
    /// Bytes that are kept, likewise: 1 KiB to 1 GiB. Default: 1 MiB.
    pub outbox_bytes: usize,
    /// Frames that may wait for room there: 0 to 16,777,216. Default: 65,536. At the limit the connection ends
    /// as a slow consumer (1013).
    pub waiting_frames: usize,
    /// Bytes of one incoming message, all its fragments together: 1 to 1 GiB. Default: 64 KiB. A longer one ends
    /// the connection (1009).
    pub max_message_bytes: usize,
    /// Fragments of one incoming message: 1 to 16,777,216. Default: 1024. More end the connection (1008).
    pub max_fragments: u32,
    /// Time between two pings: 10 ms to 1 day. Default: 15 s.
    pub heartbeat_interval: Duration,
    /// Time within which a ping must be answered: 10 ms to 1 day. Default: 10 s. After it the client counts as
    /// dead (1011).
    pub pong_timeout: Duration,
    /// Time without any frame from the client, pongs included: 10 ms to 1 year, or none. Default: none. After it the
    /// connection ends (1001).
    pub idle_timeout: Option<Duration>,
    /// How long a connection may live: 10 ms to 1 year, or none. Default: none. After it the connection ends (1012).
    pub max_connection_duration: Option<Duration>,
    /// Time for the closing handshake, what is still to be sent included: 10 ms to 1 hour. Default: 5 s. After it the
    /// socket is dropped.
    pub close_timeout: Duration,
    /// Where the hub's methods run. Default: [`RunOn::Shard`].
    pub run_on: RunOn,
}

/// What happens when a client's outbox is full.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum BroadcastPolicy {
    /// The message waits, and so does who sent it, until every client has taken it or has gone. Nothing is lost.
    Block,
    /// The message waits at most `timeout`, then it is dropped for this client.
    DropMessage {
        /// How long it waits.
        timeout: Duration,
    },
    /// As [`DropMessage`](Self::DropMessage); `max_drops` drops in a row end the connection (1013).
    DropConnection {
        /// How long a message waits.
        timeout: Duration,
        /// How many consecutive drops end the connection.
        max_drops: u32,
    },
    /// A connection whose average round-trip time over the last `rtt_samples` pings is above `max_rtt` ends (1013).
    /// Before the first pong it counts as healthy.
    DropOnHighRtt {
        /// The highest average round-trip time allowed.
        max_rtt: Duration,
        /// How many pings the average covers.
        rtt_samples: usize,
    },
}

/// Where the methods of a hub run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RunOn {
    /// On the connection's shard, at once. Best for what awaits and computes little: nothing changes threads.
    /// A method that computes for a millisecond holds up the shard's other connections for as long.
    #[default]
    Shard,
    /// On the tokio runtime, as a task. For hubs that compute for long; costs two changes of thread per message.
    /// A connection's messages are still handled one after the other, in order.
    Runtime,
}

impl Default for WsHubConfig {
    fn default() -> Self {
        let engine = ConnectionConfig::default();
        Self {
            policy: BroadcastPolicy::Block,
            outbox_frames: engine.outbox_frames,
            outbox_bytes: engine.outbox_bytes,
            waiting_frames: engine.waiting_frames,
            max_message_bytes: engine.max_message_bytes,
            max_fragments: engine.max_fragments,
            heartbeat_interval: engine.heartbeat_interval,
            pong_timeout: engine.pong_timeout,
            idle_timeout: engine.idle_timeout,
            max_connection_duration: engine.max_connection_duration,
            close_timeout: engine.close_timeout,
            run_on: RunOn::Shard,
        }
    }
}

impl WsHubConfig {
    /// Checks every field against its range.
    ///
    /// # Errors
    /// The first field that is out of range, by name; a policy that this version does not carry out.
    pub fn validate(&self) -> Result<(), HubConfigError> {
        self.connection_config().map(drop)
    }

    /// The engine's part, checked.
    pub(crate) fn connection_config(&self) -> Result<ConnectionConfig, HubConfigError> {
        let unsupported = |policy| Err(HubConfigError::UnsupportedPolicy { policy });
        match self.policy {
            BroadcastPolicy::Block => {}
            BroadcastPolicy::DropMessage { .. } => return unsupported("DropMessage"),
            BroadcastPolicy::DropConnection { .. } => return unsupported("DropConnection"),
            BroadcastPolicy::DropOnHighRtt { .. } => return unsupported("DropOnHighRtt"),
        }
        let config = ConnectionConfig {
            outbox_frames: self.outbox_frames,
            outbox_bytes: self.outbox_bytes,
            waiting_frames: self.waiting_frames,
            max_message_bytes: self.max_message_bytes,
            max_fragments: self.max_fragments,
            heartbeat_interval: self.heartbeat_interval,
            pong_timeout: self.pong_timeout,
            idle_timeout: self.idle_timeout,
            max_connection_duration: self.max_connection_duration,
            close_timeout: self.close_timeout,
        };
        config.validate()?;
        Ok(config)
    }
}

/// A hub cannot be made with these settings.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HubConfigError {
    /// A setting is out of range.
    #[error(transparent)]
    Range(#[from] ConfigError),
    /// The policy is not carried out by this version of the library; use `BroadcastPolicy::Block`.
    #[error("`policy` is {policy}, which this version does not carry out yet: use Block")]
    UnsupportedPolicy {
        /// The policy's name.
        policy: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_impossible_setting_is_named() {
        let config = WsHubConfig { outbox_frames: 0, ..WsHubConfig::default() };
        let error = config.validate().unwrap_err();
        assert_eq!(error.to_string(), "`outbox_frames` is 0, but must be from 1 to 16777216");
    }

    #[test]
    fn a_policy_that_is_not_there_is_refused_instead_of_ignored() {
        let policy = BroadcastPolicy::DropMessage { timeout: Duration::from_millis(100) };
        let error = WsHubConfig { policy, ..WsHubConfig::default() }.validate().unwrap_err();
        assert!(error.to_string().contains("DropMessage"));
    }
}
