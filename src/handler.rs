//! Handlers with `&mut self`, one value for each connection: the API of the `websocket_builder` crate.
//!
//! One task for each connection, over a socket of `ws`; the engine keeps the timeouts. Does not know hubs.
//!
//! For programs written against it: change `websocket_builder` to `shardcast::handler` and `axum::extract::ws` to
//! `shardcast::ws`, and they run on the engine.
//!
//! ```no_run
//! use std::net::SocketAddr;
//! use futures_util::{SinkExt, stream::SplitSink};
//! use shardcast::handler::{DisconnectReason, HandlerFactory, Utf8Bytes, WebSocketHandler, websocket_route};
//! use shardcast::ws::{Message, WebSocket};
//!
//! #[derive(Default)]
//! struct Echo {
//!     sink: Option<SplitSink<WebSocket, Message>>,
//!     count: u64, // its own state, without a mutex
//! }
//!
//! impl WebSocketHandler for Echo {
//!     async fn on_connect(&mut self, _: SocketAddr, sink: SplitSink<WebSocket, Message>) -> anyhow::Result<()> {
//!         self.sink = Some(sink);
//!         Ok(())
//!     }
//!
//!     async fn on_message(&mut self, text: Utf8Bytes) -> anyhow::Result<()> {
//!         self.count += 1;
//!         if let Some(sink) = &mut self.sink {
//!             sink.send(Message::text(format!("{}: {text}", self.count))).await?;
//!         }
//!         Ok(())
//!     }
//!
//!     async fn on_disconnect(&mut self, reason: DisconnectReason) {
//!         println!("disconnected: {reason:?}");
//!     }
//! }
//!
//! struct EchoFactory;
//!
//! impl HandlerFactory for EchoFactory {
//!     type Handler = Echo;
//!
//!     fn create(&self, _: &http::HeaderMap) -> Echo {
//!         Echo::default()
//!     }
//! }
//!
//! # async fn example() -> std::io::Result<()> {
//! let app = websocket_route("/ws", EchoFactory);
//! axum::serve(shardcast::listen("127.0.0.1:3000").await?, app).await
//! # }
//! ```
//!
//! What is different, and better: the limits on connections answer with 503 and `Retry-After` instead of failing after
//! the upgrade; a handler that fails closes its connection with 1011; ends have a reason with a close code; binary
//! messages arrive ([`on_binary`](WebSocketHandler::on_binary)); no timer is set for any connection. For fan-out,
//! groups, users and typed messages, write a [`StatefulHub`](crate::StatefulHub) instead: it has `&mut self`, too.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{FromRequestParts, Request};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use futures_util::StreamExt;
use futures_util::stream::{SplitSink, SplitStream};
use http::HeaderMap;
use shardcast_engine::CloseReason;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::engine::socket_config;
use crate::log_limit::{CONNECTION_LIMIT, HANDLER_FAILED};
use crate::serve::too_many_connections;
use crate::upgrade::connect_info;
use crate::ws::{CloseFrame, Message, WebSocket, close_code};

pub use crate::ws::{Utf8Bytes, WebSocketUpgrade};

/// Of clients whose address is not known.
const UNKNOWN_ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// One connection's handler. Its methods are called one after the other.
///
/// An error of `on_connect`, `on_message` or `on_binary` is logged and ends the connection with 1011; `on_disconnect`
/// is called all the same.
pub trait WebSocketHandler: Send + 'static {
    /// The client is connected. `addr` is its address; `0.0.0.0:0` if it is not known (a Unix socket, or TLS without
    /// connect info). What is sent into `sink` is written in order; it waits while the client is slow.
    fn on_connect(
        &mut self,
        addr: SocketAddr,
        sink: SplitSink<WebSocket, Message>,
    ) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// A text message has arrived.
    fn on_message(&mut self, text: Utf8Bytes) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// A binary message has arrived. By default it is ignored.
    fn on_binary(&mut self, bytes: bytes::Bytes) -> impl Future<Output = anyhow::Result<()>> + Send {
        drop(bytes);
        async { Ok(()) }
    }

    /// The connection has ended. Called exactly once.
    fn on_disconnect(&mut self, reason: DisconnectReason) -> impl Future<Output = ()> + Send;
}

/// Makes the handler of each connection.
pub trait HandlerFactory: Send + Sync + 'static {
    /// What it makes.
    type Handler: WebSocketHandler;

    /// A handler for the connection whose handshake has these headers.
    fn create(&self, headers: &HeaderMap) -> Self::Handler;
}

