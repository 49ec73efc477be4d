//! The upgrade of a socket: an extractor and a response, with the methods that Axum's has.
//!
//! Wraps the extractor that hubs use, and adds which engine or hub the connection belongs to and its settings. Gives the
//! connection to a shard, and the socket to the application's callback. Does not know frames.

use std::fmt;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::Error;
use axum::extract::{FromRequestParts, OptionalFromRequestParts};
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use http::{HeaderValue, StatusCode};
use shardcast_backplane::NodeId;
use shardcast_engine::{AdoptError, ConnectionConfig, ConnectionId, Namespace, USER_NAME_BYTES_MAX};
use tokio::sync::oneshot;

use super::socket::{Link, SocketHandler, WebSocket};
use crate::default_engine::default_engine;
use crate::engine::{Engine, Sockets, socket_config};
use crate::hub::{Hub, WsHub};
use crate::serve::{Host, ServeError, refuse_config};
use crate::upgrade::UpgradeRejection;

/// Extractor for a WebSocket handshake, for an application that reads and writes the socket itself: see
/// [the module](crate::ws).
///
/// It supports what [`shardcast::WebSocketUpgrade`](crate::WebSocketUpgrade) does: HTTP/1.1 and HTTP/2, allowed origins,
/// trusted proxies, subprotocols, and limits on connections, at which the response is a 503 with `Retry-After`.
///
/// Without further calls a message may have 64 MiB and a frame 16 MiB, as with Axum, and at most the engine's
/// [`unfinished_bytes_max`](crate::EngineConfig::unfinished_bytes_max); all other settings are those of
/// [`WsHubConfig`](crate::WsHubConfig), but there are no pings. A client that has vanished without a trace is noticed
/// only when something is sent to it; see [`config`](Self::config).
#[must_use = "the handshake goes unanswered unless the response made from it is returned"]
pub struct WebSocketUpgrade<F = DefaultOnFailedUpgrade> {
    inner: crate::upgrade::WebSocketUpgrade,
    /// None while nothing was changed: then the connection shares its engine's.
    config: Option<Arc<ConnectionConfig>>,
    owner: Option<Owner>,
    user: Option<Arc<str>>,
    on_failed_upgrade: F,
}

/// Whose connection it will be.
struct Owner {
    engine: shardcast_engine::Engine,
    namespace: Namespace,
    /// Of the hub, if there are others.
    node: Option<NodeId>,
    config: Arc<ConnectionConfig>,
}

impl Owner {
    fn of_engine(engine: &Engine) -> Self {
        let Sockets { namespace, config } = engine.sockets().clone();
        Self { engine: engine.inner().clone(), namespace, node: None, config }
    }
}

impl<F> WebSocketUpgrade<F> {
    /// Serves the connection on this engine instead of the process's default one.
    pub fn engine(self, engine: &Engine) -> Self {
        Self { owner: Some(Owner::of_engine(engine)), ..self }
    }

    /// Makes the connection one of `hub`'s clients: what the hub publishes to all, to the connection's
    /// [id](WebSocket::id), and to groups that it [joins](crate::Clients::join) is written to it by its shard. What it
    /// sends goes to the [`WebSocket`], and none of the hub's methods is called for it.
    ///
    /// The hub's settings hold from here on, without pings if they are turned off there; its codec decides which kind of
    /// message this client gets.
    pub fn client_of<H: WsHub>(self, hub: &Hub<H>) -> Self {
        hub.observe_presence();
        let Host { engine, namespace, config } = hub.host();
        let (engine, namespace, config) = (engine.clone(), namespace.clone(), config.clone());
        let owner = Owner { engine, namespace, node: hub.clients().node(), config };
        Self { owner: Some(owner), config: None, ..self }
    }

    /// The user of this connection, by a name of at most [`USER_NAME_BYTES_MAX`](crate::USER_NAME_BYTES_MAX) bytes
    /// (1,024); a longer one is answered with 400. As a [client of a hub](Self::client_of) it is reached by
    /// [`to_user`](crate::Clients::to_user) and shown by [`presence`](crate::Clients::presence) as the hub's other
    /// clients are: see [`Serve::user`](crate::Serve::user). The settings for users hold without a hub, too.
    pub fn user(self, name: impl Into<Arc<str>>) -> Self {
        Self { user: Some(name.into()), ..self }
    }

    /// All settings of the connection, as a [`WsHubConfig`](crate::WsHubConfig) or an `Arc` of one that several
    /// connections share: pings, timeouts, the outbox. They replace what other methods have set before.
    ///
    /// A setting out of range is logged as an error, and the client gets a 500 that names it.
    pub fn config(self, config: impl Into<Arc<ConnectionConfig>>) -> Self {
        Self { config: Some(config.into()), ..self }
    }

