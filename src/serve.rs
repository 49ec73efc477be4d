//! How a connection is served by a hub: the handshake is answered, and a shard gets the socket.
//!
//! From the upgrade in one step, by a response that is built (`Serve`), or from an open WebSocket. A client that no
//! shard takes gets the reason: by an HTTP status before the upgrade, by a Close frame after it. Knows the upgrade,
//! hubs and their handlers. Does not know frames or groups.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher as _, Hasher as _};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use shardcast_engine::{
    AdoptError, CloseCode, ConfigError, ConnectionConfig, ConnectionPermit, Encoding, FirstMessage,
    MakeHandler, Namespace, NewConnection, PublishError, SharedRateLimit, USER_NAME_BYTES_MAX, User,
};
use tokio::runtime::Handle;

use crate::clock::instant_of;
use crate::codec::RawMessage;
use crate::first_message::{self, Accepted, check_of};
use crate::hub::{Hub, Refusal, WsHub};
use crate::hub_handler::{HubHandler, Instance};
use crate::log_limit::{CONNECTION_LIMIT, INVALID_CONFIG, NOT_TAKEN_OVER, UPGRADE_RATE};
use crate::presence::{Metadata, MetadataError};
use crate::upgrade::{RawSocket, WebSocket, WebSocketUpgrade};

/// Seconds after which a refused client should try again. Drawn for each client, so that clients that were refused
/// together do not come back together. A `HubClient` adds up to 2 s, and so comes back within 10 s.
const RETRY_AFTER_SECONDS: std::ops::RangeInclusive<u64> = 2..=8;

/// What a client is told whose address upgrades too often.
const TOO_MANY_UPGRADES: &str = "too many connections from this address in a short time";

impl WebSocketUpgrade {
    /// The response that accepts the handshake and gives the connection to `hub`, with `instance` to handle it: the
    /// hub's value, or for a [`Stateful`](crate::Stateful) hub what is inside. Return it from the route's handler.
    pub fn serve<H: WsHub>(self, hub: &Hub<H>, instance: impl Into<H>) -> Serve<H> {
        Serve::new(self, hub, Instance::Hub(instance.into()), None)
    }

    /// The response that accepts the handshake, and makes the hub from the client's first message: for clients that say
    /// who they are by a message, because they can send nothing with the handshake and a token must not be in the URL.
    ///
    /// Until `check` has accepted it, the connection is in no group, gets nothing, and no hook runs. `check` may take its
    /// time, but the message must arrive within 10 s and have at most 8 KiB
    /// ([`first_message_within`](Serve::first_message_within), [`first_message_bytes`](Serve::first_message_bytes));
    /// otherwise the connection is closed with 1008 and 1009. Then [`on_connected`](WsHub::on_connected) runs. A
    /// [`Refusal`] closes the connection with its code and reason, and no hook runs at all.
    ///
    /// ```
    /// use axum::extract::State;
    /// use shardcast::{Accepted, CloseCode, Hub, RawMessage, Refusal, Serve, WebSocketUpgrade};
    /// # struct Chat { user: String }
    /// # impl shardcast::WsHub for Chat {
    /// #     type Codec = shardcast::RawCodec; type InMessage = String; type OutMessage = String;
    /// #     async fn on_message(&self, _: String, _: shardcast::HubContext<Self>) {}
    /// # }
    /// # async fn verify(token: &str) -> Result<String, &'static str> { Ok(token.to_owned()) }
    ///
    /// async fn connect(ws: WebSocketUpgrade, State(chat): State<Hub<Chat>>) -> Serve<Chat> {
    ///     ws.serve_first_message(&chat, async |first: RawMessage| {
    ///         let RawMessage::Text(token) = first else {
    ///             return Err(Refusal::new(CloseCode::UNSUPPORTED_DATA, "the first message must be a token"));
    ///         };
    ///         let user = verify(&token).await.map_err(|why| Refusal::new(CloseCode::POLICY_VIOLATION, why))?;
    ///         Ok(Accepted::new(Chat { user: user.clone() }).user(user))
    ///     })
    /// }
    /// ```
    pub fn serve_first_message<H, A, C, Fut>(self, hub: &Hub<H>, check: C) -> Serve<H>
    where
        H: WsHub,
        A: Into<Accepted<H>>,
        C: FnOnce(RawMessage) -> Fut + Send + 'static,
        Fut: Future<Output = Result<A, Refusal>> + Send + 'static,
    {
        Serve::new(self, hub, Instance::FirstMessage(check_of(check)), Some(first_message::DEFAULT))
    }
}

