//! Why a connection ended: exactly one reason for each connection.
//!
//! Decided once, by the connection's shard, and passed to the handler. The reason also determines the Close
//! frame for the client: its code, or no frame where the client cannot read it any more. Knows close codes
//! and framing errors. Does not know how a connection is closed.

use std::borrow::Cow;

use crate::close_code::CloseCode;
use crate::frame::FrameError;

/// Why a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// The client began the closing handshake.
    #[error("the client closed the connection with {}: {text:?}", code.unwrap_or(CloseCode::NO_STATUS))]
    Peer {
        /// The code in the client's Close frame; none if the frame was empty.
        code: Option<CloseCode>,
        /// The reason in the client's Close frame, at most 123 bytes; often empty.
        text: Box<str>,
    },
    /// The client ended the stream without a Close frame.
    #[error("the client ended the stream without a Close frame")]
    Disconnected,
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Transport(std::io::ErrorKind),
    /// The client broke the framing rules.
    #[error("the client broke the protocol: {0}")]
    Protocol(#[from] FrameError),
    /// The application's codec could not decode a message (1007).
    #[error("a message could not be decoded")]
    Undecodable,
    /// A message arrived in a kind of frame that the application's codec does not accept (1003).
    #[error("a message arrived in the wrong kind of frame")]
    WrongKind,
    /// The client did not answer a ping within the pong timeout.
    #[error("no pong within the timeout")]
    PongTimeout,
    /// Nothing arrived from the client within the idle timeout.
    #[error("nothing received within the idle timeout")]
    IdleTimeout,
    /// The connection reached its maximum duration.
    #[error("the maximum duration was reached")]
    MaxDuration,
    /// The client took no byte for [`stall_timeout`](crate::ConnectionConfig::stall_timeout) while something
    /// waited for it, or more frames waited for it than its limits allow.
    #[error("a slow consumer: it took nothing for too long, or too much waited for it")]
    SlowConsumer,
    /// Too many consecutive frames were dropped for this client.
    #[error("too many consecutive frames were dropped for a slow consumer")]
    TooManyDrops,
    /// The client's average round-trip time was too high.
    #[error("the average round-trip time was too high")]
    HighRtt,
    /// All backlogs together exceeded their limit, and this connection's was among the largest.
    #[error("ended for its large backlog: all backlogs together exceeded the limit")]
    BacklogLimit,
    /// The incoming messages of all connections that were incomplete or waited for their handler exceeded
    /// their limit, and this connection's were among the largest.
    #[error("ended for its large unfinished message: all together exceeded the limit")]
    UnfinishedLimit,
    /// The connection joined more groups than [`max_groups`](crate::ConnectionConfig::max_groups).
    #[error("the connection joined too many groups")]
    TooManyGroups,
    /// The user of the connection has a newer one, and the limit is
    /// [`UserLimit::NewestWins`](crate::UserLimit::NewestWins) (1008).
    #[error("replaced by a newer connection of the same user")]
    Replaced,
    /// The client sent no first message in time (1008), where one must
    /// [open the connection](crate::NewConnection::first_message).
    #[error("no first message in time")]
    NoFirstMessage,
    /// The connection expired (1008): what had authenticated the client is valid no longer.
    #[error("the connection expired")]
    Expired,
    /// The client sent too many control frames.
    #[error("too many control frames within a second")]
    ControlFlood,
    /// The client exceeded its rate limit, and [`OverLimit::Close`](crate::OverLimit) is set.
    #[error("the client exceeded its rate limit")]
    RateLimited,
    /// The application closed the connection.
    #[error("closed by the application with {code}")]
    Application {
        /// The code sent to the client.
        code: CloseCode,
        /// The reason sent to the client; at most 123 bytes of it.
        text: Cow<'static, str>,
    },
    /// A message could not be converted to the connection's encoding (1011): the encoding's function
    /// panicked, or made a frame that is too long.
    #[error("a message could not be converted to the connection's encoding")]
    RenderFailed,
    /// The handler panicked (1011).
    #[error("the handler panicked")]
    HandlerPanicked,
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    Shutdown {
        /// The code sent to the client: 1001 or 1012.
        code: CloseCode,
    },
}

/// Serialized as a map: the `name`, the `code` of the Close frame (or none), and the `text` as displayed.
#[cfg(feature = "serde")]
impl serde::Serialize for CloseReason {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut map = serializer.serialize_struct("CloseReason", 3)?;
        map.serialize_field("name", self.name())?;
        map.serialize_field("code", &self.close_frame().map(|(code, _)| code))?;
        map.serialize_field("text", &self.to_string())?;
        map.end()
    }
}

