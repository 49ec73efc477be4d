//! Hubs on several nodes: one order of all messages, by a log that the nodes share.
//!
//! A *node* is a process with an engine. Nodes whose engines have a [backplane](crate::Engine::backplane) on the same log
//! are one for their hubs: a message to all reaches the clients of all nodes, in one order. The log is kept by a broker:
//! [NATS JetStream](nats) (feature `nats`) or [Redis Streams](redis) (feature `redis`, also Valkey); [memory] is for tests.
//!
//! ```no_run
//! # #[cfg(feature = "nats")]
//! # fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use shardcast::backplane::{BackplaneConfig, nats::{NatsBackplane, NatsConfig}};
//! use shardcast::{Engine, EngineConfig};
//!
//! let engine = Engine::start(EngineConfig::default())?;
//! let connect = || NatsBackplane::connect("nats://localhost", NatsConfig::default());
//! engine.backplane(connect, BackplaneConfig::default())?; // before its hubs are made
//! # Ok(())
//! # }
//! ```

// This file: what an application sets and sees, and the hubs' way into the log. `ingest.rs` is the way out of it.

mod announcer;
mod answers;
mod cluster;
mod counts;
mod entry;
mod hub_state;
mod ingest;
mod roster;

use std::time::Duration;

use shardcast_engine::ConfigError;

#[cfg(feature = "nats")]
pub use shardcast_backplane::nats;
#[cfg(feature = "redis")]
pub use shardcast_backplane::redis;
pub use shardcast_backplane::{
    Backplane, Connection, Error, Gap, GapCause, InvalidNodeId, NodeId, Position, Reader, Record, Start,
    memory,
};

pub use cluster::{BackplaneMetrics, BackplaneState};
pub(crate) use cluster::{Cluster, ClusterError, Hooks, HubLink, Outgoing, TrySent};
pub(crate) use entry::{Command, Content, Published};

/// How a node takes part, and what happens while the broker cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackplaneConfig {
    /// What a publisher gets while the broker cannot be reached. Default: [`OutagePolicy::Wait`].
    pub outage: OutagePolicy,
    /// For how long at most a publisher waits until its message was appended to the log and read back by this node: 10 ms
    /// to 1 hour. Then it gets [`BackplaneError::Unavailable`]; the message may still be delivered later. Default: 5 s.
    pub publish_timeout: Duration,
    /// For how long at most [`deliver`](crate::Target::deliver) waits for the answers of other nodes, once this node has
    /// read the message: 10 ms to 1 hour. Default: 15 s, which is longer than a client may stall.
    pub answer_timeout: Duration,
    /// How often this node says that it is alive, and how many clients it has if that has changed: 100 ms to 1 minute.
    /// Default: 1 s.
    pub heartbeat_interval: Duration,
    /// After how long a silence a node counts as gone: at least three times the interval, at most 1 hour. Only time
    /// counts during which this node could read the log. Default: 5 s.
    pub node_timeout: Duration,
    /// For how long the users of a node that has left or is gone still count as present, so that they can come back on
    /// another node without being seen to leave: 0 to 1 hour. Default: 5 s.
    pub absent_users_timeout: Duration,
    /// Bytes of messages in one record of the log: 1 KiB to 16 MiB. A longer message has a record of its own. Default:
    /// 64 KiB.
    pub batch_bytes_max: usize,
    /// Bytes of messages that wait to be appended or to be read back: 64 KiB to 4 GiB. Beyond it publishers wait. Default:
    /// 16 MiB.
    pub queue_bytes_max: usize,
}

impl Default for BackplaneConfig {
    fn default() -> Self {
        Self {
            outage: OutagePolicy::default(),
            publish_timeout: Duration::from_secs(5),
            answer_timeout: Duration::from_secs(15),
            heartbeat_interval: Duration::from_secs(1),
            node_timeout: Duration::from_secs(5),
            absent_users_timeout: Duration::from_secs(5),
            batch_bytes_max: 64 << 10,
            queue_bytes_max: 16 << 20,
        }
    }
}

impl BackplaneConfig {
    /// Checks the settings.
    ///
    /// # Errors
    /// The first one that is out of range, by name.
    pub fn validate(&self) -> Result<(), ConfigError> {
        const MILLIS_10: Duration = Duration::from_millis(10);
        const HOUR: Duration = Duration::from_secs(3600);
        ConfigError::check("publish_timeout", self.publish_timeout, MILLIS_10, HOUR)?;
        ConfigError::check("answer_timeout", self.answer_timeout, MILLIS_10, HOUR)?;
        let interval = self.heartbeat_interval;
        ConfigError::check(
            "heartbeat_interval",
            interval,
            Duration::from_millis(100),
            Duration::from_secs(60),
        )?;
        ConfigError::check("node_timeout", self.node_timeout, 3 * interval, HOUR)?;
        ConfigError::check("absent_users_timeout", self.absent_users_timeout, Duration::ZERO, HOUR)?;
        ConfigError::check("batch_bytes_max", self.batch_bytes_max, 1 << 10, 16 << 20)?;
        ConfigError::check("queue_bytes_max", self.queue_bytes_max, 64 << 10, u32::MAX as usize)
    }
}

/// What a publisher gets while the broker cannot be reached.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum OutagePolicy {
    /// It waits for the broker, for [`publish_timeout`](BackplaneConfig::publish_timeout) at most.
    #[default]
    Wait,
    /// It gets [`BackplaneError::Unavailable`] at once.
    Fail,
    /// The message goes to the clients of this node only; other nodes never get it. A message that was on its way when
    /// the connection was lost waits as under `Wait`.
    ThisNode,
}

/// A message was not passed to the other nodes.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BackplaneError {
    /// The broker cannot be reached, or did not take the message in time. It may still be delivered, if the broker has it
    /// or comes back.
    #[error(
        "the broker cannot be reached or is too slow: the message may still be delivered; see `OutagePolicy`"
    )]
    Unavailable,
    /// Encoded, the message is longer than what the broker takes.
    #[error(
        "a message of {len} bytes is longer than {max}, which is what the broker takes: send it in parts, or raise its limit"
    )]
    TooLong {
        /// Its length in bytes, with what a node adds.
        len: usize,
        /// The longest that is taken.
        max: usize,
    },
    /// The broker refuses it, for the reason given: a missing permission, for instance.
    #[error("the broker refuses the message: {0}")]
    Refused(String),
    /// This node does not take part any more: its engine has ended, or the broker refuses to be read
    /// ([`BackplaneState::Failed`]).
    #[error("this node has left the other nodes")]
    Left,
}

/// [`Engine::backplane`](crate::Engine::backplane) was not possible.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackplaneStartError {
    /// A setting is out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It was not called on a tokio runtime.
    #[error("a backplane needs a tokio runtime: call this within one")]
    NoRuntime,
    /// The engine has one already.
    #[error("the engine has a backplane already")]
    AlreadySet,
}

/// Messages that this node has missed: see [`WsHub::on_gap`](crate::WsHub::on_gap).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MissedMessages {
    /// Why.
    pub cause: MissedCause,
}

/// Why a node has missed messages of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MissedCause {
    /// The broker has dropped them before this node could read them: it was away for longer, or too slow for longer, than
    /// the broker keeps them.
    Retention,
    /// The broker has lost a part of the log, such as by a restart without storage.
    BrokerLoss,
}
