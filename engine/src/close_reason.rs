//! Why a connection ended: one reason for each end.
//!
//! Decided once, by its shard, and handed to the handler. The reason also fixes what the
//! peer is told: the close code, or nothing where nobody is left to read it. Knows close
//! codes and framing errors. Does not know how the end is carried out.

use std::borrow::Cow;

use crate::close_code::CloseCode;
use crate::frame::FrameError;

/// Why a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// The peer began the closing handshake.
    #[error("the peer closed the connection with {}: {text:?}", code.unwrap_or(CloseCode::NO_STATUS))]
    Peer {
        /// The code in the peer's Close frame; none if the frame was empty.
        code: Option<CloseCode>,
        /// The reason in the peer's Close frame, at most 123 bytes; often empty.
        text: Box<str>,
    },
    /// The peer's end of the stream came without a Close frame.
    #[error("the peer ended the stream without a Close frame")]
    Disconnected,
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Transport(std::io::ErrorKind),
    /// The peer broke the framing rules.
    #[error("the peer broke the protocol: {0}")]
    Protocol(#[from] FrameError),
    /// A message's payload made no sense to the application's codec (1007).
    #[error("a message could not be decoded")]
    Undecodable,
    /// A message came in a kind of frame that the application's codec does not take (1003).
    #[error("a message came in the wrong kind of frame")]
    WrongKind,
    /// No answer to a ping within the pong timeout.
    #[error("no pong within the timeout")]
    PongTimeout,
    /// No frame from the peer within the idle timeout.
    #[error("nothing received within the idle timeout")]
    IdleTimeout,
    /// The connection reached its maximum duration.
    #[error("the maximum duration was reached")]
    MaxDuration,
    /// The peer took nothing for [`stall_timeout`](crate::ConnectionConfig::stall_timeout) while something waited for
    /// it, or more frames waited for it than may.
    #[error("a slow consumer: it took nothing for too long, or too much waited for it")]
    SlowConsumer,
    /// Too many frames in a row had to be dropped for this peer.
    #[error("too many frames in a row were dropped for a slow consumer")]
    TooManyDrops,
    /// The peer's average round-trip time was too high.
    #[error("the average round-trip time was too high")]
    HighRtt,
    /// All backlogs together had grown too large, and this one was among the largest.
    #[error("shed for its large backlog")]
    BacklogLimit,
    /// The messages of all connections that were incomplete or waited for their handler took too much memory, and this
    /// connection's were among the largest.
    #[error("shed for its large unfinished message")]
    UnfinishedLimit,
    /// The connection joined more groups than [`max_groups`](crate::ConnectionConfig::max_groups).
    #[error("the connection joined too many groups")]
    TooManyGroups,
    /// The peer sent too many control frames.
    #[error("too many control frames within a second")]
    ControlFlood,
    /// The application closed the connection.
    #[error("closed by the application with {code}")]
    Application {
        /// The code sent to the peer.
        code: CloseCode,
        /// The reason sent to the peer; at most 123 bytes of it.
        text: Cow<'static, str>,
    },
    /// A message could not be brought into the connection's encoding (1011): the encoding panicked.
    #[error("a message could not be brought into the connection's encoding")]
    RenderFailed,
    /// The handler panicked (1011).
    #[error("the handler panicked")]
    HandlerPanicked,
    /// The engine is shutdown.
    #[error("the engine is stopping")]
    Shutdown {
        /// The code sent to the peer: 1001 or 1012.
        code: CloseCode,
    },
}

/// As a map: its `name`, the `code` that it has in a Close frame (or none), and its `text` as it is displayed.
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
    /// A short name, the same for all of a kind: for a label in metrics.
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
            Self::ControlFlood => "control_flood",
            Self::Application { .. } => "application",
            Self::RenderFailed => "render_failed",
            Self::HandlerPanicked => "handler_panicked",
            Self::Shutdown { .. } => "shutdown",
        }
    }

    /// What the Close frame says, or `None` where no Close frame is sent: the peer is not there to read it.
    /// [`CloseCode::NO_STATUS`] means a Close frame without a code, the answer to a peer's Close frame without one.
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
            Self::ControlFlood => (CloseCode::POLICY_VIOLATION, "too many control frames"),
            Self::Application { code, text } => (*code, &**text),
            Self::RenderFailed | Self::HandlerPanicked => (CloseCode::INTERNAL_ERROR, ""),
            Self::Shutdown { code } => (*code, ""),
        };
        Some((code, text.into()))
    }

    /// Whether the peer may sensibly come back, at once or after a while: the end was the network's, the
    /// server's or the hour's doing, not a fault in what the peer says.
    pub fn should_reconnect(&self) -> bool {
        match self {
            Self::Protocol(_) | Self::Undecodable | Self::WrongKind => false,
            Self::ControlFlood | Self::TooManyGroups => false,
            Self::Peer { code, .. } => code.is_none_or(|code| code != CloseCode::NORMAL),
            Self::Application { code, .. } => code.should_reconnect(),
            _ => true,
        }
    }

    /// Whether what is already queued for the peer goes out before the end.
    ///
    /// Not where the peer has been slow or silent: it would only delay the end.
    pub(crate) fn flushes_first(&self) -> bool {
        let is_slow =
            matches!(self, Self::SlowConsumer | Self::TooManyDrops | Self::HighRtt | Self::BacklogLimit);
        let is_silent = matches!(self, Self::PongTimeout | Self::Transport(_));
        !is_slow && !is_silent
    }

    /// Whether the end came with the peer's input: then the messages before it are still handled.
    pub(crate) fn is_in_input(&self) -> bool {
        let is_gone = matches!(self, Self::Peer { .. } | Self::Disconnected | Self::Transport(_));
        is_gone || matches!(self, Self::Protocol(_) | Self::ControlFlood)
    }
}
