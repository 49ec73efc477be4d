//! The upgrade: from an HTTP request to a socket that a shard can own.
//!
//! An extractor, a response and a short-lived task. It ends with the plain socket off tokio's reactor and nothing of
//! hyper behind it, because what an upgraded connection keeps it keeps ten thousand times; only what is not a socket
//! gets a [bridge](crate::bridge).
//! Knows axum, hyper and the handshake's verdicts. Does not know hubs, frames, or who takes the socket.

use std::{
    fmt,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    os::unix,
};

use axum::{
    extract::{ConnectInfo, FromRequestParts, OptionalFromRequestParts},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode, header, request::Parts};
use hyper::{
    rt::{Read, Write},
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::{rt::TokioIo, server::conn::auto::upgrade::downcast};
use thiserror::Error;
use tokio::net::{TcpStream, UnixStream};

pub use crate::handshake::UpgradeRejection;
use crate::{
    bridge::bridge,
    handshake::{self, Answer, RequestHead},
};

/// Extractor for a WebSocket handshake: takes the place of `axum::extract::ws::WebSocketUpgrade`.
///
/// Speaks WebSocket over HTTP/1.1 (a `GET` with `Upgrade`) and over HTTP/2 (an extended `CONNECT`, RFC 8441), so
/// a route for both is made with [`any`](axum::routing::any); [`get`](axum::routing::get) serves HTTP/1.1 only.
/// `axum::serve` offers both.
///
/// As an extractor it refuses everything that is not a sound handshake with an [`UpgradeRejection`].
/// `Option<WebSocketUpgrade>` is `None` for a request that is not meant to open a WebSocket, so that one route can
/// serve a page, too; a handshake that is meant but not sound is refused all the same.
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
#[must_use = "the handshake goes unanswered unless the response made from it is returned"]
pub struct WebSocketUpgrade {
    answer: Answer,
    on_upgrade: OnUpgrade,
    requested_protocols: Vec<HeaderValue>,
    selected_protocol: Option<HeaderValue>,
    origin: Option<HeaderValue>,
    peer_address: Option<IpAddr>,
    refusal: Option<UpgradeRejection>,
}

impl WebSocketUpgrade {
    /// Selects the first of `protocols`, in order of the server's preference, that the client offers.
    ///
    /// Without a match no subprotocol is selected and the handshake succeeds without one; browsers then hang up,
    /// since what they asked for they did not get. See [`selected_protocol`](Self::selected_protocol).
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

    /// The subprotocols that the client offers, in its order.
    pub fn requested_protocols(&self) -> impl Iterator<Item = &HeaderValue> {
        self.requested_protocols.iter()
    }

    /// The subprotocol that the response will name, if any.
    pub fn selected_protocol(&self) -> Option<&HeaderValue> {
        self.selected_protocol.as_ref()
    }

    /// Selects `protocol`, whatever [`protocols`](Self::protocols) has found.
    ///
    /// A client that has not offered it will fail the connection.
    pub fn set_selected_protocol(&mut self, protocol: HeaderValue) {
        self.selected_protocol = Some(protocol);
    }

    /// The `Origin` of the request: where the page comes from that opens the WebSocket. Browsers always send it.
    pub fn origin(&self) -> Option<&HeaderValue> {
        self.origin.as_ref()
    }

    /// Where the request comes from, if the router is served with connect info.
    pub(crate) fn peer_address(&self) -> Option<IpAddr> {
        self.peer_address
    }

    /// Lets browsers connect from pages of these origins only, such as `https://example.org`; by default any page
    /// may. For others the response will be [`UpgradeRejection::ForbiddenOrigin`] (403).
    ///
    /// Same-origin policy does not cover WebSockets: a foreign page connects with the user's cookies. A service
    /// that trusts cookies must call this. Clients that are not browsers send no origin and are let through.
    pub fn allowed_origins<I>(mut self, origins: I) -> Self
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        if !handshake::origin_is_allowed(self.origin.as_ref(), origins) {
            self.refusal = Some(UpgradeRejection::ForbiddenOrigin);
        }
        self
    }

    /// Accepts the handshake and calls `callback` with the WebSocket once the response has been sent.
    ///
    /// The callback runs in a tokio task of its own. It is not called when the client is gone before that, nor when
    /// [`allowed_origins`](Self::allowed_origins) has refused it, which the response then says.
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
                Err(error) => {
                    tracing::debug!(error = &error as &dyn std::error::Error, "a WebSocket upgrade failed");
                }
            }
        });
        response
    }

    /// Accepts the handshake: the response to be returned, and the socket that exists once it has been sent.
    pub(crate) fn accept(self) -> Result<(Response, PendingSocket), UpgradeRejection> {
        if let Some(refusal) = self.refusal {
            return Err(refusal);
        }
        let mut response = match &self.answer {
            Answer::SwitchingProtocols { accept } => {
                let headers: [(HeaderName, &str); 3] = [
                    (header::CONNECTION, "upgrade"),
                    (header::UPGRADE, "websocket"),
                    (header::SEC_WEBSOCKET_ACCEPT, accept),
                ];
                (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
            }
            Answer::Ok => StatusCode::OK.into_response(),
        };
        if let Some(protocol) = &self.selected_protocol {
            response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, protocol.clone());
        }
        Ok((response, PendingSocket { on_upgrade: self.on_upgrade, protocol: self.selected_protocol }))
    }

    fn from_parts(parts: &mut Parts) -> Result<Self, UpgradeRejection> {
        let answer = handshake::check(head(parts))?;
        let on_upgrade = parts.extensions.remove::<OnUpgrade>().ok_or(UpgradeRejection::NotUpgradable)?;
        Ok(Self {
            answer,
            on_upgrade,
            requested_protocols: handshake::requested_protocols(&parts.headers),
            selected_protocol: None,
            origin: parts.headers.get(header::ORIGIN).cloned(),
            peer_address: parts.extensions.get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip()),
            refusal: None,
        })
    }
}