/// The response that accepts a handshake and gives the connection to a hub; made by [`WebSocketUpgrade::serve`].
///
/// When it is sent, a shard owns the socket, and no task is left of it.
///
/// At [`max_connections`](crate::EngineConfig::max_connections) or
/// [`max_connections_per_address`](crate::EngineConfig::max_connections_per_address), or when the engine is stopping,
/// it is a 503 instead, with a `Retry-After` of 2 to 8 seconds, drawn for each client. A connection counts from when
/// the response is made, and no longer if it turns out that it was not sent.
///
/// An address that upgrades more often than
/// [`max_upgrades_per_address`](crate::EngineConfig::max_upgrades_per_address) allows gets a 429 instead, with a
/// `Retry-After` that says when it may try again.
///
/// A limit for each address needs the [address](WebSocketUpgrade::peer_address). Without connect info it is known
/// only after the 101, so a client above the limit gets a Close frame (1013) instead of a 503. Behind TLS and HTTP/2
/// it is not known even then, and no client is counted. That is logged once for each engine, as an error.
///
/// ```
/// use axum::extract::State;
/// use shardcast::{Hub, Serve, WebSocketUpgrade, WsHub, WsHubConfig};
/// # struct Chat;
/// # impl WsHub for Chat {
/// #     type Codec = shardcast::RawCodec; type InMessage = String; type OutMessage = String;
/// #     async fn on_message(&self, _: String, _: shardcast::HubContext<Self>) {}
/// # }
///
/// async fn connect(ws: WebSocketUpgrade, State(chat): State<Hub<Chat>>) -> Serve<Chat> {
///     ws.serve(&chat, Chat)
/// }
///
/// /// The same hub, with longer messages.
/// async fn upload(ws: WebSocketUpgrade, State(chat): State<Hub<Chat>>) -> Serve<Chat> {
///     ws.serve(&chat, Chat).config(WsHubConfig { max_message_bytes: 16 << 20, ..WsHubConfig::default() })
/// }
/// ```
#[must_use = "the handshake goes unanswered unless this response is returned"]
pub struct Serve<H: WsHub> {
    upgrade: WebSocketUpgrade,
    hub: Hub<H>,
    instance: Instance<H>,
    config: Option<Arc<ConnectionConfig>>,
    rate_limit: Option<SharedRateLimit>,
    user: Option<Arc<str>>,
    metadata: Option<Result<Metadata, MetadataError>>,
    first_message: Option<FirstMessage>,
    expires_at: Option<SystemTime>,
}

impl<H: WsHub> Serve<H> {
    fn new(
        upgrade: WebSocketUpgrade,
        hub: &Hub<H>,
        instance: Instance<H>,
        first_message: Option<FirstMessage>,
    ) -> Self {
        let (hub, config, user, metadata, expires_at) = (hub.clone(), None, None, None, None);
        Self { upgrade, hub, instance, config, user, metadata, first_message, expires_at, rate_limit: None }
    }

    /// The time for the [first message](WebSocketUpgrade::serve_first_message), from when a shard has the connection.
    /// Default: 10 s. No effect for a connection that is served at once.
    pub fn first_message_within(mut self, within: Duration) -> Self {
        if let Some(first) = &mut self.first_message {
            first.within = within;
        }
        self
    }

