//! The client's errors: why connecting or sending failed, how a connection ended, and whether to come back after that.
//!
//! Plain data, made by the rest of the client and owned by the application. Both kinds of failure can be cloned, because
//! states, callbacks and return values report the same one. Knows tungstenite's errors, and keeps them as causes without
//! exposing their types. Does not know sockets or settings.

use std::{
    fmt, io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{Response, StatusCode, header};
use shardcast_engine::CloseCode;
use thiserror::Error;
use tokio_tungstenite::tungstenite::{self, error::ProtocolError};

use crate::codec::CodecError;

pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;
type SharedError = Arc<dyn std::error::Error + Send + Sync>;

/// Why a client could not connect.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The client has an open connection, or is reconnecting.
    #[error("the client is already connected: disconnect it first")]
    AlreadyConnected,
    /// The URL, a header, a subprotocol or a setting is malformed, the handshake sets this header itself, or the URL's
    /// scheme is not supported (`wss` needs the feature `client-tls`). Or the application's connector or function for
    /// headers panicked.
    #[error("the request is invalid")]
    InvalidRequest(#[source] SharedError),
    /// The application's function for headers failed; see
    /// [`with_fresh_headers`](super::HubClientBuilder::with_fresh_headers).
    #[error("the application could not provide the headers")]
    Headers(#[source] SharedError),
    /// The server cannot be reached, or the connection broke during the handshake.
    #[error("the server cannot be reached")]
    Unreachable(#[source] Arc<io::Error>),
    /// The server answered the handshake with another status than 101, for example 503 with a `Retry-After` at a limit
    /// on connections. The response has its status, headers and body.
    #[error("the server refused the handshake with {}", .0.status())]
    Refused(Arc<Response<Vec<u8>>>),
    /// The server's response is not a valid WebSocket handshake, or its certificate is not trusted.
    #[error("the handshake failed")]
    Handshake(#[source] SharedError),
    /// The connect timeout (10 s by default) has passed.
    #[error("the server did not answer in time")]
    TimedOut,
}

impl ClientError {
    pub(super) fn invalid(cause: impl Into<BoxError>) -> Self {
        Self::InvalidRequest(cause.into().into())
    }

    pub(super) fn handshake(cause: impl Into<BoxError>) -> Self {
        Self::Handshake(cause.into().into())
    }

    /// Whether the same attempt may succeed later: the server cannot be reached or did not answer in time, the
    /// application's function for headers failed, or the status is 408, 425, 429, 500, 502, 503 or 504. Every other
    /// status, such as 400, 401, 403 or 404, is final, and so are the other errors.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::TimedOut | Self::Headers(_) => true,
            Self::Refused(response) => matches!(
                response.status(),
                StatusCode::REQUEST_TIMEOUT
                    | StatusCode::TOO_EARLY
                    | StatusCode::TOO_MANY_REQUESTS
                    | StatusCode::INTERNAL_SERVER_ERROR
                    | StatusCode::BAD_GATEWAY
                    | StatusCode::SERVICE_UNAVAILABLE
                    | StatusCode::GATEWAY_TIMEOUT
            ),
            Self::AlreadyConnected | Self::InvalidRequest(_) | Self::Handshake(_) => false,
        }
    }

    /// How long the server asked to be left alone, by a `Retry-After` in seconds or as a date: from now on in the case
    /// of a date, and zero for one that has passed. `None` without such a header.
    pub fn retry_after(&self) -> Option<Duration> {
        let Self::Refused(response) = self else { return None };
        let value = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?;
        parse_retry_after(value, SystemTime::now())
    }
}

/// The value of a `Retry-After` header: seconds, or a date in one of HTTP's three formats.
fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // A number that does not fit is a very long time.
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // rustls reports certificate errors this way.
            io::ErrorKind::InvalidData => Self::handshake(error),
            _ => Self::Unreachable(error.into()),
        }
    }
}

impl From<tungstenite::Error> for ClientError {
    fn from(error: tungstenite::Error) -> Self {
        match error {
            tungstenite::Error::Io(error) => error.into(),
            tungstenite::Error::Protocol(ProtocolError::HandshakeIncomplete) => {
                Self::Unreachable(io::Error::new(io::ErrorKind::UnexpectedEof, error).into())
            }
            tungstenite::Error::Http(response) => {
                Self::Refused(Arc::new(response.map(Option::unwrap_or_default)))
            }
            tungstenite::Error::Url(_) | tungstenite::Error::HttpFormat(_) => Self::invalid(error),
            error => Self::handshake(error),
        }
    }
}

