//! The client: the other end of a hub, with the hub's message types and codec.
//!
//! A handle owned by the application, and per connection one task that owns the socket. Between them is one bounded
//! queue of encoded messages: dropping its sending end is how the handle asks for a Close, so that what was sent
//! before is written before. Every wait of the task ends by itself.
//! Knows codecs and tungstenite. Does not know hubs, the engine or the server half of this crate.

use std::{
    fmt,
    future::pending,
    marker::PhantomData,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{
    FutureExt, Sink, SinkExt, Stream, StreamExt,
    stream::{SplitSink, SplitStream},
};
use http::{HeaderMap, HeaderName, HeaderValue, Response, header};
use shardcast_engine::MessageKind;
use thiserror::Error;
use tokio::{
    net::TcpStream,
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{
        self, Message, Utf8Bytes,
        client::IntoClientRequest,
        protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode},
    },
};

use crate::codec::{CodecError, Decode, Encode, JsonCodec};

const QUEUE_MESSAGES: usize = 1024;
const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// tungstenite allocates this at once; its own default of 128 KiB makes load tests expensive.
const READ_BUFFER_BYTES: usize = 16 * 1024;

/// What a Close frame without a code means (RFC 6455, section 7.1.5).
const NO_CODE: u16 = 1005;

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// A client for a hub: sends `S` (the hub's `InMessage`), receives `R` (its `OutMessage`), both in codec `C`.
///
/// ```no_run
/// use serde::{Deserialize, Serialize};
/// use shardcast::{HubClient, JsonCodec};
///
/// #[derive(Serialize)]
/// struct Hello {
///     text: String,
/// }
///
/// #[derive(Deserialize, Debug)]
/// enum Reply {
///     Ok(String),
///     Err(String),
/// }
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let mut client = HubClient::builder("ws://localhost:3000/ws")
///     .with_in_message::<Hello>()
///     .with_out_message::<Reply>()
///     .with_codec::<JsonCodec>()
///     .build();
///
/// client.on_message(|reply: Reply| println!("{reply:?}"));
/// client.on_close(|close| println!("closed: {close}"));
///
/// client.connect().await?;
/// client.send(Hello { text: "hello".into() })?;
/// client.disconnect().await;
/// # Ok(())
/// # }
/// ```
///
/// # Callbacks
/// They run one after the other in the connection's task, in the order of arrival; while one runs, nothing is read.
/// They must not block: hand long work to a task. To answer from a callback, move a [`sender`](Self::sender) into
/// it. Each kind has one callback, the last that was set; what arrives before one is set is lost, so set them before
/// [`connect`](Self::connect). A callback that panics ends the connection as [`ClientClose::Lost`].
///
/// # Dropping
/// A dropped client writes what it has queued and sends a Close, in the background and only as long as the runtime
/// lives. [`disconnect`](Self::disconnect) waits for that and for the server's answer.
pub struct HubClient<S, R, C> {
    config: Config,
    callbacks: Arc<Callbacks<R>>,
    outlet: Arc<Outlet>,
    connection: Option<Connection>,
    selected_protocol: Option<HeaderValue>,
    types: PhantomData<fn(S, C)>,
}

/// What the handle keeps of a connection.
struct Connection {
    /// Dropped to tell the task that the outlet is closed and that time is running.
    closing: oneshot::Sender<()>,
    closed: oneshot::Receiver<ClientClose>,
}

impl HubClient<Unset, Unset, JsonCodec> {
    /// Starts to describe a client for the hub at `url`, for example `ws://localhost:3000/ws`.
    pub fn builder(url: impl Into<String>) -> HubClientBuilder<Unset, Unset, JsonCodec> {
        HubClientBuilder {
            config: Config {
                url: url.into(),
                headers: HeaderMap::new(),
                protocols: Vec::new(),
                malformed: None,
                queue_messages: QUEUE_MESSAGES,
                message_bytes_max: MESSAGE_BYTES_MAX,
                connect_timeout: CONNECT_TIMEOUT,
                disconnect_timeout: DISCONNECT_TIMEOUT,
                #[cfg(feature = "client-tls")]
                tls: None,
            },
            types: PhantomData,
        }
    }
}

