//! How a connection comes to a hub: the handshake is answered, a shard gets the socket.
//!
//! From the upgrade in one step, or with an open WebSocket in hand. Knows the upgrade,
//! hubs and sessions. Does not know frames or groups.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use shardcast_engine::{AdoptError, MakeHandler, Newcomer, Place};
use tokio::runtime::Handle;

use crate::hub::{Hub, WsHub};
use crate::session::Session;
use crate::upgrade::{RawSocket, WebSocket, WebSocketUpgrade};

/// Seconds after which a client that found no place should try again.
const RETRY_AFTER_SECONDS: u16 = 5;

impl WebSocketUpgrade {
    /// Answers the handshake and gives the connection to `hub`, with `instance` to handle it. From then on a shard
    /// owns the socket, and no task is left of it.
    ///
    /// With no place left ([`EngineConfig::max_connections`](crate::EngineConfig), in all or for the peer's address),
    /// or when the engine is stopping, answers 503 with `Retry-After` instead. The address is known to routers that
    /// are served with [`into_make_service_with_connect_info`](axum::Router::into_make_service_with_connect_info).
    #[must_use = "the handshake goes unanswered unless this response is returned"]
    pub fn serve<H: WsHub>(self, hub: &Hub<H>, instance: H) -> Response {
        let Some(place) = hub.admit(self.peer_address()) else {
            let retry = [(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS))];
            let why = "no place for one more connection";
            return (StatusCode::SERVICE_UNAVAILABLE, retry, why).into_response();
        };
        let hub = hub.clone();
        self.on_upgrade(move |socket| async move {
            let handler = Session::maker(&hub, instance, Handle::current(), None);
            if let Err(error) = hub.adopt(socket, handler, place).await {
                tracing::warn!(error = &error as &dyn std::error::Error, "a connection was not taken over");
            }
        })
    }
}

impl<H: WsHub> Hub<H> {
    /// Hands an open WebSocket over to the engine: for sockets that come by way of
    /// [`WebSocketUpgrade::on_upgrade`]. Must be called within a tokio runtime, which the hub's methods use.
    ///
    /// # Errors
    /// No place left, an engine that has ended, a socket that cannot be prepared. The socket is closed then.
    pub async fn serve(&self, socket: WebSocket, instance: H) -> Result<(), ServeError> {
        let place = self.admit(socket.peer_address()).ok_or(ServeError::Full)?;
        self.adopt(socket, Session::maker(self, instance, Handle::current(), None), place).await
    }

    pub(crate) async fn adopt(
        &self,
        socket: WebSocket,
        handler: MakeHandler,
        place: Place,
    ) -> Result<(), ServeError> {
        let parts = socket.into_parts();
        let (received, config) = (parts.leftover, self.config().clone());
        let socket = match parts.socket {
            RawSocket::Tcp(stream) => stream.into(),
            RawSocket::Unix(stream) => stream.into(),
        };
        Ok(self.clients().namespace().adopt(Newcomer { socket, received, handler, config, place }).await?)
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
