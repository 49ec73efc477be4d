//! The hub: what an application writes, and the handle that serves it.
//!
//! `WsHub` is the application's side: message types, a codec, methods. `Hub` is ours:
//! cloneable, publishes from anywhere, carries what its connections will need; it keeps
//! its engine alive. Knows clients. Does not know handlers, the upgrade or shards.

use std::borrow::Cow;
use std::future::{Future, poll_fn};
use std::ops::{ControlFlow, Deref};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};

use shardcast_engine::{CloseCode, CloseReason, ConfigError, ConnectionConfig, DropCause, Position};
use tokio::runtime;
use tokio::sync::mpsc;

use crate::backplane::{Cluster, MissedMessages};
use crate::clients::{Clients, PublishError, WeakClients};
use crate::codec::{CodecError, Decode, Encode};
use crate::connection_id::ConnectionId;
use crate::context::MessageContext;
use crate::log_limit::Excerpt;
use crate::presence::PresenceChange;

/// Calls of `on_message_drop` before the shard's other connections have their turn.
const DROPS_PER_TURN: u64 = 1000;

/// An application's hub: one value of it for each connection.
///
/// A connection's methods are called one after the other: [`on_connected`](Self::on_connected), then
/// [`on_message`](Self::on_message) for each message in the order of arrival, and finally
/// [`on_disconnected`](Self::on_disconnected), exactly once. While one of them is pending, pings are answered, a
/// Close is noticed, and up to 16 KiB of messages are read ahead; after that nothing is read, and the sender has to
/// wait (TCP backpressure). A panic ends the connection (1011) and affects no other.
///
/// The methods take `&self`: share what they change, or implement [`StatefulHub`](crate::StatefulHub), whose methods
/// take `&mut self`. They run on the connection's shard unless [`RUN_ON`](Self::RUN_ON) says otherwise, and may use
/// everything of tokio.
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use shardcast::{CloseCode, HubContext, JsonCodec, Refusal, WsHub};
///
/// #[derive(Deserialize)]
/// struct Say { text: String }
///
/// #[derive(Serialize)]
/// struct Said { by: String, text: String }
///
/// struct Chat { name: String }
///
/// impl WsHub for Chat {
///     type Codec = JsonCodec;
///     type InMessage = Say;
///     type OutMessage = Said;
///
///     async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
///         if self.name.is_empty() {
///             return Err(Refusal::new(CloseCode::POLICY_VIOLATION, "a name is needed"));
///         }
///         ctx.add_to_group("lobby").await;
///         Ok(())
///     }
///
///     async fn on_message(&self, say: Say, ctx: HubContext<Self>) {
///         ctx.broadcast_group("lobby", Said { by: self.name.clone(), text: say.text }).await
///     }
/// }
/// ```
///
/// # The compatible hooks
/// [`on_connect`](Self::on_connect), [`on_disconnect`](Self::on_disconnect) and
/// [`on_message_drop`](Self::on_message_drop) are those of the `axum-signal` crate, for programs that come from
/// there. They are called by the defaults of the hooks with a context, and not where such a hook is implemented.
pub trait WsHub: Send + Sync + Sized + 'static {
    /// How messages become payloads: [`JsonCodec`](crate::JsonCodec), [`BinaryCodec`](crate::BinaryCodec) or one
    /// of your own.
    type Codec: Decode<Self::InMessage> + Encode<Self::OutMessage>;
    /// What clients send.
    type InMessage: Send + 'static;
    /// What clients receive.
    type OutMessage: Send + 'static;
    /// Where the methods run. Default: [`RunOn::Shard`].
    const RUN_ON: RunOn = RunOn::Shard;

    /// A client is connected. Greet it, join groups or refuse it here: its first message is handled when this has
    /// returned.
    ///
    /// The connection joins [`to_all`](Clients::to_all) only when this has returned `Ok`, after everything that was
    /// sent until then. So nothing reaches a client before its greeting, and a refused client receives nothing that
    /// is sent to all. Groups that are joined here are joined immediately.
    ///
    /// By default calls [`on_connect`](Self::on_connect) and returns `Ok`.
    ///
    /// # Errors
    /// A [`Refusal`] ends the connection with its code and reason, after what this method has sent to it.
    /// [`on_disconnected`](Self::on_disconnected) is called for it as for every other.
    fn on_connected(&self, context: HubContext<Self>) -> impl Future<Output = Result<(), Refusal>> + Send {
        // A separate text: the context's would be kept for as long as the connection.
        let (connection_id, id) = (context.id().to_string().into(), context.id());
        drop(context);
        async move {
            self.on_connect(ConnectionRequest { connection_id, id }).await;
            Ok(())
        }
    }

    /// A message has arrived.
    fn on_message(
        &self,
        message: Self::InMessage,
        context: HubContext<Self>,
    ) -> impl Future<Output = ()> + Send;

    /// A message has arrived that the codec cannot decode. `Break` ends the connection: with 1003 if the message was
    /// of the wrong kind ([`CodecError::WrongKind`]), with 1007 otherwise. `Continue` handles the next message; a hub
    /// may send the client an error message first.
    ///
    /// By default logs at debug level and breaks.
    fn on_undecodable(
        &self,
        context: HubContext<Self>,
        error: CodecError,
    ) -> impl Future<Output = ControlFlow<()>> + Send {
        log_undecodable(context.id(), &error);
        async { ControlFlow::Break(()) }
    }

    /// The connection has ended. It is in no group any more, and the messages that arrived before a Close have been
    /// handled. Called exactly once for every connection whose [`on_connected`](Self::on_connected) was called,
    /// refused ones and those whose method has panicked included. Two ends of the process prevent it: an engine that
    /// ends while a method of the connection is still pending, and under [`RunOn::Runtime`] a runtime that has shut
    /// down before the engine.
    ///
    /// By default calls [`on_disconnect`](Self::on_disconnect).
    fn on_disconnected(
        &self,
        context: HubContext<Self>,
        reason: CloseReason,
    ) -> impl Future<Output = ()> + Send {
        let (connection_id, id) = (context.connection_id().clone(), context.id());
        drop(context);
        async move { self.on_disconnect(DisconnectRequest { connection_id, id, reason }).await }
    }

    /// The connection has reached its expiry time, which [`Serve::expires_at`](crate::Serve::expires_at),
    /// [`MessageContext::expires_at`] or [`Clients::expire_at`] has set. `Break` ends the connection (1008, "expired").
    /// `Continue` keeps it open, without an expiry time until a new one is set. To refresh a token, ask the client for a
    /// new one, set a short expiry time for its answer, and return `Continue`.
    ///
    /// Called between messages, like every other method. If another method is pending for longer than
    /// [`close_timeout`](crate::WsHubConfig::close_timeout), the connection ends without this call.
    ///
    /// By default returns `Break`.
    fn on_expired(&self, context: HubContext<Self>) -> impl Future<Output = ControlFlow<()>> + Send {
        drop(context);
        async { ControlFlow::Break(()) }
    }

    /// Whether this connection may join a group: asked by [`try_join`](Self::try_join), for groups that clients name.
    ///
    /// By default allows every group.
    ///
    /// # Errors
    /// A [`Refusal`], which `try_join` returns. The connection stays open, unless the hub closes it.
    fn on_join(
        &self,
        context: &HubContext<Self>,
        group: &str,
    ) -> impl Future<Output = Result<(), Refusal>> + Send {
        let _ = (context, group);
        async { Ok(()) }
    }

    /// Makes this connection a member of a group if [`on_join`](Self::on_join) allows that. For groups whose names come
    /// from clients; [`add_to_group`](MessageContext::add_to_group) asks nobody.
    ///
    /// ```
    /// # use shardcast::{HubContext, JoinError, RawCodec, Refusal, WsHub, CloseCode};
    /// struct Rooms { is_admin: bool }
    ///
    /// impl WsHub for Rooms {
    ///     type Codec = RawCodec;
    ///     type InMessage = String;
    ///     type OutMessage = String;
    ///
    ///     async fn on_join(&self, _: &HubContext<Self>, group: &str) -> Result<(), Refusal> {
    ///         if group.starts_with("admin/") && !self.is_admin {
    ///             return Err(Refusal::new(CloseCode::POLICY_VIOLATION, "for admins only"));
    ///         }
    ///         Ok(())
    ///     }
    ///
    ///     async fn on_message(&self, room: String, ctx: HubContext<Self>) {
    ///         match self.try_join(&ctx, &room).await {
    ///             Ok(_) => ctx.unicast(format!("you are in {room}")).await,
    ///             Err(error) => ctx.unicast(format!("no: {error}")).await,
    ///         }
    ///     }
    /// }
    /// ```
    ///
    /// # Errors
    /// A refusal by `on_join`; as for [`Clients::join`].
    fn try_join(
        &self,
        context: &HubContext<Self>,
        group: &str,
    ) -> impl Future<Output = Result<Position, JoinError>> + Send {
        async move {
            self.on_join(context, group).await?;
            Ok(context.clients().join(context.id(), group).await?)
        }
    }

    /// Messages to this connection were dropped by its policy, or by that of a message
    /// ([`Target::policy`](crate::Target::policy)). Called between messages like every other method, before the next
    /// message and before [`on_disconnected`](Self::on_disconnected), once for each cause and group since the last
    /// calls. [`BroadcastPolicy::Block`](crate::BroadcastPolicy) never drops. Messages that expire while the connection closes
    /// are counted and not reported; a hub whose method has panicked is not told of drops.
    ///
    /// By default calls [`on_message_drop`](Self::on_message_drop) once for each message. After every 1,000 calls in
    /// a row the shard's other connections have their turn.
    fn on_dropped(&self, context: HubContext<Self>, dropped: Dropped) -> impl Future<Output = ()> + Send {
        let connection_id = context.connection_id().clone();
        drop(context);
        async move {
            for told in 0..dropped.messages {
                if told > 0 && told % DROPS_PER_TURN == 0 {
                    GiveWay::default().await;
                }
                self.on_message_drop(connection_id.clone()).await;
            }
        }
    }

    /// So many messages of this client, at least 1, were dropped since the last call, because it exceeded its
    /// [rate limit](crate::WsHubConfig::rate_limit) with [`OverLimit::Drop`](crate::OverLimit::Drop), or closed while
    /// messages were delayed. Called at the first one, then at most once a second while more are dropped, and before
    /// [`on_disconnected`](Self::on_disconnected): a flood costs few calls. A hub may tell the client here, or count
    /// and [disconnect](HubContext::disconnect) it.
    ///
    /// By default logs at debug level.
    fn on_rate_limited(&self, context: HubContext<Self>, messages: u64) -> impl Future<Output = ()> + Send {
        log_rate_limited(context.id(), messages);
        drop(context);
        async {}
    }

    /// A user has joined or left a group, or the hub itself ([`PresenceChange::group`] is none): called once for each
    /// change, and not for each client. For clients that were served with a [user](crate::Serve::user).
    ///
    /// A user joins with its first client. It has left when its last client has left and the user has not rejoined within
    /// [`presence_grace`](crate::WsHubConfig::presence_grace) (5 s by default), so that reloading a page announces
    /// nothing. For one user and group, `Joined` and `Left` alternate. Each change has a position in the order of all
    /// messages, after the join or the leave, and changes are passed here one after the other in that order.
    ///
    /// ```
    /// # use shardcast::{Clients, HubContext, JsonCodec, PresenceChange, PresenceKind, WsHub};
    /// # struct Chat;
    /// # impl WsHub for Chat {
    /// #     type Codec = JsonCodec; type InMessage = String; type OutMessage = String;
    /// #     async fn on_message(&self, _: String, _: HubContext<Self>) {}
    /// async fn on_presence(clients: &Clients<String>, change: PresenceChange) {
    ///     let Some(room) = &change.group else { return };
    ///     let verb = if change.kind == PresenceKind::Joined { "joined" } else { "left" };
    ///     let text = format!("{} {verb} the room", change.user);
    ///     let _ = clients.to_group(room).publish(&text).await; // fails when the engine has ended
    /// }
    /// # }
    /// ```
    ///
    /// Runs as one task on the tokio runtime from which the first client with a user was served, also under
    /// [`RunOn::Shard`]. The next change waits until it has returned. While 1,024 wait, further ones wait in the engine,
    /// where those that cancel each other out disappear; nothing else is lost. A panic is logged. When the engine ends,
    /// nobody is announced as having left.
    ///
    /// By default does nothing.
    fn on_presence(
        clients: &Clients<Self::OutMessage>,
        change: PresenceChange,
    ) -> impl Future<Output = ()> + Send {
        let _ = (clients, change);
        async {}
    }

    /// This node has missed messages that were published on other nodes: the broker of its
    /// [backplane](crate::Engine::backplane) has dropped or lost them before they could be read here. Called once for each
    /// time that this happens, and not for each client. Which messages, nobody knows; messages of this node's own publishers
    /// are not among them, unless these got an error. A hub may tell its clients to load anew what they show:
    ///
    /// ```
    /// # use shardcast::{Clients, HubContext, JsonCodec, WsHub, backplane::MissedMessages};
    /// # struct Chat;
    /// # impl WsHub for Chat {
    /// #     type Codec = JsonCodec; type InMessage = String; type OutMessage = String;
    /// #     async fn on_message(&self, _: String, _: HubContext<Self>) {}
    /// async fn on_gap(clients: &Clients<String>, _: MissedMessages) {
    ///     let _ = clients.to_all().on_this_node().publish(&"reload".to_owned()).await; // fails when the engine has ended
    /// }
    /// # }
    /// ```
    ///
    /// Runs as a task on the tokio runtime on which the engine got its backplane. By default does nothing; that messages
    /// were missed is logged as a warning and counted
    /// ([`BackplaneMetrics::gaps`](crate::backplane::BackplaneMetrics::gaps)) in any case.
    fn on_gap(
        clients: &Clients<Self::OutMessage>,
        missed: MissedMessages,
    ) -> impl Future<Output = ()> + Send {
        let _ = (clients, missed);
        async {}
    }

    /// Called by the default of [`on_connected`](Self::on_connected). Logs at debug level by default.
    fn on_connect(&self, request: ConnectionRequest) -> impl Future<Output = ()> + Send {
        async move { tracing::debug!(id = %request.connection_id, "connected") }
    }

    /// Called by the default of [`on_disconnected`](Self::on_disconnected). Logs at debug level by default.
    fn on_disconnect(&self, request: DisconnectRequest) -> impl Future<Output = ()> + Send {
        async move { tracing::debug!(id = %request.connection_id, reason = %request.reason, "disconnected") }
    }

    /// Called by the default of [`on_dropped`](Self::on_dropped), once for each message. Logs at trace level by
    /// default.
    fn on_message_drop(&self, connection_id: Arc<str>) -> impl Future<Output = ()> + Send {
        async move { tracing::trace!(id = %connection_id, "a message was dropped") }
    }
}

