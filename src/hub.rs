//! The hub: what an application writes, and the handle that serves it.
//!
//! `WsHub` is the application's side: message types, a codec, methods. `Hub` is ours:
//! cloneable, gives connections to the engine and publishes from anywhere; it keeps its
//! engine alive. Knows sessions, clients and the upgrade. Does not know shards.

use std::future::Future;
use std::ops::Deref;
use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use shardcast_engine::{
    AdoptError, CloseReason, ConnectionConfig, ConnectionId, ConnectionMetrics, MakeHandler, Newcomer, Place,
};
use tokio::runtime;

use crate::clients::Clients;
use crate::codec::{Decode, Encode};
use crate::config::{HubConfigError, RunOn, WsHubConfig};
use crate::context::MessageContext;
use crate::session::Session;
use crate::upgrade::{RawSocket, WebSocket, WebSocketUpgrade};

/// An application's hub: one value of it for each connection.
///
/// A connection's methods are called one after the other: `on_connect`, `on_open`, then `on_message` for each
/// message in the order of arrival, at last `on_disconnect`, exactly once. While one is pending, the connection
/// is not read, and the sender feels it (TCP backpressure). A panic ends the connection (1011) and harms no other.
///
/// The methods run on the connection's shard unless [`RunOn::Runtime`] is set; they may use everything of tokio.
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use shardcast::{JsonCodec, MessageContext, WsHub};
///
/// #[derive(Deserialize)]
/// struct Say { text: String }
///
/// #[derive(Serialize)]
/// struct Said { text: String }
///
/// struct Chat;
///
/// impl WsHub for Chat {
///     type Codec = JsonCodec;
///     type InMessage = Say;
///     type OutMessage = Said;
///
///     async fn on_message(&self, say: Say, ctx: MessageContext<Said, JsonCodec>) {
///         ctx.broadcast(Said { text: say.text }).await
///     }
/// }
/// ```
pub trait WsHub: Send + Sync + Sized + 'static {
    /// How messages become payloads: [`JsonCodec`](crate::JsonCodec), [`BinaryCodec`](crate::BinaryCodec) or one
    /// of your own.
    type Codec: Decode<Self::InMessage> + Encode<Self::OutMessage>;
    /// What clients send. A message that cannot be decoded ends its connection (1007, or 1003 for the wrong kind
    /// of frame).
    type InMessage: Send + 'static;
    /// What clients get.
    type OutMessage: Send + 'static;

    /// A connection has come. Logs by default. To greet it or join groups, see [`on_open`](Self::on_open).
    fn on_connect(&self, request: ConnectionRequest) -> impl Future<Output = ()> + Send {
        async move { tracing::debug!(id = %request.connection_id, "connected") }
    }

    /// The connection is open: the place to greet it and to join groups, before its first message is read.
    fn on_open(
        &self,
        context: MessageContext<Self::OutMessage, Self::Codec>,
    ) -> impl Future<Output = ()> + Send {
        drop(context);
        async {}
    }

    /// A message has come.
    fn on_message(
        &self,
        message: Self::InMessage,
        context: MessageContext<Self::OutMessage, Self::Codec>,
    ) -> impl Future<Output = ()> + Send;

    /// The connection has ended and is in no group any more. Logs by default.
    fn on_disconnect(&self, request: DisconnectRequest) -> impl Future<Output = ()> + Send {
        async move { tracing::debug!(id = %request.connection_id, reason = %request.reason, "disconnected") }
    }

    /// A message to this connection was dropped by the policy. [`BroadcastPolicy::Block`](crate::BroadcastPolicy)
    /// never drops. Logs a warning by default.
    fn on_message_drop(&self, connection_id: Arc<str>) -> impl Future<Output = ()> + Send {
        async move { tracing::warn!(id = %connection_id, "a message was dropped") }
    }
}

/// A connection that has come.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ConnectionRequest {
    /// Its id as text.
    pub connection_id: Arc<str>,
    /// Its id.
    pub id: ConnectionId,
}

/// A connection that has ended.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DisconnectRequest {
    /// Its id as text.
    pub connection_id: Arc<str>,
    /// Its id.
    pub id: ConnectionId,
    /// Why it has ended.
    pub reason: CloseReason,
}

/// A handle to a running hub: serves connections, and reaches their clients from anywhere (it dereferences to
/// [`Clients`]). Cloneable; keeps its engine alive.
pub struct Hub<H: WsHub> {
    engine: shardcast_engine::Engine,
    /// The runtime that the shards' threads have entered.
    runtime: Option<runtime::Id>,
    clients: Clients<H::OutMessage, H::Codec>,
    config: Arc<ConnectionConfig>,
    run_on: RunOn,
}

