//! The upgrade: from an HTTP request to a socket that a shard can own.
//!
//! An extractor, a response and one short-lived task per handshake, which owns the stream until a shard takes it. The
//! result is a plain socket, removed from tokio's reactor, and none of hyper's state is kept: memory held by an
//! upgraded connection is multiplied by ten thousand connections. A stream that is not a socket (TLS, HTTP/2) gets a
//! [bridge](crate::bridge).
//! There is a socket only if the response was [sent](crate::verdict). A client that received the response and is not
//! served is [turned away](crate::turn_away) with a Close frame.
//! Knows axum, hyper and whether a handshake is valid. Does not know hubs, or what takes the socket.

use std::{
    fmt,
    future::Future,
    io,
    net::{IpAddr, Shutdown, SocketAddr},
    os::unix,
    time::Duration,
};

use axum::{
    extract::{ConnectInfo, FromRequestParts, OptionalFromRequestParts},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, request::Parts};
use hyper::{
    rt::{Read, Write},
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::{rt::TokioIo, server::conn::auto::upgrade::downcast};
use shardcast_engine::{BridgeProgress, CloseCode};
use socket2::SockRef;
use thiserror::Error;
use tokio::{
    net::{TcpStream, UnixStream},
    runtime::Handle,
    sync::SemaphorePermit,
    time::timeout,
};

pub use crate::handshake::UpgradeRejection;
use crate::{
    auth,
    bridge::bridge,
    handshake::{self, Answer, RequestHead},
    log_limit::{
        Excerpt, FORBIDDEN_ORIGIN, INVALID_ORIGIN, NO_SUBPROTOCOL, NOT_SENT, NOT_TAKEN_OVER, NOT_WAITED_FOR,
    },
    origin::AllowedOrigins,
    peer_address::{PeerAddress, TrustedProxies},
    turn_away::{self, turn_away, turn_away_at_once, turn_socket_away_at_once},
    verdict::{self, PendingVerdict, Verdict},
};

/// How long hyper may take to release the socket after it was given the response, which is about 200 bytes long.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Extractor for a WebSocket handshake; replaces `axum::extract::ws::WebSocketUpgrade`.
///
/// Supports WebSocket over HTTP/1.1 (a `GET` with `Upgrade`) and over HTTP/2 (an extended `CONNECT`, RFC 8441). Use
/// [`any`](axum::routing::any) for a route that serves both; [`get`](axum::routing::get) serves HTTP/1.1 only.
/// `axum::serve` offers both.
///
/// As an extractor it refuses every request that is not a valid handshake with an [`UpgradeRejection`].
/// `Option<WebSocketUpgrade>` is `None` for a request that does not ask for a WebSocket, so that one route can also
/// serve a page; a request that asks for one with an invalid handshake is refused.
///
/// ```
/// use axum::{Router, response::{Html, IntoResponse, Response}, routing::any};
/// use shardcast::WebSocketUpgrade;
///
/// async fn page_or_socket(ws: Option<WebSocketUpgrade>) -> Response {
///     match ws {
///         Some(ws) => ws.protocols(["chat.v2", "chat.v1"]).on_upgrade(|socket| async move {
///             // Hand the socket to a hub.
///             # drop(socket);
///         }),
///         None => Html("<h1>Come back with a WebSocket</h1>").into_response(),
///     }
/// }
///
/// let app: Router = Router::new().route("/", any(page_or_socket));
/// ```
///
/// # Middlewares
///
/// A connection exists only if the response was sent. A middleware may replace the response or change its status: then
/// the handshake is abandoned and its permit under the connection limits is released.
///
/// Over HTTP/1.1 the response's body detects this. A middleware that wraps bodies must forward [`is_end_stream`], as
/// nearly all do. tower-http's `ResponseBodyTimeoutLayer` does not: do not apply it to WebSocket routes. With it, each
/// socket is dropped at once, without a Close frame; this is logged at level `info`, at most once per second.
///
/// A middleware that replaces the response must not call [`is_end_stream`] and then [`size_hint`] on the replaced body,
/// as hyper does when it sends one: that response is then taken for sent. In that case a client that gets the other
/// response and ends its stream within 5 s briefly counts as a connection (`on_connected`, `on_disconnected`), and for
/// any other client the permit is held for these 5 s. Inspect the status and the headers instead. A middleware that
/// calls only one of the two, or both in the opposite order, creates no connection, but the permit may be held for 5 s.
///
/// [`is_end_stream`]: axum::body::HttpBody::is_end_stream
/// [`size_hint`]: axum::body::HttpBody::size_hint
#[must_use = "the handshake goes unanswered unless the response made from it is returned"]
pub struct WebSocketUpgrade {
    answer: Answer,
    on_upgrade: OnUpgrade,
    requested_protocols: Vec<HeaderValue>,
    selected_protocol: Option<HeaderValue>,
    headers: HeaderMap,
    peer_address: PeerAddress,
    refusal: Option<UpgradeRejection>,
}

impl WebSocketUpgrade {
    /// Selects the first of `protocols`, in order of the server's preference, that the client offers.
    ///
    /// Without a match, the handshake succeeds without a subprotocol; browsers then fail the connection, because none
    /// that they offered was selected. This is logged at level `info`, at most once per second, also if this method was
    /// not called and the client offers subprotocols. To refuse such a client, check
    /// [`selected_protocol`](Self::selected_protocol).
    pub fn protocols<I>(mut self, protocols: I) -> Self
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        self.selected_protocol = protocols.into_iter().find_map(|known| {
            self.requested_protocols
                .iter()
                .find(|requested| requested.as_bytes() == known.as_ref().as_bytes())
                .cloned()
        });
        self
    }

    /// The subprotocols that the client offers, in the client's order; only the first 128, if there are more.
    pub fn requested_protocols(&self) -> impl Iterator<Item = &HeaderValue> {
        self.requested_protocols.iter()
    }

    /// The subprotocol that the response will name, if any.
    pub fn selected_protocol(&self) -> Option<&HeaderValue> {
        self.selected_protocol.as_ref()
    }

    /// Selects `protocol`, instead of what [`protocols`](Self::protocols) selected.
    ///
    /// A client that did not offer it will fail the connection.
    pub fn set_selected_protocol(&mut self, protocol: HeaderValue) {
        self.selected_protocol = Some(protocol);
    }

    /// The request's `Origin`: the origin of the page that opens the WebSocket. Browsers always send it.
    pub fn origin(&self) -> Option<&HeaderValue> {
        self.headers.get(header::ORIGIN)
    }

    /// The client's address, if it is known before the upgrade;
    /// [`max_connections_per_address`](crate::EngineConfig::max_connections_per_address) counts by it. IPv4 in an IPv6
    /// form (`::ffff:192.0.2.1`) is returned as IPv4.
    ///
    /// By default it is the remote address of the socket, if the router is served with
    /// [`into_make_service_with_connect_info::<SocketAddr>`](axum::Router::into_make_service_with_connect_info), and
    /// `None` otherwise. [`trusted_proxies`](Self::trusted_proxies) replaces it by the address that the proxies report,
    /// and [`set_peer_address`](Self::set_peer_address) overrides both.
    pub fn peer_address(&self) -> Option<IpAddr> {
        self.peer_address.known()
    }

    /// Trusts these reverse proxies to report the client's address: it is the nearest address in their header that is
    /// not itself a trusted proxy. Without this call, all clients behind a proxy have the proxy's address.
    ///
    /// The header is used only if the remote address of the socket is a trusted proxy. If a proxy does not report an
    /// address (`unknown`, no header, a malformed header), the result is the nearest known address, such as the
    /// proxy's own.
    ///
    /// ```
    /// use axum::{extract::State, response::Response};
    /// use shardcast::{TrustedProxies, WebSocketUpgrade};
    ///
    /// async fn connect(ws: WebSocketUpgrade, State(proxies): State<TrustedProxies>) -> Response {
    ///     let ws = ws.trusted_proxies(&proxies);
    ///     // ws.serve(&hub, Chat)
    /// #   ws.on_upgrade(|_| async {})
    /// }
    ///
    /// // In the router's state, made once:
    /// let proxies = TrustedProxies::x_forwarded_for(["127.0.0.1", "10.0.0.0/8"])?;
    /// # Ok::<(), shardcast::InvalidNetwork>(())
    /// ```
    pub fn trusted_proxies(mut self, proxies: &TrustedProxies) -> Self {
        self.peer_address.trust(proxies, &self.headers);
        self
    }

    /// Sets the client's address, for an application that knows it from elsewhere, for instance from a header that its
    /// CDN sets.
    pub fn set_peer_address(&mut self, address: IpAddr) {
        self.peer_address.tell(address);
    }

    /// Allows browsers to connect only from pages of these origins, such as `https://example.org`; by default every
    /// origin is allowed. For any other origin the response is [`UpgradeRejection::ForbiddenOrigin`] (403), and the
    /// origin and the list are logged (`warn`, at most once per second).
    ///
    /// The same-origin policy does not cover WebSockets: a page of another site connects with the user's cookies. A
    /// service that authenticates by cookies must call this. A request without an origin, as clients that are not
    /// browsers send it, is allowed.
    ///
    /// Case, a trailing slash and default ports make no difference. An entry that can never match, such as
    /// `https://*.example.org`, is a mistake: it is logged as an error, and every page is refused until it is fixed. To
    /// detect it when the program starts, build the list there with [`AllowedOrigins::new`] and pass it here.
    pub fn allowed_origins<I>(mut self, origins: I) -> Self
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let mut sent = self.headers.get_all(header::ORIGIN).iter();
        // Browsers always send the origin. A client that sends none is not a browser and could have sent any value.
        let Some(origin) = sent.next() else { return self };
        let is_allowed = match AllowedOrigins::new(origins) {
            Ok(allowed) => {
                let is_allowed = allowed.allow(origin) && sent.next().is_none();
                if !is_allowed && let Some(left_out) = FORBIDDEN_ORIGIN.allows() {
                    let origin = Excerpt(origin.as_bytes());
                    tracing::warn!(
                        ?origin,
                        %allowed,
                        left_out,
                        "a WebSocket handshake was refused (403): its origin is not allowed"
                    );
                }
                is_allowed
            }
            Err(error) => {
                if let Some(left_out) = INVALID_ORIGIN.allows() {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        left_out,
                        "the list of allowed origins is invalid: every page is refused (403) until it is fixed"
                    );
                }
                false
            }
        };
        if !is_allowed {
            self.refusal = Some(UpgradeRejection::ForbiddenOrigin);
        }
        self
    }

    /// Accepts the handshake and calls `callback` with the WebSocket once the response has been sent.
    ///
    /// The callback runs in its own tokio task. It is not called if the client disconnects before that, if a middleware
    /// replaces the response, or if [`allowed_origins`](Self::allowed_origins) refused the handshake, in which case the
    /// response is the refusal. A WebSocket that the callback drops is closed with a Close frame (1011).
    #[must_use = "the handshake goes unanswered unless this response is returned"]
    pub fn on_upgrade<C, Fut>(self, callback: C) -> Response
    where
        C: FnOnce(WebSocket) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let (response, pending) = match self.accept() {
            Ok(accepted) => accepted,
            Err(refusal) => return refusal.into_response(),
        };
        tokio::spawn(async move {
            match pending.socket().await {
                Ok(socket) => callback(socket).await,
                Err(error) => error.log(),
            }
        });
        response
    }

    /// Accepts the handshake: the response to return, and the socket that exists once the response has been sent.
    pub(crate) fn accept(mut self) -> Result<(Response, PendingSocket), UpgradeRejection> {
        if let Some(refusal) = self.refusal {
            return Err(refusal);
        }
        // A browser whose token is the subprotocol after `bearer` fails the connection if none is selected.
        if self.selected_protocol.is_none() {
            self.selected_protocol =
                self.requested_protocols.iter().find(|protocol| *protocol == auth::BEARER).cloned();
        }
        if self.selected_protocol.is_none()
            && !self.requested_protocols.is_empty()
            && let Some(left_out) = NO_SUBPROTOCOL.allows()
        {
            let offered: Vec<_> = self.requested_protocols.iter().map(HeaderValue::as_bytes).collect();
            let offered = offered.join(&b", "[..]);
            let offered = Excerpt(&offered);
            tracing::info!(
                ?offered,
                left_out,
                "no subprotocol was selected of those that a client offers: a browser will fail the connection"
            );
        }
        let (mut response, verdict) = match &self.answer {
            Answer::SwitchingProtocols { accept } => {
                let headers: [(HeaderName, &str); 3] = [
                    (header::CONNECTION, "upgrade"),
                    (header::UPGRADE, "websocket"),
                    (header::SEC_WEBSOCKET_ACCEPT, accept),
                ];
                let mut response = (StatusCode::SWITCHING_PROTOCOLS, headers).into_response();
                if self.headers.contains_key(header::ACCEPT_ENCODING) {
                    // A compression middleware would wrap a body of unknown length, so that hyper's calls would not
                    // reach the watched body directly.
                    response
                        .headers_mut()
                        .insert(header::CONTENT_ENCODING, HeaderValue::from_static("identity"));
                }
                let (response, verdict) = verdict::watch(response);
                (response, Some(verdict))
            }
            // Over HTTP/2 hyper completes the upgrade only if the status allows it.
            Answer::Http2Ok => (StatusCode::OK.into_response(), None),
        };
        if let Some(protocol) = &self.selected_protocol {
            response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, protocol.clone());
        }
        let pending = PendingSocket {
            on_upgrade: self.on_upgrade,
            verdict,
            asks_to_close: handshake::asks_to_close(&self.headers),
            protocol: self.selected_protocol,
            peer_address: self.peer_address,
        };
        Ok((response, pending))
    }

    fn from_parts(parts: &mut Parts) -> Result<Self, UpgradeRejection> {
        let answer = handshake::check(head(parts))?;
        let on_upgrade = parts.extensions.remove::<OnUpgrade>().ok_or(match answer {
            Answer::SwitchingProtocols { .. } => UpgradeRejection::NotUpgradable,
            Answer::Http2Ok => UpgradeRejection::NotUpgradableOverHttp2,
        })?;
        let socket = connect_info(&parts.extensions).map(|address| address.ip());
        Ok(Self {
            answer,
            on_upgrade,
            requested_protocols: handshake::requested_protocols(&parts.headers),
            selected_protocol: None,
            headers: parts.headers.clone(),
            peer_address: PeerAddress::of_socket(socket),
            refusal: None,
        })
    }
}