/// Yields to the shard's other connections. Pending twice: a method's first poll is repeated at once with a
/// waker, which the first does without (see `HubHandler::start`).
#[derive(Default)]
struct GiveWay {
    polls: u8,
}

impl Future for GiveWay {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<()> {
        if self.polls == 2 {
            return Poll::Ready(());
        }
        self.polls += 1;
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

pub(crate) fn log_undecodable(id: ConnectionId, error: &CodecError) {
    // Its source may quote the message, which the client chose.
    let text = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    tracing::debug!(%id, error = ?Excerpt(text.as_bytes()), "a message could not be decoded");
}

pub(crate) fn log_rate_limited(id: ConnectionId, messages: u64) {
    tracing::debug!(%id, messages, "messages were dropped: the client exceeded its rate limit");
}

/// Calls `on_presence` for one change after the other. Ends with the hub's namespace.
async fn pass_on_presence<H: WsHub>(
    clients: WeakClients<H::OutMessage>,
    mut changes: mpsc::Receiver<PresenceChange>,
) {
    while let Some(change) = changes.recv().await {
        let Some(clients) = clients.upgrade() else { return };
        let mut call = pin!(H::on_presence(&clients, change));
        let result = poll_fn(|context| {
            let polled = catch_unwind(AssertUnwindSafe(|| call.as_mut().poll(context)));
            polled.map_or_else(|_| Poll::Ready(Err(())), |polled| polled.map(Ok))
        });
        if result.await.is_err() {
            tracing::error!(hub = std::any::type_name::<H>(), "a hub's `on_presence` panicked");
        }
    }
}

/// Why a hub does not serve a client: the code and the reason of the Close frame that the client gets.
///
/// A code that may not be in a Close frame ([`CloseCode::is_valid_on_wire`]) is logged as an error, and the client gets
/// 1011.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the client was refused with {code}: {reason}")]
pub struct Refusal {
    code: CloseCode,
    reason: Cow<'static, str>,
}

impl Refusal {
    /// A refusal with this close code and at most 123 bytes of `reason`; the rest is cut off.
    pub fn new(code: CloseCode, reason: impl Into<Cow<'static, str>>) -> Self {
        Self { code, reason: reason.into() }
    }