    /// The longest [first message](WebSocketUpgrade::serve_first_message), in bytes; at most
    /// [`max_message_bytes`](crate::WsHubConfig::max_message_bytes). Default: 8 KiB. No effect for a connection that is
    /// served at once.
    pub fn first_message_bytes(mut self, max: usize) -> Self {
        if let Some(first) = &mut self.first_message {
            first.max_bytes = max;
        }
        self
    }

    /// When the connection expires, for instance when the client's token does: see [`WsHub::on_expired`], which by
    /// default ends the connection (1008). Default: never. A hub's method changes it by
    /// [`expires_at`](crate::MessageContext::expires_at).
    pub fn expires_at(self, at: SystemTime) -> Self {
        Self { expires_at: Some(at), ..self }
    }

    /// Settings for this connection instead of the hub's: a [`WsHubConfig`](crate::WsHubConfig), or an `Arc` of one
    /// that several connections share.
    ///
    /// It is checked when the response is made. If a field is out of range, that is logged as an error and the client
    /// gets a 500 that names the field; check yours with [`Hub::check`].
    pub fn config(self, config: impl Into<Arc<ConnectionConfig>>) -> Self {
        Self { config: Some(config.into()), ..self }
    }

    /// Also counts this connection's messages in a limit that it shares with other connections, for instance with all
    /// that use the same API key. The application keeps one limit per key. What happens above it is
    /// [`rate_limit.over_limit`](crate::RateLimit::over_limit) of the connection's config. For the connections of one
    /// user, set [`rate_limit.user_messages`](crate::RateLimit::user_messages) instead.
    ///
    /// ```
    /// use axum::extract::State;
    /// use shardcast::{Hub, Rate, Serve, SharedRateLimit, WebSocketUpgrade, WsHub};
    /// # struct Chat;
    /// # impl WsHub for Chat {
    /// #     type Codec = shardcast::RawCodec; type InMessage = String; type OutMessage = String;
    /// #     async fn on_message(&self, _: String, _: shardcast::HubContext<Self>) {}
    /// # }
    ///
    /// /// 20 messages a second from all guests together.
    /// fn guests_limit() -> Result<SharedRateLimit, shardcast::ConfigError> {
    ///     SharedRateLimit::new(Some(Rate::per_second(20).with_burst(40)), None)
    /// }
    ///
    /// async fn connect_guest(
    ///     ws: WebSocketUpgrade,
    ///     State((chat, guests)): State<(Hub<Chat>, SharedRateLimit)>,
    /// ) -> Serve<Chat> {
    ///     ws.serve(&chat, Chat).shared_rate_limit(&guests)
    /// }
    /// ```
    pub fn shared_rate_limit(self, limit: &SharedRateLimit) -> Self {
        Self { rate_limit: Some(limit.clone()), ..self }
    }

    /// The user of this connection: a person or an account, by a name of at most
    /// [`USER_NAME_BYTES_MAX`](crate::USER_NAME_BYTES_MAX) bytes (1,024); a longer one is answered with 400. Connections
    /// of the same name are one user: reached by [`to_user`](crate::Clients::to_user), shown once by
    /// [`presence`](crate::Clients::presence), and limited by
    /// [`max_connections_per_user`](crate::WsHubConfig::max_connections_per_user).
    ///
    /// The name is believed: take it from a token or a session that you have checked, not from what the client says.
    ///
    /// ```
    /// # use axum::extract::State;
    /// # use shardcast::{Hub, Serve, WebSocketUpgrade, WsHub};
    /// # struct Chat;
    /// # impl WsHub for Chat {
    /// #     type Codec = shardcast::RawCodec; type InMessage = String; type OutMessage = String;
    /// #     async fn on_message(&self, _: String, _: shardcast::HubContext<Self>) {}
    /// # }
    /// # #[derive(serde::Serialize)]
    /// # struct Profile { picture: &'static str }
    /// # struct Session { user: String }
    /// # impl<S: Sync> axum::extract::FromRequestParts<S> for Session {
    /// #     type Rejection = ();
    /// #     async fn from_request_parts(_: &mut http::request::Parts, _: &S) -> Result<Self, ()> { Err(()) }
    /// # }
    /// async fn connect(ws: WebSocketUpgrade, session: Session, State(chat): State<Hub<Chat>>) -> Serve<Chat> {
    ///     ws.serve(&chat, Chat).user(session.user).metadata(&Profile { picture: "ada.png" })
    /// }
    /// ```
    pub fn user(self, name: impl Into<Arc<str>>) -> Self {
        Self { user: Some(name.into()), ..self }
    }