impl fmt::Debug for WebSocketUpgrade {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("WebSocketUpgrade")
            .field("requested_protocols", &self.requested_protocols)
            .field("selected_protocol", &self.selected_protocol)
            .field("origin", &self.origin)
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
    }
}

impl IntoResponse for UpgradeRejection {
    fn into_response(self) -> Response {
        tracing::debug!(reason = self.label(), "a WebSocket handshake was refused");
        let mut response = (self.status(), self.to_string()).into_response();
        let headers = response.headers_mut();
        match self {
            Self::WrongVersion => {
                headers.insert(header::SEC_WEBSOCKET_VERSION, handshake::WEBSOCKET_VERSION);
            }
            Self::NotUpgradable => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
                headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            }
            _ => {}
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// A WebSocket whose handshake is done and whose frames nobody has read yet. Give it to a hub.
pub struct WebSocket {
    socket: RawSocket,
    leftover: Bytes,
    protocol: Option<HeaderValue>,
}

impl WebSocket {
    /// The subprotocol that the handshake has agreed on, if any.
    pub fn protocol(&self) -> Option<&HeaderValue> {
        self.protocol.as_ref()
    }

    /// Where the peer is; none behind a bridge.
    pub(crate) fn peer_address(&self) -> Option<IpAddr> {
        match &self.socket {
            RawSocket::Tcp(stream) => stream.peer_addr().ok().map(|address| address.ip()),
            RawSocket::Unix(_) => None,
        }
    }

    pub(crate) fn into_parts(self) -> WebSocketParts {
        WebSocketParts { socket: self.socket, leftover: self.leftover }
    }
}

impl fmt::Debug for WebSocket {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("WebSocket").field("protocol", &self.protocol).finish_non_exhaustive()
    }
}

/// What a [`WebSocket`] is made of.
#[derive(Debug)]
pub(crate) struct WebSocketParts {
    pub(crate) socket: RawSocket,
    /// The first bytes of the first frames, where they came together with the handshake.
    pub(crate) leftover: Bytes,
}

/// A non-blocking socket that no runtime knows of.
#[derive(Debug)]
pub(crate) enum RawSocket {
    /// The client's own socket.
    Tcp(std::net::TcpStream),
    /// The client's own socket where the server listens on a Unix socket, or else our end of a bridge.
    Unix(unix::net::UnixStream),
}

/// The socket that an accepted handshake will leave behind.
#[derive(Debug)]
pub(crate) struct PendingSocket {
    on_upgrade: OnUpgrade,
    protocol: Option<HeaderValue>,
}

impl PendingSocket {
    /// Waits until the response has been sent, then takes the socket out of hyper's and tokio's hands.
    ///
    /// Must be awaited within a tokio runtime, and elsewhere than in the handler that returns the response. Where a
    /// middleware answers with another response, hyper yields the socket all the same, but only once the client
    /// has ended its side of the connection.
    pub(crate) async fn socket(self) -> Result<WebSocket, UpgradeError> {
        let upgraded = self.on_upgrade.await.map_err(UpgradeError::ConnectionLost)?;
        let (socket, leftover) = detach(upgraded).map_err(UpgradeError::SocketUnusable)?;
        Ok(WebSocket { socket, leftover, protocol: self.protocol })
    }
}

/// Why an accepted handshake did not yield a socket.
#[derive(Debug, Error)]
pub(crate) enum UpgradeError {
    #[error("the connection was lost before the handshake was answered")]
    ConnectionLost(#[source] hyper::Error),
    #[error("the socket could not be taken over")]
    SocketUnusable(#[source] io::Error),
}

/// Takes the socket out where there is one, and puts one in front where there is none.
fn detach(upgraded: Upgraded) -> io::Result<(RawSocket, Bytes)> {
    let upgraded = match take::<TcpStream>(upgraded) {
        Ok((stream, leftover)) => return Ok((RawSocket::Tcp(stream.into_std()?), leftover)),
        Err(upgraded) => upgraded,
    };
    let upgraded = match take::<UnixStream>(upgraded) {
        Ok((stream, leftover)) => return Ok((RawSocket::Unix(stream.into_std()?), leftover)),
        Err(upgraded) => upgraded,
    };
    // A bridge reads what hyper has left over like everything else.
    Ok((RawSocket::Unix(bridge(TokioIo::new(upgraded))?), Bytes::new()))
}

/// The stream under `upgraded`, if it is a `T`, and what hyper has read of it beyond the handshake.
fn take<T>(upgraded: Upgraded) -> Result<(T, Bytes), Upgraded>
where
    T: 'static,
    TokioIo<T>: Read + Write + Unpin,
{
    // `axum::serve` and other servers that find the HTTP version out by themselves wrap the stream once more.
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