impl<S, R, C> HubClient<S, R, C>
where
    R: 'static,
    C: Encode<S> + Decode<R>,
{
    /// Calls `callback` with every message.
    pub fn on_message(&mut self, callback: impl FnMut(R) + Send + 'static) {
        self.callbacks.message.set(callback);
    }

    /// Calls `callback` for every message that cannot be decoded; by default that is logged as a warning.
    /// The connection goes on.
    pub fn on_error(&mut self, callback: impl FnMut(CodecError) + Send + 'static) {
        self.callbacks.error.set(callback);
    }

    /// Calls `callback` once per connection, when it has ended, with the reason.
    pub fn on_close(&mut self, callback: impl FnMut(ClientClose) + Send + 'static) {
        self.callbacks.close.set(callback);
    }

    /// Opens the connection. After it has ended, for whatever reason, `connect` opens a new one.
    ///
    /// # Errors
    /// [`ClientError`]; no connection is left behind, and `connect` can be tried again.
    pub async fn connect(&mut self) -> Result<(), ClientError> {
        if self.is_connected() {
            return Err(ClientError::AlreadyConnected);
        }
        let (socket, response) = timeout(self.config.connect_timeout, open(&self.config))
            .await
            .map_err(|_| ClientError::TimedOut)??;

        let (outgoing, queue) = mpsc::channel(self.config.queue_messages);
        let (closing, closing_told) = oneshot::channel();
        let (closed_told, closed) = oneshot::channel();
        tokio::spawn(connection::<R, C>(
            socket,
            queue,
            closing_told,
            closed_told,
            Arc::clone(&self.callbacks),
            self.config.disconnect_timeout,
        ));
        self.selected_protocol = response.headers().get(header::SEC_WEBSOCKET_PROTOCOL).cloned();
        self.connection = Some(Connection { closing, closed });
        self.outlet.open(outgoing);
        Ok(())
    }

    /// Whether messages can be sent: true from a successful [`connect`](Self::connect) until either side closes or
    /// the connection is lost.
    pub fn is_connected(&self) -> bool {
        self.outlet.is_open()
    }

    /// The subprotocol that the server selected at the last [`connect`](Self::connect), if any.
    pub fn selected_protocol(&self) -> Option<&HeaderValue> {
        self.selected_protocol.as_ref()
    }

    /// Queues a message. It is encoded at once and written soon; `Ok` does not mean that it has arrived.
    ///
    /// # Errors
    /// [`SendError`], which gives the message back: the queue is full (the server reads more slowly than the client
    /// sends), there is no connection, or the codec refuses the message.
    pub fn send(&self, message: S) -> Result<(), SendError<S>> {
        self.outlet.send::<S, C>(message)
    }

    /// A handle that can only send, to be cloned and moved into callbacks and tasks.
    pub fn sender(&self) -> HubSender<S, C> {
        HubSender { outlet: Arc::clone(&self.outlet), types: PhantomData }
    }

    /// Closes the connection: writes what is queued, sends a Close and waits for the server's Close.
    ///
    /// Returns how the connection ended, which may have been earlier and by the server; `None` when it has not been
    /// connected. Takes no longer than the disconnect timeout (5 s by default), except for a callback that blocks.
    pub async fn disconnect(&mut self) -> Option<ClientClose> {
        self.outlet.close();
        let Connection { closing, closed } = self.connection.take()?;
        drop(closing);
        Some(closed.await.unwrap_or_else(|_| ClientClose::lost("the runtime has shut down")))
    }
}

impl<S, R, C> Drop for HubClient<S, R, C> {
    fn drop(&mut self) {
        // Senders may outlive the client. The connection does not.
        self.outlet.close();
    }
}

impl<S, R, C> fmt::Debug for HubClient<S, R, C> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("HubClient")
            .field("url", &self.config.url)
            .field("connected", &self.outlet.is_open())
            .finish_non_exhaustive()
    }
}

/// Sends messages on a [`HubClient`]'s connection, the present one and those after a reconnect. Does not keep the
/// connection open: it ends with the client.
pub struct HubSender<S, C> {
    outlet: Arc<Outlet>,
    types: PhantomData<fn(S, C)>,
}