    /// The settings, to be changed.
    fn config_mut(&mut self) -> &mut ConnectionConfig {
        let owner = &self.owner;
        let config = self.config.get_or_insert_with(|| {
            owner.as_ref().map_or_else(|| Arc::new(socket_config()), |owner| owner.config.clone())
        });
        Arc::make_mut(config)
    }

    /// Does nothing: a shard reads all its connections into one buffer
    /// ([`read_buffer_bytes`](crate::EngineConfig::read_buffer_bytes)).
    pub fn read_buffer_size(self, size: usize) -> Self {
        let _ = size;
        self
    }

    /// Does nothing: all that is queued for a connection is written with one system call.
    pub fn write_buffer_size(self, size: usize) -> Self {
        let _ = size;
        self
    }

    /// Bytes that may be queued for a client before [`send`](WebSocket::send) waits: at least 1 KiB, at most 1 GiB.
    /// Default: 1 MiB. Axum's sending fails at this limit.
    pub fn max_write_buffer_size(mut self, max: usize) -> Self {
        self.config_mut().outbox_bytes = max.clamp(1 << 10, 1 << 30);
        self
    }

    /// The longest message, in bytes: at most 1 GiB. Default: 64 MiB. A longer one ends the connection (1009).
    pub fn max_message_size(mut self, max: usize) -> Self {
        self.config_mut().max_message_bytes = max.clamp(1, 1 << 30);
        self
    }

    /// The longest frame of a message, in bytes: at most 1 GiB. Default: 16 MiB. A longer one ends the connection (1009).
    pub fn max_frame_size(mut self, max: usize) -> Self {
        self.config_mut().max_frame_bytes = max.clamp(1, 1 << 30);
        self
    }

    /// Accepts frames that are not masked. Default: false, as RFC 6455 demands.
    pub fn accept_unmasked_frames(mut self, accept: bool) -> Self {
        self.config_mut().accept_unmasked_frames = accept;
        self
    }

    /// See [`shardcast::WebSocketUpgrade::protocols`](crate::WebSocketUpgrade::protocols).
    pub fn protocols<I>(mut self, protocols: I) -> Self
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        self.inner = self.inner.protocols(protocols);
        self
    }

    /// The subprotocols that the client offers, in the client's order; only the first 128, if there are more.
    pub fn requested_protocols(&self) -> impl Iterator<Item = &HeaderValue> {
        self.inner.requested_protocols()
    }

    /// The subprotocol that the response will name, if any.
    pub fn selected_protocol(&self) -> Option<&HeaderValue> {
        self.inner.selected_protocol()
    }

    /// Selects `protocol`. A client that did not offer it will fail the connection.
    pub fn set_selected_protocol(&mut self, protocol: HeaderValue) {
        self.inner.set_selected_protocol(protocol);
    }

    /// See [`shardcast::WebSocketUpgrade::allowed_origins`](crate::WebSocketUpgrade::allowed_origins).
    pub fn allowed_origins<I>(mut self, origins: I) -> Self
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        self.inner = self.inner.allowed_origins(origins);
        self
    }

    /// See [`shardcast::WebSocketUpgrade::trusted_proxies`](crate::WebSocketUpgrade::trusted_proxies).
    pub fn trusted_proxies(mut self, proxies: &crate::TrustedProxies) -> Self {
        self.inner = self.inner.trusted_proxies(proxies);
        self
    }

    /// The client's address, if it is known before the upgrade.
    pub fn peer_address(&self) -> Option<IpAddr> {
        self.inner.peer_address()
    }

    /// Calls `callback` if the handshake was accepted and there is no WebSocket all the same, because the client has
    /// disconnected or the response was not sent. By default nothing is called.
    pub fn on_failed_upgrade<C: OnFailedUpgrade>(self, callback: C) -> WebSocketUpgrade<C> {
        let Self { inner, config, owner, user, .. } = self;
        WebSocketUpgrade { inner, config, owner, user, on_failed_upgrade: callback }
    }

    /// Accepts the handshake, and runs `callback` with the WebSocket in a task of its own once a shard has the
    /// connection.
    ///
    /// At a limit on connections and while the engine is stopping the response is a 503 with a `Retry-After` of 2 to
    /// 8 seconds, and for a setting out of range a 500.
    #[must_use = "the handshake goes unanswered unless this response is returned"]
    pub fn on_upgrade<C, Fut>(self, callback: C) -> Response
    where
        C: FnOnce(WebSocket) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
        F: OnFailedUpgrade,
    {
        self.on_upgrade_from(move |socket, _| callback(socket))
    }

    /// [`on_upgrade`](Self::on_upgrade) with the remote address of the client's socket, if it has one.
    pub(crate) fn on_upgrade_from<C, Fut>(self, callback: C) -> Response
    where
        C: FnOnce(WebSocket, Option<SocketAddr>) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
        F: OnFailedUpgrade,
    {
        let Self { inner, config, owner, user, on_failed_upgrade } = self;
        if user.as_ref().is_some_and(|user| user.len() > USER_NAME_BYTES_MAX) {
            return (StatusCode::BAD_REQUEST, AdoptError::UserNameTooLong.to_string()).into_response();
        }
        let Some(owner) = owner.or_else(|| default_engine().map(Owner::of_engine)) else {
            return (StatusCode::INTERNAL_SERVER_ERROR, "the server could not start").into_response();
        };
        let config = config.unwrap_or_else(|| owner.config.clone());
        if let Err(error) = owner.engine.check(&config) {
            return refuse_config(&error);
        }
        let permit = match (Host { engine: &owner.engine, namespace: &owner.namespace, config: &config })
            .admit(&inner)
        {
            Ok(permit) => permit,
            Err(response) => return *response,
        };
        let (response, pending) = match inner.accept() {
            Ok(accepted) => accepted,
            Err(refusal) => return refusal.into_response(),
        };
        tokio::spawn(async move {
            let socket = match pending.socket().await {
                Ok(socket) => socket,
                Err(error) => {
                    error.log();
                    return on_failed_upgrade.call(Error::new(error));
                }
            };
            let host = Host { engine: &owner.engine, namespace: &owner.namespace, config: &config };
            let address = socket.remote_address();
            match adopt(host, permit, socket, user, owner.node).await {
                // In a task of its own, which keeps nothing of the upgrade.
                Ok(socket) => drop(tokio::spawn(callback(socket, address))),
                Err(error) => on_failed_upgrade.call(error),
            }
        });
        response
    }
}