    /// What presence shows of the connection's user besides the name: any value that serde can serialize, at most
    /// [`METADATA_BYTES_MAX`](crate::METADATA_BYTES_MAX) bytes of JSON (16 KiB); otherwise that is logged as an error and
    /// the client gets a 500. Without a [user](Self::user) it is not used. A hub's method changes it by
    /// [`set_metadata`](crate::MessageContext::set_metadata).
    pub fn metadata<T: serde::Serialize + ?Sized>(self, metadata: &T) -> Self {
        Self { metadata: Some(Metadata::new(metadata)), ..self }
    }
}

impl<H: WsHub> fmt::Debug for Serve<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serve").field("upgrade", &self.upgrade).finish_non_exhaustive()
    }
}

impl<H: WsHub> IntoResponse for Serve<H> {
    fn into_response(self) -> Response {
        let Self { upgrade, hub, instance, config, user, metadata, first_message, expires_at, rate_limit } =
            self;
        if user.as_ref().is_some_and(|user| user.len() > USER_NAME_BYTES_MAX) {
            return (StatusCode::BAD_REQUEST, AdoptError::UserNameTooLong.to_string()).into_response();
        }
        let metadata = match metadata.transpose() {
            Ok(metadata) => metadata,
            Err(error) => {
                if let Some(left_out) = INVALID_CONFIG.allows() {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(
                        error,
                        left_out,
                        "a connection was refused (500): its metadata cannot be kept"
                    );
                }
                return (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response();
            }
        };
        let hub = match config.map_or_else(|| Ok(hub.clone()), |config| hub.with_config(config)) {
            Ok(hub) => hub,
            Err(error) => return refuse_config(&error),
        };
        let permit = match hub.host().admit(&upgrade) {
            Ok(permit) => permit,
            Err(response) => return *response,
        };
        upgrade.on_upgrade(move |socket| async move {
            let mut permit = permit;
            let Ok(socket) = hub.host().count_late(&mut permit, socket) else { return };
            let handler = HubHandler::maker(&hub, instance, Handle::current(), None, user.clone());
            let user = user.map(|user| match metadata {
                Some(metadata) => User::new(user).with_metadata(metadata.into_bytes()),
                None => User::new(user),
            });
            let expires_at = expires_at.map(|at| instant_of(at, hub.clients().namespace().now()));
            let arrival = Arrival { user, first_message, expires_at, rate_limit };
            if let Err(error) = hub.adopt(socket, handler, permit, arrival).await {
                error.log();
            }
        })
    }
}

impl<H: WsHub> Hub<H> {
    /// Gives an open WebSocket to the engine: for sockets from [`WebSocketUpgrade::on_upgrade`]. Must be called
    /// within a tokio runtime, which the hub's methods use.
    ///
    /// # Errors
    /// A limit on connections (the client gets a Close frame with 1013), an engine that is stopping (1001), a socket
    /// that cannot be prepared (1011).
    pub async fn serve(&self, socket: WebSocket, instance: impl Into<H>) -> Result<(), ServeError> {
        self.serve_open(socket, instance.into(), None).await
    }

