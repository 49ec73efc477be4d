//! The crate axum-signal 0.1.3, used as its README shows.
//!
//! Its default configuration, typed JSON in and out. One hub type for each route, because its registry has one list of
//! clients for each type. It counts no losses and keeps no order between clients; the load generator reports both.

use std::io;

use axum::{
    Router,
    extract::ws::{WebSocket, WebSocketUpgrade},
    response::Response,
    routing::any,
};
use axum_signal::{
    ConnectionRequest, DisconnectRequest, JsonCodec, MessageContext, WsHub, WsHubConfig, serve_hub,
};
use tokio::net::TcpListener;

use super::runtime::{self, Message};

struct FanOut;
struct Echo;

impl WsHub for FanOut {
    type Codec = JsonCodec;
    type InMessage = Message;
    type OutMessage = Message;

    async fn on_connect(&self, _: ConnectionRequest) {}
    async fn on_disconnect(&self, _: DisconnectRequest) {}

    async fn on_message(&self, message: Message, context: MessageContext<Message, JsonCodec>) {
        context.broadcast(message).await;
    }
}

impl WsHub for Echo {
    type Codec = JsonCodec;
    type InMessage = Message;
    type OutMessage = Message;

    async fn on_connect(&self, _: ConnectionRequest) {}
    async fn on_disconnect(&self, _: DisconnectRequest) {}

    async fn on_message(&self, message: Message, context: MessageContext<Message, JsonCodec>) {
        context.unicast(message).await;
    }
}

/// Serves until it is killed.
pub(crate) async fn serve(listener: TcpListener) -> io::Result<()> {
    let router = Router::new().route("/ws", any(fan_out)).route("/echo", any(echo));
    axum::serve(runtime::without_delay(listener), router).await
}

async fn fan_out(upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(|socket| drive(socket, FanOut))
}

async fn echo(upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(|socket| drive(socket, Echo))
}

async fn drive<H: WsHub>(socket: WebSocket, hub: H) {
    serve_hub(socket, hub, &WsHubConfig::default()).await;
}
