//! The builder: a client's settings, each with its default and what happens at its limit.
//!
//! Checks settings at once but reports errors in `connect`, since a chain of calls cannot return them. Does not connect.

use std::{fmt, marker::PhantomData, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, header, uri::Authority};

#[cfg(doc)]
use super::{ClientClose, ClientError};
use super::{HubClient, Unset};
use crate::codec::{Decode, Encode, JsonCodec};

const QUEUE_MESSAGES: usize = 1024;
const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Three heartbeats of a hub by default.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(45);

/// Describes a [`HubClient`]; made by [`HubClient::builder`].
#[derive(Clone)]
#[must_use]
pub struct HubClientBuilder<S, R, C> {
    config: Config,
    types: PhantomData<fn(S, R, C)>,
}

#[derive(Clone)]
pub(super) struct Config {
    pub(super) url: String,
    pub(super) headers: HeaderMap,
    pub(super) protocols: Vec<String>,
    /// The first thing that was refused. The builder does not fail; `connect` does.
    pub(super) malformed: Option<Arc<str>>,
    pub(super) queue_messages: usize,
    pub(super) message_bytes_max: usize,
    pub(super) connect_timeout: Duration,
    pub(super) disconnect_timeout: Duration,
    pub(super) silence_timeout: Option<Duration>,
    #[cfg(feature = "client-tls")]
    pub(super) tls: Option<Arc<rustls::ClientConfig>>,
}

impl Config {
    fn new(url: String) -> Self {
        Self {
            url,
            headers: HeaderMap::new(),
            protocols: Vec::new(),
            malformed: None,
            queue_messages: QUEUE_MESSAGES,
            message_bytes_max: MESSAGE_BYTES_MAX,
            connect_timeout: CONNECT_TIMEOUT,
            disconnect_timeout: DISCONNECT_TIMEOUT,
            silence_timeout: Some(SILENCE_TIMEOUT),
            #[cfg(feature = "client-tls")]
            tls: None,
        }
    }
}

impl HubClientBuilder<Unset, Unset, JsonCodec> {
    pub(super) fn new(url: String) -> Self {
        Self { config: Config::new(url), types: PhantomData }
    }
}

impl<S, R, C> HubClientBuilder<S, R, C> {
    /// The messages that the client sends: the hub's `InMessage`.
    pub fn with_in_message<T>(self) -> HubClientBuilder<T, R, C> {
        HubClientBuilder { config: self.config, types: PhantomData }
    }

    /// The messages that the client receives: the hub's `OutMessage`.
    pub fn with_out_message<T>(self) -> HubClientBuilder<S, T, C> {
        HubClientBuilder { config: self.config, types: PhantomData }
    }

    /// The hub's codec; [`JsonCodec`] by default.
    pub fn with_codec<T>(self) -> HubClientBuilder<S, R, T> {
        HubClientBuilder { config: self.config, types: PhantomData }
    }

    /// Sends a header with the handshake, such as `Authorization`. A name that is given twice is sent twice.
    ///
    /// `Host` takes the place of the one made of the URL; it changes neither where the client connects to nor whose
    /// certificate it expects.
    ///
    /// What is no header makes [`connect`](HubClient::connect) fail with [`ClientError::InvalidRequest`], and so do
    /// those that the handshake makes itself: `Connection`, `Upgrade`, `Sec-WebSocket-*` (for
    /// `Sec-WebSocket-Protocol` there is [`with_subprotocol`](Self::with_subprotocol)), and `Content-Length`,
    /// `Transfer-Encoding` and `Expect`, as a handshake has no body.
    pub fn with_header<N, V>(mut self, name: N, value: V) -> Self
    where
        N: TryInto<HeaderName>,
        V: TryInto<HeaderValue>,
    {
        match (name.try_into(), value.try_into()) {
            (Ok(name), Ok(value)) => match refusal(&name, &value) {
                None if name == header::HOST && self.config.headers.contains_key(&name) => {
                    self.malformed("the header `host` is given twice".to_owned());
                }
                None => {
                    self.config.headers.append(name, value);
                }
                Some(why) => self.malformed(format!("the header `{name}` cannot be set: {why}")),
            },
            (Ok(name), Err(_)) => self.malformed(format!("the value of the header `{name}` is malformed")),
            (Err(_), _) => self.malformed("the name of a header is malformed".to_owned()),
        }
        self
    }

