//! The short form: `serve_hub` without an engine in sight.
//!
//! For programs that want no more than a socket, a hub and a config. They share one
//! engine, started with its defaults when the first socket comes, and one set of clients
//! for each hub type. Settings belong to a connection, not to the first who came: each
//! call's config holds for its own connection. Does not know the handshake.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::config::{ConfigError, EngineConfig, WsHubConfig};
use crate::engine::Engine;
use crate::hub::{Hub, WsHub};
use crate::session::Session;
use crate::upgrade::WebSocket;

static ENGINE: OnceLock<Option<Engine>> = OnceLock::new();
static HUBS: Mutex<Option<HashMap<TypeId, Box<dyn Any + Send>>>> = Mutex::new(None);

/// Serves one WebSocket with one hub and ends when the connection and its `on_disconnect` are over.
///
/// All connections served with the same hub type are each other's clients. `config` holds for this connection. The
/// engine behind it has one shard for each allowed CPU; to choose, to have several hubs of one type, to publish from
/// outside or to save the waiting task, use [`Engine`] and [`WebSocketUpgrade::serve`](crate::WebSocketUpgrade::serve).
///
/// A config out of range is logged as an error and the connection closed; check yours with [`WsHubConfig::validate`].
/// Must be called within a tokio runtime.
pub async fn serve_hub<H: WsHub>(socket: WebSocket, hub: H, config: &WsHubConfig) {
    let handle = match hub_of_type::<H>(config) {
        Ok(Some(handle)) => handle,
        Ok(None) => return, // logged when the engine did not start
        Err(error) => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "a connection was refused: bad hub config"
            );
            return;
        }
    };
    let Some(place) = handle.admit(socket.peer_address()) else {
        tracing::warn!("a connection was refused: no place left");
        return;
    };
    let (sender, over) = oneshot::channel();
    let session = Session::maker(&handle, hub, Handle::current(), Some(sender));
    match handle.adopt(socket, session, place).await {
        Ok(()) => drop(over.await), // an error here means that the session was dropped, which is the end, too
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "a connection was not taken over");
        }
    }
}

/// The one hub of this type, made at the first call.
fn hub_of_type<H: WsHub>(config: &WsHubConfig) -> Result<Option<Hub<H>>, ConfigError> {
    let engine = ENGINE.get_or_init(|| match Engine::start(EngineConfig::default()) {
        Ok(engine) => Some(engine),
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "the engine did not start");
            None
        }
    });
    let Some(engine) = engine else { return Ok(None) };
    let mut hubs = HUBS.lock().unwrap_or_else(PoisonError::into_inner);
    let hubs = hubs.get_or_insert_default();
    let known = hubs.get(&TypeId::of::<H>()).and_then(|hub| hub.downcast_ref::<Hub<H>>());
    let hub = match known {
        Some(hub) => hub.reconfigured(config)?,
        None => engine.hub::<H>(config.clone())?,
    };
    // The latest: connections of the same settings share them.
    hubs.insert(TypeId::of::<H>(), Box::new(hub.clone()));
    Ok(Some(hub))
}
