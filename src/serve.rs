//! How a connection is served by a hub: the handshake is answered, and a shard gets the socket.
//!
//! From the upgrade in one step, by a response that is built (`Serve`), or from an open WebSocket. A client that no
//! shard takes gets the reason: by an HTTP status before the upgrade, by a Close frame after it. Knows the upgrade,
//! hubs and their handlers. Does not know frames or groups.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher as _, Hasher as _};
use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use shardcast_engine::{
    AdoptError, CloseCode, ConfigError, ConnectionConfig, ConnectionPermit, Encoding, MakeHandler, Namespace,
    NewConnection, PublishError, SharedRateLimit,
};
use tokio::runtime::Handle;

use crate::hub::{Hub, WsHub};
use crate::hub_handler::HubHandler;
use crate::log_limit::{CONNECTION_LIMIT, INVALID_CONFIG, NOT_TAKEN_OVER, UPGRADE_RATE};
use crate::upgrade::{RawSocket, WebSocket, WebSocketUpgrade};

/// Seconds after which a refused client should try again. Drawn for each client, so that clients that were refused
/// together do not come back together.
const RETRY_AFTER_SECONDS: std::ops::RangeInclusive<u64> = 2..=10;

/// What a client is told whose address upgrades too often.
const TOO_MANY_UPGRADES: &str = "too many connections from this address in a short time";

impl WebSocketUpgrade {
    /// The response that accepts the handshake and gives the connection to `hub`, with `instance` to handle it: the
    /// hub's value, or for a [`Stateful`](crate::Stateful) hub what is inside. Return it from the route's handler.
    pub fn serve<H: WsHub>(self, hub: &Hub<H>, instance: impl Into<H>) -> Serve<H> {
        Serve { upgrade: self, hub: hub.clone(), instance: instance.into(), config: None, rate_limit: None }
    }
}

/// The response that accepts a handshake and gives the connection to a hub; made by [`WebSocketUpgrade::serve`].
///
/// When it is sent, a shard owns the socket, and no task is left of it.
///
/// At [`max_connections`](crate::EngineConfig::max_connections) or
/// [`max_connections_per_address`](crate::EngineConfig::max_connections_per_address), or when the engine is stopping,
/// it is a 503 instead, with a `Retry-After` of 2 to 10 seconds, drawn for each client. A connection counts from when
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
    instance: H,
    config: Option<Arc<ConnectionConfig>>,
    rate_limit: Option<SharedRateLimit>,
}

impl<H: WsHub> Serve<H> {
    /// Settings for this connection instead of the hub's: a [`WsHubConfig`](crate::WsHubConfig), or an `Arc` of one
    /// that several connections share.
    ///
    /// It is checked when the response is made. If a field is out of range, that is logged as an error and the client
    /// gets a 500 that names the field; check yours with [`Hub::check`].
    pub fn config(self, config: impl Into<Arc<ConnectionConfig>>) -> Self {
        Self { config: Some(config.into()), ..self }
    }

    /// Also counts this connection's messages in a limit that it shares with others: those of the same user, for
    /// instance. The application keeps one for each user, as long as the user is connected. What happens above it is
    /// [`rate_limit.over_limit`](crate::RateLimit::over_limit) of the connection's config.
    ///
    /// ```
    /// # use std::collections::HashMap;
    /// # use std::sync::Arc;
    /// use axum::extract::State;
    /// use shardcast::{Hub, Rate, Serve, SharedRateLimit, WebSocketUpgrade, WsHub};
    /// # struct Chat;
    /// # impl WsHub for Chat {
    /// #     type Codec = shardcast::RawCodec; type InMessage = String; type OutMessage = String;
    /// #     async fn on_message(&self, _: String, _: shardcast::HubContext<Self>) {}
    /// # }
    /// # #[derive(Clone)]
    /// # struct Users(Arc<HashMap<String, SharedRateLimit>>);
    /// # fn user() -> String { String::new() }
    ///
    /// /// 20 messages a second from all connections of a user together.
    /// fn new_limit() -> Result<SharedRateLimit, shardcast::ConfigError> {
    ///     SharedRateLimit::new(Some(Rate::per_second(20).with_burst(40)), None)
    /// }
    ///
    /// async fn connect(
    ///     ws: WebSocketUpgrade,
    ///     State((chat, users)): State<(Hub<Chat>, Users)>,
    /// ) -> Serve<Chat> {
    ///     ws.serve(&chat, Chat).shared_rate_limit(&users.0[&user()])
    /// }
    /// ```
    pub fn shared_rate_limit(self, limit: &SharedRateLimit) -> Self {
        Self { rate_limit: Some(limit.clone()), ..self }
    }
}