    /// The close code.
    pub fn code(&self) -> CloseCode {
        self.code
    }

    /// The reason.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    pub(crate) fn into_close_reason(self) -> CloseReason {
        CloseReason::Application { code: self.code, text: self.reason }
    }
}

/// A connection did not join a group: see [`WsHub::try_join`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// [`WsHub::on_join`] has refused it.
    #[error("the group may not be joined: {}", .0.reason())]
    Refused(#[from] Refusal),
    /// The join was not carried out.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

/// Where the methods of a hub run: [`WsHub::RUN_ON`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum RunOn {
    /// On the connection's shard, at once. Best for methods that await and compute little: they run without switching
    /// threads. A method that computes for a millisecond blocks the shard's other connections for a millisecond. The
    /// first `tokio::task::yield_now().await` of a method does not let them have their turn; the second does.
    #[default]
    Shard,
    /// On the tokio runtime, as a task. For hubs that compute for long; costs two changes of thread for each message.
    /// The messages of one connection are still handled one after the other, in order.
    Runtime,
}

/// What the methods of the hub `H` are given, and what they reach its clients by: `HubContext<Self>` in an
/// implementation of [`WsHub`]. See [`MessageContext`].
pub type HubContext<H> = MessageContext<<H as WsHub>::OutMessage, <H as WsHub>::Codec>;

/// Messages to one connection that were dropped for the same cause, and that were published to the same group.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Dropped {
    /// How many messages, at least 1.
    pub messages: u64,
    /// Why.
    pub cause: DropCause,
    /// The group that they were published to. None for messages to all, to several groups or to this client alone;
    /// and for messages of more than 16 groups that were dropped while a method was pending.
    pub group: Option<Arc<str>>,
}