    /// Like [`serve`](Self::serve), for a client of this [user](Serve::user).
    ///
    /// # Errors
    /// As for `serve`; also a name that is too long and, where the oldest connections stay, a user who has as many as
    /// [`max_connections_per_user`](crate::WsHubConfig::max_connections_per_user) (1008).
    pub async fn serve_as(
        &self,
        socket: WebSocket,
        instance: impl Into<H>,
        user: impl Into<Arc<str>>,
    ) -> Result<(), ServeError> {
        self.serve_open(socket, instance.into(), Some(user.into())).await
    }

    async fn serve_open(
        &self,
        socket: WebSocket,
        instance: H,
        user: Option<Arc<str>>,
    ) -> Result<(), ServeError> {
        if let Some(Err(_)) = socket.peer_address().map(|address| self.engine().count_upgrade(address)) {
            log_upgrade_rate("1013");
            ServeError::TooManyUpgrades.turn_away(socket);
            return Err(ServeError::TooManyUpgrades);
        }
        let Some(permit) = self.host().engine.admit(socket.peer_address()) else {
            return Err(self.host().refuse(socket));
        };
        if permit.lacks_address() && permit.is_first_to_lack_address() {
            tracing::error!(
                "connections or upgrades are limited for each address, but that of a client is not known: behind TLS and HTTP/2 \
                 it needs `app.into_make_service_with_connect_info::<SocketAddr>()`. Such clients are not counted"
            );
        }
        let instance = Instance::Hub(instance);
        let handler = HubHandler::maker(self, instance, Handle::current(), None, user.clone());
        let arrival = Arrival { user: user.map(User::new), ..Arrival::default() };
        self.adopt(socket, handler, permit, arrival).await
    }

    async fn adopt(
        &self,
        socket: WebSocket,
        handler: MakeHandler,
        permit: ConnectionPermit,
        arrival: Arrival,
    ) -> Result<(), ServeError> {
        // A first message may tell a user, too.
        if arrival.user.is_some() || arrival.first_message.is_some() {
            self.observe_presence();
        }
        self.host().adopt_as(socket, handler, permit, arrival).await
    }

    /// Where this hub's connections go.
    pub(crate) fn host(&self) -> Host<'_> {
        Host { engine: self.engine(), namespace: self.clients().namespace(), config: self.config() }
    }
}

/// Where connections go: an engine, the connections that they can be addressed with, and their settings.
#[derive(Clone, Copy)]
pub(crate) struct Host<'a> {
    pub(crate) engine: &'a shardcast_engine::Engine,
    pub(crate) namespace: &'a Namespace,
    pub(crate) config: &'a Arc<ConnectionConfig>,
}