impl<H: WsHub> Clone for Hub<H> {
    fn clone(&self) -> Self {
        let (engine, clients, config) = (self.engine.clone(), self.clients.clone(), self.config.clone());
        Self { engine, runtime: self.runtime, clients, config, run_on: self.run_on }
    }
}

impl<H: WsHub> std::fmt::Debug for Hub<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("clients", &self.clients).finish_non_exhaustive()
    }
}

impl<H: WsHub> Deref for Hub<H> {
    type Target = Clients<H::OutMessage, H::Codec>;

    fn deref(&self) -> &Self::Target {
        &self.clients
    }
}

impl<H: WsHub> Hub<H> {
    pub(crate) fn new(
        engine: shardcast_engine::Engine,
        runtime: Option<runtime::Id>,
        config: &WsHubConfig,
    ) -> Result<Self, HubConfigError> {
        let (clients, run_on) = (Clients::new(engine.namespace()), config.run_on);
        Ok(Self { engine, runtime, clients, config: Arc::new(config.connection_config()?), run_on })
    }

    /// The same clients, with other settings for connections to come.
    pub(crate) fn reconfigured(&self, config: &WsHubConfig) -> Result<Self, HubConfigError> {
        let fresh = config.connection_config()?;
        let config_shared = if fresh == *self.config { self.config.clone() } else { Arc::new(fresh) };
        Ok(Self { config: config_shared, run_on: config.run_on, ..self.clone() })
    }

    /// The clients of this hub.
    pub fn clients(&self) -> &Clients<H::OutMessage, H::Codec> {
        &self.clients
    }

    /// Hands an open WebSocket over to the engine: for sockets that come by way of
    /// [`WebSocketUpgrade::on_upgrade`]. Must be called within a tokio runtime, which the hub's methods use.
    ///
    /// # Errors
    /// No place left, an engine that has ended, a socket that cannot be prepared. The socket is closed then.
    pub async fn serve(&self, socket: WebSocket, hub: H) -> Result<(), ServeError> {
        let place = self.engine.admit().ok_or(ServeError::Full)?;
        self.adopt(socket, Session::maker(self, hub, runtime::Handle::current(), None), place).await
    }

    pub(crate) fn run_on(&self) -> RunOn {
        self.run_on
    }

    /// The runtime that the shards' threads have entered.
    pub(crate) fn runtime(&self) -> Option<runtime::Id> {
        self.runtime
    }

    pub(crate) async fn adopt(
        &self,
        socket: WebSocket,
        handler: MakeHandler,
        place: Place,
    ) -> Result<(), ServeError> {
        let parts = socket.into_parts();
        let socket = match parts.socket {
            RawSocket::Tcp(stream) => stream.into(),
            RawSocket::Unix(stream) => stream.into(),
        };
        let newcomer =
            Newcomer { socket, received: parts.leftover, handler, config: self.config.clone(), place };
        Ok(self.clients.namespace().adopt(newcomer).await?)
    }

    pub(crate) fn admit(&self) -> Option<Place> {
        self.engine.admit()
    }

    /// What a connection has counted; the same as [`Clients::inspect`].
    ///
    /// # Errors
    /// As for [`Clients::join`].
    pub async fn inspect(&self, id: ConnectionId) -> Result<Option<ConnectionMetrics>, crate::SendError> {
        self.clients.inspect(id).await
    }
}

/// A WebSocket could not be handed over to a hub; it has been closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The engine has `max_connections` connections, or is stopping.
    #[error("no place for one more connection")]
    Full,
    /// The engine did not take it.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
}

/// Seconds after which a client that found no place should try again.
const RETRY_AFTER_SECONDS: u16 = 5;

impl WebSocketUpgrade {
    /// Answers the handshake and gives the connection to `hub`, with `instance` to handle it. From then on a shard
    /// owns the socket, and no task is left of it.
    ///
    /// With no place left ([`EngineConfig::max_connections`](crate::EngineConfig)), or when the engine is stopping,
    /// answers 503 with `Retry-After` instead.
    #[must_use = "the handshake goes unanswered unless this response is returned"]
    pub fn serve<H: WsHub>(self, hub: &Hub<H>, instance: H) -> Response {
        let Some(place) = hub.admit() else {
            let retry = [(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS))];
            return (StatusCode::SERVICE_UNAVAILABLE, retry, "no place for one more connection")
                .into_response();
        };
        let hub = hub.clone();
        self.on_upgrade(move |socket| async move {
            let handler = Session::maker(&hub, instance, runtime::Handle::current(), None);
            if let Err(error) = hub.adopt(socket, handler, place).await {
                tracing::warn!(error = &error as &dyn std::error::Error, "a connection was not taken over");
            }
        })
    }
}
