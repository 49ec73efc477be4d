//! The builder: a client's settings, each with its default and what happens at its limit.
//!
//! Owned by the application until it becomes a client, which keeps the settings. Settings are checked when they are
//! set, but errors are reported by `connect`, since a chain of calls cannot return them. Knows headers and codecs by
//! name. Does not know sockets, and does not connect.

use std::{fmt, future::Future, io, marker::PhantomData, net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, header};
use tokio::io::{AsyncRead, AsyncWrite};

#[cfg(feature = "client-tls")]
use super::tls::Tls;
#[cfg(doc)]
use super::{ClientClose, ClientError, SendError};
use super::{
    HubClient, Unset,
    error::BoxError,
    liveness::Heartbeat,
    queue::{Limits, WhenFull},
    reconnect::ReconnectPolicy,
    request::{self, HeaderSource},
    transport::Connector,
};
use crate::codec::{Decode, Encode, JsonCodec};

const QUEUE_MESSAGES: usize = 1024;
const QUEUE_BYTES: usize = 32 * 1024 * 1024;
const INBOX_MESSAGES: usize = 256;
const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Three times the default heartbeat interval of a hub.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(45);
/// Longer than the default heartbeat interval of a hub, so that a hub that pings is not pinged.
const PING_INTERVAL: Duration = Duration::from_secs(20);

/// The settings of a [`HubClient`] to build; made by [`HubClient::builder`].
#[derive(Clone)]
#[must_use]
pub struct HubClientBuilder<S, R, C> {
    config: Config,
    ping_interval: Ping,
    types: PhantomData<fn(S, R, C)>,
}

/// The ping interval as it was set. The default depends on the silence timeout, which may be set later.
#[derive(Clone, Copy, Debug)]
enum Ping {
    Default,
    Never,
    Every(Duration),
}

#[derive(Clone)]
pub(super) struct Config {
    pub(super) url: String,
    pub(super) headers: HeaderMap,
    pub(super) header_source: Option<HeaderSource>,
    pub(super) protocols: Vec<String>,
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) connector: Option<Connector>,
    /// The first error in the settings. The builder does not fail; `connect` does.
    pub(super) malformed: Option<Arc<str>>,
    pub(super) queue: Limits,
    pub(super) inbox_messages: usize,
    pub(super) message_bytes_max: usize,
    pub(super) connect_timeout: Duration,
    pub(super) disconnect_timeout: Duration,
    pub(super) heartbeat: Heartbeat,
    pub(super) reconnect: Option<ReconnectPolicy>,
    #[cfg(feature = "client-tls")]
    pub(super) tls: Tls,
}

impl Config {
    pub(super) fn new(url: String) -> Self {
        Self {
            url,
            headers: HeaderMap::new(),
            header_source: None,
            protocols: Vec::new(),
            addresses: Vec::new(),
            connector: None,
            malformed: None,
            queue: Limits { messages: QUEUE_MESSAGES, bytes: QUEUE_BYTES, when_full: WhenFull::Refuse },
            inbox_messages: INBOX_MESSAGES,
            message_bytes_max: MESSAGE_BYTES_MAX,
            connect_timeout: CONNECT_TIMEOUT,
            disconnect_timeout: DISCONNECT_TIMEOUT,
            heartbeat: Heartbeat { ping_interval: None, silence_timeout: Some(SILENCE_TIMEOUT) },
            reconnect: None,
            #[cfg(feature = "client-tls")]
            tls: Tls::default(),
        }
    }
}

impl HubClientBuilder<Unset, Unset, JsonCodec> {
    pub(super) fn new(url: String) -> Self {
        Self { config: Config::new(url), ping_interval: Ping::Default, types: PhantomData }
    }
}

impl<S, R, C> HubClientBuilder<S, R, C> {
    /// The messages that this client *sends*: what the hub takes in, its [`InMessage`](crate::WsHub::InMessage). Named from
    /// the hub's side, as in the hub's definition, so that the client mirrors the hub's types: what is *in* for the hub
    /// is out for the client.
    pub fn with_in_message<T>(self) -> HubClientBuilder<T, R, C> {
        HubClientBuilder { config: self.config, ping_interval: self.ping_interval, types: PhantomData }
    }

    /// The messages that this client *receives*: what the hub gives out, its [`OutMessage`](crate::WsHub::OutMessage).
    pub fn with_out_message<T>(self) -> HubClientBuilder<S, T, C> {
        HubClientBuilder { config: self.config, ping_interval: self.ping_interval, types: PhantomData }
    }

    /// The hub's codec; [`JsonCodec`] by default.
    pub fn with_codec<T>(self) -> HubClientBuilder<S, R, T> {
        HubClientBuilder { config: self.config, ping_interval: self.ping_interval, types: PhantomData }
    }