impl Host<'_> {
    /// A permit for one more connection, or the response that tells the client why there is none.
    pub(crate) fn admit(&self, upgrade: &WebSocketUpgrade) -> Result<ConnectionPermit, Box<Response>> {
        if let Some(Err(refused)) = upgrade.peer_address().map(|address| self.engine.count_upgrade(address)) {
            log_upgrade_rate("429");
            let seconds = refused.retry_after.as_secs_f64().ceil() as u64;
            let retry = [(header::RETRY_AFTER, HeaderValue::from(seconds))];
            return Err(Box::new((StatusCode::TOO_MANY_REQUESTS, retry, TOO_MANY_UPGRADES).into_response()));
        }
        let Some(permit) = self.engine.admit(upgrade.peer_address()) else {
            self.log_connection_limit("503");
            return Err(Box::new(too_many_connections(self.refusal().farewell().1)));
        };
        if permit.lacks_address() && permit.is_first_to_lack_address() {
            tracing::error!(
                "connections or upgrades are limited for each address, but this router does not tell where its clients \
                 are: serve it \
                 with `axum::serve(listener, app.into_make_service_with_connect_info::<SocketAddr>())`, or give \
                 each `WebSocketUpgrade` its `set_peer_address`. Until then the limit holds only for plain TCP, after the \
                 handshake (Close frame 1013 instead of 503 or 429), and not at all for TLS and HTTP/2"
            );
        }
        Ok(permit)
    }

    /// Counts the connection for its address, if that is known only now. Above a limit the client is turned away.
    pub(crate) fn count_late(
        &self,
        permit: &mut ConnectionPermit,
        socket: WebSocket,
    ) -> Result<WebSocket, ServeError> {
        if permit.lacks_address()
            && let Some(address) = socket.peer_address()
        {
            if self.engine.count_upgrade(address).is_err() {
                log_upgrade_rate("1013");
                ServeError::TooManyUpgrades.turn_away(socket);
                return Err(ServeError::TooManyUpgrades);
            }
            if !permit.count_for(address) {
                self.log_connection_limit("1013");
                ServeError::Full.turn_away(socket);
                return Err(ServeError::Full);
            }
        }
        Ok(socket)
    }

    /// Why there is no permit for one more connection.
    fn refusal(&self) -> ServeError {
        if self.engine.is_stopping() { ServeError::Stopping } else { ServeError::Full }
    }

    /// Turns a client away for which there is no permit.
    pub(crate) fn refuse(&self, socket: WebSocket) -> ServeError {
        let refusal = self.refusal();
        self.log_connection_limit(if self.engine.is_stopping() { "1001" } else { "1013" });
        refusal.turn_away(socket);
        refusal
    }

    /// Logs that a client was refused, with a status or a close code.
    fn log_connection_limit(&self, told: &'static str) {
        if self.engine.is_stopping() {
            tracing::debug!(told, "a connection was refused: the engine is stopping");
        } else if let Some(left_out) = CONNECTION_LIMIT.allows() {
            tracing::warn!(
                told,
                left_out,
                "a connection was refused: `max_connections` or `max_connections_per_address` is reached"
            );
        }
    }

    pub(crate) async fn adopt(
        &self,
        socket: WebSocket,
        handler: MakeHandler,
        permit: ConnectionPermit,
        user: Option<Arc<str>>,
    ) -> Result<(), ServeError> {
        let arrival = Arrival { user: user.map(User::new), ..Arrival::default() };
        self.adopt_as(socket, handler, permit, arrival).await
    }

    /// The same for a connection of which more is known, or less.
    async fn adopt_as(
        &self,
        socket: WebSocket,
        handler: MakeHandler,
        permit: ConnectionPermit,
        arrival: Arrival,
    ) -> Result<(), ServeError> {
        if self.engine.is_stopping() {
            ServeError::Stopping.turn_away(socket);
            return Err(ServeError::Stopping);
        }
        let parts = socket.into_parts();
        // The engine drops a socket that it does not adopt. Without a descriptor for this copy the client gets no
        // Close frame.
        let mut spare = Spare(parts.socket.duplicate().ok().flatten());
        let config = self.config.clone();
        let (socket, received) = parts.socket.into_socket(parts.read_ahead).map_err(AdoptError::from)?;
        let encoding = Encoding::PLAIN;
        let Arrival { user, first_message, expires_at, rate_limit } = arrival;
        let connection = NewConnection {
            socket,
            received,
            handler,
            config,
            encoding,
            permit,
            user,
            first_message,
            expires_at,
            rate_limit,
        };
        match self.namespace.adopt_without_wake(connection).await {
            Ok(wake) => {
                spare.0 = None;
                // The other connections of this tick of the runtime are adopted first, so that they share one wake.
                tokio::task::yield_now().await;
                drop(wake);
                Ok(())
            }
            Err(error) => {
                let error = ServeError::from(error);
                if let Some(spare) = spare.0.take() {
                    let (code, reason) = error.farewell();
                    spare.turn_away(code, reason);
                }
                Err(error)
            }
        }
    }
}

/// What is known of a client when its connection is given to a shard.
#[derive(Default)]
struct Arrival {
    user: Option<User>,
    /// Set if its first message must say who it is.
    first_message: Option<FirstMessage>,
    expires_at: Option<Instant>,
    rate_limit: Option<SharedRateLimit>,
}

