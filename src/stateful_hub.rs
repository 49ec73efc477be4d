//! A hub whose methods change it: `&mut self` instead of `&self`.
//!
//! Owned by its connection, like every hub. A wrapper implements [`WsHub`] with a lock that is never contended,
//! because a connection's methods run one at a time; it exists only because the compiler cannot know that. It is
//! tokio's, because it is held across awaits and is not poisoned by a panic, so that `on_disconnected` still runs.
//! Knows hubs. Does not know connections or shards.

use std::fmt;
use std::future::Future;
use std::ops::ControlFlow;

use shardcast_engine::{CloseReason, Position};
use tokio::sync::Mutex;

use crate::backplane::MissedMessages;
use crate::clients::Clients;
use crate::codec::{CodecError, Decode, Encode};
use crate::hub::{Dropped, HubContext, JoinError, Refusal, RunOn, WsHub, log_rate_limited, log_undecodable};
use crate::presence::PresenceChange;

/// An application's hub with its own state: a [`WsHub`] whose methods take `&mut self`, and which need not be `Sync`.
///
/// The hub's type is [`Stateful<Self>`](Stateful). `serve` takes the bare value:
///
/// ```
/// use axum::extract::State;
/// use shardcast::{Engine, EngineConfig, Hub, HubContext, JsonCodec, Serve, Stateful, StatefulHub, WebSocketUpgrade, WsHubConfig};
///
/// /// Tells each client the sum of what it has sent.
/// #[derive(Default)]
/// struct Sum {
///     so_far: i64,
/// }
///
/// impl StatefulHub for Sum {
///     type Codec = JsonCodec;
///     type InMessage = i64;
///     type OutMessage = i64;
///
///     async fn on_message(&mut self, number: i64, ctx: HubContext<Stateful<Self>>) {
///         self.so_far = self.so_far.saturating_add(number);
///         ctx.unicast(self.so_far).await;
///     }
/// }
///
/// async fn connect(ws: WebSocketUpgrade, State(sums): State<Hub<Stateful<Sum>>>) -> Serve<Stateful<Sum>> {
///     ws.serve(&sums, Sum::default())
/// }
///
/// let engine = Engine::start(EngineConfig::default())?;
/// let sums = engine.hub::<Stateful<Sum>>(WsHubConfig::default())?;
/// let app: axum::Router = axum::Router::new().route("/ws", axum::routing::any(connect)).with_state(sums);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Everything else is as for [`WsHub`]. After a panic, which ends the connection with 1011,
/// [`on_disconnected`](Self::on_disconnected) gets the state as the panic has left it.
pub trait StatefulHub: Send + Sized + 'static {
    /// How messages become payloads; see [`WsHub::Codec`].
    type Codec: Decode<Self::InMessage> + Encode<Self::OutMessage>;
    /// What clients send.
    type InMessage: Send + 'static;
    /// What clients receive.
    type OutMessage: Send + 'static;
    /// Where the methods run; see [`WsHub::RUN_ON`].
    const RUN_ON: RunOn = RunOn::Shard;

    /// A client is connected; see [`WsHub::on_connected`]. By default logs at debug level and returns `Ok`.
    ///
    /// # Errors
    /// A [`Refusal`] ends the connection with its code and reason.
    fn on_connected(
        &mut self,
        context: HubContext<Stateful<Self>>,
    ) -> impl Future<Output = Result<(), Refusal>> + Send {
        tracing::debug!(id = %context.id(), "connected");
        drop(context);
        async { Ok(()) }
    }

    /// A message has arrived.
    fn on_message(
        &mut self,
        message: Self::InMessage,
        context: HubContext<Stateful<Self>>,
    ) -> impl Future<Output = ()> + Send;

    /// A message has arrived that the codec cannot decode; see [`WsHub::on_undecodable`]. By default logs at debug
    /// level and breaks, which ends the connection.
    fn on_undecodable(
        &mut self,
        context: HubContext<Stateful<Self>>,
        error: CodecError,
    ) -> impl Future<Output = ControlFlow<()>> + Send {
        log_undecodable(context.id(), &error);
        async { ControlFlow::Break(()) }
    }

    /// Messages to this connection were dropped; see [`WsHub::on_dropped`]. By default logs at trace level.
    fn on_dropped(
        &mut self,
        context: HubContext<Stateful<Self>>,
        dropped: Dropped,
    ) -> impl Future<Output = ()> + Send {
        tracing::trace!(id = %context.id(), ?dropped, "messages were dropped");
        drop(context);
        async {}
    }

    /// Messages of this client were dropped because it exceeded its rate limit; see [`WsHub::on_rate_limited`]. By
    /// default logs at debug level.
    fn on_rate_limited(
        &mut self,
        context: HubContext<Stateful<Self>>,
        messages: u64,
    ) -> impl Future<Output = ()> + Send {
        log_rate_limited(context.id(), messages);
        drop(context);
        async {}
    }

    /// The connection has reached its expiry time; see [`WsHub::on_expired`]. By default returns `Break`, which ends the
    /// connection.
    fn on_expired(
        &mut self,
        context: HubContext<Stateful<Self>>,
    ) -> impl Future<Output = ControlFlow<()>> + Send {
        drop(context);
        async { ControlFlow::Break(()) }
    }

    /// Whether this connection may join a group: asked by [`try_join`](Self::try_join). By default allows every group.
    ///
    /// # Errors
    /// A [`Refusal`], which `try_join` returns.
    fn on_join(
        &mut self,
        context: &HubContext<Stateful<Self>>,
        group: &str,
    ) -> impl Future<Output = Result<(), Refusal>> + Send {
        let _ = (context, group);
        async { Ok(()) }
    }

    /// Makes this connection a member of a group if [`on_join`](Self::on_join) allows that; see [`WsHub::try_join`].
    ///
    /// # Errors
    /// As for [`WsHub::try_join`].
    fn try_join(
        &mut self,
        context: &HubContext<Stateful<Self>>,
        group: &str,
    ) -> impl Future<Output = Result<Position, JoinError>> + Send {
        async move {
            self.on_join(context, group).await?;
            Ok(context.clients().join(context.id(), group).await?)
        }
    }

    /// A user has joined or left a group, or the hub; see [`WsHub::on_presence`]. By default does nothing.
    fn on_presence(
        clients: &Clients<Self::OutMessage>,
        change: PresenceChange,
    ) -> impl Future<Output = ()> + Send {
        let _ = (clients, change);
        async {}
    }

    /// This node has missed messages of other nodes; see [`WsHub::on_gap`]. By default does nothing.
    fn on_gap(
        clients: &Clients<Self::OutMessage>,
        missed: MissedMessages,
    ) -> impl Future<Output = ()> + Send {
        let _ = (clients, missed);
        async {}
    }

    /// The connection has ended; see [`WsHub::on_disconnected`]. By default logs at debug level.
    fn on_disconnected(
        &mut self,
        context: HubContext<Stateful<Self>>,
        reason: CloseReason,
    ) -> impl Future<Output = ()> + Send {
        tracing::debug!(id = %context.id(), %reason, "disconnected");
        drop(context);
        async {}
    }
}

