//! The crate axum-signal 0.1.3, used as its README shows.
//!
//! Its default configuration, typed JSON in and out. One hub type for each route, because its registry has one list of
//! clients for each type. It counts no losses and keeps no order between clients; the load generator reports both.

use std::io;

use axum::{Router, extract::ws::WebSocketUpgrade, response::Response, routing::any};
use axum_signal::{
    ConnectionRequest, DisconnectRequest, JsonCodec, MessageContext, WsHub, WsHubConfig, serve_hub,
};

use super::{listener::Listener, runtime::Message};

/// A hub for each route: `/echo` if `ECHO`, else `/ws`.
struct Hub<const ECHO: bool>;

impl<const ECHO: bool> WsHub for Hub<ECHO> {
    type Codec = JsonCodec;
    type InMessage = Message;
    type OutMessage = Message;

    async fn on_connect(&self, _: ConnectionRequest) {}
    async fn on_disconnect(&self, _: DisconnectRequest) {}

    async fn on_message(&self, message: Message, context: MessageContext<Message, JsonCodec>) {
        if ECHO {
            context.unicast(message).await;
        } else {
            context.broadcast(message).await;
        }
    }
}

/// Serves until it is killed.
pub(crate) async fn serve(listener: Listener) -> io::Result<()> {
    let router = Router::new().route("/ws", any(upgrade::<false>)).route("/echo", any(upgrade::<true>));
    axum::serve(listener, router).await
}

async fn upgrade<const ECHO: bool>(upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(async |socket| serve_hub(socket, Hub::<ECHO>, &WsHubConfig::default()).await)
}