/// A second descriptor of a socket that the engine may not adopt. Dropped with it, as a timeout around [`Hub::serve`] does
/// while the engine has no room, the client gets a Close frame as for any WebSocket that is dropped (1011).
struct Spare(Option<RawSocket>);

impl Drop for Spare {
    fn drop(&mut self) {
        if let Some(socket) = self.0.take() {
            socket.turn_away(CloseCode::INTERNAL_ERROR, "the connection was not served");
        }
    }
}

/// A WebSocket could not be served by a hub; it was closed, with a Close frame.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The engine has `max_connections` connections, or `max_connections_per_address` from there. The client got 1013.
    #[error("a limit on connections is reached: try again later, or raise `max_connections`")]
    Full,
    /// The client's address opens connections more often than `max_upgrades_per_address` allows. The client got 1013.
    #[error("the client's address opens connections too often: it may try again later")]
    TooManyUpgrades,
    /// The engine is stopping. The client got 1001.
    #[error("the engine is stopping")]
    Stopping,
    /// The engine did not adopt it. The client got 1013 if too many publishers wait already, 1001 if the engine has
    /// ended, 1008 if its user has too many connections or too long a name, 1011 otherwise.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
}

impl ServeError {
    /// The close code and reason that the client gets.
    fn farewell(&self) -> (CloseCode, &'static str) {
        match self {
            Self::Full => (CloseCode::TRY_AGAIN_LATER, "connection limit reached"),
            Self::TooManyUpgrades => (CloseCode::TRY_AGAIN_LATER, TOO_MANY_UPGRADES),
            Self::Stopping => AdoptError::Refused(PublishError::Closed).farewell(),
            Self::Adopt(error) => error.farewell(),
        }
    }

    pub(crate) fn turn_away(&self, socket: WebSocket) {
        let (code, reason) = self.farewell();
        socket.turn_away(code, reason);
    }

    pub(crate) fn log(&self) {
        if matches!(self, Self::Stopping) {
            tracing::debug!("a connection came while the engine was stopping (1001)");
        } else if matches!(self, Self::Adopt(AdoptError::TooManyConnectionsOfUser)) {
            tracing::debug!("a connection was refused (1008): its user has too many");
        } else if let Some(left_out) = NOT_TAKEN_OVER.allows() {
            let error = self as &dyn std::error::Error;
            tracing::warn!(error, left_out, "a connection was not taken over");
        }
    }
}

/// The response for a client that should try again later.
pub(crate) fn too_many_connections(why: &'static str) -> Response {
    let retry = [(header::RETRY_AFTER, HeaderValue::from(retry_after_seconds()))];
    (StatusCode::SERVICE_UNAVAILABLE, retry, why).into_response()
}

/// The response for a connection whose settings are out of range.
pub(crate) fn refuse_config(error: &ConfigError) -> Response {
    if let Some(left_out) = INVALID_CONFIG.allows() {
        tracing::error!(
            error = error as &dyn std::error::Error,
            left_out,
            "a connection was refused (500): its config is out of range"
        );
    }
    (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response()
}

/// Logs that a client was refused because its address upgrades too often, with a status or a close code.
fn log_upgrade_rate(told: &'static str) {
    if let Some(left_out) = UPGRADE_RATE.allows() {
        tracing::warn!(
            told,
            left_out,
            "a connection was refused: its address exceeds `max_upgrades_per_address`"
        );
    }
}

/// Each hasher has random keys, which suffices to spread clients.
fn retry_after_seconds() -> u64 {
    let (first, last) = (*RETRY_AFTER_SECONDS.start(), *RETRY_AFTER_SECONDS.end());
    first + RandomState::new().build_hasher().finish() % (last - first + 1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn those_who_are_refused_together_do_not_come_back_together() {
        let drawn: BTreeSet<u64> = (0..1000).map(|_| retry_after_seconds()).collect();
        assert_eq!(drawn, RETRY_AFTER_SECONDS.collect(), "each second within 1000 draws, and no other");
    }
}
