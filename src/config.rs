//! What can be set for a hub, with its unit, default and range.
//!
//! Read when a hub is made. The engine's part is handed on to the engine, which checks
//! its ranges. Does not know connections.

use std::time::Duration;

use shardcast_engine::ConnectionConfig;
pub use shardcast_engine::{ConfigError, EngineConfig, Policy as BroadcastPolicy};

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
    /// Frames that may wait for room there: 0 to 16,777,216. Default: 65,536. At the limit frames that may be
    /// dropped are dropped at once; where none may, the connection ends as a slow consumer (1013).
    pub waiting_frames: usize,
    /// Bytes that may wait for room there, likewise: 0 to 16 GiB. Default: 16 MiB. One frame of any size may
    /// wait where nothing else does.
    pub waiting_bytes: usize,
    /// How long a client may take nothing while something waits for it: 10 ms to 1 hour, or none. Default: 10 s. After
    /// it the client is ended as a slow consumer (1013), whatever it sends and whatever its method does. A client that
    /// takes one byte in this time makes progress and stays. Where the system does not tell what the client has taken
    /// (it does on Linux), progress is room for another write.
    pub stall_timeout: Option<Duration>,
    /// Bytes of one incoming message, all its fragments together: 1 to 1 GiB. Default: 64 KiB. A longer one ends
    /// the connection (1009).
    pub max_message_bytes: usize,
    /// Fragments of one incoming message: 1 to 16,777,216. Default: 1024. More end the connection (1008).
    pub max_fragments: u32,
    /// Control frames that a client may send in one second: 1 to 65,535. Default: 200. More end the connection (1008).
    pub control_frames_per_second: u16,
    /// Time between two pings: 10 ms to 1 day. Default: 15 s.
    pub heartbeat_interval: Duration,
    /// Time within which a ping must be answered, from when it was written: 10 ms to 1 day. Default: 10 s. After it
    /// the client counts as dead (1011). Every whole message, every ping and the ping's pong is an answer. The wait is
    /// prolonged by the same time, up to 250 times in a row, if meanwhile the client has taken some of what was written
    /// before the ping, or has sent at least 256 bytes of an unfinished message.
    pub pong_timeout: Duration,
    /// Time without a byte from the client, pongs included: 10 ms to 1 year, or none. Default: none. After it the
    /// connection ends (1001). Browsers answer pings whatever their page does. To end clients that send nothing, see
    /// [`message_timeout`](Self::message_timeout).
    pub idle_timeout: Option<Duration>,
    /// Time without a message from the client, for which pings and pongs do not count: 10 ms to 1 year, or none.
    /// Default: none. After it the connection ends (1001).
    pub message_timeout: Option<Duration>,
    /// How long a connection may live: 10 ms to 1 year, or none. Default: none. After it the connection ends (1012).
    /// It is up to a tenth shorter, so that clients which came together do not come back together.
    pub max_connection_duration: Option<Duration>,
    /// Groups that a connection may be in at a time: 1 to 1,048,576. Default: 10,000. A connection that joins one more
    /// is ended (1008).
    pub max_groups: usize,
    /// Time for the closing handshake, what is still to be sent included: 10 ms to 1 hour. Default: 5 s. After half of
    /// it the messages that still wait are discarded, so that the Close frame gets through; after all of it the socket
    /// is dropped.
    pub close_timeout: Duration,
    /// Where the hub's methods run. Default: [`RunOn::Shard`].
    pub run_on: RunOn,
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
            waiting_bytes: engine.waiting_bytes,
            stall_timeout: engine.stall_timeout,
            control_frames_per_second: engine.control_frames_per_second,
            max_message_bytes: engine.max_message_bytes,
            max_fragments: engine.max_fragments,
            heartbeat_interval: engine.heartbeat_interval,
            pong_timeout: engine.pong_timeout,
            idle_timeout: engine.idle_timeout,
            message_timeout: engine.message_timeout,
            max_groups: engine.max_groups,
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
    /// The first field that is out of range, by name.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.connection_config().map(drop)
    }

    /// The engine's part, checked.
    pub(crate) fn connection_config(&self) -> Result<ConnectionConfig, ConfigError> {
        let config = ConnectionConfig {
            outbox_frames: self.outbox_frames,
            outbox_bytes: self.outbox_bytes,
            waiting_frames: self.waiting_frames,
            waiting_bytes: self.waiting_bytes,
            stall_timeout: self.stall_timeout,
            policy: self.policy,
            control_frames_per_second: self.control_frames_per_second,
            max_message_bytes: self.max_message_bytes,
            max_fragments: self.max_fragments,
            heartbeat_interval: self.heartbeat_interval,
            pong_timeout: self.pong_timeout,
            idle_timeout: self.idle_timeout,
            message_timeout: self.message_timeout,
            max_groups: self.max_groups,
            max_connection_duration: self.max_connection_duration,
            close_timeout: self.close_timeout,
        };
        config.validate()?;
        Ok(config)
    }
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
    fn an_impossible_policy_is_named() {
        let policy = BroadcastPolicy::DropConnection { timeout: Duration::from_millis(100), max_drops: 0 };
        let error = WsHubConfig { policy, ..WsHubConfig::default() }.validate().unwrap_err();
        assert_eq!(error.field, "max_drops");
    }
}
