//! The peer: the crate axum-signal 0.1.3, used the way its README shows.
//!
//! Its default configuration, typed JSON in and out, one hub type per route because its registry has one list of
//! clients per type. It counts no losses and has no order between clients: the load generator says what that means.

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

use super::peer::{self, Message};

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
    axum::serve(peer::without_delay(listener), router).await
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