impl fmt::Debug for WebSocketUpgrade {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("WebSocketUpgrade")
            // Not the requested subprotocols: one may be a token.
            .field("selected_protocol", &self.selected_protocol)
            .field("origin", &self.origin())
            .field("peer_address", &self.peer_address())
            .field("refusal", &self.refusal)
            .finish_non_exhaustive()
    }
}

impl<S: Send + Sync> FromRequestParts<S> for WebSocketUpgrade {
    type Rejection = UpgradeRejection;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, UpgradeRejection> {
        Self::from_parts(parts)
    }
}

impl<S: Send + Sync> OptionalFromRequestParts<S> for WebSocketUpgrade {
    type Rejection = UpgradeRejection;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, UpgradeRejection> {
        if handshake::is_attempt(head(parts)) { Self::from_parts(parts).map(Some) } else { Ok(None) }
    }
}

fn head(parts: &Parts) -> RequestHead<'_> {
    RequestHead {
        method: &parts.method,
        version: parts.version,
        headers: &parts.headers,
        protocol: parts.extensions.get::<hyper::ext::Protocol>().map(hyper::ext::Protocol::as_str),
        authority: parts.uri.authority(),
    }
}

impl IntoResponse for UpgradeRejection {
    fn into_response(self) -> Response {
        tracing::debug!(reason = self.label(), "a WebSocket handshake was refused");
        let mut response = (self.status(), self.to_string()).into_response();
        let headers = response.headers_mut();
        if matches!(self, Self::WrongVersion | Self::WrongVersionOverHttp2) {
            headers.insert(header::SEC_WEBSOCKET_VERSION, handshake::WEBSOCKET_VERSION);
        }
        if self.status() == StatusCode::UPGRADE_REQUIRED {
            // RFC 9110, section 15.5.22.
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// A WebSocket after its handshake, before any frame has been read. Give it to a hub: if it is dropped, it is closed
/// with a Close frame (1011).
pub struct WebSocket {
    /// `None` once the parts have been taken.
    parts: Option<WebSocketParts>,
    protocol: Option<HeaderValue>,
    peer_address: Option<IpAddr>,
}

impl WebSocket {
    /// The subprotocol that the handshake selected, if any.
    pub fn protocol(&self) -> Option<&HeaderValue> {
        self.protocol.as_ref()
    }

    /// The client's address: [`WebSocketUpgrade::peer_address`], or else the remote address of the socket. `None` with
    /// TLS and HTTP/2 without connect info, and on Unix sockets.
    pub fn peer_address(&self) -> Option<IpAddr> {
        self.peer_address
    }

    /// The remote address of the socket, if it is a TCP connection.
    pub(crate) fn remote_address(&self) -> Option<SocketAddr> {
        self.parts.as_ref().and_then(|parts| parts.socket.remote_address())
    }

    pub(crate) fn into_parts(mut self) -> WebSocketParts {
        self.parts.take().expect("the parts are taken only by methods that consume the WebSocket")
    }

    /// Closes the WebSocket with this Close frame.
    pub(crate) fn turn_away(mut self, code: CloseCode, reason: &'static str) {
        if let Some(parts) = self.parts.take() {
            parts.socket.turn_away(code, reason);
        }
    }
}

impl Drop for WebSocket {
    fn drop(&mut self) {
        if let Some(parts) = self.parts.take() {
            parts.socket.turn_away(CloseCode::INTERNAL_ERROR, "the connection was not served");
        }
    }
}

impl fmt::Debug for WebSocket {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("WebSocket")
            .field("protocol", &self.protocol)
            .field("peer_address", &self.peer_address)
            .finish_non_exhaustive()
    }
}

/// The parts of a [`WebSocket`].
#[derive(Debug)]
pub(crate) struct WebSocketParts {
    pub(crate) socket: RawSocket,
    /// The beginning of the first frames, if the client sent them together with the handshake.
    pub(crate) read_ahead: Bytes,
}

/// The remote address, if the router is served with connect info.
pub(crate) fn connect_info(extensions: &http::Extensions) -> Option<SocketAddr> {
    #[cfg(feature = "tls")]
    if let Some(ConnectInfo(crate::tls::PeerAddr(address))) = extensions.get() {
        return Some(*address);
    }
    extensions.get::<ConnectInfo<SocketAddr>>().map(|info| info.0)
}

/// What a TLS server over TCP reads and writes.
#[cfg(feature = "tls")]
type TlsStream = tokio_rustls::server::TlsStream<TcpStream>;

/// A non-blocking socket, registered with no runtime but for TLS.
#[derive(Debug)]
pub(crate) enum RawSocket {
    /// The client's own socket.
    Tcp(std::net::TcpStream),
    /// The client's own socket with its TLS session.
    #[cfg(feature = "tls")]
    Tls(Box<TlsStream>),
    /// The client's own socket, if the server listens on a Unix socket.
    Unix(unix::net::UnixStream),
    /// Our end of a bridge, and what the bridge has passed on.
    Bridge(unix::net::UnixStream, BridgeProgress),
}

impl RawSocket {
    /// A second descriptor of the same socket; none for a TLS session, of which there is only one.
    pub(crate) fn duplicate(&self) -> io::Result<Option<Self>> {
        Ok(Some(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            #[cfg(feature = "tls")]
            Self::Tls(_) => return Ok(None),
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Bridge(stream, progress) => Self::Bridge(stream.try_clone()?, progress.clone()),
        }))
    }

    /// The socket for an engine, and what the client has sent before what is read from it.
    pub(crate) fn into_socket(self, read_ahead: Bytes) -> io::Result<(shardcast_engine::Socket, Bytes)> {
        Ok(match self {
            Self::Tcp(stream) => (stream.into(), read_ahead),
            #[cfg(feature = "tls")]
            Self::Tls(stream) => {
                let (stream, mut session) = stream.into_inner();
                let mut received = read_ahead.to_vec();
                read_decrypted(&mut session, &mut received);
                (shardcast_engine::Socket::tls(stream.into_std()?, session), received.into())
            }
            Self::Unix(stream) => (stream.into(), read_ahead),
            Self::Bridge(stream, progress) => {
                (shardcast_engine::Socket::bridge(stream, progress), read_ahead)
            }
        })
    }

    /// Closes the socket with a Close frame: in a task that waits for the client, or without waiting if there is no
    /// runtime or the limit on such tasks is reached.
    pub(crate) fn turn_away(self, code: CloseCode, reason: &'static str) {
        self.turn_away_within(&turn_away::LIMIT, code, reason);
    }

    fn turn_away_within(self, limit: &'static turn_away::Limit, code: CloseCode, reason: &'static str) {
        let waiting = Handle::try_current().ok().and_then(|runtime| Some((runtime, permit(limit)?)));
        let Some((runtime, permit)) = waiting else {
            match self {
                Self::Tcp(stream) => {
                    turn_socket_away_at_once(
                        &stream,
                        |stream| stream.shutdown(Shutdown::Write),
                        code,
                        reason,
                    );
                }
                #[cfg(feature = "tls")]
                Self::Tls(stream) => turn_away_at_once(*stream, code, reason),
                Self::Unix(stream) | Self::Bridge(stream, _) => {
                    turn_socket_away_at_once(
                        &stream,
                        |stream| stream.shutdown(Shutdown::Write),
                        code,
                        reason,
                    );
                }
            }
            return;
        };
        runtime.spawn(async move {
            match self {
                Self::Tcp(stream) => {
                    if let Ok(stream) = TcpStream::from_std(stream) {
                        turn_away(stream, code, reason).await;
                    }
                }
                #[cfg(feature = "tls")]
                Self::Tls(stream) => turn_away(*stream, code, reason).await,
                Self::Unix(stream) | Self::Bridge(stream, _) => {
                    if let Ok(stream) = UnixStream::from_std(stream) {
                        turn_away(stream, code, reason).await;
                    }
                }
            }
            drop(permit);
        });
    }

    /// The remote address, if there is one.
    fn remote_address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(stream) => stream.peer_addr().ok(),
            #[cfg(feature = "tls")]
            Self::Tls(stream) => stream.get_ref().0.peer_addr().ok(),
            Self::Unix(_) | Self::Bridge(..) => None,
        }
    }

    /// Whether the client has ended its side and all that it sent has been read.
    fn is_at_end(&self) -> bool {
        let mut byte = [std::mem::MaybeUninit::uninit()];
        let peeked = match self {
            Self::Tcp(stream) => SockRef::from(stream).peek(&mut byte),
            #[cfg(feature = "tls")]
            Self::Tls(stream) => SockRef::from(stream.get_ref().0).peek(&mut byte),
            Self::Unix(stream) | Self::Bridge(stream, _) => SockRef::from(stream).peek(&mut byte),
        };
        peeked.is_ok_and(|count| count == 0)
    }
}