impl<S, C: Encode<S>> HubSender<S, C> {
    /// Queues a message; see [`HubClient::send`].
    ///
    /// # Errors
    /// As for [`HubClient::send`].
    pub fn send(&self, message: S) -> Result<(), SendError<S>> {
        self.outlet.send::<S, C>(message)
    }

    /// Whether messages can be sent; see [`HubClient::is_connected`].
    pub fn is_connected(&self) -> bool {
        self.outlet.is_open()
    }
}

impl<S, C> Clone for HubSender<S, C> {
    fn clone(&self) -> Self {
        Self { outlet: Arc::clone(&self.outlet), types: PhantomData }
    }
}

impl<S, C> fmt::Debug for HubSender<S, C> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("HubSender").field("connected", &self.outlet.is_open()).finish()
    }
}

/// Stands for a message type that a [`HubClientBuilder`] has not been told. No codec can do anything with it, so
/// that what was forgotten does not compile.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Unset;

/// Describes a [`HubClient`]; made by [`HubClient::builder`].
#[derive(Clone)]
#[must_use]
pub struct HubClientBuilder<S, R, C> {
    config: Config,
    types: PhantomData<fn(S, R, C)>,
}

#[derive(Clone)]
struct Config {
    url: String,
    headers: HeaderMap,
    protocols: Vec<String>,
    /// The first header that was none. The builder does not fail; `connect` does.
    malformed: Option<Arc<str>>,
    queue_messages: usize,
    message_bytes_max: usize,
    connect_timeout: Duration,
    disconnect_timeout: Duration,
    #[cfg(feature = "client-tls")]
    tls: Option<Arc<rustls::ClientConfig>>,
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

    /// Sends a header with the handshake, such as `Authorization`. What is no header makes
    /// [`connect`](HubClient::connect) fail with [`ClientError::InvalidRequest`].
    pub fn with_header<N, V>(mut self, name: N, value: V) -> Self
    where
        N: TryInto<HeaderName>,
        V: TryInto<HeaderValue>,
    {
        match (name.try_into(), value.try_into()) {
            (Ok(name), Ok(value)) => {
                self.config.headers.append(name, value);
            }
            (Ok(name), Err(_)) => self.malformed(format!("the value of the header `{name}` is malformed")),
            (Err(_), _) => self.malformed("the name of a header is malformed".to_owned()),
        }
        self
    }

    /// Offers a subprotocol, after those that were offered before. A server that selects none of them makes
    /// [`connect`](HubClient::connect) fail.
    pub fn with_subprotocol(mut self, protocol: impl Into<String>) -> Self {
        self.config.protocols.push(protocol.into());
        self
    }

    /// How many messages may be queued and not yet written: 1024 by default, at least 1. Beyond it
    /// [`send`](HubClient::send) gives the message back. The queue is allocated as it fills.
    pub fn with_queue_messages(mut self, messages: usize) -> Self {
        self.config.queue_messages = messages.clamp(1, tokio::sync::Semaphore::MAX_PERMITS);
        self
    }

    /// The longest message that is received: 16 MiB by default. A longer one ends the connection as
    /// [`ClientClose::Lost`].
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
            .finish_non_exhaustive()
    }
}