/// Gives the connection to a shard.
async fn adopt(
    host: Host<'_>,
    mut permit: shardcast_engine::ConnectionPermit,
    socket: crate::upgrade::WebSocket,
    user: Option<Arc<str>>,
    node: Option<NodeId>,
) -> Result<WebSocket, Error> {
    let socket = host.count_late(&mut permit, socket).map_err(Error::new)?;
    let (link, protocol) = (Arc::<Link>::default(), socket.protocol().cloned());
    let (sender, opened) = oneshot::channel::<ConnectionId>();
    let handler = SocketHandler::new(link.clone());
    let make_handler: shardcast_engine::MakeHandler = Box::new(move |id| {
        let _ = sender.send(id); // nobody waits for a socket whose task has been dropped
        Box::new(handler)
    });
    if let Err(error) = host.adopt(socket, make_handler, permit, user).await {
        error.log();
        return Err(Error::new(error));
    }
    match opened.await {
        Ok(id) => Ok(WebSocket::new(link, host.namespace.clone(), id, node, protocol)),
        Err(_) => Err(Error::new(ServeError::Stopping)), // the shard did not take it
    }
}

/// What to do when an accepted handshake did not become a WebSocket: see [`WebSocketUpgrade::on_failed_upgrade`].
pub trait OnFailedUpgrade: Send + 'static {
    /// Called with the reason.
    fn call(self, error: Error);
}

impl<F: FnOnce(Error) + Send + 'static> OnFailedUpgrade for F {
    fn call(self, error: Error) {
        self(error);
    }
}

/// Does nothing.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct DefaultOnFailedUpgrade;

impl OnFailedUpgrade for DefaultOnFailedUpgrade {
    fn call(self, _: Error) {}
}

impl WebSocketUpgrade {
    fn new(inner: crate::upgrade::WebSocketUpgrade) -> Self {
        Self { inner, config: None, owner: None, user: None, on_failed_upgrade: DefaultOnFailedUpgrade }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for WebSocketUpgrade {
    type Rejection = UpgradeRejection;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, UpgradeRejection> {
        <crate::upgrade::WebSocketUpgrade as FromRequestParts<S>>::from_request_parts(parts, state)
            .await
            .map(Self::new)
    }
}

impl<S: Send + Sync> OptionalFromRequestParts<S> for WebSocketUpgrade {
    type Rejection = UpgradeRejection;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Option<Self>, UpgradeRejection> {
        let inner = <crate::upgrade::WebSocketUpgrade as OptionalFromRequestParts<S>>::from_request_parts(
            parts, state,
        )
        .await?;
        Ok(inner.map(Self::new))
    }
}

impl<F> fmt::Debug for WebSocketUpgrade<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebSocketUpgrade")
            .field("inner", &self.inner)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}
