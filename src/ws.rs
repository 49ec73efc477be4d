//! A socket of one's own, on the engine: what `axum::extract::ws` has, under the same names.
//!
//! For programs that read and write one connection themselves, in a task, instead of implementing a hub. Change the
//! import, and the program runs on shardcast:
//!
//! ```
//! use axum::{Router, response::Response, routing::any};
//! use shardcast::ws::{Message, WebSocket, WebSocketUpgrade}; // was: axum::extract::ws::{…}
//!
//! async fn connect(ws: WebSocketUpgrade) -> Response {
//!     ws.on_upgrade(echo)
//! }
//!
//! async fn echo(mut socket: WebSocket) {
//!     while let Some(Ok(message)) = socket.recv().await {
//!         if let Message::Text(text) = message
//!             && socket.send(Message::Text(text)).await.is_err()
//!         {
//!             break;
//!         }
//!     }
//! }
//!
//! let app: Router = Router::new().route("/ws", any(connect));
//! ```
//!
//! What is different, and better:
//!
//! - A waiting connection costs about 1.6 KB, its task included, and has no buffer of its own, instead of some 135 KB.
//! - A shard owns the connection, as it does those of hubs: it has an [id](WebSocket::id), counts in
//!   [`Engine::metrics`](crate::Engine::metrics) and under the limits on connections, and ends with 1001 at a
//!   [shutdown](crate::Engine::shutdown).
//! - It can be a client of a hub ([`WebSocketUpgrade::client_of`]): the hub's messages reach it directly from its shard,
//!   and no task forwards them.
//! - A client that reads nothing delays only who sends to it, and is closed after
//!   [`stall_timeout`](crate::WsHubConfig::stall_timeout) (1013).
//! - Dropping a [`WebSocket`] closes the connection with a Close frame (1000; 1011 in a panic) and not without one.
//!
//! Backpressure goes both ways and is bounded. [`recv`](WebSocket::recv) reads ahead at most 16 KiB and 64 messages;
//! another 16 KiB are held by the shard, the rest stays in the kernel, and the client has to wait.
//! [`send`](WebSocket::send) waits while the [outbox](crate::WsHubConfig::outbox_bytes) is full.
//!
//! The engine is the one of [`serve_hub`](crate::serve_hub), started with its defaults, unless
//! [`engine`](WebSocketUpgrade::engine) or [`client_of`](WebSocketUpgrade::client_of) names another.

mod message;
mod socket;
mod upgrade;

pub use self::message::{CloseCode, CloseFrame, Message, Utf8Bytes, close_code};
pub use self::socket::WebSocket;
pub use self::upgrade::{DefaultOnFailedUpgrade, OnFailedUpgrade, WebSocketUpgrade};

/// The rejections of the extractor.
pub mod rejection {
    pub use crate::upgrade::UpgradeRejection as WebSocketUpgradeRejection;
}
