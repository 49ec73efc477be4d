//! The short form: `serve_hub`, for programs that name no engine.
//!
//! They share one engine, started with its defaults when the first socket is served, and one set of clients for each
//! hub type. Settings belong to a connection: each call's config holds for its own, and not that of the first call
//! for all. Does not know the handshake.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use shardcast_engine::{CloseCode, ConfigError, ConnectionConfig};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::default_engine::default_engine;
use crate::hub::{Hub, WsHub};
use crate::hub_handler::{HubHandler, Instance};
use crate::log_limit::INVALID_CONFIG;
use crate::upgrade::WebSocket;

static HUBS: Mutex<Option<HashMap<TypeId, Box<dyn Any + Send>>>> = Mutex::new(None);

/// Serves one WebSocket with one hub, and returns when the connection has ended and its `on_disconnected` has returned.
///
/// All connections served with the same hub type are each other's clients. `config` applies to this connection. The
/// engine that serves them has one shard for each allowed CPU. To choose the number, to have several hubs of one
/// type, to publish from elsewhere or to save the waiting task, use [`Engine`](crate::Engine) and
/// [`WebSocketUpgrade::serve`](crate::WebSocketUpgrade::serve).
///
/// A config out of range is logged as an error and the connection closed (1011); check yours with
/// [`WsHubConfig::validate`](crate::WsHubConfig::validate). Above a limit on connections it is closed with 1013.
/// Must be called within a tokio runtime.
pub async fn serve_hub<H: WsHub>(socket: WebSocket, hub: H, config: &ConnectionConfig) {
    let handle = match hub_of_type::<H>(config) {
        Ok(Some(handle)) => handle,
        Ok(None) => {
            // Logged when the engine did not start.
            socket.turn_away(CloseCode::INTERNAL_ERROR, "the server could not start");
            return;
        }
        Err(error) => {
            if let Some(left_out) = INVALID_CONFIG.allows() {
                let error = &error as &dyn std::error::Error;
                tracing::error!(
                    error,
                    left_out,
                    "a connection was refused (1011): its config is out of range"
                );
            }
            socket.turn_away(CloseCode::INTERNAL_ERROR, "the server is not set up right");
            return;
        }
    };
    let host = handle.host();
    let Some(permit) = host.engine.admit(socket.peer_address()) else {
        host.refuse(socket);
        return;
    };
    let (sender, done) = oneshot::channel();
    let handler = HubHandler::maker(&handle, Instance::Hub(hub), Handle::current(), Some(sender), None);
    match host.adopt(socket, handler, permit, None).await {
        Ok(()) => drop(done.await), // an error means that the handler was dropped, which is the end, too
        Err(error) => error.log(),
    }
}

/// The one hub of this type, made at the first call.
fn hub_of_type<H: WsHub>(config: &ConnectionConfig) -> Result<Option<Hub<H>>, ConfigError> {
    let Some(engine) = default_engine() else { return Ok(None) };
    let mut hubs = HUBS.lock().unwrap_or_else(PoisonError::into_inner);
    let hubs = hubs.get_or_insert_default();
    let known = hubs.get(&TypeId::of::<H>()).and_then(|hub| hub.downcast_ref::<Hub<H>>());
    let hub = match known {
        Some(hub) if **hub.config() == *config => return Ok(Some(hub.clone())),
        Some(hub) => hub.with_config(Arc::new(config.clone()))?,
        None => engine.hub::<H>(config.clone())?,
    };
    // The latest, because connections with the same settings share them.
    hubs.insert(TypeId::of::<H>(), Box::new(hub.clone()));
    Ok(Some(hub))
}