/// A permit to wait for one more client that is turned away.
fn permit(limit: &'static turn_away::Limit) -> Option<SemaphorePermit<'static>> {
    let permit = limit.permit();
    if permit.is_none()
        && let Some(left_out) = NOT_WAITED_FOR.allows()
    {
        tracing::warn!(
            at_once_max = turn_away::AT_ONCE_MAX,
            left_out,
            "too many clients are turned away at once: a client was sent its Close frame and disconnected \
             without waiting for it to close"
        );
    }
    permit
}

/// The socket that an accepted handshake will yield.
#[derive(Debug)]
pub(crate) struct PendingSocket {
    on_upgrade: OnUpgrade,
    /// `None` over HTTP/2, where hyper releases the stream only if the response was sent.
    verdict: Option<PendingVerdict>,
    /// Whether the client asks to close the connection after the response.
    asks_to_close: bool,
    protocol: Option<HeaderValue>,
    peer_address: PeerAddress,
}

impl PendingSocket {
    /// Waits until the response has been sent, then detaches the socket from hyper and tokio. Returns an error as soon
    /// as it is known that the response was not sent.
    ///
    /// Must be awaited within a tokio runtime, and not in the handler that returns the response.
    pub(crate) async fn socket(self) -> Result<WebSocket, UpgradeError> {
        let (verdict, upgraded) = match self.verdict {
            Some(pending) => {
                let verdict = pending.verdict().await;
                if verdict == Verdict::NotSent || (verdict == Verdict::Unclear && self.asks_to_close) {
                    return Err(UpgradeError::NotSent);
                }
                // Times out if a response with another status and without a body was sent.
                let upgraded = timeout(ANSWER_TIMEOUT, self.on_upgrade).await;
                (verdict, upgraded.map_err(|_| UpgradeError::NotSent)?)
            }
            None => (Verdict::Sent, self.on_upgrade.await),
        };
        let upgraded = upgraded.map_err(UpgradeError::ConnectionLost)?;
        let (socket, read_ahead) = match detach(upgraded) {
            Ok(detached) => detached,
            Err(Undetachable { error, upgraded }) => {
                if let Some(upgraded) = upgraded {
                    let why = "no resources for one more connection";
                    let (stream, code) = (TokioIo::new(upgraded), CloseCode::TRY_AGAIN_LATER);
                    match permit(&turn_away::LIMIT) {
                        Some(permit) => {
                            tokio::spawn(async move {
                                turn_away(stream, code, why).await;
                                drop(permit);
                            });
                        }
                        None => turn_away_at_once(stream, code, why),
                    }
                }
                return Err(UpgradeError::SocketUnusable(error));
            }
        };
        // hyper releases the socket of a client that ended its side together with the handshake after any response,
        // so the socket is no proof that ours was sent.
        if verdict == Verdict::Unclear && read_ahead.is_empty() && socket.is_at_end() {
            return Err(UpgradeError::NotSent);
        }
        let peer_address = self.peer_address.with_socket(socket.remote_address().map(|address| address.ip()));
        let parts = Some(WebSocketParts { socket, read_ahead });
        Ok(WebSocket { parts, protocol: self.protocol, peer_address })
    }
}

/// Why an accepted handshake did not yield a socket.
#[derive(Debug, Error)]
pub(crate) enum UpgradeError {
    #[error("the response was not sent: the client disconnected, or a middleware replaced the response")]
    NotSent,
    #[error("the connection was lost before the response was sent")]
    ConnectionLost(#[source] hyper::Error),
    #[error("the socket could not be detached from the server")]
    SocketUnusable(#[source] io::Error),
}

impl UpgradeError {
    pub(crate) fn log(&self) {
        let error = self as &dyn std::error::Error;
        match self {
            Self::ConnectionLost(_) => tracing::debug!(error, "a WebSocket upgrade failed"),
            Self::NotSent => {
                if let Some(left_out) = NOT_SENT.allows() {
                    tracing::info!(error, left_out, "a WebSocket upgrade failed");
                }
            }
            Self::SocketUnusable(_) => {
                if let Some(left_out) = NOT_TAKEN_OVER.allows() {
                    tracing::warn!(
                        error,
                        left_out,
                        "a client was closed (1013) after its handshake: check the limit on open files (`ulimit -n`)"
                    );
                }
            }
        }
    }
}

/// Why a stream could not be detached, and the stream, if it still exists.
struct Undetachable {
    error: io::Error,
    upgraded: Option<Upgraded>,
}

impl From<io::Error> for Undetachable {
    fn from(error: io::Error) -> Self {
        Self { error, upgraded: None }
    }
}

/// The socket under `upgraded`, or a bridge's if the stream is not a socket.
fn detach(upgraded: Upgraded) -> Result<(RawSocket, Bytes), Undetachable> {
    let upgraded = match take::<TcpStream>(upgraded) {
        Ok((stream, read_ahead)) => return Ok((RawSocket::Tcp(stream.into_std()?), read_ahead)),
        Err(upgraded) => upgraded,
    };
    let upgraded = match take::<UnixStream>(upgraded) {
        Ok((stream, read_ahead)) => return Ok((RawSocket::Unix(stream.into_std()?), read_ahead)),
        Err(upgraded) => upgraded,
    };
    #[cfg(feature = "tls")]
    let upgraded = match take::<TlsStream>(upgraded) {
        Ok((stream, read_ahead)) => return Ok((RawSocket::Tls(Box::new(stream)), read_ahead)),
        Err(upgraded) => upgraded,
    };
    // The bridge reads hyper's read-ahead from the stream, like all other bytes.
    match bridge(TokioIo::new(upgraded)) {
        Ok((socket, progress)) => Ok((RawSocket::Bridge(socket, progress), Bytes::new())),
        Err((error, upgraded)) => Err(Undetachable { error, upgraded: Some(upgraded.into_inner()) }),
    }
}

/// Takes out what a TLS session has decrypted already: the client may have sent it together with its handshake.
#[cfg(feature = "tls")]
fn read_decrypted(session: &mut tokio_rustls::rustls::ServerConnection, to: &mut Vec<u8>) {
    let mut piece = [0; 4096];
    // An end of the session is seen by the shard again.
    while let Ok(count @ 1..) = io::Read::read(&mut session.reader(), &mut piece) {
        to.extend_from_slice(&piece[..count]);
    }
}

/// The stream under `upgraded`, if it is a `T`, and the bytes that hyper read beyond the handshake.
fn take<T>(upgraded: Upgraded) -> Result<(T, Bytes), Upgraded>
where
    T: 'static,
    TokioIo<T>: Read + Write + Unpin,
{
    // `axum::serve` and other servers that detect the HTTP version wrap the stream once more.
    let (io, read) = match downcast::<TokioIo<T>>(upgraded) {
        Ok(parts) => (parts.io, parts.read_buf),
        Err(upgraded) => {
            let parts = upgraded.downcast::<TokioIo<T>>()?;
            (parts.io, parts.read_buf)
        }
    };
    // A copy, because a slice would keep hyper's whole read buffer alive.
    Ok((io.into_inner(), Bytes::copy_from_slice(&read)))
}

#[cfg(test)]
mod tests;