/// A client that has connected.
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
    /// Why it ended.
    pub reason: CloseReason,
}

/// A handle to a running hub: serves connections, and reaches their clients from anywhere. Cloneable; keeps its engine
/// alive. A handle that does not is [`clients`](Self::clients), whose methods can be called on the hub, too:
/// `hub.to_all()`, `hub.join(id, "lobby")`.
pub struct Hub<H: WsHub> {
    engine: shardcast_engine::Engine,
    /// The runtime that the shards' threads have entered.
    runtime: Option<runtime::Id>,
    clients: Clients<H::OutMessage>,
    config: Arc<ConnectionConfig>,
}

impl<H: WsHub> Clone for Hub<H> {
    fn clone(&self) -> Self {
        let (engine, clients, config) = (self.engine.clone(), self.clients.clone(), self.config.clone());
        Self { engine, runtime: self.runtime, clients, config }
    }
}

impl<H: WsHub> std::fmt::Debug for Hub<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("clients", &self.clients).finish_non_exhaustive()
    }
}

impl<H: WsHub> Deref for Hub<H> {
    type Target = Clients<H::OutMessage>;

    fn deref(&self) -> &Clients<H::OutMessage> {
        &self.clients
    }
}

impl<H: WsHub> Hub<H> {
    pub(crate) fn new(
        engine: shardcast_engine::Engine,
        runtime: Option<runtime::Id>,
        config: Arc<ConnectionConfig>,
    ) -> Result<Self, ConfigError> {
        engine.check(&config)?;
        let clients = Clients::new::<H::Codec>(engine.namespace_named(std::any::type_name::<H>()));
        Ok(Self { engine, runtime, clients, config })
    }