/// Why a connection has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DisconnectReason {
    /// The client has closed, with what its Close frame said; none if it said nothing.
    ClientClosed(Option<CloseFrame>),
    /// The application has closed, by a Close frame into the sink or through its hub, and the client has not answered.
    ServerClosed,
    /// [`idle_timeout`](ConnectionConfig::idle_timeout) or
    /// [`max_connection_duration`](ConnectionConfig::max_connection_duration) has passed; which, in words.
    Timeout(String),
    /// A method of the handler has failed.
    HandlerFailed(String),
    /// Anything else, in words: a broken connection, a client that breaks the protocol or reads nothing, a shutdown.
    Error(String),
}

/// Settings of the connections of one route.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConnectionConfig {
    /// Connections of this route at a time. Default: none, so that only the engine's limits hold. At the limit the
    /// response is a 503 with `Retry-After`.
    pub max_connections: Option<usize>,
    /// How long a connection may last, whatever happens on it: 10 ms to 1 year; up to a tenth shorter, so that clients
    /// that connected together do not come back together. Default: none. After it the client gets a Close frame (1012).
    pub max_connection_duration: Option<Duration>,
    /// How long nothing may arrive from the client: 10 ms to 1 year. Default: none. Any frame starts the time again, and
    /// no ping is sent that a browser would answer by itself. After it the client gets a Close frame (1001).
    pub idle_timeout: Option<Duration>,
}

impl ConnectionConfig {
    fn settings(&self) -> shardcast_engine::ConnectionConfig {
        shardcast_engine::ConnectionConfig {
            max_connection_duration: self.max_connection_duration,
            idle_timeout: self.idle_timeout,
            ..socket_config()
        }
    }
}

/// A router with one route whose connections `factory` handles, with the default settings.
///
/// The route's state and middlewares are those of the router that it is merged into. Served with
/// `into_make_service_with_connect_info::<SocketAddr>()` it knows its clients' addresses with TLS, too.
pub fn websocket_route<F: HandlerFactory>(path: &str, factory: F) -> Router {
    websocket_route_with_config(path, factory, ConnectionConfig::default())
}

/// [`websocket_route`] with settings. Settings out of range are logged as an error, and clients get a 500 that names the
/// setting.
pub fn websocket_route_with_config<F: HandlerFactory>(
    path: &str,
    factory: F,
    config: ConnectionConfig,
) -> Router {
    let route = Arc::new(Route {
        factory,
        permits: config.max_connections.map(|max| Arc::new(Semaphore::new(max.min(Semaphore::MAX_PERMITS)))),
        settings: Arc::new(config.settings()),
    });
    Router::new().route(path, any(move |request: Request| async move { route.serve(request).await }))
}

/// What all connections of a route share.
struct Route<F> {
    factory: F,
    permits: Option<Arc<Semaphore>>,
    settings: Arc<shardcast_engine::ConnectionConfig>,
}

impl<F: HandlerFactory> Route<F> {
    async fn serve(&self, request: Request) -> Response {
        let (mut parts, _) = request.into_parts();
        let upgrade = match WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
            Ok(upgrade) => upgrade,
            Err(rejection) => return rejection.into_response(),
        };
        let permit = match &self.permits {
            None => None,
            Some(permits) => match permits.clone().try_acquire_owned() {
                Ok(permit) => Some(permit),
                Err(_) => return refuse(),
            },
        };
        let told = connect_info(&parts.extensions);
        let handler = self.factory.create(&parts.headers);
        upgrade.config(self.settings.clone()).on_upgrade_from(move |socket, address| async move {
            let addr = told.or(address).unwrap_or(UNKNOWN_ADDRESS);
            run(socket, addr, handler, Timeouts::default()).await;
            drop(permit);
        })
    }
}

fn refuse() -> Response {
    if let Some(left_out) = CONNECTION_LIMIT.allows() {
        tracing::warn!(
            told = "503",
            left_out,
            "a connection was refused: its route's `max_connections` is reached"
        );
    }
    too_many_connections("connection limit reached")
}

/// Accepts a handshake and handles the connection with `handler`. Its settings are those of the upgrade
/// ([`WebSocketUpgrade::config`]).
pub async fn handle_upgrade<H: WebSocketHandler>(
    ws: WebSocketUpgrade,
    addr: SocketAddr,
    handler: H,
) -> Response {
    ws.on_upgrade(move |socket| run(socket, addr, handler, Timeouts::default()))
}