    /// Reconnects when the connection is lost: never by default. [`ReconnectPolicy`] says when and after which delays,
    /// [`HubClient`] what happens to messages meanwhile. A delay of zero makes [`connect`](HubClient::connect) fail.
    pub fn with_reconnect(mut self, policy: ReconnectPolicy) -> Self {
        if let Some(what) = policy.fault() {
            self.malformed(what.to_owned());
        }
        self.config.reconnect = Some(policy);
        self
    }

    /// Sends a header with the handshake, such as `Authorization`. A name that is given twice is sent twice, except for
    /// `Cookie`, whose values are joined.
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
            (Ok(name), Ok(value)) => {
                if let Err(what) = request::add(&mut self.config.headers, name, value) {
                    self.malformed(what);
                }
            }
            (Ok(name), Err(_)) => self.malformed(format!("the value of the header `{name}` is malformed")),
            (Err(_), _) => self.malformed("a header's name is malformed".to_owned()),
        }
        self
    }

    /// Sends a cookie with the handshake, after those of earlier calls.
    ///
    /// A name that is not a token, or a value with a character that a cookie cannot have (a control character, a space,
    /// one of `",;\`, or one that is not ASCII: percent-encode it), makes [`connect`](HubClient::connect) fail.
    pub fn with_cookie(mut self, name: &str, value: &str) -> Self {
        match request::cookie(name, value) {
            Ok(cookie) => {
                self.config.headers.append(header::COOKIE, cookie);
            }
            Err(what) => self.malformed(what),
        }
        self
    }

    /// Calls `make` before each attempt to connect, for headers that must be fresh, such as a token that expires. They are
    /// sent after those of [`with_header`](Self::with_header), under the same rules. The time counts towards the connect
    /// timeout.
    ///
    /// If it fails, the attempt fails with [`ClientError::Headers`], after which a client with a
    /// [`ReconnectPolicy`] tries again. If it panics, the attempt fails with [`ClientError::InvalidRequest`], which is
    /// final.
    pub fn with_fresh_headers<F>(mut self, make: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<HeaderMap, BoxError>> + Send + 'static,
    {
        self.config.header_source = Some(HeaderSource::new(make));
        self
    }

    /// Offers a subprotocol, after those of earlier calls. Which one the server selected is known by
    /// [`selected_protocol`](HubClient::selected_protocol). If it selects none of them, [`connect`](HubClient::connect)
    /// fails; it also fails for a name that is not a token (letters, digits and ``!#$%&'*+-.^_`|~``).
    pub fn with_subprotocol(mut self, protocol: impl Into<String>) -> Self {
        let protocol = protocol.into();
        if !request::is_token(&protocol) {
            self.malformed(format!(
                "the subprotocol {protocol:?} is not a token: use letters, digits and `-._`"
            ));
        }
        self.config.protocols.push(protocol);
        self
    }

    /// Connects to these addresses instead of those that the URL's host resolves to; `Host` and the certificate still are
    /// those of the URL. Each call replaces the former; with no address, the host is resolved.
    ///
    /// As for a host with several addresses (RFC 8305, "Happy Eyeballs"), families take turns, the next address is tried
    /// after 250 ms or when the one before fails, and the first connection wins.
    pub fn with_addresses(mut self, addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        self.config.addresses = addresses.into_iter().collect();
        self
    }

    /// Connects over a stream of the application's own instead of TCP: through a proxy, a Unix socket, or memory. It is
    /// called for each attempt, also when the client reconnects, and its time counts towards the connect timeout. An error
    /// is [`ClientError::Unreachable`], and a panic [`ClientError::InvalidRequest`]. The URL still gives the request's path and host, and `wss` puts TLS on the stream.
    ///
    /// For one connection without reconnecting, see [`connect_over`](HubClient::connect_over).
    ///
    /// ```no_run
    /// # use shardcast::HubClient;
    /// let client = HubClient::builder("ws://localhost/ws")
    ///     .with_in_message::<String>()
    ///     .with_out_message::<String>()
    ///     .with_connector(|| tokio::net::UnixStream::connect("/run/chat.sock"))
    ///     .build();
    /// ```
    pub fn with_connector<F, T>(mut self, connect: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = io::Result<T>> + Send + 'static,
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        self.config.connector = Some(Connector::new(connect));
        self
    }

    /// How many messages may be queued and not yet written, also while the client reconnects: 1024 by default, at least 1
    /// (0 counts as 1). What happens to the next one is set by [`with_when_full`](Self::with_when_full). The queue is
    /// allocated as it fills.
    pub fn with_queue_messages(mut self, messages: usize) -> Self {
        self.config.queue.messages = messages.max(1);
        self
    }

    /// How many bytes of encoded messages may be queued and not yet written, also while the client reconnects: 32 MiB by
    /// default. An empty queue accepts one message of any length.
    pub fn with_queue_bytes(mut self, bytes: usize) -> Self {
        self.config.queue.bytes = bytes;
        self
    }

    /// What happens to a message for which the queue has no room: by default, [`send`](HubClient::send) fails with
    /// [`SendError::Full`], which returns it ([`WhenFull::Refuse`]).
    pub fn with_when_full(mut self, when_full: WhenFull) -> Self {
        self.config.queue.when_full = when_full;
        self
    }

    /// How many received messages may wait for [`recv`](HubClient::recv) or [`Messages`](super::Messages): 256 by default,
    /// at least 1 (0 counts as 1). Their payloads are also limited to as many bytes as the longest message
    /// ([`with_message_bytes_max`](Self::with_message_bytes_max)) together. At the limit the client stops reading until
    /// the application takes one. Without effect on messages for a callback, which are not queued.
    pub fn with_inbox_messages(mut self, messages: usize) -> Self {
        self.config.inbox_messages = messages.max(1);
        self
    }

    /// The longest message that is received, in bytes: 16 MiB by default. A longer one ends the connection as
    /// [`ClientClose::TooLong`] as soon as its length is announced, and the server is sent a Close with 1009.
    pub fn with_message_bytes_max(mut self, bytes: usize) -> Self {
        self.config.message_bytes_max = bytes;
        self
    }

    /// How long one attempt to connect may take, name lookup and handshakes included: 10 s by default. After that it fails
    /// with [`ClientError::TimedOut`].
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
    /// A hub pings its clients every [`heartbeat_interval`](crate::WsHubConfig::heartbeat_interval), 15 s by default, and
    /// a server that does not is pinged by the client (see [`with_ping_interval`](Self::with_ping_interval)), so silence
    /// means that the server or the network has failed. Without this timeout, a client that only receives would never
    /// notice. A socket that was full and accepts bytes again is also a sign of life, and while the client does not read
    /// because its inbox is full, nothing counts as silence. Zero makes [`connect`](HubClient::connect) fail.
    pub fn with_silence_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.config.heartbeat.silence_timeout = timeout.into();
        if self.config.heartbeat.silence_timeout == Some(Duration::ZERO) {
            self.malformed(
                "the silence timeout is zero: set a longer one, or `None` for no timeout".to_owned(),
            );
        }
        self
    }

    /// How long nothing must have been received for the client to send a ping, and again after each further interval: by
    /// default 20 s, or half the silence timeout if that is shorter; `None` sends no pings. A server that answers has
    /// broken the silence; one that sends anything by itself, such as a hub's own pings, is not pinged.
    ///
    /// Zero, or an interval that is not shorter than the silence timeout, makes [`connect`](HubClient::connect) fail.
    pub fn with_ping_interval(mut self, interval: impl Into<Option<Duration>>) -> Self {
        self.ping_interval = interval.into().map_or(Ping::Never, Ping::Every);
        self
    }

    /// The TLS configuration for `wss://`, for example with a private certificate authority or a client certificate. By
    /// default servers are verified against Mozilla's root certificates, which are compiled in.
    #[cfg(feature = "client-tls")]
    pub fn with_tls_config(mut self, config: Arc<rustls::ClientConfig>) -> Self {
        self.config.tls = Tls::custom(config);
        self
    }

    /// Verifies servers against the root certificates that are installed on this system, instead of Mozilla's. They are
    /// read once per client, at the first attempt to connect; if there are none, it fails with
    /// [`ClientError::Handshake`]. The environment variables `SSL_CERT_FILE` and `SSL_CERT_DIR` replace the system's.
    #[cfg(feature = "client-tls-native")]
    pub fn with_native_roots(mut self) -> Self {
        self.config.tls = Tls::native_roots();
        self
    }

    /// The client, not yet connected.
    pub fn build(mut self) -> HubClient<S, R, C>
    where
        R: Send + 'static,
        C: Encode<S> + Decode<R>,
    {
        let silence = self.config.heartbeat.silence_timeout;
        self.config.heartbeat.ping_interval = match self.ping_interval {
            Ping::Never => None,
            Ping::Default => Some(silence.map_or(PING_INTERVAL, |silence| PING_INTERVAL.min(silence / 2))),
            Ping::Every(interval) => {
                if interval.is_zero() || silence.is_some_and(|silence| interval >= silence) {
                    self.malformed(
                        "the ping interval must be above zero and shorter than the silence timeout"
                            .to_owned(),
                    );
                }
                Some(interval)
            }
        };
        HubClient::new(self.config)
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
            .field("queue", &self.config.queue)
            .field("inbox_messages", &self.config.inbox_messages)
            .field("message_bytes_max", &self.config.message_bytes_max)
            .field("connect_timeout", &self.config.connect_timeout)
            .field("disconnect_timeout", &self.config.disconnect_timeout)
            .field("silence_timeout", &self.config.heartbeat.silence_timeout)
            .field("ping_interval", &self.ping_interval)
            .field("reconnect", &self.config.reconnect)
            .finish_non_exhaustive()
    }
}