impl<H: WsHub> fmt::Debug for Serve<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serve").field("upgrade", &self.upgrade).finish_non_exhaustive()
    }
}

impl<H: WsHub> IntoResponse for Serve<H> {
    fn into_response(self) -> Response {
        let Self { upgrade, hub, instance, config, rate_limit } = self;
        let hub = match config.map_or_else(|| Ok(hub.clone()), |config| hub.with_config(config)) {
            Ok(hub) => hub,
            Err(error) => return refuse_config(&error),
        };
        let permit = match hub.host().admit(&upgrade) {
            Ok(permit) => permit,
            Err(response) => return response,
        };
        upgrade.on_upgrade(move |socket| async move {
            let mut permit = permit;
            let Ok(socket) = hub.host().count_late(&mut permit, socket) else { return };
            let handler = HubHandler::maker(&hub, instance, Handle::current(), None);
            if let Err(error) = hub.host().adopt(socket, handler, permit, rate_limit).await {
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
        let instance = instance.into();
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
        let handler = HubHandler::maker(self, instance, Handle::current(), None);
        self.host().adopt(socket, handler, permit, None).await
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
    pub(crate) fn admit(&self, upgrade: &WebSocketUpgrade) -> Result<ConnectionPermit, Response> {
        if let Some(Err(refused)) = upgrade.peer_address().map(|address| self.engine.count_upgrade(address)) {
            log_upgrade_rate("429");
            let seconds = refused.retry_after.as_secs_f64().ceil() as u64;
            let retry = [(header::RETRY_AFTER, HeaderValue::from(seconds))];
            return Err((StatusCode::TOO_MANY_REQUESTS, retry, TOO_MANY_UPGRADES).into_response());
        }
        let Some(permit) = self.engine.admit(upgrade.peer_address()) else {
            self.log_connection_limit("503");
            let retry = [(header::RETRY_AFTER, HeaderValue::from(retry_after_seconds()))];
            let (_, why) = self.refusal().farewell();
            return Err((StatusCode::SERVICE_UNAVAILABLE, retry, why).into_response());
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
        rate_limit: Option<SharedRateLimit>,
    ) -> Result<(), ServeError> {
        if self.engine.is_stopping() {
            ServeError::Stopping.turn_away(socket);
            return Err(ServeError::Stopping);
        }
        let parts = socket.into_parts();
        // The engine drops a socket that it does not adopt. Without a descriptor for this copy the client gets no
        // Close frame.
        let mut spare = Spare(parts.socket.duplicate().ok());
        let (received, config) = (parts.read_ahead, self.config.clone());
        let socket = match parts.socket {
            RawSocket::Tcp(stream) => stream.into(),
            RawSocket::Unix(stream) => stream.into(),
            RawSocket::Bridge(stream) => shardcast_engine::Socket::bridge(stream),
        };
        let encoding = Encoding::PLAIN;
        let connection = NewConnection { socket, received, handler, config, encoding, permit, rate_limit };
        match self.namespace.adopt(connection).await {
            Ok(()) => {
                spare.0 = None;
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
    /// ended, 1011 otherwise.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
}

impl ServeError {
    /// The close code and reason that the client gets.
    fn farewell(&self) -> (CloseCode, &'static str) {
        match self {
            Self::Full => (CloseCode::TRY_AGAIN_LATER, "connection limit reached"),
            Self::TooManyUpgrades => (CloseCode::TRY_AGAIN_LATER, TOO_MANY_UPGRADES),
            Self::Adopt(AdoptError::Refused(PublishError::Overloaded)) => {
                (CloseCode::TRY_AGAIN_LATER, "the server is overloaded")
            }
            Self::Stopping | Self::Adopt(AdoptError::Refused(PublishError::Closed)) => {
                (CloseCode::GOING_AWAY, "the server is stopping")
            }
            Self::Adopt(_) => (CloseCode::INTERNAL_ERROR, "the connection could not be taken over"),
        }
    }

    pub(crate) fn turn_away(&self, socket: WebSocket) {
        let (code, reason) = self.farewell();
        socket.turn_away(code, reason);
    }

    pub(crate) fn log(&self) {
        if matches!(self, Self::Stopping) {
            tracing::debug!("a connection came while the engine was stopping (1001)");
        } else if let Some(left_out) = NOT_TAKEN_OVER.allows() {
            let error = self as &dyn std::error::Error;
            tracing::warn!(error, left_out, "a connection was not taken over");
        }
    }
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
