//! The client's errors: why connecting or sending failed, and how a connection ended.
//!
//! Plain data, made by the rest of the client and owned by the application. Knows tungstenite's errors, and keeps them
//! as causes without exposing their types. Does not know sockets or settings.

use std::{fmt, sync::Arc, time::Duration};

use http::Response;
use thiserror::Error;
use tokio_tungstenite::tungstenite;

use crate::codec::CodecError;

pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a client could not connect.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The client has an open connection.
    #[error("the client is already connected: disconnect it first")]
    AlreadyConnected,
    /// The URL, a header, a subprotocol or a setting is malformed, the handshake sets this header itself, or the URL's
    /// scheme is not supported (`wss` needs the feature `client-tls`).
    #[error("the request is invalid")]
    InvalidRequest(#[source] BoxError),
    /// The server cannot be reached.
    #[error("the server cannot be reached")]
    Unreachable(#[source] std::io::Error),
    /// The server answered the handshake with another status than 101, for example 503 with a `Retry-After` at a limit
    /// on connections. The response has its status, headers and body.
    #[error("the server refused the handshake with {}", .0.status())]
    Refused(Box<Response<Vec<u8>>>),
    /// The server's response is not a valid WebSocket handshake, or its certificate is not trusted.
    #[error("the handshake failed")]
    Handshake(#[source] BoxError),
    /// The connect timeout (10 s by default) has passed.
    #[error("the server did not answer in time")]
    TimedOut,
}

impl From<tungstenite::Error> for ClientError {
    fn from(error: tungstenite::Error) -> Self {
        match error {
            // rustls reports certificate errors this way.
            tungstenite::Error::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                Self::Handshake(error.into())
            }
            tungstenite::Error::Io(error) => Self::Unreachable(error),
            tungstenite::Error::Http(response) => {
                Self::Refused(Box::new(response.map(Option::unwrap_or_default)))
            }
            tungstenite::Error::Url(_) | tungstenite::Error::HttpFormat(_) => {
                Self::InvalidRequest(error.into())
            }
            error => Self::Handshake(error.into()),
        }
    }
}

/// Why a message was not queued. Every variant contains the message.
#[derive(Error)]
#[non_exhaustive]
pub enum SendError<S> {
    /// [`with_queue_messages`](super::HubClientBuilder::with_queue_messages) messages are queued: the server reads more
    /// slowly than the client sends.
    #[error("the queue is full: try again later")]
    Full(S),
    /// There is no open connection.
    #[error("the client is not connected: connect it first")]
    NotConnected(S),
    /// The codec refuses the message.
    #[error("the message cannot be encoded")]
    Encode {
        /// The message.
        message: S,
        /// The codec's error.
        source: CodecError,
    },
}

impl<S> SendError<S> {
    /// Whether the queue is full, so that the same message may be accepted later on this connection.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full(_))
    }

    /// Whether there is no connection: nothing is accepted before the next successful
    /// [`connect`](super::HubClient::connect).
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::NotConnected(_))
    }

    /// The message that was not sent.
    pub fn into_inner(self) -> S {
        match self {
            Self::Full(message) | Self::NotConnected(message) | Self::Encode { message, .. } => message,
        }
    }
}

/// Omits the message, which need not be `Debug`.
impl<S> fmt::Debug for SendError<S> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full(_) => formatter.write_str("Full(..)"),
            Self::NotConnected(_) => formatter.write_str("NotConnected(..)"),
            Self::Encode { source, .. } => {
                formatter.debug_struct("Encode").field("source", source).finish_non_exhaustive()
            }
        }
    }
}

/// How a client's connection ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ClientClose {
    /// The client closed, and the server answered with a Close.
    ByClient,
    /// The server closed.
    ByServer {
        /// The code of its Close frame; 1005 if it had none.
        code: u16,
        /// The reason in its Close frame; often empty.
        reason: String,
    },
    /// The client closed, and the server did not answer with a Close within the disconnect timeout (5 s by default).
    Unanswered,
    /// No byte, not even a ping, was received from the server for the silence timeout, so the server or the network has
    /// failed; see [`with_silence_timeout`](super::HubClientBuilder::with_silence_timeout).
    Silent {
        /// The silence timeout.
        timeout: Duration,
    },
    /// The server sent a message above the client's limit and was sent a Close with 1009. See
    /// [`with_message_bytes_max`](super::HubClientBuilder::with_message_bytes_max).
    TooLong {
        /// The length of the message in bytes, as far as it is known: a lower bound.
        bytes: usize,
        /// The client's limit in bytes.
        bytes_max: usize,
    },
    /// The connection ended without a Close, or the server violated the protocol, or a callback panicked. If the client
    /// ended it, the server was sent a Close: 1002 or 1007 for the protocol, 1011 for a panic.
    Lost(Arc<dyn std::error::Error + Send + Sync>),
}

impl ClientClose {
    pub(super) fn lost(cause: impl Into<BoxError>) -> Self {
        Self::Lost(cause.into().into())
    }
}

impl fmt::Display for ClientClose {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ByClient => formatter.write_str("closed by the client"),
            Self::ByServer { code, reason } if reason.is_empty() => {
                write!(formatter, "closed by the server with {code}")
            }
            Self::ByServer { code, reason } => {
                write!(formatter, "closed by the server with {code}: {reason}")
            }
            Self::Unanswered => {
                formatter.write_str("closed by the client; the server did not answer in time")
            }
            Self::Silent { timeout } => {
                write!(formatter, "nothing was received from the server for {timeout:?}")
            }
            Self::TooLong { bytes, bytes_max } => {
                write!(formatter, "a message of {bytes} bytes is above the limit of {bytes_max}")
            }
            Self::Lost(cause) => write!(formatter, "lost: {cause}"),
        }
    }
}