impl CloseReason {
    /// A short name, the same for all reasons of a kind: a label for metrics.
    ///
    /// ```
    /// # use shardcast_engine::CloseReason;
    /// assert_eq!(CloseReason::SlowConsumer.name(), "slow_consumer");
    /// ```
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Peer { .. } => "peer",
            Self::Disconnected => "disconnected",
            Self::Transport(_) => "transport",
            Self::Protocol(_) => "protocol",
            Self::Undecodable => "undecodable",
            Self::WrongKind => "wrong_kind",
            Self::PongTimeout => "pong_timeout",
            Self::IdleTimeout => "idle_timeout",
            Self::MaxDuration => "max_duration",
            Self::SlowConsumer => "slow_consumer",
            Self::TooManyDrops => "too_many_drops",
            Self::HighRtt => "high_rtt",
            Self::BacklogLimit => "backlog_limit",
            Self::UnfinishedLimit => "unfinished_limit",
            Self::TooManyGroups => "too_many_groups",
            Self::Replaced => "replaced",
            Self::NoFirstMessage => "no_first_message",
            Self::Expired => "expired",
            Self::ControlFlood => "control_flood",
            Self::RateLimited => "rate_limited",
            Self::Application { .. } => "application",
            Self::RenderFailed => "render_failed",
            Self::HandlerPanicked => "handler_panicked",
            Self::Shutdown { .. } => "shutdown",
        }
    }

    /// The code and text of the Close frame, or `None` where no Close frame is sent because the client can no
    /// longer read it. [`CloseCode::NO_STATUS`] means a Close frame without a code: the answer to a client's
    /// Close frame without one.
    pub fn close_frame(&self) -> Option<(CloseCode, Cow<'_, str>)> {
        let (code, text) = match self {
            Self::Disconnected | Self::Transport(_) => return None,
            Self::Peer { code, .. } => (code.unwrap_or(CloseCode::NO_STATUS), ""),
            Self::Protocol(error) => return Some((error.close_code(), error.to_string().into())),
            Self::Undecodable => (CloseCode::INVALID_PAYLOAD, "undecodable message"),
            Self::WrongKind => (CloseCode::UNSUPPORTED_DATA, "wrong kind of message"),
            Self::PongTimeout => (CloseCode::INTERNAL_ERROR, "no pong in time"),
            Self::IdleTimeout => (CloseCode::GOING_AWAY, "idle"),
            Self::MaxDuration => (CloseCode::SERVICE_RESTART, "maximum duration"),
            Self::SlowConsumer | Self::TooManyDrops | Self::BacklogLimit => {
                (CloseCode::TRY_AGAIN_LATER, "slow consumer")
            }
            Self::HighRtt => (CloseCode::TRY_AGAIN_LATER, "round trips too slow"),
            Self::UnfinishedLimit => (CloseCode::TRY_AGAIN_LATER, "overloaded by unfinished messages"),
            Self::TooManyGroups => (CloseCode::POLICY_VIOLATION, "too many groups"),
            Self::Replaced => (CloseCode::POLICY_VIOLATION, "replaced by a newer connection"),
            Self::NoFirstMessage => (CloseCode::POLICY_VIOLATION, "no first message in time"),
            Self::Expired => (CloseCode::POLICY_VIOLATION, "expired"),
            Self::ControlFlood => (CloseCode::POLICY_VIOLATION, "too many control frames"),
            Self::RateLimited => (CloseCode::POLICY_VIOLATION, "rate limit exceeded"),
            Self::Application { code, text } => (*code, &**text),
            Self::RenderFailed | Self::HandlerPanicked => (CloseCode::INTERNAL_ERROR, ""),
            Self::Shutdown { code } => (*code, ""),
        };
        Some((code, text.into()))
    }

    /// Whether the client should reconnect, at once or after a delay: the cause was the network, the server
    /// or the load, not a fault in what the client sends.
    pub fn should_reconnect(&self) -> bool {
        match self {
            Self::Protocol(_) | Self::Undecodable | Self::WrongKind => false,
            Self::ControlFlood | Self::RateLimited | Self::TooManyGroups | Self::Replaced => false,
            Self::NoFirstMessage | Self::Expired => false,
            Self::Peer { code, .. } => code.is_none_or(|code| code != CloseCode::NORMAL),
            Self::Application { code, .. } => code.should_reconnect(),
            _ => true,
        }
    }

    /// Whether what is already queued for the client is written before the end. Not for a client that has
    /// been slow or silent: that would only delay the end.
    pub(crate) fn flushes_first(&self) -> bool {
        let is_slow =
            matches!(self, Self::SlowConsumer | Self::TooManyDrops | Self::HighRtt | Self::BacklogLimit);
        let is_silent = matches!(self, Self::PongTimeout | Self::Transport(_));
        !is_slow && !is_silent
    }

    /// Whether the end was caused by the client's input: the messages before it are still handled then.
    pub(crate) fn is_in_input(&self) -> bool {
        let has_left = matches!(self, Self::Peer { .. } | Self::Disconnected | Self::Transport(_));
        has_left || matches!(self, Self::Protocol(_) | Self::ControlFlood | Self::RateLimited)
    }
}