    /// The part on this node of the hub that all nodes know by this name.
    pub(crate) fn on_all_nodes(
        engine: shardcast_engine::Engine,
        runtime: Option<runtime::Id>,
        config: Arc<ConnectionConfig>,
        cluster: &Cluster,
        name: &str,
    ) -> Result<Self, ConfigError> {
        engine.check(&config)?;
        let namespace = engine.namespace_named(std::any::type_name::<H>());
        let on_gap = |clients: &Clients<H::OutMessage>, missed| {
            let clients = clients.clone();
            tokio::spawn(async move { H::on_gap(&clients, missed).await });
        };
        let start = |clients, changes| drop(cluster.runtime().spawn(pass_on_presence::<H>(clients, changes)));
        let clients = Clients::of_all_nodes::<H::Codec>(namespace, cluster, name, on_gap, start);
        Ok(Self { engine, runtime, clients, config })
    }

    /// The same clients, with these settings for connections to come.
    pub(crate) fn with_config(&self, config: Arc<ConnectionConfig>) -> Result<Self, ConfigError> {
        self.engine.check(&config)?;
        Ok(Self { config, ..self.clone() })
    }

    /// Checks settings for [`Serve::config`](crate::Serve::config), also against the engine's own.
    ///
    /// # Errors
    /// The first setting that is out of range, by name.
    pub fn check(&self, config: &ConnectionConfig) -> Result<(), ConfigError> {
        self.engine.check(config)
    }

    /// The clients of this hub. A clone of them does not keep the engine alive.
    pub fn clients(&self) -> &Clients<H::OutMessage> {
        &self.clients
    }

    /// A client with a user is about to be served: from now on the hub is told of changes of presence.
    pub(crate) fn observe_presence(&self) {
        self.clients.observe_presence(|clients, changes| {
            tokio::spawn(pass_on_presence::<H>(clients, changes));
        });
    }

    pub(crate) fn config(&self) -> &Arc<ConnectionConfig> {
        &self.config
    }

    /// The runtime that the shards' threads have entered.
    pub(crate) fn runtime(&self) -> Option<runtime::Id> {
        self.runtime
    }

    pub(crate) fn engine(&self) -> &shardcast_engine::Engine {
        &self.engine
    }
}