/// Why a message was not queued. Every variant contains the message.
#[derive(Error)]
#[non_exhaustive]
pub enum SendError<S> {
    /// The queue is full by [messages](super::HubClientBuilder::with_queue_messages) or by
    /// [bytes](super::HubClientBuilder::with_queue_bytes): the server reads more slowly than the client sends, or the
    /// client has been reconnecting for long.
    #[error("the queue is full: try again later")]
    Full(S),
    /// There is no open connection, and the client is not reconnecting.
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
    /// Whether the queue is full, so that the same message may be accepted later.
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

/// How a client's connection ended, or why it could not be opened again.
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
    /// No byte, not even a pong, was received from the server for the silence timeout, so the server or the network has
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
    /// The connection ended without a Close (what browsers call 1006).
    Lost(Arc<dyn std::error::Error + Send + Sync>),
    /// The server violated the WebSocket protocol and was sent a Close with 1002, or 1007 for text that is not UTF-8.
    ProtocolViolation(Arc<dyn std::error::Error + Send + Sync>),
    /// A callback panicked. The server was sent a Close with 1011.
    CallbackPanicked,
    /// An attempt to connect failed. As the final reason: the last attempt, after which the
    /// [`ReconnectPolicy`](super::ReconnectPolicy) allowed no other.
    ConnectFailed {
        /// How many attempts to reconnect have failed in a row; 0 for the first attempt of
        /// [`connect`](super::HubClient::connect).
        attempts: u32,
        /// Why the last one failed.
        error: ClientError,
    },
    /// The client was disconnected or dropped while it had no open connection, between two attempts.
    Abandoned {
        /// Messages that were queued and never sent.
        unsent: usize,
    },
}

impl ClientClose {
    pub(super) fn lost(cause: impl Into<BoxError>) -> Self {
        Self::Lost(cause.into().into())
    }

    /// Whether a client should reconnect, which is what a [`ReconnectPolicy`](super::ReconnectPolicy) does unless it has
    /// [a condition of its own](super::ReconnectPolicy::with_condition).
    ///
    /// | reconnects after | does not reconnect after |
    /// |---|---|
    /// | a lost connection (1006), a silent server | the client's own close |
    /// | the server's codes 1001 and 1011 to 1013 ([`CloseCode::should_reconnect`]) | every other code, such as 1000, 1002, 1003, 1005, 1007, 1008, 1009, 3xxx and 4xxx |
    /// | an attempt that failed for now ([`ClientError::is_transient`]): no connection, a timeout, 408, 425, 429, 500, 502, 503, 504 | every other attempt that failed: 400, 401, 403, 404, an untrusted certificate, an invalid request |
    /// | | a message above the client's limit, a protocol violation, a panic in a callback |
    ///
    /// The transport reports codes that RFC 6455 does not know as 1002, also 1014, which was registered later.
    pub fn should_reconnect(&self) -> bool {
        match self {
            Self::Lost(_) | Self::Silent { .. } => true,
            Self::ByServer { code, .. } => CloseCode(*code).should_reconnect(),
            Self::ConnectFailed { error, .. } => error.is_transient(),
            Self::ByClient
            | Self::Unanswered
            | Self::Abandoned { .. }
            | Self::TooLong { .. }
            | Self::ProtocolViolation(_)
            | Self::CallbackPanicked => false,
        }
    }

    /// Whether no policy may reconnect: the application closed, or the request can never succeed.
    pub(super) fn is_irrevocable(&self) -> bool {
        matches!(
            self,
            Self::ByClient
                | Self::Unanswered
                | Self::Abandoned { .. }
                | Self::ConnectFailed { error: ClientError::InvalidRequest(_), .. }
        )
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
            Self::ProtocolViolation(cause) => write!(formatter, "the server violated the protocol: {cause}"),
            Self::CallbackPanicked => formatter.write_str("a callback panicked"),
            Self::ConnectFailed { attempts, error } => {
                write!(formatter, "not connected: {error}")?;
                if let Some(cause) = std::error::Error::source(error) {
                    write!(formatter, ": {cause}")?;
                }
                match attempts {
                    0 => Ok(()),
                    attempts => write!(formatter, " (failed attempts to reconnect: {attempts})"),
                }
            }
            Self::Abandoned { unsent } => {
                write!(
                    formatter,
                    "closed by the client while it was not connected; {unsent} messages were not sent"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_read_as_seconds_and_as_each_of_the_dates_of_http() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:07 GMT").unwrap();
        for (value, expected) in [
            ("0", Some(0)),
            (" 120 ", Some(120)),
            ("99999999999999999999999", Some(u64::MAX)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(30)),
            ("Sunday, 06-Nov-94 08:49:37 GMT", Some(30)),
            ("Sun Nov  6 08:49:37 1994", Some(30)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("", None),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
        ] {
            assert_eq!(parse_retry_after(value, now), expected.map(Duration::from_secs), "{value:?}");
        }
    }

    #[test]
    fn a_client_comes_back_after_faults_of_the_network_and_the_server_and_not_after_its_own() {
        let by_server = |code| ClientClose::ByServer { code, reason: String::new() };
        for code in [1001, 1011, 1012, 1013, 1014] {
            assert!(by_server(code).should_reconnect(), "{code}");
        }
        for code in [1000, 1002, 1003, 1005, 1007, 1008, 1009, 1010, 3000, 4000, 4001, 4999] {
            assert!(!by_server(code).should_reconnect(), "{code}");
        }
        let refused = |status: u16| ClientClose::ConnectFailed {
            attempts: 1,
            error: ClientError::Refused(Arc::new(
                Response::builder().status(status).body(Vec::new()).unwrap(),
            )),
        };
        for status in [408, 425, 429, 500, 502, 503, 504] {
            assert!(refused(status).should_reconnect(), "{status}");
        }
        for status in [200, 301, 400, 401, 403, 404, 410, 426, 501, 505] {
            assert!(!refused(status).should_reconnect(), "{status}");
        }
    }
}
