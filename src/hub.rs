//! The hub: what an application writes, and the handle that serves it.
//!
//! `WsHub` is the application's side: message types, a codec, methods. `Hub` is ours:
//! cloneable, publishes from anywhere, carries what its connections will need; it keeps
//! its engine alive. Knows clients. Does not know sessions, the upgrade or shards.

use std::future::Future;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use shardcast_engine::{CloseReason, ConnectionConfig, ConnectionId, Place};
use tokio::runtime;

use crate::clients::Clients;
use crate::codec::{Decode, Encode};
use crate::config::{ConfigError, RunOn, WsHubConfig};
use crate::context::MessageContext;

/// An application's hub: one value of it for each connection.
///
/// A connection's methods are called one after the other: `on_connect`, `on_open`, then `on_message` for each
/// message in the order of arrival, at last `on_disconnect`, exactly once. While one is pending, pings are answered and a
/// Close is seen, and messages are held for it until they make up 16 KiB; then nothing more is read, and the sender has
/// to wait (TCP backpressure). A panic ends the connection (1011) and harms no other.
///
/// The methods run on the connection's shard unless [`RunOn::Runtime`] is set; they may use everything of tokio.
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use shardcast::{HubContext, JsonCodec, WsHub};
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
///     async fn on_message(&self, say: Say, ctx: HubContext<Self>) {
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

    /// The connection is open: the place to greet it and to join groups, before its first message is handled. It is
    /// among [`to_all`](Clients::to_all) only when this has returned, behind everything that was sent until then, so
    /// nothing reaches a client ahead of its greeting, nor one that is turned away here
    /// ([`MessageContext::disconnect`]). A group that is joined here is joined at once.
    fn on_open(&self, context: HubContext<Self>) -> impl Future<Output = ()> + Send {
        drop(context);
        async {}
    }

    /// A message has come.
    fn on_message(
        &self,
        message: Self::InMessage,
        context: HubContext<Self>,
    ) -> impl Future<Output = ()> + Send;

    /// The connection has ended, is in no group any more, and the messages that came before a Close have been handled.
    /// Logs by default.
    fn on_disconnect(&self, request: DisconnectRequest) -> impl Future<Output = ()> + Send {
        async move { tracing::debug!(id = %request.connection_id, reason = %request.reason, "disconnected") }
    }

    /// A message to this connection was dropped by the policy; called once per drop, between messages like every other
    /// method. After every 1,000 calls in a row the shard's other connections have their turn.
    /// [`BroadcastPolicy::Block`](crate::BroadcastPolicy) never drops. Logs at trace level by default.
    fn on_message_drop(&self, connection_id: Arc<str>) -> impl Future<Output = ()> + Send {
        async move { tracing::trace!(id = %connection_id, "a message was dropped") }
    }
}

/// What the methods of the hub `H` are given, and what they reach its clients by: `HubContext<Self>` in an
/// implementation of [`WsHub`]. See [`MessageContext`].
pub type HubContext<H> = MessageContext<<H as WsHub>::OutMessage, <H as WsHub>::Codec>;

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
    clients: Clients<H::OutMessage>,
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
    type Target = Clients<H::OutMessage>;

    fn deref(&self) -> &Self::Target {
        &self.clients
    }
}

impl<H: WsHub> Hub<H> {
    pub(crate) fn new(
        engine: shardcast_engine::Engine,
        runtime: Option<runtime::Id>,
        config: &WsHubConfig,
    ) -> Result<Self, ConfigError> {
        let (clients, run_on) =
            (Clients::new::<H::Codec>(engine.namespace_named(std::any::type_name::<H>())), config.run_on);
        Ok(Self { engine, runtime, clients, config: Arc::new(config.connection_config()?), run_on })
    }

    /// The same clients, with other settings for connections to come.
    pub(crate) fn reconfigured(&self, config: &WsHubConfig) -> Result<Self, ConfigError> {
        let fresh = config.connection_config()?;
        let config_shared = if fresh == *self.config { self.config.clone() } else { Arc::new(fresh) };
        Ok(Self { config: config_shared, run_on: config.run_on, ..self.clone() })
    }

    /// The clients of this hub.
    pub fn clients(&self) -> &Clients<H::OutMessage> {
        &self.clients
    }

    pub(crate) fn config(&self) -> &Arc<ConnectionConfig> {
        &self.config
    }

    pub(crate) fn run_on(&self) -> RunOn {
        self.run_on
    }

    /// The runtime that the shards' threads have entered.
    pub(crate) fn runtime(&self) -> Option<runtime::Id> {
        self.runtime
    }

    pub(crate) fn admit(&self, address: Option<IpAddr>) -> Option<Place> {
        self.engine.admit(address)
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.engine.is_stopping()
    }
}