/// Why a client could not connect.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// There is a connection; disconnect first.
    #[error("the client is already connected")]
    AlreadyConnected,
    /// The URL, a header or a subprotocol is malformed, or the URL's scheme is not supported (`wss` needs the
    /// feature `client-tls`).
    #[error("the request is invalid")]
    InvalidRequest(#[source] BoxError),
    /// The server cannot be reached.
    #[error("the server cannot be reached")]
    Unreachable(#[source] std::io::Error),
    /// The server answered the handshake with something else than a WebSocket: an error of its own, a refusal, a
    /// `Retry-After`.
    #[error("the server refused the handshake with {}", .0.status())]
    Refused(Box<Response<Vec<u8>>>),
    /// What the server answered is no WebSocket handshake, or not a valid one, or its certificate is not trusted.
    #[error("the handshake failed")]
    Handshake(#[source] BoxError),
    /// The connect timeout (10 s by default) has passed.
    #[error("the server did not answer in time")]
    TimedOut,
}

impl From<tungstenite::Error> for ClientError {
    fn from(error: tungstenite::Error) -> Self {
        match error {
            // What rustls says about the server's certificate comes this way.
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

/// A message that was not queued, and why.
#[derive(Error)]
#[non_exhaustive]
pub enum SendError<S> {
    /// The queue is full: the server reads more slowly than the client sends. Try again later.
    #[error("the queue is full")]
    Full(S),
    /// There is no connection, or no longer.
    #[error("the client is not connected")]
    NotConnected(S),
    /// The codec refuses the message.
    #[error("the message cannot be encoded")]
    Encode {
        /// The message.
        message: S,
        /// What the codec says.
        source: CodecError,
    },
}

impl<S> SendError<S> {
    /// The message that was not sent.
    pub fn into_message(self) -> S {
        match self {
            Self::Full(message) | Self::NotConnected(message) | Self::Encode { message, .. } => message,
        }
    }

    /// Whether it may help to try again later on this connection.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full(_))
    }
}

/// Without the message, which need not be `Debug`.
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
    /// The client closed, and the server answered with its Close.
    ByClient,
    /// The server closed.
    ByServer {
        /// The code of its Close frame; 1005 when it had none.
        code: u16,
        /// The reason in its Close frame; often empty.
        reason: String,
    },
    /// The client closed, and no Close of the server's came in time.
    Unanswered,
    /// The connection ended without a Close.
    Lost(Arc<dyn std::error::Error + Send + Sync>),
}

impl ClientClose {
    fn lost(cause: impl Into<BoxError>) -> Self {
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
            Self::Unanswered => formatter.write_str("closed by the client without an answer of the server's"),
            Self::Lost(cause) => write!(formatter, "lost: {cause}"),
        }
    }
}

/// The callbacks, shared by the handle, which sets them, and the connection's task, which calls them.
struct Callbacks<R> {
    message: Slot<R>,
    error: Slot<CodecError>,
    close: Slot<ClientClose>,
}

impl<R> Default for Callbacks<R> {
    fn default() -> Self {
        Self { message: Slot::default(), error: Slot::default(), close: Slot::default() }
    }
}

type Callback<T> = Box<dyn FnMut(T) + Send>;

/// One callback. Two locks, so that it can be replaced while it runs, even by itself.
struct Slot<T>(Mutex<Option<Arc<Mutex<Callback<T>>>>>);

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> Slot<T> {
    fn set(&self, callback: impl FnMut(T) + Send + 'static) {
        let callback: Callback<T> = Box::new(callback);
        let former =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).replace(Arc::new(Mutex::new(callback)));
        // Outside the lock: what a callback owns may do anything when it is dropped.
        drop(former);
    }

    /// Calls the callback, or gives the argument back where there is none.
    fn call(&self, argument: T) -> Result<(), T> {
        let callback = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(callback) = callback else { return Err(argument) };
        callback.lock().unwrap_or_else(PoisonError::into_inner)(argument);
        Ok(())
    }
}

/// Where messages go in: the queue of the present connection, if there is one.
#[derive(Default)]
struct Outlet(RwLock<Option<mpsc::Sender<Message>>>);

impl Outlet {
    fn open(&self, outgoing: mpsc::Sender<Message>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(outgoing);
    }

    fn close(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn is_open(&self) -> bool {
        let outgoing = self.0.read().unwrap_or_else(PoisonError::into_inner);
        outgoing.as_ref().is_some_and(|outgoing| !outgoing.is_closed())
    }

    fn send<S, C: Encode<S>>(&self, message: S) -> Result<(), SendError<S>> {
        // No clone of the sender leaves the lock: it would keep the queue open when the outlet closes.
        let outgoing = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(outgoing) = &*outgoing else { return Err(SendError::NotConnected(message)) };
        // The place first, then the work.
        let place = match outgoing.try_reserve() {
            Ok(place) => place,
            Err(mpsc::error::TrySendError::Full(())) => return Err(SendError::Full(message)),
            Err(mpsc::error::TrySendError::Closed(())) => return Err(SendError::NotConnected(message)),
        };
        match encode::<S, C>(&message) {
            Ok(encoded) => {
                place.send(encoded);
                Ok(())
            }
            Err(source) => Err(SendError::Encode { message, source }),
        }
    }
}

fn encode<S, C: Encode<S>>(message: &S) -> Result<Message, CodecError> {
    let mut payload = Vec::new();
    match C::encode(message, &mut payload)? {
        MessageKind::Text => Utf8Bytes::try_from(payload).map(Message::Text).map_err(CodecError::encode),
        MessageKind::Binary => Ok(Message::Binary(payload.into())),
    }
}

async fn open(config: &Config) -> Result<(Socket, Response<Option<Vec<u8>>>), ClientError> {
    if let Some(what) = &config.malformed {
        return Err(ClientError::InvalidRequest((&**what).into()));
    }
    let mut request = config.url.as_str().into_client_request()?;
    // Asked here, because tungstenite would connect first.
    match request.uri().scheme_str() {
        Some("ws") => {}
        Some("wss") if cfg!(feature = "client-tls") => {}
        Some("wss") => return Err(ClientError::InvalidRequest("wss needs the feature `client-tls`".into())),
        _ => return Err(ClientError::InvalidRequest("the URL's scheme is neither ws nor wss".into())),
    }
    for (name, value) in &config.headers {
        request.headers_mut().append(name, value.clone());
    }
    if !config.protocols.is_empty() {
        let protocols = HeaderValue::try_from(config.protocols.join(", "))
            .map_err(|error| ClientError::InvalidRequest(error.into()))?;
        request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, protocols);
    }
    let limits = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .max_message_size(Some(config.message_bytes_max))
        .max_frame_size(Some(config.message_bytes_max));
    let nodelay = true;
    #[cfg(not(feature = "client-tls"))]
    let opened = tokio_tungstenite::connect_async_with_config(request, Some(limits), nodelay).await?;
    #[cfg(feature = "client-tls")]
    let opened = {
        let tls = config.tls.clone().map_or_else(public_roots, Ok)?;
        let connector = tokio_tungstenite::Connector::Rustls(tls);
        tokio_tungstenite::connect_async_tls_with_config(request, Some(limits), nodelay, Some(connector))
            .await?
    };
    Ok(opened)
}

/// Names its cryptography, because without a name rustls panics in programs that contain two kinds or none.
#[cfg(feature = "client-tls")]
fn public_roots() -> Result<Arc<rustls::ClientConfig>, ClientError> {
    let roots = rustls::RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    let config = rustls::ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .map_err(|error| ClientError::Handshake(error.into()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// The connection's task, from the handshake until the socket is gone.
async fn connection<R, C>(
    socket: Socket,
    queue: mpsc::Receiver<Message>,
    closing: oneshot::Receiver<()>,
    closed: oneshot::Sender<ClientClose>,
    callbacks: Arc<Callbacks<R>>,
    disconnect_timeout: Duration,
) where
    R: 'static,
    C: Decode<R>,
{
    let (mut sink, mut stream) = socket.split();
    let talk = talk::<R, C>(&mut sink, &mut stream, queue, closing, &callbacks, disconnect_timeout);
    let close = match AssertUnwindSafe(talk).catch_unwind().await {
        Ok(close) => close,
        Err(_) => ClientClose::lost("a callback panicked"),
    };
    if let ClientClose::ByServer { .. } = close {
        // tungstenite has put our answer aside, and a flush sends it.
        let _ = timeout(disconnect_timeout, sink.flush()).await;
    }
    let _ = callbacks.close.call(close.clone());
    let answered = matches!(close, ClientClose::ByClient | ClientClose::ByServer { .. });
    let _ = closed.send(close);
    if answered {
        // RFC 6455 wants the server to hang up first. Nobody has to wait for that but this task.
        let hang_up = async { while let Some(Ok(_)) = stream.next().await {} };
        let _ = timeout(disconnect_timeout, hang_up).await;
    }
}

/// Reads and writes at the same time until there is a Close from the server, or will be none.
async fn talk<R, C>(
    sink: &mut SplitSink<Socket, Message>,
    stream: &mut SplitStream<Socket>,
    queue: mpsc::Receiver<Message>,
    closing: oneshot::Receiver<()>,
    callbacks: &Callbacks<R>,
    disconnect_timeout: Duration,
) -> ClientClose
where
    R: 'static,
    C: Decode<R>,
{
    let close_sent = AtomicBool::new(false);
    let mut reading = pin!(read::<R, C>(stream, callbacks, &close_sent));
    let mut writing = pin!(write(sink, queue, &close_sent));
    let mut too_late = pin!(async {
        // Never sent, only dropped.
        let _ = closing.await;
        sleep(disconnect_timeout).await;
    });
    tokio::select! {
        biased;
        close = &mut reading => close,
        error = &mut writing => tokio::select! {
            biased;
            // What the server said before it hung up says more than that it did.
            close = reading => match close {
                ClientClose::Lost(_) => ClientClose::lost(error),
                close => close,
            },
            () = too_late => ClientClose::Unanswered,
            () = sleep(disconnect_timeout) => ClientClose::lost(error),
        },
        () = &mut too_late => ClientClose::Unanswered,
    }
}

/// Hands messages to the callbacks until the server closes or is gone.
async fn read<R, C>(
    stream: &mut (impl Stream<Item = Result<Message, tungstenite::Error>> + Unpin),
    callbacks: &Callbacks<R>,
    close_sent: &AtomicBool,
) -> ClientClose
where
    C: Decode<R>,
{
    let error = loop {
        match stream.next().await {
            Some(Ok(Message::Text(text))) => deliver::<R, C>(callbacks, MessageKind::Text, text.as_bytes()),
            Some(Ok(Message::Binary(bytes))) => deliver::<R, C>(callbacks, MessageKind::Binary, &bytes),
            // Relaxed: written and read by the same task.
            Some(Ok(Message::Close(_))) if close_sent.load(Ordering::Relaxed) => {
                return ClientClose::ByClient;
            }
            Some(Ok(Message::Close(frame))) => {
                let (code, reason) = frame
                    .map_or((NO_CODE, String::new()), |frame| (frame.code.into(), frame.reason.to_string()));
                return ClientClose::ByServer { code, reason };
            }
            // tungstenite answers pings by itself, with the next read.
            Some(Ok(_)) => {}
            Some(Err(error)) => break error,
            None => break tungstenite::Error::ConnectionClosed,
        }
    };
    if close_sent.load(Ordering::Relaxed) { ClientClose::Unanswered } else { ClientClose::lost(error) }
}

fn deliver<R, C: Decode<R>>(callbacks: &Callbacks<R>, kind: MessageKind, payload: &[u8]) {
    match C::decode(kind, payload) {
        Ok(message) => {
            if callbacks.message.call(message).is_err() {
                tracing::debug!("a message has arrived before a callback was set");
            }
        }
        Err(error) => {
            if let Err(error) = callbacks.error.call(error) {
                tracing::warn!(error = &error as &dyn std::error::Error, "a message cannot be decoded");
            }
        }
    }
}

/// Writes what is queued and, when the queue has been closed, a Close. Ends with an error only: after the Close it is
/// for the reading half to say how the connection ended.
async fn write(
    sink: &mut (impl Sink<Message, Error = tungstenite::Error> + Unpin),
    mut queue: mpsc::Receiver<Message>,
    close_sent: &AtomicBool,
) -> tungstenite::Error {
    while let Some(message) = queue.recv().await {
        let written = async {
            sink.feed(message).await?;
            // Whatever else is queued goes out with the same write.
            while let Ok(message) = queue.try_recv() {
                sink.feed(message).await?;
            }
            sink.flush().await
        };
        if let Err(error) = written.await {
            return error;
        }
    }
    close_sent.store(true, Ordering::Relaxed);
    let farewell = CloseFrame { code: CloseCode::Normal, reason: Utf8Bytes::default() };
    match sink.send(Message::Close(Some(farewell))).await {
        Ok(()) => pending().await,
        Err(error) => error,
    }
}