/// Handles an open WebSocket. Returns when it has ended and `on_disconnect` has returned.
///
/// The timeouts of `config` are kept by timers of this task; those that were given to the upgrade cost nothing. Its
/// `max_connections` has no effect: it belongs to a route.
pub async fn handle_socket<H: WebSocketHandler>(
    socket: WebSocket,
    addr: SocketAddr,
    handler: H,
    config: ConnectionConfig,
) {
    let ConnectionConfig { max_connection_duration, idle_timeout, .. } = config;
    let end = max_connection_duration.and_then(|duration| Instant::now().checked_add(duration));
    run(socket, addr, handler, Timeouts { idle: idle_timeout, end }).await;
}

/// Timeouts that the connection's task keeps.
#[derive(Debug, Default, Clone, Copy)]
struct Timeouts {
    idle: Option<Duration>,
    end: Option<Instant>,
}

async fn run<H: WebSocketHandler>(socket: WebSocket, addr: SocketAddr, mut handler: H, timeouts: Timeouts) {
    let closer = socket.closer();
    let (sink, mut stream) = socket.split();
    let reason = match handle(&mut handler, addr, sink, &mut stream, timeouts).await {
        Ok(reason) => reason,
        Err(error) => {
            if let Some(left_out) = HANDLER_FAILED.allows() {
                let error: &(dyn std::error::Error + Send + Sync) = error.as_ref();
                tracing::error!(
                    error = error as &dyn std::error::Error,
                    id = %closer.id(),
                    handler = std::any::type_name::<H>(),
                    left_out,
                    "a connection ends (1011): its handler has failed"
                );
            }
            DisconnectReason::HandlerFailed(format!("{error:#}"))
        }
    };
    let code = match &reason {
        DisconnectReason::HandlerFailed(_) => Some(close_code::ERROR),
        DisconnectReason::Timeout(text) if text == IDLE => Some(close_code::AWAY),
        DisconnectReason::Timeout(_) => Some(close_code::RESTART),
        _ => None, // it has ended already
    };
    if let Some(code) = code {
        closer.close(code).await;
    }
    handler.on_disconnect(reason).await;
}

/// Passes messages to the handler until the connection ends.
async fn handle<H: WebSocketHandler>(
    handler: &mut H,
    addr: SocketAddr,
    sink: SplitSink<WebSocket, Message>,
    stream: &mut SplitStream<WebSocket>,
    timeouts: Timeouts,
) -> anyhow::Result<DisconnectReason> {
    handler.on_connect(addr, sink).await?;
    loop {
        let received = match next(stream, timeouts).await {
            Ok(received) => received,
            Err(timeout) => return Ok(DisconnectReason::Timeout(timeout.to_owned())),
        };
        match received {
            Some(Ok(Message::Text(text))) => handler.on_message(text).await?,
            Some(Ok(Message::Binary(bytes))) => handler.on_binary(bytes).await?,
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(frame))) => return Ok(DisconnectReason::ClientClosed(frame)),
            Some(Err(error)) => return Ok(reason_of(error)),
            None => return Ok(DisconnectReason::ServerClosed),
        }
    }
}

const IDLE: &str = "nothing arrived within the idle timeout";
const TOO_OLD: &str = "the maximum duration was reached";

/// The next message, or which timeout has passed.
async fn next(
    stream: &mut SplitStream<WebSocket>,
    Timeouts { idle, end }: Timeouts,
) -> Result<Option<Result<Message, axum::Error>>, &'static str> {
    if idle.is_none() && end.is_none() {
        return Ok(stream.next().await);
    }
    let idle_at = idle.and_then(|idle| Instant::now().checked_add(idle));
    let (at, timeout) = match (idle_at, end) {
        (Some(idle_at), Some(end)) if end < idle_at => (end, TOO_OLD),
        (Some(idle_at), _) => (idle_at, IDLE),
        (None, Some(end)) => (end, TOO_OLD),
        (None, None) => return Ok(stream.next().await), // further away than a clock can say
    };
    tokio::time::timeout_at(at, stream.next()).await.map_err(|_| timeout)
}

/// The engine's reason in the error of a socket.
fn reason_of(error: axum::Error) -> DisconnectReason {
    match error.into_inner().downcast_ref::<CloseReason>() {
        Some(CloseReason::IdleTimeout) => DisconnectReason::Timeout(IDLE.to_owned()),
        Some(CloseReason::MaxDuration) => DisconnectReason::Timeout(TOO_OLD.to_owned()),
        Some(reason) => DisconnectReason::Error(reason.to_string()),
        None => DisconnectReason::Error("the connection has ended".to_owned()),
    }
}
