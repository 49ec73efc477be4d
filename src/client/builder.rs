//! The builder: a client's settings, each with its default and what happens at its limit.
//!
//! Owned by the application until it becomes a client, which keeps the settings. Settings are checked when they are
//! set, but errors are reported by `connect`, since a chain of calls cannot return them. Knows headers and codecs by
//! name. Does not know sockets, and does not connect.

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
/// Three times the default heartbeat interval of a hub.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(45);

/// The settings of a [`HubClient`] to build; made by [`HubClient::builder`].
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
    /// The first error in the settings. The builder does not fail; `connect` does.
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
    /// `Host` replaces the one made from the URL; it changes neither the address that the client connects to nor the
    /// name that it expects in the certificate.
    ///
    /// A malformed header makes [`connect`](HubClient::connect) fail with [`ClientError::InvalidRequest`]. So do a
    /// second `Host`, the headers that the handshake sets itself: `Connection`, `Upgrade` and `Sec-WebSocket-*` (for
    /// `Sec-WebSocket-Protocol` use [`with_subprotocol`](Self::with_subprotocol)), and `Content-Length`,
    /// `Transfer-Encoding` and `Expect`, since a handshake has no body.
    pub fn with_header<N, V>(mut self, name: N, value: V) -> Self
    where
        N: TryInto<HeaderName>,
        V: TryInto<HeaderValue>,
    {
        match (name.try_into(), value.try_into()) {
            (Ok(name), Ok(value)) => match refusal(&name, &value) {
                None if name == header::HOST && self.config.headers.contains_key(&name) => {
                    self.malformed("the header `host` is set twice: set it once".to_owned());
                }
                None => {
                    self.config.headers.append(name, value);
                }
                Some(why) => self.malformed(format!("the header `{name}` cannot be set: {why}")),
            },
            (Ok(name), Err(_)) => self.malformed(format!("the value of the header `{name}` is malformed")),
            (Err(_), _) => self.malformed("a header's name is malformed".to_owned()),
        }
        self
    }

    /// Offers a subprotocol, after those of earlier calls. If the server selects none of them,
    /// [`connect`](HubClient::connect) fails; it also fails for a name that is not a token (letters, digits and
    /// ``!#$%&'*+-.^_`|~``).
    pub fn with_subprotocol(mut self, protocol: impl Into<String>) -> Self {
        let protocol = protocol.into();
        // Header names are tokens, too.
        if HeaderName::try_from(&protocol).is_err() {
            self.malformed(format!(
                "the subprotocol {protocol:?} is not a token: use letters, digits and `-._`"
            ));
        }
        self.config.protocols.push(protocol);
        self
    }

    /// How many messages may be queued and not yet written: 1024 by default, at least 1 (0 counts as 1). When the queue
    /// is full, [`send`](HubClient::send) returns the message. The queue is allocated as it fills.
    pub fn with_queue_messages(mut self, messages: usize) -> Self {
        self.config.queue_messages = messages.clamp(1, tokio::sync::Semaphore::MAX_PERMITS);
        self
    }

    /// The longest message that is received, in bytes: 16 MiB by default. A longer one ends the connection as
    /// [`ClientClose::TooLong`] as soon as its length is announced, and the server is sent a Close with 1009.
    pub fn with_message_bytes_max(mut self, bytes: usize) -> Self {
        self.config.message_bytes_max = bytes;
        self
    }

    /// How long [`connect`](HubClient::connect) may take: 10 s by default. After that it fails with
    /// [`ClientError::TimedOut`].
    pub fn with_connect_timeout(mut self, timeout: Duration) -> Self {
        self.config.connect_timeout = timeout;
        self
    }

    /// How long the closing handshake may take, including the writing of queued messages: 5 s by default. After that
    /// the connection ends as [`ClientClose::Unanswered`]. Applies to [`disconnect`](HubClient::disconnect) and to a
    /// dropped client.
    pub fn with_disconnect_timeout(mut self, timeout: Duration) -> Self {
        self.config.disconnect_timeout = timeout;
        self
    }

    /// How long the server may be silent: 45 s by default, without limit for `None`. If no byte is received for that
    /// time (or up to a quarter longer), the connection ends as [`ClientClose::Silent`].
    ///
    /// A hub pings its clients every [`heartbeat_interval`](crate::WsHubConfig::heartbeat_interval), 15 s by default,
    /// so silence means that the server or the network has failed. Without this timeout, a client that only receives
    /// would never notice. The default tolerates two lost pings. The timeout must be longer than the hub's interval:
    /// set both, or `None` for a server that does not ping. Zero makes [`connect`](HubClient::connect) fail.
    pub fn with_silence_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.config.silence_timeout = timeout.into();
        if self.config.silence_timeout == Some(Duration::ZERO) {
            self.malformed(
                "the silence timeout is zero: set a longer one, or `None` for no timeout".to_owned(),
            );
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
        // Without the headers: they may contain credentials, which must not be logged.
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

/// Why an application cannot set this header, if it cannot.
fn refusal(name: &HeaderName, value: &HeaderValue) -> Option<&'static str> {
    match name.as_str() {
        "host" => {
            let host = value.to_str().ok().and_then(|host| host.parse::<Authority>().ok());
            host.is_none_or(|host| host.as_str().contains('@')).then_some("its value is not a host")
        }
        "sec-websocket-protocol" => Some("use `with_subprotocol` to offer subprotocols"),
        "sec-websocket-extensions" => Some("the client supports no extensions"),
        "connection" | "upgrade" => Some("the handshake sets it"),
        name if name.starts_with("sec-websocket-") => Some("the handshake sets it"),
        "content-length" | "transfer-encoding" | "expect" => Some("a handshake has no body"),
        _ => None,
    }
}