    /// Offers a subprotocol, after those that were offered before. A server that selects none of them makes
    /// [`connect`](HubClient::connect) fail; so does what is no token (letters, digits and ``!#$%&'*+-.^_`|~``).
    pub fn with_subprotocol(mut self, protocol: impl Into<String>) -> Self {
        let protocol = protocol.into();
        // The names of headers are tokens, too.
        if HeaderName::try_from(&protocol).is_err() {
            self.malformed(format!("the subprotocol {protocol:?} is no token"));
        }
        self.config.protocols.push(protocol);
        self
    }

    /// How many messages may be queued and not yet written: 1024 by default, at least 1. Beyond it
    /// [`send`](HubClient::send) gives the message back. The queue is allocated as it fills.
    pub fn with_queue_messages(mut self, messages: usize) -> Self {
        self.config.queue_messages = messages.clamp(1, tokio::sync::Semaphore::MAX_PERMITS);
        self
    }

    /// The longest message that is received: 16 MiB by default. A longer one ends the connection as
    /// [`ClientClose::TooLong`], as soon as it claims to be, and the server is told by a Close with 1009.
    pub fn with_message_bytes_max(mut self, bytes: usize) -> Self {
        self.config.message_bytes_max = bytes;
        self
    }

    /// How long [`connect`](HubClient::connect) may take: 10 s by default.
    pub fn with_connect_timeout(mut self, timeout: Duration) -> Self {
        self.config.connect_timeout = timeout;
        self
    }

    /// How long the closing handshake may take, with the writing of what is queued: 5 s by default. Holds for
    /// [`disconnect`](HubClient::disconnect) and for a dropped client.
    pub fn with_disconnect_timeout(mut self, timeout: Duration) -> Self {
        self.config.disconnect_timeout = timeout;
        self
    }

    /// How long the server may be silent: 45 s by default, `None` for ever. When not a byte has come from it for that
    /// long (or up to a quarter longer), the connection ends as [`ClientClose::Silent`].
    ///
    /// A hub pings its clients every [`heartbeat_interval`](crate::WsHubConfig::heartbeat_interval), 15 s by default,
    /// so silence means that the server or the network is gone or frozen. Without this timeout a client that only
    /// listens would never notice. The default forgives the loss of two pings. It must be longer than the
    /// hub's interval: set both, or `None` for a server that does not ping. Zero makes
    /// [`connect`](HubClient::connect) fail.
    pub fn with_silence_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.config.silence_timeout = timeout.into();
        if self.config.silence_timeout == Some(Duration::ZERO) {
            self.malformed("the silence timeout is zero; without one it is `None`".to_owned());
        }
        self
    }

    /// The TLS configuration for `wss://`, for example with a private certificate authority. By default servers are
    /// verified against Mozilla's root certificates.
    #[cfg(feature = "client-tls")]
    pub fn with_tls_config(mut self, config: Arc<rustls::ClientConfig>) -> Self {
        self.config.tls = Some(config);
        self
    }

    /// The client, not yet connected.
    pub fn build(self) -> HubClient<S, R, C>
    where
        R: 'static,
        C: Encode<S> + Decode<R>,
    {
        HubClient {
            config: self.config,
            callbacks: Arc::default(),
            outlet: Arc::default(),
            connection: None,
            selected_protocol: None,
            types: PhantomData,
        }
    }

    fn malformed(&mut self, what: String) {
        self.config.malformed.get_or_insert(what.into());
    }
}

impl<S, R, C> fmt::Debug for HubClientBuilder<S, R, C> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Headers hold tokens, which do not belong into logs.
        formatter
            .debug_struct("HubClientBuilder")
            .field("url", &self.config.url)
            .field("protocols", &self.config.protocols)
            .field("queue_messages", &self.config.queue_messages)
            .field("message_bytes_max", &self.config.message_bytes_max)
            .field("connect_timeout", &self.config.connect_timeout)
            .field("disconnect_timeout", &self.config.disconnect_timeout)
            .field("silence_timeout", &self.config.silence_timeout)
            .finish_non_exhaustive()
    }
}

/// Why a header cannot be the application's.
fn refusal(name: &HeaderName, value: &HeaderValue) -> Option<&'static str> {
    match name.as_str() {
        "host" => {
            let host = value.to_str().ok().and_then(|host| host.parse::<Authority>().ok());
            host.is_none_or(|host| host.as_str().contains('@')).then_some("it is no host")
        }
        "sec-websocket-protocol" => Some("offer subprotocols by `with_subprotocol`"),
        "sec-websocket-extensions" => Some("the client speaks no extensions"),
        "connection" | "upgrade" => Some("the handshake makes it"),
        name if name.starts_with("sec-websocket-") => Some("the handshake makes it"),
        "content-length" | "transfer-encoding" | "expect" => Some("a handshake has no body"),
        _ => None,
    }
}