/// The [`WsHub`] that a [`StatefulHub`] is served as. Made of one by `From`, which `serve` does.
pub struct Stateful<H>(Mutex<H>);

impl<H> From<H> for Stateful<H> {
    fn from(hub: H) -> Self {
        Self(Mutex::new(hub))
    }
}

impl<H> fmt::Debug for Stateful<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stateful").finish_non_exhaustive()
    }
}

impl<H: StatefulHub> WsHub for Stateful<H> {
    type Codec = H::Codec;
    type InMessage = H::InMessage;
    type OutMessage = H::OutMessage;
    const RUN_ON: RunOn = H::RUN_ON;

    async fn on_connected(&self, context: HubContext<Self>) -> Result<(), Refusal> {
        self.0.lock().await.on_connected(context).await
    }

    async fn on_message(&self, message: H::InMessage, context: HubContext<Self>) {
        self.0.lock().await.on_message(message, context).await;
    }

    async fn on_undecodable(&self, context: HubContext<Self>, error: CodecError) -> ControlFlow<()> {
        self.0.lock().await.on_undecodable(context, error).await
    }

    async fn on_expired(&self, context: HubContext<Self>) -> ControlFlow<()> {
        self.0.lock().await.on_expired(context).await
    }

    async fn on_join(&self, context: &HubContext<Self>, group: &str) -> Result<(), Refusal> {
        self.0.lock().await.on_join(context, group).await
    }

    async fn on_dropped(&self, context: HubContext<Self>, dropped: Dropped) {
        self.0.lock().await.on_dropped(context, dropped).await;
    }

    async fn on_rate_limited(&self, context: HubContext<Self>, messages: u64) {
        self.0.lock().await.on_rate_limited(context, messages).await;
    }

    fn on_presence(
        clients: &Clients<H::OutMessage>,
        change: PresenceChange,
    ) -> impl Future<Output = ()> + Send {
        H::on_presence(clients, change)
    }

    fn on_gap(clients: &Clients<H::OutMessage>, missed: MissedMessages) -> impl Future<Output = ()> + Send {
        H::on_gap(clients, missed)
    }

    async fn on_disconnected(&self, context: HubContext<Self>, reason: CloseReason) {
        self.0.lock().await.on_disconnected(context, reason).await;
    }
}
